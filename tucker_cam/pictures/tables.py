"""Parquet files in, the names of their rows and the encoded pictures in them out.

A table has a column ``image`` (encoded pictures, or Hugging Face's struct of bytes and path) and may have a column
``name``. Whatever cannot be read is an OSError with one line for a user.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pyarrow.parquet as pq

from tucker_cam.errors import BadFileError
from tucker_cam.pictures.files import open_file

_CACHED_ROW_GROUPS = 2


def row_names(path: str) -> dict[tuple[int, int], str | None]:
    """Return what each row is called, by its row group and its place in it; None where no name can be read."""
    with _opened(path) as table:
        groups = (enumerate(_names(table, group)) for group in range(table.num_row_groups))
        return {(group, row): name for group, names in enumerate(groups) for row, name in names}


def encoded_picture(path: str, group: int, row: int) -> bytes:
    """Return the picture of a row as it is stored."""
    value = _images(path, group)[row].as_py()
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise BadFileError(f"expected an encoded picture, found {type(value).__name__}")
    return value


@lru_cache(maxsize=_CACHED_ROW_GROUPS)
def _images(path: str, group: int) -> Any:
    with _opened(path) as table:
        columns = table.schema_arrow.names
        if columns.count("image") != 1:
            raise BadFileError(f"expected one column image, found {', '.join(columns)}")
        return table.read_row_group(group, columns=["image"])["image"]


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    with open_file(path) as file:
        try:
            yield pq.ParquetFile(file)
        except BadFileError:
            raise
        except Exception as error:
            # Arrow's decoders fail in their own ways.
            raise BadFileError(f"{path}: expected a Parquet file, found something else or a broken one") from error


def _names(table: pq.ParquetFile, group: int) -> list[str | None]:
    try:
        column = table.read_row_group(group, columns=["name"])["name"]
    except Exception:
        # There is no such column, or it is there twice, or broken.
        return [None] * table.metadata.row_group(group).num_rows
    return [_text(each) for each in column]


def _text(value: Any) -> str | None:
    try:
        found = value.as_py()
    except (ValueError, OverflowError):
        # Text that is no UTF-8, a date beyond Python's.
        return None
    return None if found is None else str(found)
