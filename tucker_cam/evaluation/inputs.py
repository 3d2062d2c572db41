"""Reads a folder of pictures ahead, or takes batches of network inputs, and gives what the network sees of each."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from tucker_cam.errors import BadTypeError, BadValueError, Failure
from tucker_cam.explanations.explainer import read_batch
from tucker_cam.models import LoadedModel, Network, load_model
from tucker_cam.models.loading import Loading, that_takes
from tucker_cam.pictures.ahead import in_batches, of_one_size, read_ahead, together_or_alone
from tucker_cam.pictures.annotations import Annotations, NetworkView, Sample, find_samples, network_view
from tucker_cam.pictures.held import Collection, named_inputs
from tucker_cam.pictures.sources import check_limit
from tucker_cam.progress import progress
from tucker_cam.text import counted

Data = str | Path | Tensor | Iterable[Any]
Model = str | nn.Module | Network
Read = tuple[str, NetworkView | Tensor | Exception]
"""A picture's name, and its view, its network input alone if nothing is known of its objects, or its error."""
Work = Callable[[Sequence[str], Tensor, Tensor], None]
"""What is done with the names, images and masks of a batch, on the model's device."""


class Inputs(NamedTuple):
    """The pictures of a run: `samples`, by name, if they are from a folder, and `views` if they are from batches.

    `example` is a batch of one input, if they are from batches.
    """

    where: str
    annotations: Annotations
    remarks: list[str]
    samples: dict[str, Sample] | None
    views: Iterator[Read] = iter(())
    example: Tensor | None = None

    @property
    def number(self) -> int | None:
        return None if self.samples is None else len(self.samples)

    def read(self, network: Network, batch_size: int, workers: int | None) -> Iterator[list[Read]]:
        """Yield the pictures in batches; those of a folder are read by this many workers."""
        if self.samples is None:
            while batch := list(islice(self.views, batch_size)):
                yield batch
            return
        # The processes that read need no model: it stays in this one.
        network = Network(nn.Identity(), network.preprocess, network.mean, network.std)
        read = partial(_read, annotations=self.annotations, network=network)
        yield from read_ahead(in_batches([*self.samples.values()], batch_size), read, workers)


def load_for_pictures(
    model: Model, example: Tensor | None, *, one_layer: bool = True, **options: Unpack[Loading]
) -> LoadedModel:
    """Return the model loaded; ValueError if it takes clips or, with `one_layer`, has several target layers."""
    loaded = load_model(that_takes(model, example), **options)
    if loaded.frames is not None:
        raise BadValueError(f"expected a network for pictures, and {loaded.name} takes clips")
    if one_layer and len(loaded.layers) > 1:
        raise BadValueError(f"expected one layer to score, got {', '.join(loaded.layer_names)}")
    return loaded


def find_inputs(data: Data, annotations: Annotations | None, limit: int | None) -> Inputs:
    """Return the `Inputs` of a run; the errors for a folder are those of `find_samples`."""
    if isinstance(data, (str, Path)):
        samples, kind, remarks = find_samples(Path(data), annotations=annotations, limit=limit)
        return Inputs(str(Path(data).resolve()), kind, remarks, {sample.name: sample for sample in samples})
    if annotations is not None:
        raise BadValueError(f"expected a folder for annotations={annotations!r}, got batches: give their masks")
    if not isinstance(data, Iterable):
        raise BadTypeError(f"expected a folder, or batches of network inputs, got {type(data).__name__}")
    check_limit(limit)
    views = islice(_of_batches([data] if isinstance(data, Tensor) else data), limit)
    first = next(views, None)
    if first is None:
        raise BadValueError("expected batches of network inputs, got none")
    kind = "masks" if isinstance(first[1], NetworkView) else "none"
    return Inputs("batches", kind, [], None, chain([first], views), _view(first[1]).network_input[None])


def _of_batches(batches: Iterable[Any]) -> Iterator[tuple[str, NetworkView | Tensor]]:
    for names, images, others in named_inputs(batches):
        views: Iterable[NetworkView | Tensor] = images
        # Labels, also one-hot ones, have fewer axes.
        if found := [each for each in others if getattr(each, "ndim", 0) > 2]:
            masks = torch.as_tensor(found[0])
            masks = masks.squeeze(1) if masks.dim() == images.dim() else masks
            if masks.dtype != torch.bool:
                raise BadTypeError(
                    f"expected masks of bool after the images, got {masks.dtype}: use masks > 0, or leave out what is "
                    "no mask"
                )
            if len(masks) != len(images):
                raise BadValueError(f"expected a mask for each of {len(images)} images, got {len(masks)}")
            views = [NetworkView(image, mask, []) for image, mask in zip(images, masks, strict=True)]
        yield from zip(names, views, strict=True)


def read_pictures(collection: Collection, network: Network, batch_size: int) -> Iterator[list[Read]]:
    for part in collection.parts():
        for batch in in_batches(part, batch_size):
            yield [*zip(map(str, batch), read_batch(batch, network).inputs, strict=True)]


def _read(samples: Sequence[Sample], annotations: Annotations, network: Network) -> list[Read]:
    read: list[Read] = []
    for sample in samples:
        try:
            read.append((sample.name, network_view(sample, annotations, network)))
        except (OSError, ValueError) as error:
            read.append((sample.name, error))
    return read


def go_through(
    batches: Iterable[list[Read]], network: Network, work: Work, title: str, *, number: int | None, shown: bool
) -> tuple[list[Failure], list[str]]:
    """Give each batch's pictures, those of one size together, to `work`; return the failures and any remarks.

    ValueError if all pictures failed. An OSError of `work` is passed on; any other error fails only its own pictures.
    """
    failures: list[Failure] = []
    remarks: list[str] = []
    done = 0
    with progress(title, number, shown=shown) as advance:
        for batch in batches:
            failures += [Failure(name, each) for name, each in batch if isinstance(each, Exception)]
            views = {name: _view(each) for name, each in batch if not isinstance(each, Exception)}
            remarks += [remark for view in views.values() for remark in view.remarks]
            for these in of_one_size({name: view.network_input for name, view in views.items()}):
                do = partial(_do, work=work, views=views, network=network)
                found = together_or_alone(do, [*these], through=(OSError,))
                failures += [
                    Failure(name, error) for name, error in zip(these, found, strict=True) if error is not None
                ]
            done += len(batch)
            advance(len(batch))
    if not done:
        raise BadValueError("expected pictures, found none")
    if len(failures) == done:
        error = failures[0].error
        raise BadValueError(f"found {counted(done)}, and none could be used: {error}") from error
    return failures, remarks


def _view(seen: NetworkView | Tensor) -> NetworkView:
    if isinstance(seen, NetworkView):
        return seen
    return NetworkView(seen, torch.zeros(seen.shape[-2:], dtype=torch.bool), [])


def _do(names: Sequence[str], work: Work, views: Mapping[str, NetworkView], network: Network) -> list[None]:
    images = torch.stack([views[name].network_input for name in names])
    masks = torch.stack([views[name].mask for name in names])
    work(names, network.placed(images), masks.to(network.device))
    return [None] * len(names)
