"""A line for a user in, what the terminal shows of it out."""

from __future__ import annotations

import typer

from tucker_cam.text import printable


def say(text: str, *, error: bool = False) -> None:
    """Print a line; nothing in it is a command to the terminal."""
    typer.echo(printable(text), err=error)
