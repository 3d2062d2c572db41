"""How many pictures are done, how fast it goes and how long it will take: a bar, or where nobody watches a line.

Rich prints its bar into a file once, at the end; a run of hours would say nothing before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from tucker_cam.console import PlainConsole
from tucker_cam.text import printable

SECONDS_BETWEEN_LINES = 30


class _PicturesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("- pictures/s" if speed is None else f"{speed:.3g} pictures/s")


@contextmanager
def progress(title: str, total: int, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many more pictures are done.

    Args:
        title: what is done to them.
        total: how many there are.
        clock: gives the time in seconds.
    """
    console = PlainConsole(stderr=True)
    if not console.is_terminal:
        yield _Lines(title, total, clock).advance
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _PicturesPerSecond(),
        TextColumn("time left"),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


class _Lines:
    def __init__(self, title: str, total: int, clock: Callable[[], float]) -> None:
        self.title, self.total, self.clock = title, total, clock
        self.done, self.start = 0, clock()
        self.printed = self.start

    def advance(self, done: int) -> None:
        self.done += done
        now = self.clock()
        if now - self.printed < SECONDS_BETWEEN_LINES or self.done >= self.total:
            return
        self.printed = now
        each = (now - self.start) / self.done
        left = timedelta(seconds=round(each * (self.total - self.done)))
        line = f"{self.title}: {self.done} of {self.total}, {1 / each:.3g} pictures/s, time left {left}"
        print(printable(line), file=sys.stderr)
