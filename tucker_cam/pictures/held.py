"""What a program holds in, pictures that are read as files are out: images, arrays, network inputs, loaders."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from tucker_cam.errors import BadTypeError, BadValueError, Failure
from tucker_cam.pictures.sources import Source, Stamp, find_sources, random_sample

Pictures = str | Path | Image.Image | NDArray[Any] | Tensor | Iterable[Any]


@dataclass(frozen=True, eq=False)
class Held:
    """A picture, or a network's input, that the program holds; it is read as a `Source` is.

    Attributes:
        name: its place among the others.
        content: channels x height x width if it is a network's input.
    """

    name: str
    content: Image.Image | Tensor

    def __str__(self) -> str:
        return self.name

    @property
    def key(self) -> str:
        return self.name

    @property
    def stamp(self) -> Stamp:
        """What tells whether it is another one than that of an earlier run."""
        if isinstance(self.content, Tensor):
            numbers = self.content.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        else:
            numbers = np.asarray(self.content)
        return Stamp(zlib.crc32(numbers.tobytes()), numbers.nbytes)

    def read(self, frames: int | None = None) -> Image.Image | list[Image.Image] | Tensor:
        return self.content if frames is None or isinstance(self.content, Tensor) else [self.content] * frames


Picture = Source | Held


class Collection(NamedTuple):
    """Pictures to explain.

    Attributes:
        parts: yields them, in lists; again when it is called again.
        number: how many there are; None where that is not known.
        failures: what cannot be used.
    """

    parts: Callable[[], Iterator[Sequence[Picture]]]
    number: int | None
    failures: list[Failure]


def collect(pictures: Pictures, *, out: Path | None = None, limit: int | None = None) -> Collection:
    """Return the pictures that were named or given, as `explain` takes them.

    Args:
        pictures: see `explain`.
        out: see `find_sources`.
        limit: see `random_sample`.

    Raises:
        TypeError, ValueError: what was given holds no pictures.
    """
    if isinstance(pictures, (str, Path, Image.Image, np.ndarray)):
        pictures = [pictures]
    if isinstance(pictures, Tensor):
        return _listed(_of_batch(pictures, 0), [], limit)
    if isinstance(pictures, (list, tuple)) and not any(isinstance(each, Tensor) for each in pictures):
        return _listed(*_of_list(pictures, out), limit)
    if not isinstance(pictures, Iterable):
        raise BadTypeError(
            "expected pictures as a path, a PIL image, an array, a list of these, a tensor, or batches of tensors, got "
            f"{type(pictures).__name__}"
        )
    if limit is not None:
        raise BadValueError("expected no limit where the number of pictures is not known: take as many batches")
    batches = pictures
    return Collection(lambda: _of_batches(batches), None, [])


def _listed(pictures: Sequence[Picture], failures: list[Failure], limit: int | None) -> Collection:
    chosen = random_sample(pictures, limit)
    return Collection(lambda: iter([chosen]), len(chosen), failures)


def _of_list(pictures: Sequence[object], out: Path | None) -> tuple[list[Picture], list[Failure]]:
    if pictures and all(isinstance(each, (str, Path)) for each in pictures):
        sources, failures = find_sources([str(each) for each in pictures], out=out)
        return [*sources], failures
    found: list[Picture] = []
    failures = []
    for index, each in enumerate(pictures):
        if isinstance(each, (str, Path)):
            try:
                sources, problems = find_sources([str(each)], out=out)
            except (BadValueError, ImportError) as error:
                sources, problems = [], [Failure(str(each), error)]
            found, failures = [*found, *sources], failures + problems
        elif isinstance(each, Image.Image):
            found.append(Held(f"picture-{index}", ImageOps.exif_transpose(each).convert("RGB")))
        elif isinstance(each, np.ndarray):
            found.append(Held(f"picture-{index}", _from_array(each)))
        else:
            raise BadTypeError(f"expected a path, an image or an array as picture {index}, got {type(each).__name__}")
    if not found:
        raise failures[0].error if failures else BadValueError("expected pictures, got an empty list")
    return found, failures


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise BadValueError(f"expected a picture as height x width x 3, got {array.shape}")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise BadValueError("expected a floating point picture in [0, 1], got numbers outside: divide by 255")
        array = np.rint(255 * array).astype(np.uint8)
    if array.dtype != np.uint8:
        raise BadTypeError(f"expected a picture of uint8, or of floating point in [0, 1], got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def _of_batches(batches: Iterable[Any]) -> Iterator[list[Picture]]:
    done = 0
    for batch in batches:
        yield (held := _of_batch(batch[0] if isinstance(batch, (list, tuple)) else batch, done))
        done += len(held)


def _of_batch(images: object, start: int) -> list[Picture]:
    if not isinstance(images, Tensor):
        raise BadTypeError(f"expected batches of network inputs as tensors, got {type(images).__name__}")
    if images.dim() not in (4, 5):
        raise BadValueError(
            f"expected a batch of network inputs, batch x channels x height x width, got {tuple(images.shape)}: "
            "a single one needs images[None]"
        )
    return [Held(f"{start + index:06d}", image) for index, image in enumerate(images)]
