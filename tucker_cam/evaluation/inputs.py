"""A folder of pictures, or batches of network inputs, in, what the network sees of each out: read ahead, by batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from tucker_cam.errors import BadTypeError, BadValueError, Failure
from tucker_cam.models import LoadedModel, Network, load_model
from tucker_cam.models.loading import Loading
from tucker_cam.pictures.ahead import in_batches, read_ahead
from tucker_cam.pictures.annotations import Annotations, NetworkView, Sample, find_samples, network_view
from tucker_cam.progress import progress
from tucker_cam.text import counted

Data = str | Path | Tensor | Iterable[Any]
Model = str | nn.Module | Network
Views = dict[str, NetworkView]


def load_one_layer(model: Model, **options: Unpack[Loading]) -> LoadedModel:
    """Return the model, loaded as by `load_model`, if it has one layer of pictures.

    Raises:
        ValueError: it is a video network, or several layers were asked for.
    """
    loaded = load_model(model, **options)
    if loaded.frames is not None:
        raise BadValueError(f"expected a network for pictures, and {loaded.name} takes clips")
    if len(loaded.layers) > 1:
        raise BadValueError(f"expected one layer to score, got {', '.join(loaded.layer_names)}")
    return loaded


def find_inputs(data: Data, annotations: Annotations | None, limit: int | None) -> FolderInputs | BatchInputs:
    """Return what reads the pictures.

    Raises:
        TypeError, ValueError, OSError: there are none, see `find_samples`.
    """
    if isinstance(data, (str, Path)):
        return FolderInputs(Path(data), annotations, limit)
    if annotations is not None:
        raise BadValueError(f"expected a folder for annotations={annotations!r}, got batches: give their masks")
    return BatchInputs([data] if isinstance(data, Tensor) else data, limit)


class FolderInputs:
    """The pictures of a folder, with their boxes or masks.

    Attributes:
        where: the folder.
        annotations: of which kind they are.
        remarks: on files that were not taken.
        samples: the pictures, by their names.
        total: how many there are.
    """

    def __init__(self, folder: Path, annotations: Annotations | None, limit: int | None) -> None:
        samples, self.annotations, self.remarks = find_samples(folder, annotations=annotations, limit=limit)
        self.where = str(folder.resolve())
        self.samples = {sample.name: sample for sample in samples}
        self.total = len(samples)

    def batches(self, loaded: LoadedModel, size: int, workers: int | None) -> Iterator[list[_Read]]:
        """Yield what was read, cut into batches the same way in every run."""
        # The model itself stays in this process.
        network = Network(nn.Identity(), loaded.preprocess, loaded.mean, loaded.std)
        read = partial(_read, annotations=self.annotations, network=network)
        return read_ahead(in_batches(list(self.samples.values()), size), read, workers)


_Read = tuple[str, NetworkView | Exception]


def _read(samples: Sequence[Sample], annotations: Annotations, network: Network) -> list[_Read]:
    read: list[_Read] = []
    for sample in samples:
        try:
            read.append((sample.name, network_view(sample, annotations, network)))
        except (OSError, ValueError) as error:
            read.append((sample.name, error))
    return read


class BatchInputs:
    """Batches of network inputs, or of these and masks, gone through once; attributes as of `FolderInputs`."""

    def __init__(self, batches: Iterable[Any], limit: int | None) -> None:
        images = islice(_of_batches(batches), limit)
        first = next(images, None)
        if first is None:
            raise BadValueError("expected batches of network inputs, got none")
        self.where, self.annotations = "batches", "none" if first[1] is None else "masks"
        self.remarks: list[str] = []
        dataset = getattr(batches, "dataset", None)
        self.total = min(len(dataset), limit or len(dataset)) if isinstance(dataset, Sized) else None
        self._images = enumerate(chain([first], images))

    def batches(self, loaded: LoadedModel, size: int, workers: int | None) -> Iterator[list[_Read]]:
        """Yield them in batches of this size; they come as fast as they come."""
        while batch := list(islice(self._images, size)):
            yield [(f"{index:06d}", _view(image, mask)) for index, (image, mask) in batch]


def _of_batches(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
    for batch in batches:
        images, *others = batch if isinstance(batch, (list, tuple)) else (batch,)
        # A data set's labels are of no use here.
        masks = others[0] if others and isinstance(others[0], Tensor) and others[0].dim() > 1 else None
        if not isinstance(images, Tensor) or images.dim() != 4:
            found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise BadTypeError(f"expected batches of network inputs, batch x channels x height x width, got {found}")
        if masks is not None and (masks.dtype != torch.bool or (len(images), *images.shape[-2:]) != masks.shape):
            raise BadTypeError(
                f"expected masks of bool, batch x height x width, for images {tuple(images.shape)}, got {masks.dtype}, "
                f"{tuple(masks.shape)}"
            )
        yield from zip(images, [None] * len(images) if masks is None else masks, strict=True)


def _view(image: Tensor, mask: Tensor | None) -> NetworkView:
    return NetworkView(image, torch.zeros(image.shape[-2:], dtype=torch.bool) if mask is None else mask, [])


def go_through(
    inputs: FolderInputs | BatchInputs,
    loaded: LoadedModel,
    work: Callable[[Views], None],
    title: str,
    batch_size: int,
    workers: int | None,
    *,
    shown: bool,
) -> list[Failure]:
    """Read the pictures, hand those of a batch and of one size to `work`, and return those that failed.

    Raises:
        ValueError: all failed.
        OSError: of `work`; all others cost the pictures that they were raised on, one by one.
    """
    failures: list[Failure] = []
    done = 0
    with progress(title, inputs.total, shown=shown) as advance:
        for batch in inputs.batches(loaded, batch_size, workers):
            # Not every preprocessing crops.
            of_one_size: dict[torch.Size, Views] = {}
            for name, view in batch:
                if isinstance(view, Exception):
                    failures.append(Failure(name, view))
                else:
                    of_one_size.setdefault(view.network_input.shape, {})[name] = view
            for views in of_one_size.values():
                failures += _together_or_alone(work, views)
            done += len(batch)
            advance(len(batch))
    if len(failures) == done:
        error = failures[0].error
        raise BadValueError(f"found {counted(done)}, and none could be used: {error}") from error
    return failures


def _together_or_alone(work: Callable[[Views], None], views: Views) -> list[Failure]:
    try:
        work(views)
    except OSError:
        raise
    except Exception as error:
        # A picture on which a network fails, or a batch too large for the memory, costs no other picture its rows.
        if len(views) == 1:
            return [Failure(name, error) for name in views]
        return [failure for name, view in views.items() for failure in _together_or_alone(work, {name: view})]
    return []


def on_device(views: Views, loaded: LoadedModel) -> tuple[Tensor, Tensor]:
    """Return the images and the masks as batches where the model is."""
    return (
        torch.stack([view.network_input for view in views.values()]).to(loaded.device),
        torch.stack([view.mask for view in views.values()]).to(loaded.device),
    )
