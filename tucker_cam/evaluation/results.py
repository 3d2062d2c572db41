"""A CSV file of results, one row for each picture and method: read, checked, gone on with, never half a row."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tucker_cam.errors import BadValueError
from tucker_cam.writing import complete_or_absent

KEYS = ("picture", "method")

Row = dict[str, str]


class ResultsFile:
    """The rows of a run, on the disk as soon as they are known.

    What a killed run left is read and gone on with; a last line that it left unfinished is thrown away.

    Args:
        path: the file; it is made, with its folder, if it is missing.
        run: columns that are the same in every row of the run: the model, the layer ...
        columns: of the numbers.

    Raises:
        ValueError: the file holds something else than results, or results of another run.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, *, run: Mapping[str, str], columns: Sequence[str]) -> None:
        self.path = path
        self._run = dict(run)
        self._columns = list(columns)
        self._header = [*KEYS, *run, *columns]
        self.rows: dict[tuple[str, str], Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()
        # Written anew, so that an unfinished line does not run into the next one.
        with complete_or_absent(path) as unfinished:
            self._write(unfinished, "w", [self._header, *self._lines(self.rows.values())])

    def append(self, method: str, pictures: Sequence[str], values: Mapping[str, Sequence[float]]) -> None:
        """Add a row for each picture that has none with this method yet; NaN is written as nothing.

        Raises:
            OSError: the file cannot be written.
        """
        added: list[Row] = []
        for index, picture in enumerate(pictures):
            if (picture, method) in self.rows:
                continue
            numbers = {column: each[index] for column, each in values.items()}
            written = {column: "" if math.isnan(number) else f"{number:.6g}" for column, number in numbers.items()}
            self.rows[picture, method] = {"picture": picture, "method": method} | self._run | written
            added.append(self.rows[picture, method])
        self._write(self.path, "a", self._lines(added))

    def _read(self) -> None:
        # Names of files may hold any byte and any line ending.
        with self.path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            text = file.read()
        if not text:
            return
        try:
            lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        except csv.Error:
            lines = []
        if not lines or lines[0][: len(KEYS)] != list(KEYS):
            raise BadValueError(f"{self.path}: expected results to go on with, found something else: give another file")
        if lines[0] != self._header:
            differing = ", ".join(sorted(set(self._header) ^ set(lines[0]))) or "their order"
            raise BadValueError(
                f"{self.path}: expected the columns of this run, found others (the difference: {differing}): ask for "
                "the metrics it was written with, or give another file"
            )
        for line in lines[1:]:
            if len(line) != len(self._header):
                continue
            row = dict(zip(self._header, line, strict=True))
            for column in self._columns:
                if row[column] and not _is_number(row[column]):
                    raise BadValueError(
                        f"{self.path}: expected a number as {column} of {row['picture']!r}, found {row[column]!r}"
                    )
            for name, expected in self._run.items():
                if row[name] != expected:
                    raise BadValueError(
                        f"{self.path}: expected results of the {name} {expected}, found some of {row[name]}: "
                        "give another file"
                    )
            self.rows[row["picture"], row["method"]] = row

    def _lines(self, rows: Iterable[Row]) -> list[list[str]]:
        return [[row[name] for name in self._header] for row in rows]

    @staticmethod
    def _write(path: Path, mode: str, lines: Iterable[Sequence[str]]) -> None:
        with path.open(mode, encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows(lines)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
