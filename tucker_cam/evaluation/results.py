"""The rows of an evaluation, and the CSV that holds them: read, checked, gone on with, never half a row."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tucker_cam.errors import BadValueError
from tucker_cam.writing import complete_or_absent

_KEYS = ["picture", "method"]


@dataclass(frozen=True)
class Row:
    """What the measures say of a method's map of a picture.

    Attributes:
        picture: its name.
        method: its name.
        values: by the measure's name, to six digits; NaN where it was not scored.
    """

    picture: str
    method: str
    values: Mapping[str, float]


def rounded(number: float) -> float:
    """Return a number as it stands in the CSV, so that a run that was gone on with sums up to the same."""
    return float(f"{number:.6g}")


class Results:
    """The rows of a run; with a file, on the disk as soon as they are known.

    What a killed run left is read and gone on with; a last line that it left unfinished is thrown away.

    Args:
        path: the file; it is made when there is a row. None for none.
        run: columns that are the same in every row of the run: the model, the layer ...
        measures: names of the columns of numbers.

    Raises:
        ValueError: the file holds something else than results, or results of another run.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path | None, run: Mapping[str, str], measures: Sequence[str]) -> None:
        self.path, self.run, self.measures = path, run, measures
        self._header = [*_KEYS, *run, *measures]
        self._is_whole = False
        self.rows: dict[tuple[str, str], Row] = {}
        if path is not None and path.exists():
            self._read(path)

    def append(self, rows: Iterable[Row]) -> None:
        """Add the rows of pictures and methods that have none yet.

        Raises:
            OSError: the file cannot be written.
        """
        added = {(row.picture, row.method): row for row in rows if (row.picture, row.method) not in self.rows}
        if self.path is not None and added:
            if not self._is_whole:
                # Written anew, so that an unfinished line does not run into the next one.
                self.to_csv(self.path)
                self._is_whole = True
            self._write(self.path, "a", self._lines(added.values()))
        self.rows |= added

    def to_csv(self, path: Path) -> None:
        """Write all rows; NaN as nothing.

        Raises:
            OSError: the file cannot be written.
        """
        with complete_or_absent(path) as unfinished:
            self._write(unfinished, "w", [self._header, *self._lines(self.rows.values())])

    def _read(self, path: Path) -> None:
        # Names of files may hold any byte and any line ending.
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            text = file.read()
        if not text:
            return
        try:
            lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
        except csv.Error:
            lines = []
        if not lines or lines[0][: len(_KEYS)] != _KEYS:
            raise BadValueError(f"{path}: expected results to go on with, found something else: give another file")
        if lines[0] != self._header:
            differing = ", ".join(sorted(set(self._header) ^ set(lines[0]))) or "their order"
            raise BadValueError(
                f"{path}: expected the columns of this run, found others (the difference: {differing}): ask for "
                "the metrics it was written with, or give another file"
            )
        for line in lines[1:]:
            if len(line) != len(self._header):
                continue
            of_line = dict(zip(self._header, line, strict=True))
            for name, expected in self.run.items():
                if of_line[name] != expected:
                    raise BadValueError(
                        f"{path}: expected results of the {name} {expected}, found some of {of_line[name]}: "
                        "give another file"
                    )
            picture, method = line[: len(_KEYS)]
            try:
                values = {name: float(of_line[name] or "nan") for name in self.measures}
            except ValueError as error:
                raise BadValueError(
                    f"{path}: expected numbers for {method} of {picture!r}, found others ({error})"
                ) from error
            self.rows[picture, method] = Row(picture, method, values)

    def _lines(self, rows: Iterable[Row]) -> list[list[str]]:
        return [[row.picture, row.method, *self.run.values(), *map(_written, row.values.values())] for row in rows]

    def _write(self, path: Path, mode: str, lines: Iterable[Sequence[str]]) -> None:
        with path.open(mode, encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows(lines)


def _written(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.6g}"
