"""Lets images, arrays, network inputs and loaders that a program holds be read like pictures in files."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tucker_cam.errors import BadFileError, BadTypeError, BadValueError, Failure
from tucker_cam.pictures.files import decoded
from tucker_cam.pictures.sources import Source, Stamp, check_limit, find_sources, random_sample

Pictures = str | Path | Image.Image | NDArray[Any] | Tensor | Iterable[Any]


@dataclass(frozen=True, eq=False)
class Held:
    """A picture, or a network's input, that the program holds; it is read like a `Source` and named by its position."""

    name: str
    content: Image.Image | Tensor

    def __str__(self) -> str:
        return self.name

    @property
    def key(self) -> str:
        return self.name

    @property
    def stamp(self) -> Stamp:
        """A checksum and a size, which tell whether the content differs from that of an earlier run."""
        numbers = np.asarray(self.content.detach().cpu().float() if isinstance(self.content, Tensor) else self.content)
        return Stamp(zlib.crc32(numbers.tobytes(), zlib.crc32(str(numbers.shape).encode())), numbers.nbytes)

    def read(self, frames: int | None = None) -> Image.Image | list[Image.Image] | Tensor:
        return self.content if frames is None or isinstance(self.content, Tensor) else [self.content] * frames


Picture = Source | Held


def first_frame(content: Image.Image | Sequence[Image.Image] | Tensor) -> Image.Image | None:
    """Return the picture that was read, or a clip's first frame; None for a network's input."""
    if isinstance(content, Tensor):
        return None
    return content if isinstance(content, Image.Image) else content[0]


def size_of(content: Image.Image | Sequence[Image.Image] | Tensor) -> tuple[int, int] | None:
    """Return the width and height of the picture that was read; None for a network's input."""
    frame = first_frame(content)
    return None if frame is None else frame.size


class Collection(NamedTuple):
    """Pictures to explain: each call of `parts` yields them all, in lists; `number` is None if it is not known.

    `example` is a batch of one network input, if the pictures are network inputs.
    """

    parts: Callable[[], Iterator[Sequence[Picture]]]
    number: int | None
    failures: list[Failure]
    example: Tensor | None = None


def collect(pictures: Pictures, *, out: Path | None = None, limit: int | None = None) -> Collection:
    """Return the pictures that `explain` was given, as paths or objects; TypeError or ValueError if there are none."""
    if isinstance(pictures, (str, Path, Image.Image, np.ndarray)):
        pictures = [pictures]
    if not isinstance(pictures, Iterable):
        raise BadTypeError(
            "expected pictures as a path, a PIL image, an array, a list of these, a tensor, or batches of tensors, got "
            f"{type(pictures).__name__}"
        )
    failures: list[Failure] = []
    example = None
    if isinstance(pictures, Tensor):
        if not len(pictures):
            raise BadValueError("expected pictures, got an empty batch")
        found, example = next(_of_batches([pictures])), pictures[:1]
    elif isinstance(pictures, (list, tuple)) and not any(isinstance(each, (Tensor, list, tuple)) for each in pictures):
        found, failures = _of_list(pictures, out)
    else:
        check_limit(limit)
        times: Iterator[Iterable[Any]] = iter([pictures]) if isinstance(pictures, Iterator) else repeat(pictures)
        # The first batch is looked at here, and still comes first in the iteration.
        batches = iter(_next_time(times))
        first = [*islice(batches, 1)]
        for _, images, _ in named_inputs(first):
            example = images[:1]
        times = chain([chain(first, batches)], times)
        return Collection(lambda: _first(_of_batches(_next_time(times)), limit), None, [], example)
    chosen = random_sample(found, limit)
    return Collection(lambda: iter([chosen]), len(chosen), failures, example)


def _next_time(times: Iterator[Iterable[Any]]) -> Iterable[Any]:
    for batches in times:
        return batches
    raise BadValueError("expected batches that can be iterated over again, got an iterator: give a list of them")


def named_inputs(batches: Iterable[Any]) -> Iterator[tuple[list[str], Tensor, list[Any]]]:
    """Yield for each batch its inputs' names (their numbers among all inputs), the inputs, and what came with them."""
    done = 0
    for batch in batches:
        images, *others = batch if isinstance(batch, (list, tuple)) else (batch,)
        if not isinstance(images, Tensor):
            raise BadTypeError(
                f"expected batches of network inputs, got {type(images).__name__}: explain takes pictures and paths in "
                "a list, evaluate takes the folder that they are in, and both take the tensor in a dict, not the dict"
            )
        if images.dim() not in (4, 5):
            raise BadValueError(
                f"expected a batch of network inputs, batch x channels x height x width, got {tuple(images.shape)}: "
                "give a single input as images[None], and a single batch with labels or masks as [(images, labels)]"
            )
        yield [f"{done + index:06d}" for index in range(len(images))], images, others
        done += len(images)


def _of_batches(batches: Iterable[Any]) -> Iterator[list[Picture]]:
    for names, images, _ in named_inputs(batches):
        yield [Held(name, image) for name, image in zip(names, images, strict=True)]


def _first(parts: Iterator[list[Picture]], limit: int | None) -> Iterator[list[Picture]]:
    for part in parts:
        yield part[:limit]
        limit = None if limit is None else limit - len(part)
        if limit is not None and limit <= 0:
            return


def _of_list(pictures: Sequence[Any], out: Path | None) -> tuple[list[Picture], list[Failure]]:
    found: dict[str, Picture] = {}
    failures: list[Failure] = []
    for index, each in enumerate(pictures):
        if isinstance(each, (str, Path)):
            sources, problems = find_sources([str(each)], out=out)
            found |= {source.key: source for source in sources}
            failures += problems
            continue
        name = f"picture-{index}"
        try:
            found[name] = Held(name, _as_picture(each, name))
        except BadFileError as error:
            failures.append(Failure(name, error))
    if not found:
        raise BadValueError("; ".join(str(each.error) for each in failures) or "expected pictures, got an empty list")
    return [*found.values()], failures


def _as_picture(given: Any, name: str) -> Image.Image:
    if isinstance(given, Image.Image):
        return decoded(given, name)
    if not isinstance(given, np.ndarray):
        raise BadTypeError(f"expected a path, an image or an array as {name}, got {type(given).__name__}")
    if given.ndim < 2 or given.shape[2:] not in [(), (3,)] or 0 in given.shape:
        raise BadValueError(
            "expected a picture as height x width x 3, in grey height x width, or a PIL image, got an array of "
            f"{given.shape}"
        )
    if np.issubdtype(given.dtype, np.floating):
        if not (given.min() >= 0 and given.max() <= 1):
            raise BadValueError("expected a floating point picture in [0, 1], got numbers outside: divide by 255")
        given = np.rint(255 * given).astype(np.uint8)
    if given.dtype != np.uint8:
        raise BadTypeError(f"expected a picture of uint8, or of floating point in [0, 1], got {given.dtype}")
    return Image.fromarray(given).convert("RGB")
