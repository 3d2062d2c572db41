"""Preprocessed pictures in, their saliency maps out: the work that every engine does, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_grad_cam.base_cam import BaseCAM
from torch import Tensor

from tucker_cam.decomposition.modes import channel_modes
from tucker_cam.explanations.maps import OnePass
from tucker_cam.models import LoadedModel

_COMPONENTS = 6


@dataclass(frozen=True)
class Found:
    """What was found out about one network input.

    Attributes:
        maps: by method, (time x) height x width in [0, 1].
        components: the strongest components of MTSM at the last of the layers, count x its positions, signed;
            none unless asked for.
        values: all singular values, descending; none unless asked for.
    """

    maps: dict[str, NDArray[np.float32]]
    components: NDArray[np.float32]
    values: NDArray[np.float32]


@dataclass(frozen=True)
class Explainer:
    """Explains batches of pictures with one model.

    Attributes:
        loaded: the model.
        methods: classes of the host's kind, by name.
        aug_smooth: average over flips and brightness, as the host does.
        components: return the single components of MTSM too.
    """

    loaded: LoadedModel
    methods: Mapping[str, Callable[..., BaseCAM]]
    aug_smooth: bool = False
    components: bool = False

    def explain(self, inputs: Sequence[Tensor | Exception] | Tensor) -> list[Found | Exception]:
        """Explain pictures; those of one size go through the network together.

        Args:
            inputs: as `loaded.preprocess` returns them, or the error for which there is none; or all in one tensor.

        Returns:
            For each picture what was found, or the error for which nothing was.
        """
        if isinstance(inputs, Tensor):
            return self._together(inputs)
        results: dict[int, Found | Exception] = {}
        by_size: dict[torch.Size, dict[int, Tensor]] = {}
        for index, each in enumerate(inputs):
            if isinstance(each, Tensor):
                by_size.setdefault(each.shape, {})[index] = each
            else:
                results[index] = each
        for of_one_size in by_size.values():
            together = self._together(torch.stack(list(of_one_size.values())))
            results |= dict(zip(of_one_size, together, strict=True))
        return [results[index] for index in range(len(inputs))]

    def _together(self, images: Tensor) -> list[Found | Exception]:
        try:
            return [*self._explain(images)]
        except Exception as error:
            # One picture on which a network fails in its own way, or a batch too large for the memory, costs no
            # other picture its map.
            if len(images) > 1:
                return [result for image in images.split(1) for result in self._together(image)]
            return [error]

    def _explain(self, images: Tensor) -> list[Found]:
        loaded = self.loaded
        images = images.to(loaded.device)
        components = values = np.zeros((len(images), 0), np.float32)
        with OnePass(
            loaded.model, loaded.target_layers, loaded.reshape_transform, images, aug_smooth=self.aug_smooth
        ) as one_pass:
            maps = {name: one_pass.maps(build) for name, build in self.methods.items()}
            if self.components:
                modes = channel_modes(one_pass.output_and_features()[1][-1])
                components, values = modes.maps[:, :_COMPONENTS].cpu().numpy(), modes.values.cpu().numpy()
        return [
            Found({name: each[index] for name, each in maps.items()}, components[index], values[index])
            for index in range(len(images))
        ]
