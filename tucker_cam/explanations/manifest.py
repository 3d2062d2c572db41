"""Keeps the manifest of a folder of results, which lists the model, the methods and the pictures of a run.

One folder holds the results of one run, which may have been stopped and resumed. Results of another model, layer or
engine go into a subfolder, which the same command finds again.
"""

import json
import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from tucker_cam.errors import BadValueError
from tucker_cam.explanations.outputs import FORMATS, MethodFiles
from tucker_cam.models import LoadedModel
from tucker_cam.pictures.held import Picture
from tucker_cam.pictures.sources import MANIFEST, UNNAMED_SUFFIXES, Stamp, safe_name
from tucker_cam.pictures.view import View
from tucker_cam.writing import complete_or_absent

_PACKAGES = ("tucker-cam", "torch", "numpy", "grad-cam", "pillow")
_RUN = frozenset(["engine", "model", "weights", "layers", "aug_smooth", "preprocessing"])
_LONGEST_FOLDER = 100
# The endings of our own files, which no folder in a picture's name may have.
_SUFFIXES = (".json", ".html", ".zarr", *(kind.suffix for kind in FORMATS.values() if issubclass(kind, MethodFiles)))


class Manifest:
    """``manifest.json``: the model and layers that a folder's files are of, and the versions that made them.

    For each picture, by its key, it also keeps a name, so that a later run with more or fewer pictures uses the same
    name again; the picture's size and when it was last written, so that one that has changed is explained again; and
    where in it the network looked. `run` is the run's `identity`, or None to take it from the manifest. ValueError if
    the file is not a manifest.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any] | None) -> None:
        self.folder, self.path, self.run = folder, folder / MANIFEST, dict(run or {})
        self.names: dict[str, str] = {}
        self.stamps: dict[str, Stamp] = {}
        self.views: dict[str, list[float] | None] = {}
        self.methods: list[str] = []
        self.suffixes: list[str] = []
        self.is_new = not self.path.exists()
        if not self.is_new:
            content = read_manifest(self.path.read_bytes(), str(folder))
            self.run = dict(run or content)
            try:
                self._take(content)
            except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
                raise _no_manifest(str(folder)) from error
        self.places = {key: place for place, key in enumerate(self.names)}

    def _take(self, content: Mapping[str, Any]) -> None:
        self.methods = list(content["methods"])
        self.suffixes = list(content.get("suffixes", UNNAMED_SUFFIXES))
        for key, picture in content["pictures"].items():
            self.names[key] = safe_name(picture["name"])
            self.stamps[key] = Stamp(int(picture["modified"]), int(picture["size"]))
            if "view" in picture:
                self.views[key] = picture["view"]
        if len(set(self.names.values())) < len(self.names):
            raise BadValueError("two pictures of one name")

    def add(self, pictures: Iterable[Picture]) -> None:
        """Record each picture as it is now, under a unique name; the second ``cat`` becomes ``cat-2``."""
        taken = set(self.names.values())
        last: dict[str, int] = {}
        for picture in pictures:
            self.stamps[picture.key] = picture.stamp
            if picture.key not in self.names:
                name = base = _apart_from_ours(picture.name)
                while name in taken:
                    last[base] = last.get(base, 1) + 1
                    name = f"{base}-{last[base]}"
                self.places[picture.key] = len(self.names)
                self.names[picture.key] = name
                taken.add(name)

    def see(self, key: str, view: View | None) -> None:
        """Record where in a picture the network looked, to a hundredth of a pixel."""
        self.views[key] = None if view is None else [round(edge, 2) for edge in view]

    def write(self) -> None:
        pictures = {key: {"name": name, **self.stamps[key]._asdict()} for key, name in self.names.items()}
        for key, view in self.views.items():
            pictures[key]["view"] = view
        kinds = {"methods": self.methods, "suffixes": self.suffixes}
        content = {**self.run, "versions": versions(), **kinds, "pictures": pictures}
        with complete_or_absent(self.path) as unfinished:
            unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")


def identity(loaded: LoadedModel, engine: Literal["torch", "ray"], *, aug_smooth: bool) -> dict[str, Any]:
    """Return what all maps of a run have in common."""
    return {
        "engine": engine,
        "model": loaded.name,
        "weights": loaded.digest(),
        "layers": loaded.layer_names,
        "aug_smooth": aug_smooth,
        "preprocessing": loaded.preprocessing,
    }


def manifests_in(out: Path) -> list[Path]:
    return [path for path in (out / MANIFEST, *sorted(out.glob(f"*/{MANIFEST}"))) if path.is_file()]


def place_of_run(out: str, run: Mapping[str, Any], manifests: Mapping[str, bytes]) -> str:
    """Return where the results of a run are or go: `out`, or a folder below it named after the model and layers.

    `manifests` are the texts of the manifests in `out` and below it, by folder; ValueError if one is not a manifest.
    """
    contents = {place: read_manifest(text, place) for place, text in manifests.items()}
    if out not in contents:  # folders below it belong to other runs
        return out
    for place, content in contents.items():
        if run.items() <= content.items():
            return place
    taken = contents[out]
    # A run that failed before its first picture left only a manifest: another run may replace it.
    if taken["engine"] == run["engine"] and taken.get("pictures") == {}:
        return out
    model = re.sub(r"[^\w.+-]+", "-", run["model"])
    name = "_".join([model, *run["layers"], *(["ray"] if run["engine"] == "ray" else [])])[:_LONGEST_FOLDER]
    number, place = 1, f"{out}/{name}"
    while place in manifests:
        number, place = number + 1, f"{out}/{name}-{number + 1}"
    return place


def read_manifest(manifest: bytes, folder: str) -> dict[str, Any]:
    """Return the content of an earlier run's manifest; ValueError if it is not a manifest."""
    try:
        content: dict[str, Any] = json.loads(manifest)
        if not content.keys() >= _RUN:
            raise BadValueError("entries are missing")
        for names in (content["layers"], content.get("methods", [])):
            "".join(names)  # a TypeError if they are not names
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise _no_manifest(folder) from error
    return content


def not_of_a_run(taken: Path | str) -> BadValueError:
    """Return the error for a folder that holds a file that no manifest lists."""
    return BadValueError(f"{taken} is there already, and not of a run in this folder: choose another one")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}


def _no_manifest(folder: str) -> BadValueError:
    return BadValueError(
        f"{folder}: expected {MANIFEST} of an earlier run, found something else: choose another folder"
    )


def _apart_from_ours(name: str) -> str:
    """Change parts of a name that would be hidden, and folders that could have the name of one of our own files."""
    *folders, last = (f"_{part}" if part.startswith(".") else part for part in PurePosixPath(name).parts)
    return "/".join([*(f"{part}_" if part.lower().endswith(_SUFFIXES) else part for part in folders), last])
