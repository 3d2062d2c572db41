"""What a user typed in, files, folders, globs, Parquet tables and URLs, a list of pictures that can be read out."""

from __future__ import annotations

import glob
import io
import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, TypeVar

from PIL import Image

from tucker_cam.errors import BadFileError, BadValueError
from tucker_cam.pictures.files import decode_frames, decode_picture, files_below, is_url, may_be_file, open_file
from tucker_cam.text import one_line

Item = TypeVar("Item")
_NO_TABLE = "expected a Parquet file, found something else or a broken one"
_MAGIC = "*?["
_PICTURES = frozenset([".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
_WANTED = _PICTURES | {".parquet"}
_CACHED_ROW_GROUPS = 2
# A method, a suffix and a mark for what is not finished come after it; file systems take 255 bytes, and 4,096 with all
# folders.
_LONGEST_NAME, _LONGEST_PATH = 180, 1000
MANIFEST = "manifest.json"
"""What tells a folder of results; see `outputs`."""


class Stamp(NamedTuple):
    """What tells whether a file has changed.

    Attributes:
        modified: when it was last written, in nanoseconds; 0 where that is not known.
        size: in bytes; 0 where that is not known, and None where an older manifest does not say.
    """

    modified: int
    size: int | None

    def differs(self, now: Stamp) -> bool:
        """Tell whether the file is another one now."""
        return self.modified != now.modified or self.size not in (None, now.size)


@dataclass(frozen=True)
class Source:
    """Where a picture is.

    Attributes:
        name: for people and for files: its path below the folder that was named, without the suffix.
        path: of the file, local or a URL.
        row: in a Parquet file, the row group and the row in it; None for a picture file.
    """

    name: str
    path: str
    row: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.path if self.row is None else f"{self.path}, row {self.row[1]} of group {self.row[0]}"

    @property
    def location(self) -> str:
        """Its path, wherever a run is started: absolute, or a URL."""
        return self.path if is_url(self.path) else os.path.abspath(self.path)

    @property
    def key(self) -> str:
        """What tells this picture from all others."""
        return self.location if self.row is None else f"{self.location}#{self.row[0]}.{self.row[1]}"

    @property
    def stamp(self) -> Stamp:
        """When a local file was last written, and its size."""
        if is_url(self.path) or not os.path.exists(self.path):
            return Stamp(0, 0)
        found = os.stat(self.path)
        return Stamp(found.st_mtime_ns, found.st_size)

    def read(self, frames: int | None = None) -> Image.Image | list[Image.Image]:
        """Return the picture as RGB, or for a video network that many frames of it.

        Raises:
            OSError: it cannot be read; the message is one line for a user.
        """
        with self._open() as file:
            return decode_picture(file, str(self)) if frames is None else decode_frames(file, str(self), frames)

    def _open(self) -> BinaryIO:
        if self.row is not None:
            group, index = self.row
            return io.BytesIO(_encoded_picture(_row_group(self.path, group)["image"][index].as_py(), str(self)))
        return open_file(self.path)


def find_sources(arguments: Sequence[str], *, out: Path | None = None) -> tuple[list[Source], list[str]]:
    """Find the pictures: each file that is named, and those in folders (at any depth), globs and Parquet files.

    A Parquet file has a column ``image`` (encoded pictures, or Hugging Face's struct of bytes and path) and may have a
    column ``name``. Hidden files in folders are left out, and so are folders that are links, and local folders of
    results. A file of a folder that cannot be read, or is no table, stays in the list: reading it says so.

    Args:
        arguments: as they were typed.
        out: a folder for results; what is found in it is an earlier run's, and left out.

    Returns:
        The pictures, in the order of the arguments, and of the names in each, none twice; and one line for each
        argument that cannot be used.

    Raises:
        ValueError: none can be used: each names what is not there, a folder, glob or table without pictures, or `out`.
        ImportError: none can be used, for want of a package.
    """
    found: dict[str, Source] = {}
    problems: list[str] = []
    missing: list[ImportError] = []
    for argument in arguments:
        try:
            found |= {source.key: source for source in _sources_of(argument, out, problems)}
        except ImportError as error:
            problems.append(f"{argument}: {one_line(error)}")
            missing.append(error)
        except ValueError as error:
            problems.append(str(error))
    if not found and missing:
        raise missing[0]
    if not found:
        raise BadValueError("; ".join(problems))
    return list(found.values()), problems


def random_sample(items: Sequence[Item], limit: int | None, *, seed: int = 0) -> list[Item]:
    """Return a random sample in the order of the items: the same in every run, and part of any larger one.

    Raises:
        ValueError: the limit is below 1.
    """
    if limit is None:
        return list(items)
    if limit < 1:
        raise BadValueError(f"expected a limit of at least 1 picture, got {limit}")
    places = random.Random(seed).sample(range(len(items)), len(items))[:limit]  # noqa: S311
    return [items[place] for place in sorted(places)]


def _sources_of(argument: str, out: Path | None, problems: list[str]) -> Iterator[Source]:
    """Yield the pictures of an argument, and add a line for each table that cannot be read."""
    root, paths = _expanded(argument, out)
    empty = True
    for path in paths:
        name = _name(path, root)
        try:
            for source in _rows(path, name) if path.endswith(".parquet") else [Source(name, path)]:
                yield source
                empty = False
        except OSError as error:
            problems.append(f"{path}: {one_line(error).removeprefix(f'{path}: ')}")
            empty = False
    if empty:
        raise BadValueError(f"{argument}: expected pictures or Parquet files with rows, found none")


def _expanded(argument: str, out: Path | None) -> tuple[str, list[str]]:
    """Return the folder that names are relative to, and the files."""
    if is_url(argument):
        return _expanded_url(argument)
    path = Path(argument)
    if os.path.isdir(path):
        if out is not None and out.resolve() == path.resolve():
            raise BadValueError(f"{argument}: expected another folder for the results, got this one as --out")
        found, root = files_below(path, _WANTED), path
    elif not os.path.exists(path) and any(character in argument for character in _MAGIC):
        found = [Path(file) for file in glob.glob(argument, recursive=True)]
        found = [file for file in found if may_be_file(file)]
        fixed = path.parts[:-1]
        magic = next((i for i, part in enumerate(fixed) if any(each in part for each in _MAGIC)), len(fixed))
        root = Path(*fixed[:magic])
    elif not os.path.lexists(path):
        raise BadValueError(
            f"{argument}: expected pictures or Parquet files, found none: no such file or folder that may be read"
        )
    else:
        return str(path.parent), [str(path)]
    folders = {folder for file in found for folder in file.parents if folder.is_relative_to(root)}
    results = {folder.resolve() for folder in folders if _is_manifest(folder / MANIFEST)}
    results |= set() if out is None else {out.resolve()}
    ours = [file for file in found if results.isdisjoint(file.resolve().parents)]
    if not ours:
        left_out = " but results of earlier runs" if found else ""
        raise BadValueError(f"{argument}: expected pictures or Parquet files, found none{left_out}")
    return str(root), sorted(str(file) for file in ours)


def _expanded_url(argument: str) -> tuple[str, list[str]]:
    import fsspec

    # Of a file in an archive, zip://x.png::https://host/pictures.zip, the archive comes last.
    inside, mark, archive = argument.partition("::")
    outside = mark + archive if is_url(inside) else ""
    itself = argument.removesuffix(outside).rpartition("/")[0], [argument]
    try:
        filesystem, path = fsspec.core.url_to_fs(argument)
        if any(character in path for character in _MAGIC):
            found, root = filesystem.glob(path), re.split(r"[*?[]", path)[0].rpartition("/")[0]
        elif filesystem.isdir(path):
            found = [file for file in filesystem.find(path) if _is_wanted(file[len(path) :].lstrip("/"))]
            root = path
        else:
            return itself
    except ImportError:
        raise
    except Exception:
        # A host that cannot be reached, a broken archive: opening it says so.
        return itself
    if not found:
        raise BadValueError(f"{argument}: expected pictures or Parquet files, found none")
    return filesystem.unstrip_protocol(root), sorted(filesystem.unstrip_protocol(file) + outside for file in found)


def _is_wanted(relative: str) -> bool:
    suffix = PurePosixPath(relative).suffix.lower()
    return suffix in _WANTED and not any(part.startswith(".") for part in relative.split("/"))


def _name(path: str, root: str) -> str:
    relative = path.removeprefix(root).lstrip("/\\") if root != "." else path
    if is_url(path):
        relative, *_ = relative.split("::")
    return safe_name(str(PurePosixPath(relative).with_suffix("")))


def safe_name(name: str) -> str:
    """Drop what would lead out of a folder that the name is joined to, and shorten what no file can be called."""
    parts = PurePosixPath(name.replace("\\", "/").replace("\0", "")).parts
    safe = "/".join(_shortened(part) for part in parts if part not in ("/", "..", ".")) or "picture"
    return safe if len(os.fsencode(safe)) <= _LONGEST_PATH else _shortened(safe.replace("/", "-"))


def _shortened(part: str) -> str:
    encoded = os.fsencode(part)
    if len(encoded) <= _LONGEST_NAME:
        return part
    start = encoded[: _LONGEST_NAME - 9].decode(errors="ignore")
    return f"{start}-{sha256(encoded).hexdigest()[:8]}"


def _rows(path: str, name: str) -> Iterator[Source]:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with open_file(path) as file:
            table = pq.ParquetFile(file)
            for group in range(table.num_row_groups):
                for row, each in enumerate(_row_names(table, group, name)):
                    yield Source(safe_name(each), path, (group, row))
    except (UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise BadFileError(_NO_TABLE) from error


def _row_names(table: Any, group: int, name: str) -> list[str]:
    """Return what the column ``name`` says; of a row where it says nothing that can be read, its place."""
    import pyarrow

    names = [f"{name}-{group}-{row}" for row in range(table.metadata.row_group(group).num_rows)]
    if table.schema_arrow.names.count("name") == 1:
        try:
            column = table.read_row_group(group, columns=["name"])["name"]
        except (OSError, pyarrow.ArrowException):
            return names
        for row, each in enumerate(column):
            # Text that is no UTF-8, a date beyond Python's.
            with suppress(ValueError, OverflowError):
                text = each.as_py()
                names[row] = names[row] if text is None else str(text)
    return names


@lru_cache(maxsize=_CACHED_ROW_GROUPS)
def _row_group(path: str, group: int) -> Any:
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with open_file(path) as file:
            table = pq.ParquetFile(file)
            if table.schema_arrow.names.count("image") != 1:
                raise BadFileError(f"expected one column image, found {', '.join(table.schema_arrow.names)}")
            return table.read_row_group(group, columns=["image"])
    except (UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise BadFileError(_NO_TABLE) from error


def _is_manifest(file: Path) -> bool:
    try:
        return file.is_file() and '"tucker-cam"' in file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _encoded_picture(value: object, name: str) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise BadFileError(f"{name}: expected an encoded picture, found {type(value).__name__}")
    return value
