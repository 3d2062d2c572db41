"""Images and several methods in, the maps of each out, of one forward pass for all methods that need no gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_grad_cam.base_cam import BaseCAM
from torch import Tensor, nn

from tucker_cam.activations import FeatureRecorder, ReshapeTransform


class OnePass:
    """Explains a batch of images by several methods, for which, where they need no gradient, the model runs once.

    Under test-time augmentation it runs once for each transform. The maps are those of the methods' own classes; where
    a module rewrites a layer's output in place, the host's get the output as it was.

    Args:
        model: the network.
        target_layers: see `TSM`.
        reshape_transform: see `TSM`.
        images: batch x channels x spatial, on the model's device.
        aug_smooth: average over the host's flips and brightness.

    Attributes:
        passes: what the model has put out so far, and each target layer's feature maps: one pair a transform.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: ReshapeTransform | None,
        images: Tensor,
        *,
        aug_smooth: bool = False,
    ) -> None:
        self.model, self.target_layers, self.reshape_transform = model, target_layers, reshape_transform
        self.images, self.aug_smooth = images, aug_smooth
        self.passes: list[tuple[Any, list[Tensor]]] = []
        self._recorder = FeatureRecorder(model, target_layers, reshape_transform)

    def maps(self, method: Callable[..., BaseCAM]) -> NDArray[np.float32]:
        """Return a method's maps, batch x spatial, float32 in [0, 1].

        One that uses gradients runs the model by itself, and explains the class that it predicts.

        Raises:
            TypeError, ValueError: see `TSM`. What the model, or the host, raises comes through.
        """
        with method(self.model, self.target_layers, self.reshape_transform) as cam:
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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
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
