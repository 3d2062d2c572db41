"""Explanations in, files out: overlays, maps and the gallery, each complete or absent, and a manifest of them all."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from glob import escape
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pytorch_grad_cam.utils.image import show_cam_on_image

from tucker_cam import __version__
from tucker_cam.errors import BadValueError
from tucker_cam.explanations.explainer import Found
from tucker_cam.explanations.gallery import gallery_entry, write_gallery
from tucker_cam.methods import METHODS
from tucker_cam.models import LoadedModel
from tucker_cam.pictures.sources import MANIFEST, Source, Stamp, safe_name
from tucker_cam.text import printable
from tucker_cam.writing import complete_or_absent

NOT_OURS = Stamp(-1, None)
"""Stands in a manifest for a picture whose files were there before, and are somebody else's."""
Engine = Literal["torch", "ray"]
Picture = Callable[[], NDArray[np.float32]]
_PACKAGES = ("torch", "numpy", "grad-cam", "pillow")


class Output(Protocol):
    """One kind of file that is made of each explanation. Writing may happen in several threads.

    Attributes:
        suffix: of its files, or of the one that holds all; what no folder of a picture's name may end in.
    """

    suffix: str

    @classmethod
    def begin(cls, out: Path, methods: Sequence[str], manifest: Manifest) -> Self:
        """Return the output of a run."""

    @classmethod
    def left(cls, out: Path, name: str, place: int) -> Iterable[Path]:
        """Return the files that runs of any methods have left of a picture.

        Args:
            out: the folder.
            name: of the picture, relative to the folder.
            place: of the picture in the manifest.
        """

    def paths(self, name: str) -> list[Path]:
        """Return the files of this picture: where they are, or will be."""

    def has(self, name: str) -> bool:
        """Tell whether all of them are there."""
        return all(path.is_file() for path in self.paths(name))

    def write(self, name: str, picture: Picture, explanation: Found) -> None:
        """Write the files of a picture.

        Args:
            name: of the picture, relative to the folder.
            picture: returns what the network saw, (time x) height x width x 3 in [0, 1].
            explanation: of it.

        Raises:
            OSError, ValueError: they cannot be written.
        """


class MethodFiles(Output):
    """A file for each method: ``NAME_METHOD`` and a suffix."""

    def __init__(self, out: Path, methods: Sequence[str]) -> None:
        self.out, self.methods = out, methods

    @classmethod
    def begin(cls, out: Path, methods: Sequence[str], manifest: Manifest) -> Self:
        return cls(out, methods)

    @classmethod
    def left(cls, out: Path, name: str, place: int) -> Iterable[Path]:
        return cls(out, list(METHODS)).paths(name)

    def paths(self, name: str) -> list[Path]:
        return [self._path(name, method) for method in self.methods]

    def write(self, name: str, picture: Picture, explanation: Found) -> None:
        for method, saliency in explanation.maps.items():
            with _new_file(self._path(name, method)) as unfinished:
                self.save(unfinished, picture, saliency)

    def save(self, path: Path, picture: Picture, saliency: NDArray[np.float32]) -> None:
        """Write the file of one method."""
        raise NotImplementedError

    def _path(self, name: str, method: str) -> Path:
        return self.out / f"{name}_{method}{self.suffix}"


class Overlays(MethodFiles):
    """The map over what the network saw; of a clip an animated one."""

    suffix = ".png"

    def save(self, path: Path, picture: Picture, saliency: NDArray[np.float32]) -> None:
        seen = picture()
        pairs = [(seen, saliency)] if saliency.ndim == 2 else list(zip(seen, saliency, strict=True))
        first, *others = [Image.fromarray(show_cam_on_image(view, each, use_rgb=True)) for view, each in pairs]
        animation: dict[str, Any] = {"save_all": True, "append_images": others} if others else {}
        first.save(path, format="PNG", **animation)


class ArrayFiles(MethodFiles):
    """The map, float32 in [0, 1]."""

    suffix = ".npy"

    def save(self, path: Path, picture: Picture, saliency: NDArray[np.float32]) -> None:
        with path.open("wb") as file:
            np.save(file, saliency)


class ZarrStore(Output):
    """``maps.zarr``: for each method one array, pictures x height x width, in the order of the manifest.

    A picture is a chunk of its own, which the store writes whole or not at all; without one it reads as NaN.
    """

    file_name, suffix = "maps.zarr", ".zarr"

    @classmethod
    def begin(cls, out: Path, methods: Sequence[str], manifest: Manifest) -> Self:
        return cls(out, methods, list(manifest.names.values()), manifest.run | {"versions": versions()})

    @classmethod
    def left(cls, out: Path, name: str, place: int) -> Iterable[Path]:
        return out.glob(f"{cls.file_name}/*/c/{place}/**/0")

    def __init__(self, out: Path, methods: Sequence[str], names: Sequence[str], attributes: Mapping[str, Any]) -> None:
        import zarr

        self.methods, self.index = methods, {name: index for index, name in enumerate(names)}
        self.path = out / self.file_name
        self.lock = Lock()
        try:
            # The older format knows a codec that unpickles.
            self.group: Any = zarr.open_group(self.path, mode="a", zarr_format=3, attributes=dict(attributes))
            earlier: Any = self.group.attrs.get("pictures", [])
            now = [printable(name) for name in names]
            if now[: len(earlier)] != earlier:
                raise BadValueError("its pictures are not in the manifest's order")
            self.group.attrs.update({"pictures": now})
            # What a killed run was writing.
            for unfinished in self.path.rglob("*.partial"):
                unfinished.unlink()
            for method, array in self.group.arrays():
                if method in methods and array.shape[0] < len(names):
                    array.resize((len(names), *array.shape[1:]))
        except Exception as error:
            raise BadValueError(
                f"{self.path}: expected a Zarr store of an earlier run, found something else or a broken one "
                f"({error}): give another --out"
            ) from error

    def paths(self, name: str) -> list[Path]:
        return [chunk for method in self.methods for chunk in self._chunks(method, name)]

    def has(self, name: str) -> bool:
        return all(self._chunks(method, name) for method in self.methods)

    def _chunks(self, method: str, name: str) -> list[Path]:
        folder = self.path / method / "c" / str(self.index[name])
        return [path for path in folder.rglob("0") if path.is_file()] if folder.exists() else []

    def write(self, name: str, picture: Picture, explanation: Found) -> None:
        for method, saliency in explanation.maps.items():
            with self.lock:
                array = self.group.get(method)
                if array is None:
                    shape = (len(self.index), *saliency.shape)
                    array = self.group.create_array(
                        method, shape=shape, chunks=(1, *saliency.shape), dtype="float32", fill_value=np.nan
                    )
            if array.shape[1:] != saliency.shape:
                raise BadValueError(
                    f"its map is {'x'.join(map(str, saliency.shape))}, the store's are "
                    f"{'x'.join(map(str, array.shape[1:]))}: --format npy takes maps of any size"
                )
            array[self.index[name]] = saliency


class GalleryParts(Output):
    """``gallery.html``, one page, put together of a part for each picture, which a later run takes up again.

    It shows what all runs wrote: pictures and methods.
    """

    file_name, suffix = "gallery.html", ".html"

    @classmethod
    def begin(cls, out: Path, methods: Sequence[str], manifest: Manifest) -> Self:
        return cls(out, methods)

    @classmethod
    def left(cls, out: Path, name: str, place: int) -> Iterable[Path]:
        return out.glob(f".gallery/*/{escape(name)}.json")

    def __init__(self, out: Path, methods: Sequence[str]) -> None:
        self.parts, self.page = out / ".gallery" / "+".join(methods), out / self.file_name

    def paths(self, name: str) -> list[Path]:
        return [self._path(name)]

    def write(self, name: str, picture: Picture, explanation: Found) -> None:
        seen = picture()
        if seen.ndim == 4:
            raise BadValueError("the gallery shows pictures, not clips: leave out --gallery")
        entry = gallery_entry(name, seen, explanation.maps, explanation.components, explanation.values)
        with _new_file(self._path(name)) as unfinished:
            unfinished.write_text(json.dumps(entry), encoding="utf-8")

    def finish(self, names: Iterable[str], title: str) -> None:
        """Write the page.

        Raises:
            OSError: it cannot be written.
            ValueError: a part is broken.
        """
        # This run's methods first.
        folders = dict.fromkeys([self.parts, *sorted(self.parts.parent.glob("*/"))])
        parts = ([path for folder in folders if (path := folder / f"{name}.json").is_file()] for name in names)
        write_gallery(self.page, title, (self._merged(paths) for paths in parts if paths))

    def _merged(self, paths: Sequence[Path]) -> dict[str, Any]:
        entry, *others = [self._entry(path) for path in paths]
        for other in others:
            entry["methods"] |= other["methods"]
        return entry

    def _entry(self, path: Path) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = json.loads(path.read_text("utf-8"))
            entry["picture"]
            entry["methods"] = dict(entry["methods"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadValueError(f"{path}: expected a part of the gallery, found a broken one: delete it") from error
        return entry

    def _path(self, name: str) -> Path:
        return self.parts / f"{name}.json"


FORMATS: dict[str, type[Output]] = {"overlay": Overlays, "npy": ArrayFiles, "zarr": ZarrStore}
"""By the name that a user asks for."""


class Manifest:
    """``manifest.json``: what the files in a folder are: of which model and layers, made with which versions.

    It also keeps the pictures' names, so that a later run, with more pictures or fewer, gives each the same one again,
    and when each was written and its size, so that a picture that changed since is explained again.

    Args:
        out: the folder.
        loaded: the model.
        aug_smooth: whether maps are smoothed.

    Raises:
        ValueError: the folder holds the maps of another model, of other weights, layers or smoothing, or of another
            engine; or its manifest is none.
    """

    def __init__(self, out: Path, loaded: LoadedModel, *, aug_smooth: bool) -> None:
        self.out, self.path, self.run = out, out / MANIFEST, identity(loaded, "torch", aug_smooth=aug_smooth)
        self.names: dict[str, str] = {}
        self.stamps: dict[str, Stamp] = {}
        self._is_ours = False
        if self.path.exists():
            content = read_manifest(self.path.read_text("utf-8", errors="surrogateescape"), self.run, str(out))
            try:
                for key, picture in content["pictures"].items():
                    self.names[key] = safe_name(picture["name"])
                    size = picture.get("size")
                    self.stamps[key] = Stamp(int(picture["modified"]), None if size is None else int(size))
                if len(set(self.names.values())) < len(self.names):
                    raise BadValueError("two pictures of one name")
            except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
                raise _no_manifest(out) from error
            self._is_ours = is_of_run(content, self.run, str(out), self._holds_maps)
            if not self._is_ours:
                self.names, self.stamps = {}, {}
        self._places = {key: place for place, key in enumerate(self.names)}

    def claim_folder(self) -> None:
        """Write the manifest of a new folder, so that whatever a killed run leaves is known to be of a run.

        A folder whose run came to no map is new too.

        Raises:
            ValueError: a store or a gallery is there, of which no manifest knows.
            OSError: it cannot be written.
        """
        if self._is_ours:
            return
        store = self.out / ZarrStore.file_name
        if self.path.exists():
            if store.exists():
                # Without a map, and made for those of another run.
                shutil.rmtree(store)
        else:
            for taken in (store, self.out / GalleryParts.file_name):
                if taken.exists():
                    raise not_of_a_run(taken)
        self.write()

    def add(self, sources: Iterable[Source]) -> dict[Source, str]:
        """Give each picture a name of its own, relative to the folder; the second ``cat`` becomes ``cat-2``."""
        taken = set(self.names.values())
        last: dict[str, int] = {}
        named = {}
        for source in sources:
            if source.key not in self.names:
                name = base = _apart_from_ours(source.name)
                while name in taken:
                    last[base] = last.get(base, 1) + 1
                    name = f"{base}-{last[base]}"
                self._places[source.key] = len(self.names)
                self.names[source.key] = name
                taken.add(name)
            named[source] = self.names[source.key]
        return named

    def remove_files(self, source: Source) -> None:
        """Remove what earlier runs wrote of a picture, which has changed since."""
        for path in self._left(self.names[source.key], self._places[source.key]):
            path.unlink()

    def _left(self, name: str, place: int) -> Iterator[Path]:
        return (path for kind in _kinds() for path in kind.left(self.out, name, place) if path.is_file())

    def _holds_maps(self) -> bool:
        ours = (item for item in enumerate(self.names.items()) if self.stamps[item[1][0]] != NOT_OURS)
        return any(True for place, (_, name) in ours for _ in self._left(name, place))

    def write(self) -> None:
        """Write the manifest.

        Raises:
            OSError: it cannot be written.
        """
        pictures = {key: {"name": name, **self.stamps[key]._asdict()} for key, name in self.names.items()}
        content = {**self.run, "versions": versions(), "pictures": pictures}
        with complete_or_absent(self.path) as unfinished:
            unfinished.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _kinds() -> list[type[Output]]:
    return [*FORMATS.values(), GalleryParts]


def _apart_from_ours(name: str) -> str:
    """Change the parts of a name that would be hidden, and its folders that could be called as a file of ours."""
    suffixes = (".json", *(kind.suffix for kind in _kinds()))
    *folders, last = (f"_{part}" if part.startswith(".") else part for part in PurePosixPath(name).parts)
    return "/".join([*(f"{part}_" if part.lower().endswith(suffixes) else part for part in folders), last])


def identity(loaded: LoadedModel, engine: Engine, *, aug_smooth: bool) -> dict[str, Any]:
    """Return what all maps of a folder have in common."""
    return {
        "engine": engine,
        "model": loaded.name,
        "weights": loaded.digest(),
        "layers": loaded.layer_names,
        "aug_smooth": aug_smooth,
    }


def read_manifest(manifest: str, run: Mapping[str, Any], out: str) -> dict[str, Any]:
    """Return the content of an earlier run's manifest.

    Raises:
        ValueError: it is none, or another engine's, which keeps maps and their list in its own way.
    """
    try:
        content: dict[str, Any] = json.loads(manifest)
        # Older manifests do not say it; Ray's tables are the list of its pictures.
        content.setdefault("engine", "torch" if "pictures" in content else "ray")
        found = {key: content[key] for key in run}
    except (AttributeError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _no_manifest(out) from error
    if found["engine"] != run["engine"]:
        raise _other_run(out, "engine", found["engine"], run["engine"])
    return content


def is_of_run(content: Mapping[str, Any], run: Mapping[str, Any], out: str, holds_maps: Callable[[], bool]) -> bool:
    """Tell whether a folder is one of this run, and not of another that came to no map.

    Raises:
        ValueError: it holds the maps of another run.
    """
    for key, value in run.items():
        if content[key] != value:
            if holds_maps():
                raise _other_run(out, key, content[key], value)
            return False
    return True


def _other_run(out: str, key: str, found: object, now: object) -> ValueError:
    return BadValueError(f"{out}: holds the maps of another run ({key}: {found}, now {now}): give another --out")


def not_of_a_run(taken: Path | str) -> ValueError:
    """Return the error of a folder that holds what no manifest knows."""
    return BadValueError(f"{taken}: is there already, and not of a run in this folder: give another --out")


def _no_manifest(out: Path | str) -> ValueError:
    return BadValueError(f"{out}: expected {MANIFEST} of an earlier run, found something else: give another --out")


def versions() -> dict[str, str]:
    """Return the versions of what computed the maps."""
    return {"tucker-cam": __version__, "python": platform.python_version()} | {
        name: version(name) for name in _PACKAGES
    }


def _new_file(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return complete_or_absent(path)
