"""Prints text on a terminal so that nothing in it acts as a command: names come from strangers."""

from typing import Any

from rich.console import Console
from rich.text import Text

from tucker_cam.text import printable


class PlainConsole(Console):
    """A console that prints every text and every table cell as it is, without interpreting ``[red]`` or ``:cat:``.

    Control characters become escapes; Rich lets most of them through.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text for Rich to print, with control characters as escapes; Rich calls this for every string."""
        return super().render_str(printable(text), **options)
