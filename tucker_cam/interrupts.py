"""Lets the system end the program if imports are interrupted, because half-imported modules fail oddly."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130


@contextmanager
def importing() -> Iterator[None]:
    """End the program at once if it is interrupted in this block, which must not write any files."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
