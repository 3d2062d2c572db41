"""Writes explanations to files: overlays, maps and the gallery, each complete or absent. Each kind is one class."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from glob import escape
from math import nan
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tucker_cam.errors import BadValueError
from tucker_cam.methods import METHODS, name_in_files
from tucker_cam.text import printable
from tucker_cam.writing import complete_or_absent

# Heavy packages are imported where they are used: the command line only lists the formats.
if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tucker_cam.explanations.explanation import Explanation, Look
    from tucker_cam.explanations.manifest import Manifest


STORE, PAGE = "maps.zarr", "gallery.html"
_MARK = "tucker_cam look"
"""The key in an overlay's PNG under which it says how it was drawn."""


class Output(ABC):
    """One kind of file that is made for each explanation. Several threads may write at once.

    Args:
        manifest: the folder's manifest, which knows the pictures' names.
        methods: the names of the methods.
        look: how overlays are drawn.
    """

    def __init__(self, manifest: Manifest, methods: Sequence[str], look: Look) -> None:
        self.manifest, self.methods, self.look = manifest, methods, look

    @classmethod
    @abstractmethod
    def left(cls, manifest: Manifest, key: str) -> Iterable[Path]:
        """Return the files that runs with any methods may have left for a picture, given by its key in the manifest."""

    @abstractmethod
    def paths(self, key: str) -> Sequence[Path]:
        """Return the paths of a picture's files, whether or not they exist yet."""

    def has(self, key: str) -> bool:
        """Return whether all of a picture's files are there."""
        return all(map(_is_whole, self.paths(key)))

    @abstractmethod
    def write(self, explanation: Explanation) -> None:
        """Write the files of a picture; OSError or ValueError if they cannot be written."""


def _is_whole(path: Path) -> bool:
    """Return whether a file is there and not empty, as it can be after a power failure."""
    return path.is_file() and path.stat().st_size > 0


class MethodFiles(Output):
    """A file for each method: ``NAME_METHOD`` and a suffix; see `name_in_files`."""

    suffix: str

    @classmethod
    def left(cls, manifest: Manifest, key: str) -> Iterable[Path]:
        return [cls.path(manifest, key, method) for method in {*METHODS, *manifest.methods}]

    def paths(self, key: str) -> list[Path]:
        return [self.path(self.manifest, key, method) for method in self.methods]

    def write(self, explanation: Explanation) -> None:
        for method, saliency in explanation.maps.items():
            path = self.path(self.manifest, explanation.source.key, method)
            path.parent.mkdir(parents=True, exist_ok=True)
            with complete_or_absent(path) as unfinished:
                self.save(unfinished, explanation, saliency)

    @abstractmethod
    def save(self, path: Path, explanation: Explanation, saliency: NDArray[np.float32]) -> None:
        """Write the file of one method; the path ends in the suffix."""

    @classmethod
    def path(cls, manifest: Manifest, key: str, method: str) -> Path:
        return manifest.folder / f"{manifest.names[key]}_{name_in_files(method)}{cls.suffix}"


class Overlays(MethodFiles):
    """The map over the picture; for a clip, an animation over what the network saw.

    The file says how it was drawn. Overlays in another look are drawn again for the pictures and methods of the current
    run; all other overlays stay as they are.
    """

    suffix = ".png"

    def has(self, key: str) -> bool:
        return all(_look_of(path) == self.look for path in self.paths(key))

    def save(self, path: Path, explanation: Explanation, saliency: NDArray[np.float32]) -> None:
        from PIL.PngImagePlugin import PngInfo

        about = PngInfo()
        about.add_text(_MARK, json.dumps(self.look._asdict(), default=float))
        if saliency.ndim == 2:
            # Twice as fast as Pillow's default, and a few per cent larger.
            explanation.drawn(saliency, self.look).save(path, compress_level=1, pnginfo=about)
            return
        seen = explanation.network.picture(explanation.network_input)
        first, *others = [self.look.draw(frame, each) for frame, each in zip(seen, saliency, strict=True)]
        first.save(path, save_all=True, append_images=others, pnginfo=about)


def _look_of(path: Path) -> Look | None:
    """Return the look that an overlay was drawn in; None if there is no overlay, or only somebody else's file."""
    from PIL import Image

    from tucker_cam.explanations.explanation import Look

    try:
        with Image.open(path) as overlay:
            look = Look(**json.loads(overlay.info[_MARK]))
        look.check()
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return look


class ArrayFiles(MethodFiles):
    """The map, float32 in [0, 1]."""

    suffix = ".npy"

    def save(self, path: Path, explanation: Explanation, saliency: NDArray[np.float32]) -> None:
        import numpy

        numpy.save(path, saliency)


class ZarrStore(Output):
    """``maps.zarr``: one array for each method, pictures x height x width, in the order of the manifest.

    Each picture is one chunk, which the store writes whole or not at all; a missing chunk reads as NaN.
    """

    @classmethod
    def left(cls, manifest: Manifest, key: str) -> Iterable[Path]:
        return manifest.folder.glob(f"{STORE}/*/c/{manifest.places[key]}/**/0")

    def __init__(self, manifest: Manifest, methods: Sequence[str], look: Look) -> None:
        import zarr

        super().__init__(manifest, methods, look)
        self.path = manifest.folder / STORE
        self.lock = Lock()
        try:
            # The older format has a codec that unpickles data.
            self.group: Any = zarr.open_group(self.path, mode="a", zarr_format=3, attributes=dict(manifest.run))
            earlier: Any = self.group.attrs.get("pictures", [])
            now = [printable(name) for name in manifest.names.values()]
            if now[: len(earlier)] != earlier:
                raise BadValueError("its pictures are not in the manifest's order")
            self.group.attrs.update({"pictures": now})
            # Left by a killed run.
            for unfinished in self.path.rglob("*.partial"):
                unfinished.unlink()
            for method, array in self.group.arrays():
                if method in methods and array.shape[0] < len(now):
                    array.resize((len(now), *array.shape[1:]))
        except Exception as error:
            raise BadValueError(
                f"{self.path}: expected a Zarr store of an earlier run, found something else or a broken one "
                f"({error}): choose another folder"
            ) from error

    def paths(self, key: str) -> list[Path]:
        return [self.path / method / "c" / str(self.manifest.places[key]) for method in self.methods]

    def has(self, key: str) -> bool:
        return all(any(map(_is_whole, folder.rglob("0"))) for folder in self.paths(key))

    def write(self, explanation: Explanation) -> None:
        for method, saliency in explanation.maps.items():
            with self.lock:
                array = self.group.get(method)
                if array is None:
                    shape, chunks = ((length, *saliency.shape) for length in (len(self.manifest.names), 1))
                    array = self.group.create_array(method, shape=shape, chunks=chunks, dtype="float32", fill_value=nan)
            if array.shape[1:] != saliency.shape:
                raise BadValueError(
                    f"its map is {'x'.join(map(str, saliency.shape))}, the store's are "
                    f"{'x'.join(map(str, array.shape[1:]))}: the format npy takes maps of any size"
                )
            array[self.manifest.places[explanation.source.key]] = saliency


class GalleryParts(Output):
    """``gallery.html``: one page, assembled from a part for each picture; a later run uses the parts again."""

    @classmethod
    def left(cls, manifest: Manifest, key: str) -> Iterable[Path]:
        return manifest.folder.glob(f".gallery/*/{escape(manifest.names[key])}.json")

    def paths(self, key: str) -> list[Path]:
        return [self._path(key, self.methods)]

    def _path(self, key: str, methods: Iterable[str]) -> Path:
        return self.manifest.folder / ".gallery" / "+".join(methods) / f"{self.manifest.names[key]}.json"

    def write(self, explanation: Explanation) -> None:
        from tucker_cam.explanations.gallery import gallery_entry

        key = explanation.source.key
        # Without the methods that failed, so that the next run finds this part missing and tries them again.
        name, path = self.manifest.names[key], self._path(key, explanation.maps)
        entry = gallery_entry(name, explanation.seen, explanation.maps, explanation.components, explanation.values)
        path.parent.mkdir(parents=True, exist_ok=True)
        with complete_or_absent(path) as unfinished:
            unfinished.write_text(json.dumps(entry), encoding="utf-8")


def gallery_entries(manifest: Manifest, title: str, page: Path) -> Iterator[dict[str, Any]]:
    """Yield an entry for each picture of a run, with the methods of all its parts, and links to their overlays.

    The title is appended to each name; links are relative to the folder `page`. ValueError if a part is broken.
    """
    for key in manifest.names:
        entry: dict[str, Any] = {"methods": {}}
        for path in sorted(GalleryParts.left(manifest, key)):
            try:
                part = json.loads(path.read_text("utf-8"))
                entry |= part | {"methods": entry["methods"] | part["methods"]}
            except (ValueError, KeyError, TypeError) as error:
                raise BadValueError(f"{path}: expected a part of the gallery, found a broken one: delete it") from error
        for method, shown in entry["methods"].items():
            overlay = Overlays.path(manifest, key, method)
            if look := _look_of(overlay):
                shown["file"] = quote(bytes(overlay.relative_to(page)))
                shown["colormap"] = look.colormap
        if entry["methods"]:
            yield entry | {"name": f"{entry['name']}{title}"}


FORMATS: dict[str, type[Output]] = {"overlay": Overlays, "npy": ArrayFiles, "zarr": ZarrStore}
"""The kinds of files, by the name that a user gives."""
