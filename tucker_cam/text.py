"""Text from strangers in, text that a terminal, a page or one line of an answer can show out."""

import re
import sys

# Also what turns the direction of writing around.
_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"


def printable(text: str) -> str:
    """Return a text as any terminal can show it: control characters, and bytes that are no UTF-8, become escapes."""
    shown = text.encode(errors="backslashreplace").decode()
    return re.sub(_CONTROL, lambda control: f"\\x{ord(control[0]):02x}", shown)


def say(text: str, *, error: bool = False) -> None:
    """Print a line; nothing in it is a command to the terminal."""
    print(printable(text), file=sys.stderr if error else sys.stdout)


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def kind_and_line(error: BaseException) -> str:
    """Return what kind of error it is, and its first line: of strangers' code, whose messages need both."""
    return f"{type(error).__name__}: {one_line(error)}"


def counted(pictures: int) -> str:
    """Return a number of pictures in words."""
    return "1 picture" if pictures == 1 else f"{pictures} pictures"
