"""Keeps the rows of an evaluation in a CSV file, which a later run checks and resumes; never half a row."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tucker_cam.errors import BadValueError
from tucker_cam.writing import TABLE_TEXT, new_table


@dataclass(frozen=True)
class Row:
    """The values of a method's map of a picture: by the measure's name, to six digits, NaN where not scored."""

    picture: str
    method: str
    values: Mapping[str, float]


class Results:
    """The rows of a run; with a path, they are on the disk as soon as they are known.

    Rows that a killed run left are read and kept; a last line that it left unfinished is dropped. `run` holds the
    columns that are the same in every row, such as the model. ValueError if the file holds something else.
    """

    def __init__(self, path: Path | None, run: Mapping[str, str], measures: Sequence[str]) -> None:
        self.path, self.run, self.measures = path, run, measures
        self._header = ["picture", "method", *run, *measures]
        if len(set(self._header)) < len(self._header):
            raise BadValueError(f"expected measures of different names, got the columns {', '.join(self._header)}")
        self.rows: dict[tuple[str, str], Row] = {}
        if path is not None and path.exists():
            if path.stat().st_size:
                self._read(path)
            self.to_csv(path)

    def append(self, rows: Iterable[Row]) -> None:
        """Add the rows of pictures and methods that have none yet; OSError if the file cannot be written."""
        added = {(row.picture, row.method): row for row in rows if (row.picture, row.method) not in self.rows}
        self.rows |= added
        if self.path is not None and self.path.exists():
            with self.path.open("a", **TABLE_TEXT) as file:
                csv.writer(file).writerows(map(self._line, added.values()))
        elif self.path is not None:
            self.to_csv(self.path)

    def to_csv(self, path: Path) -> None:
        """Write all rows, with NaN as an empty cell; OSError if the file cannot be written."""
        with new_table(path, self._header) as write_row:
            for row in self.rows.values():
                write_row(self._line(row))

    def _read(self, path: Path) -> None:
        with path.open(**TABLE_TEXT) as file:
            text = file.read()
        lines = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        if lines.fieldnames != self._header:
            differing = ", ".join(sorted(set(self._header) ^ set(lines.fieldnames or []))) or "their order"
            raise BadValueError(
                f"{path}: expected the columns of this run, found others (the difference: {differing}): ask for "
                "the metrics it was written with, or give another file"
            )
        for line in lines:
            if None in line.values():
                # A killed run may have stopped within a name that contains line breaks.
                continue
            for name, expected in self.run.items():
                if line[name] != expected:
                    found = f"expected results of the {name} {expected}, found some of {line[name]}"
                    raise BadValueError(f"{path}: {found}: give another file")
            try:
                values = {name: float(line[name] or "nan") for name in self.measures}
            except ValueError as error:
                raise BadValueError(f"{path}: expected numbers, found others ({error}): give another file") from error
            self.rows[line["picture"], line["method"]] = Row(line["picture"], line["method"], values)

    def _line(self, row: Row) -> list[str]:
        numbers = ["" if math.isnan(each) else f"{each:.6g}" for each in row.values.values()]
        return [row.picture, row.method, *self.run.values(), *numbers]
