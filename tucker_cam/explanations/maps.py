"""Images and several methods in, the maps of each out, of one forward pass for all methods that need no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_grad_cam.base_cam import BaseCAM
from torch import Tensor

from tucker_cam.activations import FeatureRecorder
from tucker_cam.models import LoadedModel


class OnePass:
    """Explains a batch of images by several methods, for which, where they need no gradient, the model runs once.

    Under test-time augmentation it runs once for each transform. The maps are those of the methods' own classes; where
    a module rewrites a layer's output in place, the host's get the output as it was.

    Args:
        loaded: the network, with its layers.
        images: batch x channels x spatial, on its device.
        aug_smooth: average over the host's flips and brightness.

    Attributes:
        passes: what the model has put out so far, and each target layer's feature maps: one pair a transform.
    """

    def __init__(self, loaded: LoadedModel, images: Tensor, *, aug_smooth: bool = False) -> None:
        self.images, self.aug_smooth = images, aug_smooth
        self.passes: list[tuple[Any, list[Tensor]]] = []
        self._model = loaded.model, loaded.target_layers, loaded.reshape_transform
        self._recorder = FeatureRecorder(*self._model)

    def maps(self, method: Callable[..., BaseCAM]) -> NDArray[np.float32]:
        """Return a method's maps, batch x spatial, float32 in [0, 1].

        One that uses gradients runs the model by itself, and explains the class that it predicts.

        Raises:
            TypeError, ValueError: see `TSM`. What the model, or the host, raises comes through.
        """
        with method(*self._model) as cam:
            targets: list[Any] | None = None
            if not cam.uses_gradients:
                cam.activations_and_grads.release()
                cam.activations_and_grads = _Replayed(self._recorder, self.passes)
                # Without targets the host would read the output, which need not be a tensor.
                targets = []
            maps: NDArray[np.float32] = cam(self.images, targets=targets, aug_smooth=self.aug_smooth)
        return maps

    def output_and_features(self) -> tuple[Any, list[Tensor]]:
        """Return what the model puts out for the images themselves, and each target layer's feature maps of them."""
        if self.aug_smooth or not self.passes:
            with torch.no_grad():
                output = self._recorder(self.images)
            if self.aug_smooth:
                return output, self._recorder.activations
            self.passes.append((output, self._recorder.activations))
        return self.passes[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._recorder.release()


class _Replayed(FeatureRecorder):
    """Stands in a CAM object where its recorder stood, and runs the model only where no other object has."""

    def __init__(self, recorder: FeatureRecorder, passes: list[tuple[Any, list[Tensor]]]) -> None:
        self._recorder, self._passes, self._calls = recorder, passes, 0
        self.activations, self.gradients = [], []

    def __call__(self, images: Any) -> Any:
        if self._calls == len(self._passes):
            with torch.no_grad():
                outputs = self._recorder(images)
            self._passes.append((outputs, self._recorder.activations))
        outputs, self.activations = self._passes[self._calls]
        self._calls += 1
        return outputs

    def release(self) -> None:
        self.clear()
