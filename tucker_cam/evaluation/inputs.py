"""A folder of pictures, or batches of network inputs, in, what the network sees of each out: read ahead, by batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from tucker_cam.errors import BadValueError, Failure
from tucker_cam.explanations.explainer import read_input
from tucker_cam.models import LoadedModel, Network, load_model
from tucker_cam.models.loading import Loading
from tucker_cam.pictures.ahead import in_batches, of_one_size, read_ahead
from tucker_cam.pictures.annotations import Annotations, NetworkView, Sample, find_samples, network_view
from tucker_cam.pictures.held import Collection, Picture, named_inputs
from tucker_cam.progress import progress
from tucker_cam.text import counted

Data = str | Path | Tensor | Iterable[Any]
Model = str | nn.Module | Network
Work = Callable[[Sequence[str], Tensor, Tensor], None]
"""What is done with the names, the images and the masks of a batch, on the model's device."""
_Read = tuple[str, NetworkView | Exception]


class Inputs(NamedTuple):
    """The pictures of a run: of a folder, then with `samples` by their names, or of batches.

    `batches` yields what was read, for a network, by so many together and by so many workers; `number` is how many
    there are, where that is known.
    """

    where: str
    annotations: Annotations
    remarks: list[str]
    samples: dict[str, Sample] | None
    batches: Callable[[Network, int, int | None], Iterator[list[_Read]]]
    number: int | None = None


def load_for_pictures(model: Model, **options: Unpack[Loading]) -> LoadedModel:
    """Return the model, loaded as by `load_model`; ValueError if it takes clips."""
    loaded = load_model(model, **options)
    if loaded.frames is not None:
        raise BadValueError(f"expected a network for pictures, and {loaded.name} takes clips")
    return loaded


def load_one_layer(model: Model, **options: Unpack[Loading]) -> LoadedModel:
    """Return the model as of `load_for_pictures`; ValueError too if it has several layers to explain."""
    loaded = load_for_pictures(model, **options)
    if len(loaded.layers) > 1:
        raise BadValueError(f"expected one layer to score, got {', '.join(loaded.layer_names)}")
    return loaded


def find_inputs(data: Data, annotations: Annotations | None, limit: int | None) -> Inputs:
    """Return what reads the pictures; if there are none, the errors of `find_samples`."""
    if isinstance(data, (str, Path)):
        return _of_folder(Path(data), annotations, limit)
    if annotations is not None:
        raise BadValueError(f"expected a folder for annotations={annotations!r}, got batches: give their masks")
    inputs = islice(_of_batches([data] if isinstance(data, Tensor) else data), limit)
    first = next(inputs, None)
    if first is None:
        raise BadValueError("expected batches of network inputs, got none")
    views: Iterator[_Read] = (
        (name, _without_object(image) if mask is None else NetworkView(image, mask, []))
        for name, image, mask in chain([first], inputs)
    )

    def batches(network: Network, size: int, workers: int | None) -> Iterator[list[_Read]]:
        while batch := list(islice(views, size)):
            yield batch

    return Inputs("batches", "none" if first[2] is None else "masks", [], None, batches)


def _of_folder(folder: Path, annotations: Annotations | None, limit: int | None) -> Inputs:
    samples, kind, remarks = find_samples(folder, annotations=annotations, limit=limit)

    def batches(network: Network, size: int, workers: int | None) -> Iterator[list[_Read]]:
        read = partial(_read, annotations=kind, network=_without_model(network))
        return read_ahead(in_batches(samples, size), read, workers)

    by_name = {sample.name: sample for sample in samples}
    return Inputs(str(folder.resolve()), kind, remarks, by_name, batches, len(by_name))


def inputs_of(collection: Collection) -> Inputs:
    """Return what reads pictures that `collect` found; nothing is known of what is in them."""

    def batches(network: Network, size: int, workers: int | None) -> Iterator[list[_Read]]:
        read = partial(_read_pictures, network=_without_model(network))
        for part in collection.parts():
            yield from read_ahead(in_batches(part, size), read, workers)

    return Inputs("pictures", "none", [], None, batches, collection.number)


def _without_model(network: Network) -> Network:
    """Return what reading needs of a network: the model itself stays in this process."""
    return Network(nn.Identity(), network.preprocess, network.mean, network.std)


def _read_pictures(pictures: Sequence[Picture], network: Network) -> list[_Read]:
    found = [(str(picture), read_input(picture, network)) for picture in pictures]
    return [(name, each if isinstance(each, Exception) else _without_object(each)) for name, each in found]


def _without_object(image: Tensor) -> NetworkView:
    return NetworkView(image, torch.zeros(image.shape[-2:], dtype=torch.bool), [])


def _read(samples: Sequence[Sample], annotations: Annotations, network: Network) -> list[_Read]:
    read: list[_Read] = []
    for sample in samples:
        try:
            read.append((sample.name, network_view(sample, annotations, network)))
        except (OSError, ValueError) as error:
            read.append((sample.name, error))
    return read


def _of_batches(batches: Iterable[Any]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    for names, images, others in named_inputs(batches):
        # A data set's labels are of no use here.
        masks = others[0] if others and isinstance(others[0], Tensor) and others[0].dim() > 1 else None
        yield from zip(names, images, [None] * len(images) if masks is None else masks, strict=True)


def go_through(
    inputs: Inputs,
    loaded: LoadedModel,
    work: Work,
    title: str,
    *,
    batch_size: int,
    workers: int | None,
    shown: bool,
) -> tuple[list[Failure], list[str]]:
    """Hand the pictures of a batch and of one size to `work`; return what failed, and a line on each that is odd.

    ValueError if all failed. An OSError of `work` comes through; all others cost the pictures that they were raised on.
    """
    failures: list[Failure] = []
    remarks: list[str] = []
    done = 0
    with progress(title, inputs.number, shown=shown) as advance:
        for batch in inputs.batches(loaded, batch_size, workers):
            failures += [Failure(name, view) for name, view in batch if isinstance(view, Exception)]
            views = {name: view for name, view in batch if isinstance(view, NetworkView)}
            remarks += [remark for view in views.values() for remark in view.remarks]
            for these in of_one_size({name: view.network_input for name, view in views.items()}):
                failures += _together_or_alone(work, {name: views[name] for name in these}, loaded.device)
            done += len(batch)
            advance(len(batch))
    if len(failures) == done:
        error = failures[0].error
        raise BadValueError(f"found {counted(done)}, and none could be used: {error}") from error
    return failures, remarks


def _together_or_alone(work: Work, views: dict[str, NetworkView], device: torch.device) -> list[Failure]:
    try:
        images = torch.stack([view.network_input for view in views.values()])
        masks = torch.stack([view.mask for view in views.values()])
        work(list(views), images.to(device), masks.to(device))
    except OSError:
        raise
    except Exception as error:
        # A picture on which a network fails, or a batch too large for the memory, costs no other picture its rows.
        if len(views) == 1:
            return [Failure(name, error) for name in views]
        return [failure for each in views.items() for failure in _together_or_alone(work, dict([each]), device)]
    return []
