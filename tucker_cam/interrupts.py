"""Ends the program, with one word and an exit code, if imports are interrupted: half-imported modules fail oddly."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

INTERRUPTED = 130


@contextmanager
def importing() -> Iterator[None]:
    """End the program at once if it is interrupted in this block, which must not write any files."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(*_: object) -> NoReturn:
    os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)
