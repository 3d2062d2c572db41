"""Text in, what a terminal shows of it out: names come from strangers, so nothing in a text is a command to it."""

from typing import Any

from rich.console import Console
from rich.text import Text

from tucker_cam.text import printable


class PlainConsole(Console):
    """A console that prints each text and each cell of a table as it is: ``[red]`` and ``:cat:`` stay as they stand.

    Control characters become escapes; Rich lets most of them through.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text as Rich prints it, wherever it stands; Rich calls this for every string."""
        return super().render_str(printable(text), **options)
