"""Makes text from strangers safe to show on a terminal, on a page or in a one-line message."""

import re
import sys

# Also the characters that reverse the direction of writing.
_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"


def printable(text: str) -> str:
    """Return a text that any terminal can show: control characters, and bytes that are not UTF-8, become escapes."""
    shown = text.encode(errors="backslashreplace").decode()
    return re.sub(_CONTROL, lambda control: f"\\x{ord(control[0]):02x}", shown)


def say(text: str, *, error: bool = False) -> None:
    """Print a line in which nothing can act as a command to the terminal."""
    print(printable(text), file=sys.stderr if error else sys.stdout)


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def kind_and_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message; messages from foreign code need both."""
    return f"{type(error).__name__}: {one_line(error)}"


def counted(pictures: int) -> str:
    """Return a number of pictures with its noun, in the singular or plural."""
    return "1 picture" if pictures == 1 else f"{pictures} pictures"
