"""Explains pictures: reads them ahead, and runs each batch through the network once for all methods."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_grad_cam.base_cam import BaseCAM
from torch import Tensor

from tucker_cam.decomposition.modes import channel_modes
from tucker_cam.errors import Failure, TuckerCamError
from tucker_cam.explanations.border import BorderCheck
from tucker_cam.explanations.explanation import DEFAULT_LOOK, Explanation, Look
from tucker_cam.explanations.maps import OnePass
from tucker_cam.models import LoadedModel, Network
from tucker_cam.models.network import preprocessed
from tucker_cam.pictures.ahead import of_one_size, read_ahead, together_or_alone
from tucker_cam.pictures.held import Held, Picture, size_of

CPU_BATCH = 8
_LARGEST_BATCH = 256
_COMPONENTS = 6


class ReadBatch(NamedTuple):
    """What was read of a batch of pictures.

    Attributes:
        inputs: the network inputs, with an error for each that could not be made; one tensor if all have one size.
        sizes: the pictures' own width and height; None if a network input was given or the picture cannot be read.
    """

    inputs: Sequence[Tensor | Exception] | Tensor
    sizes: Sequence[tuple[int, int] | None]


@dataclass(frozen=True)
class Explainer:
    """Explains batches of pictures with one model.

    Attributes:
        loaded: the model.
        methods: callables that make the CAM objects, by the method's name.
        aug_smooth: average over flips and brightness, as the host does.
        components: also find the single components of MTSM.
        look: how overlays are drawn by default.
    """

    loaded: LoadedModel
    methods: Mapping[str, Callable[..., BaseCAM]]
    aug_smooth: bool = False
    components: bool = False
    look: Look = DEFAULT_LOOK

    @cached_property
    def border(self) -> BorderCheck:
        """The check that sees the last layer's features, and warns of a layer that shows where the pictures end."""
        return BorderCheck(self.loaded.layer_names[-1])

    def explain_all(
        self, batches: Sequence[Sequence[Picture]], workers: int | None = 0
    ) -> Iterator[list[tuple[Picture, Explanation | Exception]]]:
        """Yield, for each batch, every picture with its explanation or its error; see also `read_ahead`."""
        # The processes that read need no model: it stays in this one.
        network = Network(torch.nn.Identity(), self.loaded.preprocess, frames=self.loaded.frames)
        read = read_ahead(batches, partial(read_batch, network=network), workers)
        for batch, of_batch in zip(batches, read, strict=True):
            yield list(zip(batch, self.explain(batch, of_batch), strict=True))

    def explain(self, pictures: Sequence[Picture], read: ReadBatch) -> list[Explanation | Exception]:
        """Explain a batch of pictures; those whose inputs have the same size go through the network together."""
        results: list[Any] = [*read.inputs]
        for these in of_one_size({index: each for index, each in enumerate(results) if isinstance(each, Tensor)}):
            found = together_or_alone(partial(self._explain, pictures=pictures, read=read), [*these])
            for index, result in zip(these, found, strict=True):
                results[index] = result
        return results

    def _explain(
        self, indices: Sequence[int], pictures: Sequence[Picture], read: ReadBatch
    ) -> list[Explanation | Exception]:
        loaded, images = self.loaded, read.inputs
        if not isinstance(images, Tensor) or len(indices) < len(pictures):
            images = torch.stack([read.inputs[index] for index in indices])  # type: ignore[misc]
        components = values = np.zeros((len(images), 0), np.float32)
        with OnePass(loaded, loaded.placed(images), aug_smooth=self.aug_smooth) as one_pass:
            found = {name: one_pass.maps_or_errors(build) for name, build in self.methods.items()}
            if one_pass.passes:
                self.border.warn_of(one_pass.passes[0][1][-1])
            if self.components:
                modes = channel_modes(one_pass.output_and_features()[1][-1])
                components, values = modes.maps[:, :_COMPONENTS].cpu().numpy(), modes.values.cpu().numpy()
        explanations: list[Explanation | Exception] = []
        for place, index in enumerate(indices):
            picture, size = pictures[index], read.sizes[index]
            errors = {name: of_images[place] for name, (_, of_images) in found.items() if place in of_images}
            own = {name: maps[place] for name, (maps, _) in found.items() if name not in errors}
            if not own:
                explanations.append(next(iter(errors.values())))
                continue
            failures = [Failure(str(picture), error, name) for name, error in errors.items()]
            of_modes = components[place], values[place]
            explanations.append(Explanation(picture, size, images[place], loaded, own, *of_modes, self.look, failures))
        return explanations

    @cached_property
    def batch_size(self) -> int:
        """How many pictures go through the network at once: on a GPU, as many as fill half of its free memory."""
        if self.loaded.device.type != "cuda":
            return CPU_BATCH
        example = self.loaded.example()
        # A copy, so that the border check of this object does not see the grey picture.
        trial, grey, read = replace(self), Held("grey", example[0]), ReadBatch(example, [None])
        trial._explain([0], [grey], read)
        torch.cuda.reset_peak_memory_stats(example.device)
        before = torch.cuda.memory_allocated(example.device)
        trial._explain([0], [grey], read)
        each = max(torch.cuda.max_memory_allocated(example.device) - before, 1)
        free, _ = torch.cuda.mem_get_info(example.device)
        return int(min(max(free // 2 // each, 1), _LARGEST_BATCH))


def read_batch(pictures: Sequence[Picture], network: Network) -> ReadBatch:
    """Read and preprocess pictures; inputs that are all of one size are stacked, so that a process sends one tensor."""
    read = [_read_input(picture, network) for picture in pictures]
    inputs, sizes = [each for each, _ in read], [size for _, size in read]
    try:
        return ReadBatch(torch.stack(inputs), sizes)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        # A picture could not be read, or the sizes differ.
        return ReadBatch(inputs, sizes)


def _read_input(picture: Picture, network: Network) -> tuple[Tensor | Exception, tuple[int, int] | None]:
    try:
        content = picture.read(network.frames)
        if not isinstance(content, Tensor):
            return preprocessed(network.preprocess, content, str(picture)), size_of(content)
        return content, None
    except (OSError, TuckerCamError) as error:
        return error, None
