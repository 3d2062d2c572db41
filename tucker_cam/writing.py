"""Writes files that are either complete or absent, and lets only one run at a time write to a folder."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tucker_cam.errors import BadFileError, BadValueError

TABLE_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
"""How to open a CSV: names of files may hold any byte and any line ending."""


@contextmanager
def complete_or_absent(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file takes its real name only when the block ends without an error.

    The path has the same suffix, by which many libraries choose the format that they write.
    """
    suffix, path = path.suffix, path.resolve()
    if path.exists() and not path.is_file():
        raise BadFileError(f"{path}: expected a file to write, found a folder or a device")
    unfinished = path.with_name(f".{path.name}.unfinished{suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def new_table(path: Path, header: Sequence[str]) -> Iterator[Callable[[Iterable[object]], object]]:
    """Yield a function that writes a row to a CSV file; at the end the file is complete or absent."""
    with complete_or_absent(path) as unfinished, unfinished.open("w", **TABLE_TEXT) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        yield writer.writerow


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Raise ValueError while another run writes to `out`; a run that was killed does not block the folder."""
    lock = out.with_name(f".{out.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise BadValueError(f"{out}: another run is writing to it: wait for its end, or write elsewhere") from error
