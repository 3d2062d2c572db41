"""Turns the files, folders, globs, Parquet tables and URLs that a user typed into a list of pictures to read."""

from __future__ import annotations

import glob
import io
import json
import logging
import os
import random
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from numbers import Integral
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from PIL import Image

from tucker_cam.errors import BadValueError, Failure, MissingPackageError, TuckerCamError
from tucker_cam.methods import name_in_files
from tucker_cam.pictures.files import decode_frames, is_url, open_file
from tucker_cam.pictures.tables import encoded_picture, row_names
from tucker_cam.text import one_line

Item = TypeVar("Item")
PICTURES = frozenset(
    [".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"]
)
ANNOTATED = {"boxes": ("annotations", "Annotations"), "masks": ("masks", "Masks", "SegmentationClass")}
"""Names of folders with annotations, by their kind; no picture in them is one to explain."""
SINGLE_OBJECTS = "SegmentationObject"
"""VOC's folder for the masks of single objects, which are not needed."""
MANIFEST = "manifest.json"
"""The file that marks a folder of results."""
UNNAMED_SUFFIXES = (".png",)
"""The suffixes of a run whose manifest names none, as an unreleased version wrote it."""
TABLES = "maps-"
"""How the names of Ray's tables of maps begin."""
_TABLE = ".parquet"
_MAGIC = re.compile(r"[*?[]")
_EXPECTED = "expected pictures or Parquet files, found none"
# A method, a suffix and a mark for unfinished files are added to the name. File systems take 255 bytes for a name, and
# 4,096 with all of its folders.
_LONGEST_PART, _LONGEST_NAME = 180, 1000
logger = logging.getLogger("tucker_cam")


class Stamp(NamedTuple):
    """When a file was last written, in nanoseconds, and its size in bytes: 0 if unknown."""

    modified: int
    size: int


NOT_OURS = Stamp(-1, -1)
"""The stamp of a picture whose files were there before a run and belong to somebody else."""


@dataclass(frozen=True)
class Source:
    """A picture in a file, local or at a URL; in a Parquet file, `row` is its row group and its row in the group.

    The name, used in messages and file names, is its path below the folder that was named, without the suffix.
    """

    name: str
    path: str
    row: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.path if self.row is None else f"{self.path}, row {self.row[1]} of group {self.row[0]}"

    @property
    def location(self) -> str:
        """The path, independent of where a run is started: absolute, or a URL."""
        return self.path if is_url(self.path) else os.path.abspath(self.path)

    @property
    def key(self) -> str:
        """A string that identifies this picture among all others."""
        return self.location if self.row is None else f"{self.location}#{self.row[0]}.{self.row[1]}"

    @property
    def stamp(self) -> Stamp:
        """When a local file was last written, and its size."""
        if not os.path.exists(self.path):
            return Stamp(0, 0)
        found = os.stat(self.path)
        return Stamp(found.st_mtime_ns, found.st_size)

    def read(self, frames: int | None = None) -> Image.Image | list[Image.Image]:
        """Return the picture as RGB, or for a video network `frames` frames of it; OSError if it cannot be read."""
        path, row = self.path, self.row
        with open_file(path) if row is None else io.BytesIO(encoded_picture(path, *row, self.stamp)) as file:
            pictures = decode_frames(file, str(self), frames or 1)
        return pictures[0] if frames is None else pictures


def find_sources(arguments: Sequence[str], *, out: Path | None = None) -> tuple[list[Source], list[Failure]]:
    """Find the pictures: each file that is named, and those in folders (at any depth), globs and Parquet files.

    In folders, hidden files, links to folders and folders of annotations are left out; in folders and globs, results of
    earlier runs. A file that cannot be read stays in the list, and fails when it is read. For tables see `tables`.

    Returns:
        The pictures without duplicates, in the order of the arguments and, within each, of their names; and failures:
        the arguments and tables that cannot be used, each with an error whose message names it.
    """
    found: dict[str, Source] = {}
    failures: list[Failure] = []
    for argument in arguments:
        try:
            files = _files_at_url(argument) if is_url(argument) else _files_at(argument, out)
        except TuckerCamError as error:
            failures.append(Failure(argument, error))
            continue
        for path, name in files:
            try:
                found |= {source.key: source for source in _in_file(path, os.path.splitext(name)[0])}
            except TuckerCamError as error:
                failures.append(Failure(path, error))
    return list(found.values()), failures


def files_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Return the files in a folder, at any depth, with one of these suffixes in any case, except hidden ones.

    A folder that may not be entered is returned in place of its files, and fails when it is opened.
    """
    closed: list[OSError] = []
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=closed.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = [Path(parent, name) for name in names if not name.startswith(".")]
        found += [path for path in shown if path.suffix.lower() in suffixes]
    return found + [Path(error.filename) for error in closed]


def is_annotation(file: Path, root: Path) -> bool:
    """Return whether a file is in a folder of annotations below the folder that was named."""
    folders = {SINGLE_OBJECTS}.union(*ANNOTATED.values())
    return not folders.isdisjoint(file.relative_to(root).parts[:-1])


def without_results(files: Sequence[Path], root: Path) -> list[Path]:
    """Leave out what runs wrote into folders, `root` or below it, by their manifests; keep all other files in them."""
    folders = {folder for file in files for folder in file.parents if folder.is_relative_to(root)}
    runs = {folder: run for folder in folders if (run := _run_in(folder)) is not None}
    return [
        file for file in files if not any(_is_result(file, each, runs[each]) for each in file.parents if each in runs)
    ]


def check_limit(limit: int | None) -> None:
    """Raise ValueError unless the limit is None or a whole number above 0."""
    if limit is not None and not (isinstance(limit, Integral) and limit > 0):
        raise BadValueError(f"expected a limit of at least 1 picture, got {limit}")


def random_sample(items: Sequence[Item], limit: int | None) -> list[Item]:
    """Return a random sample in the order of the items; it is the same in every run, and part of any larger sample."""
    check_limit(limit)
    if limit is None:
        return list(items)
    places = random.Random(0).sample(range(len(items)), len(items))[:limit]  # noqa: S311
    return [items[place] for place in sorted(places)]


def safe_name(name: str) -> str:
    """Drop parts that would lead out of a folder that the name is joined to, and shorten a name too long for a file."""
    parts = PurePosixPath(name.replace("\\", "/").replace("\0", "")).parts
    parts = tuple(part for part in parts if part not in ("/", "..", ".")) or ("picture",)
    lengths = [len(os.fsencode(part)) for part in parts]
    if max(lengths) <= _LONGEST_PART and sum(lengths) + len(parts) <= _LONGEST_NAME:
        return "/".join(parts)
    encoded = os.fsencode("-".join(parts))
    start = encoded[: _LONGEST_PART - 9].decode(errors="ignore")
    return f"{start}-{sha256(encoded).hexdigest()[:8]}"


def _files_at(argument: str, out: Path | None) -> list[tuple[str, str]]:
    """Return the files that an argument names, each with its path below the folder that was named."""
    root = Path(argument)
    if os.path.isdir(argument):
        if out is not None and out.resolve() == root.resolve():
            raise BadValueError(f"{argument}: expected another folder for the results, got that of the pictures")
        below = files_below(root, PICTURES | {_TABLE})
        found = [file for file in below if not is_annotation(file, root)]
        if left_out := len(below) - len(found):
            logger.info(
                f"note: {argument}: in folders of masks, so left out: {left_out}; to take them, name such a folder"
            )
    elif os.path.lexists(argument):
        return [(str(root), root.name)]
    elif not _MAGIC.search(argument):
        raise BadValueError(f"{argument}: {_EXPECTED}: no such file or folder that may be read")
    else:
        root = Path(os.path.dirname(_MAGIC.split(argument)[0]))
        found = [Path(file) for file in glob.glob(argument, recursive=True) if not os.path.isdir(file)]
    ours = without_results(found, root)
    if not ours:
        but = " but results of earlier runs" if found else ""
        raise BadValueError(f"{argument}: {_EXPECTED}{but}")
    return sorted((str(file), str(file.relative_to(root))) for file in ours)


def _files_at_url(argument: str) -> list[tuple[str, str]]:
    import fsspec

    # For a file in an archive, zip://x.png::https://host/pictures.zip, the archive comes last.
    inside, mark, archive = argument.partition("::")
    outside = mark + archive if is_url(inside) else ""
    itself = [(argument, argument.removesuffix(outside).rpartition("/")[2])]
    try:
        filesystem, path = fsspec.core.url_to_fs(argument)
        if _MAGIC.search(path):
            found, root = filesystem.glob(path), _MAGIC.split(path)[0].rpartition("/")[0]
        elif filesystem.isdir(path):
            below = [file for file in filesystem.find(path) if "/." not in f"/{file.removeprefix(path)}"]
            found, root = [file for file in below if file.lower().endswith((*PICTURES, _TABLE))], path
        else:
            return itself
    except ImportError as error:
        raise MissingPackageError(f"{argument}: {one_line(error)}") from error
    except Exception:
        # The host cannot be reached or the archive is broken: opening the file fails then, and says so.
        return itself
    if not found:
        raise BadValueError(f"{argument}: {_EXPECTED}")
    return sorted((filesystem.unstrip_protocol(file) + outside, file.removeprefix(root)) for file in found)


def _in_file(path: str, stem: str) -> list[Source]:
    if not path.lower().endswith(_TABLE):
        return [Source(safe_name(stem), path)]
    names = row_names(path)
    if not names:
        raise BadValueError(f"{path}: expected pictures or Parquet files with rows, found none")
    return [Source(safe_name(name or f"{stem}-{row[0]}-{row[1]}"), path, row) for row, name in names.items()]


class _Run(NamedTuple):
    """What is told of a run's files by its manifest: the names of pictures and methods in them, and the suffixes."""

    pictures: frozenset[str]
    methods: frozenset[str]
    suffixes: frozenset[str]


def _run_in(folder: Path) -> _Run | None:
    # Other programs have a manifest of this name too, with anything in it.
    with suppress(Exception):
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if "tucker-cam" in manifest["versions"]:
            pictures = manifest.get("pictures", {}).values()
            names = frozenset(each["name"] for each in pictures if each["modified"] != NOT_OURS.modified)
            methods = frozenset(map(name_in_files, manifest.get("methods", [])))
            return _Run(names, methods, frozenset(manifest.get("suffixes", UNNAMED_SUFFIXES)))
    return None


def _is_result(file: Path, folder: Path, run: _Run) -> bool:
    name, _, method = file.relative_to(folder).with_suffix("").as_posix().rpartition("_")
    is_table = file.suffix == _TABLE and file.name.startswith(TABLES)
    return is_table or (name in run.pictures and method in run.methods and file.suffix in run.suffixes)
