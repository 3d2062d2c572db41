"""Pictures in, their explanations out: read ahead, through the network in batches, by all methods together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from pytorch_grad_cam.base_cam import BaseCAM
from torch import Tensor

from tucker_cam.decomposition.modes import channel_modes
from tucker_cam.errors import TuckerCamError
from tucker_cam.explanations.border import BorderCheck
from tucker_cam.explanations.explanation import Explanation
from tucker_cam.explanations.maps import OnePass
from tucker_cam.models import LoadedModel, Network
from tucker_cam.models.network import preprocessed
from tucker_cam.pictures.ahead import of_one_size, read_ahead, together_or_alone
from tucker_cam.pictures.held import Held, Picture

CPU_BATCH = 8
_LARGEST_BATCH = 256
_COMPONENTS = 6


@dataclass(frozen=True)
class Explainer:
    """Explains batches of pictures with one model.

    Attributes:
        loaded: the model.
        methods: classes of the host's kind, by name.
        aug_smooth: average over flips and brightness, as the host does.
        components: find the single components of MTSM too.
    """

    loaded: LoadedModel
    methods: Mapping[str, Callable[..., BaseCAM]]
    aug_smooth: bool = False
    components: bool = False

    @cached_property
    def border(self) -> BorderCheck:
        """Is shown the features, to warn of a layer that shows where the pictures end."""
        return BorderCheck(self.loaded.layer_names[-1])

    def explain_all(
        self, batches: Sequence[Sequence[Picture]], workers: int | None = 0
    ) -> Iterator[list[tuple[Picture, Explanation | Exception]]]:
        """Yield each batch's explanations, or the errors for which there are none; for the rest see `read_ahead`."""
        # The model itself stays in this process.
        network = Network(torch.nn.Identity(), self.loaded.preprocess, frames=self.loaded.frames)
        read = read_ahead(batches, partial(_read_batch, network=network), workers)
        for batch, inputs in zip(batches, read, strict=True):
            yield list(zip(batch, self.explain(batch, inputs), strict=True))

    def explain(
        self, pictures: Sequence[Picture], inputs: Sequence[Tensor | Exception] | Tensor
    ) -> list[Explanation | Exception]:
        """Explain a batch of inputs, which may be errors; those of one size go through the network together."""
        results: list[Any] = [*inputs]
        for these in of_one_size({index: each for index, each in enumerate(inputs) if isinstance(each, Tensor)}):
            found = together_or_alone(partial(self._explain_those, pictures=pictures, images=these), [*these])
            for index, result in zip(these, found, strict=True):
                results[index] = result
        return results

    def _explain_those(
        self, indices: Sequence[int], pictures: Sequence[Picture], images: Mapping[int, Tensor]
    ) -> list[Explanation]:
        return self._explain([pictures[index] for index in indices], torch.stack([images[index] for index in indices]))

    def _explain(self, pictures: Sequence[Picture], images: Tensor) -> list[Explanation]:
        loaded = self.loaded
        components = values = np.zeros((len(images), 0), np.float32)
        with OnePass(loaded, images.to(loaded.device), aug_smooth=self.aug_smooth) as one_pass:
            maps = {name: one_pass.maps(build) for name, build in self.methods.items()}
            if one_pass.passes:
                self.border.warn_of(one_pass.passes[0][1][-1])
            if self.components:
                modes = channel_modes(one_pass.output_and_features()[1][-1])
                components, values = modes.maps[:, :_COMPONENTS].cpu().numpy(), modes.values.cpu().numpy()
        explanations = []
        for index, picture in enumerate(pictures):
            own = {name: each[index] for name, each in maps.items()}
            explanations.append(Explanation(picture, images[index], loaded, own, components[index], values[index]))
        return explanations

    @cached_property
    def batch_size(self) -> int:
        """How many pictures the device takes at once: on a GPU, what fills half of its free memory."""
        if self.loaded.device.type != "cuda":
            return CPU_BATCH
        example = self.loaded.example()
        # A copy: what it sees of grey tells nothing of the layer.
        trial, grey = replace(self), Held("grey", example[0])
        trial._explain([grey], example)
        torch.cuda.reset_peak_memory_stats(example.device)
        before = torch.cuda.memory_allocated(example.device)
        trial._explain([grey], example)
        each = max(torch.cuda.max_memory_allocated(example.device) - before, 1)
        free, _ = torch.cuda.mem_get_info(example.device)
        return int(min(max(free // 2 // each, 1), _LARGEST_BATCH))


def read_input(picture: Picture, network: Network) -> Tensor | Exception:
    """Return the network's input for a picture, or the error for which there is none."""
    try:
        content = picture.read(network.frames)
        return content if isinstance(content, Tensor) else preprocessed(network.preprocess, content, str(picture))
    except (OSError, TuckerCamError) as error:
        return error


def _read_batch(pictures: Sequence[Picture], network: Network) -> list[Tensor | Exception] | Tensor:
    """Read a batch; inputs of one size in one tensor, which a process hands over at once and not one by one."""
    inputs = [read_input(picture, network) for picture in pictures]
    try:
        return torch.stack(inputs)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        # An error of a picture that cannot be read; another size.
        return inputs
