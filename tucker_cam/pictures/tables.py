"""Reads the names of a Parquet file's rows (column ``name``) and the encoded pictures in them (column ``image``)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from tucker_cam.errors import BadFileError, MissingPackageError
from tucker_cam.extras import install
from tucker_cam.pictures.files import is_url, open_file


def row_names(path: str) -> dict[tuple[int, int], str | None]:
    """Return each row's name by its row group and its place in the group; None if the name cannot be read.

    OSError if the file is not such a table.
    """
    with _opened(path) as table:
        columns = table.schema_arrow.names
        groups = [_names(table, group) for group in range(table.num_row_groups)]
    if columns.count("image") != 1:
        raise BadFileError(f"{path}: expected one column image, found {', '.join(columns)}")
    return {(group, row): name for group, names in enumerate(groups) for row, name in enumerate(names)}


def encoded_picture(path: str, group: int, row: int, stamp: object) -> bytes:
    """Return a row's picture as it is stored. If `stamp` differs from that of an earlier call, read the table again."""
    images = _images(path, group, stamp)
    if row >= len(images):
        raise BadFileError(f"expected a row {row} of group {group}, found {len(images)} rows: the table has changed")
    value = images[row].as_py()
    found = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(found, bytes):
        raise BadFileError(f"expected an encoded picture, found {type(found).__name__}")
    return found


@lru_cache(maxsize=2)
def _images(path: str, group: int, stamp: object) -> Any:
    with _opened(path) as table:
        return table.read_row_group(group, columns=["image"])["image"]


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingPackageError(f"{path}: a table needs the package pyarrow: {install('ray')}") from error
    with open_file(path) as file:
        try:
            yield pq.ParquetFile(file)
        except Exception as error:
            # Arrow's decoders fail in their own ways.
            found = "something else or a broken one"
            found += ", or a server that sends no parts of files: download it" if is_url(path) else ""
            raise BadFileError(f"{path}: expected a Parquet file, found {found}") from error


def _names(table: Any, group: int) -> list[str | None]:
    try:
        names = table.read_row_group(group, columns=["name"])["name"].to_pylist()
    except Exception:
        # The column is missing, is there twice, or holds text that is not UTF-8.
        return [None] * table.metadata.row_group(group).num_rows
    return [name and str(name) for name in names]
