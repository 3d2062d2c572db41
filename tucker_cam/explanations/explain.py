"""Whatever holds pictures, a model and methods in, one explanation after the other out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pytorch_grad_cam.base_cam import BaseCAM
from torch import Tensor, nn

from tucker_cam.errors import BadTypeError, BadValueError, Failure
from tucker_cam.explanations.explainer import Explainer
from tucker_cam.explanations.explanation import Explanation
from tucker_cam.methods import method_named
from tucker_cam.models import LoadedModel, Network, load_model
from tucker_cam.models.families import preprocessed
from tucker_cam.pictures.sources import Source, find_sources
from tucker_cam.pictures.view import view_of
from tucker_cam.text import counted, one_line

Pictures = str | Path | Image.Image | NDArray[Any] | Tensor | Iterable[Any]
# Of a long run, what a notebook shows.
_MOST_SHOWN = 24


def explain(
    pictures: Pictures,
    model: str | nn.Module | Network = "demo",
    methods: str | Sequence[str] | Mapping[str, Callable[..., BaseCAM]] = "tsm",
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    layers: Sequence[str | int | nn.Module] = (),
    device: str | torch.device | None = None,
    batch_size: int = 8,
    aug_smooth: bool = False,
    components: bool = False,
) -> Explanations:
    """Explain pictures by label-free methods, with one forward pass of each batch for all of them.

    Args:
        pictures: a file, a folder, a glob, a URL or a Parquet file; a PIL image; an array height x width x 3 (uint8, or
            floating point in [0, 1]); a list of these; a batch of network inputs, batch x channels x height x width; or
            an iterable of such batches, a DataLoader say, of which the first part of a tuple is taken.
        model: a name or a module as for `load_model`, or what that returns.
        methods: names as on the command line; or classes of the host's kind, by a name of yours.
        weights: see `load_model`.
        pretrained: see `load_model`.
        layers: see `load_model`.
        device: see `load_model`.
        batch_size: how many pictures go through the network together.
        aug_smooth: average over flips and brightness.
        components: find the single components of MTSM too.

    Returns:
        An iterable that does the work while it is gone through, and again when it is gone through again.

    Raises:
        TypeError, ValueError: what was given holds no pictures; an unknown method, or a bad size of the batch.
        ModuleNotFoundError, OSError: see `load_model`; ValueError and TypeError too.

    Example:
        >>> picture = np.zeros((40, 60, 3), np.uint8)
        >>> (explanation,) = explain(picture, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), layers=["0"])
        >>> explanation.maps["tsm"].shape, explanation.overlay().size
        ((224, 224), (60, 40))
    """
    names = [methods] if isinstance(methods, str) else methods
    chosen = dict(names) if isinstance(names, Mapping) else {name: method_named(name) for name in names}
    if not chosen:
        raise BadValueError("expected at least one method, got none")
    if batch_size < 1:
        raise BadValueError(f"expected a batch_size of at least 1, got {batch_size}")
    items, length, failures = _items(pictures)
    given = {"weights": weights, "pretrained": pretrained, "layers": layers, "device": device}
    loaded = model if isinstance(model, LoadedModel) else load_model(model, **given)  # type: ignore[arg-type]
    explainer = Explainer(loaded, chosen, aug_smooth=aug_smooth, components=components)
    return Explanations(explainer, items, length, failures, batch_size)


class Explanations:
    """One explanation after the other; the work is done while this is gone through.

    Attributes:
        loaded: the model, with its layers.
        failures: the pictures that could not be read or explained, as far as it was gone through the last time.
    """

    def __init__(
        self,
        explainer: Explainer,
        items: Callable[[], Iterator[_Item]],
        length: int | None,
        failures: Sequence[Failure],
        batch_size: int,
    ) -> None:
        self.loaded = explainer.loaded
        self.failures = list(failures)
        self._explainer, self._items, self._length = explainer, items, length
        self._unusable, self._batch_size = list(failures), batch_size

    def __len__(self) -> int:
        """Return how many pictures there are, those that fail included; TypeError where that is not known."""
        if self._length is None:
            raise BadTypeError("the number of pictures is not known before they were gone through")
        return self._length

    def __iter__(self) -> Iterator[Explanation]:
        self.failures = list(self._unusable)
        items = self._items()
        while batch := list(islice(items, self._batch_size)):
            read = [self._read(item) for item in batch]
            found = self._explainer.explain([each if isinstance(each, Exception) else each[1] for each in read])
            for item, each, result in zip(batch, read, found, strict=True):
                if isinstance(result, Exception):
                    self.failures.append(Failure(item.name, result))
                elif not isinstance(each, Exception):
                    picture, network_input = each
                    saw = self.loaded.picture(network_input)
                    seen = saw if saw.ndim == 3 else saw[0]
                    view = None
                    if picture is not None:
                        view = view_of(self.loaded.preprocess, picture.size, self.loaded.frames)
                    whole = Image.fromarray(np.uint8(255 * seen)) if picture is None else picture
                    yield Explanation(item.name, whole, seen, view, result.maps, result.components, result.values)

    def save(self, folder: str | Path) -> list[Path]:
        """Write the overlays of all, and return the files; what fails is in `failures`.

        Raises:
            OSError: they cannot be written.
        """
        return [path for explanation in self for path in explanation.save(folder)]

    def _read(self, item: _Item) -> tuple[Image.Image | None, Tensor] | Exception:
        if isinstance(item.content, Tensor):
            return None, item.content
        loaded = self.loaded
        try:
            content = item.content
            frames = content.read(loaded.frames) if isinstance(content, Source) else content
            if loaded.frames is not None and isinstance(frames, Image.Image):
                frames = [frames] * loaded.frames
            first = frames if isinstance(frames, Image.Image) else frames[0]
            return first, preprocessed(loaded.preprocess, frames, item.name)
        except (OSError, ValueError) as error:
            return error

    def __repr__(self) -> str:
        count = "pictures" if self._length is None else counted(self._length)
        return f"<Explanations of {count} by {', '.join(self._explainer.methods)}; {self.loaded.description}>"

    def _repr_html_(self) -> str:
        """Show the first explanations in a notebook."""
        shown = "".join(explanation._repr_html_() for explanation in islice(self, _MOST_SHOWN))
        failed = "".join(f"<p>{failure.name}: {one_line(failure.error)}</p>" for failure in self.failures)
        more = self._length is not None and self._length > _MOST_SHOWN
        return shown + failed + (f"<p>the first {_MOST_SHOWN} of {self._length}</p>" if more else "")


class _Item(NamedTuple):
    name: str
    content: Source | Image.Image | Tensor


def _items(pictures: Pictures) -> tuple[Callable[[], Iterator[_Item]], int | None, list[Failure]]:
    """Return what yields the pictures, how many there are, and what cannot be used."""
    if isinstance(pictures, (str, Path, Image.Image, np.ndarray)):
        pictures = [pictures]
    if isinstance(pictures, Tensor):
        if pictures.dim() not in (4, 5):
            raise BadValueError(
                f"expected a batch of network inputs, batch x channels x height x width, got {tuple(pictures.shape)}: "
                "a single one needs images[None]"
            )
        batch = pictures
        return lambda: _of_batch(batch, 0), len(batch), []
    if isinstance(pictures, (list, tuple)) and not any(isinstance(each, Tensor) for each in pictures):
        return _of_list(pictures)
    if not isinstance(pictures, Iterable):
        raise BadTypeError(
            "expected pictures as a path, a PIL image, an array, a list of these, a tensor, or batches of tensors, got "
            f"{type(pictures).__name__}"
        )
    batches = pictures
    return lambda: _of_batches(batches), None, []


def _of_list(pictures: Sequence[object]) -> tuple[Callable[[], Iterator[_Item]], int, list[Failure]]:
    items: list[_Item] = []
    failures: list[Failure] = []
    for index, each in enumerate(pictures):
        if isinstance(each, (str, Path)):
            try:
                sources, unusable = find_sources([str(each)])
            except ValueError as error:
                failures.append(Failure(str(each), error))
                continue
            items += [_Item(source.name, source) for source in sources]
            failures += unusable
        elif isinstance(each, Image.Image):
            items.append(_Item(f"picture-{index}", ImageOps.exif_transpose(each).convert("RGB")))
        elif isinstance(each, np.ndarray):
            items.append(_Item(f"picture-{index}", _from_array(each)))
        else:
            raise BadTypeError(
                f"expected a path, a PIL image or an array as picture {index}, got {type(each).__name__}"
            )
    if not items:
        raise failures[0].error if failures else BadValueError("expected pictures, got an empty list")
    return lambda: iter(items), len(items), failures


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


def _of_batch(batch: Tensor, start: int) -> Iterator[_Item]:
    return (_Item(f"{start + index:06d}", image) for index, image in enumerate(batch))


def _of_batches(batches: Iterable[Any]) -> Iterator[_Item]:
    done = 0
    for batch in batches:
        images = batch[0] if isinstance(batch, (list, tuple)) else batch
        if not isinstance(images, Tensor) or images.dim() not in (4, 5):
            raise BadTypeError(
                f"expected batches of network inputs, batch x channels x height x width, got {type(images).__name__}"
            )
        yield from _of_batch(images, done)
        done += len(images)
