"""Computes the maps of several methods, with one forward pass for all methods that need no class."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand
from numpy.typing import NDArray
from pytorch_grad_cam import KPCA_CAM, AblationCAM, ScoreCAM
from pytorch_grad_cam.base_cam import BaseCAM
from torch import Tensor

from tucker_cam.activations import FeatureRecorder
from tucker_cam.models import LoadedModel

_SEEDING = Lock()


@contextmanager
def _the_same_start() -> Iterator[None]:
    """Let KPCA-CAM's solver, which draws from NumPy's global generator, start from the same numbers every time.

    Meanwhile that generator is set aside, and nothing is drawn from it.
    """
    with _SEEDING:
        before = mtrand.get_bit_generator()
        mtrand.set_bit_generator(np.random.MT19937(0))
        try:
            yield
        finally:
            mtrand.set_bit_generator(before)


class OnePass(FeatureRecorder):
    """Explains a batch of images by several methods; the model runs once for all methods that need no class.

    It is the recorder that all CAM objects share. Under test-time augmentation, the host's flips and brightness, the
    model runs once for each transform; `passes` holds its outputs and each target layer's feature maps. The maps equal
    those of the methods' own classes, but the host's get a layer's output as it was before it was rewritten in place.
    """

    def __init__(self, loaded: LoadedModel, images: Tensor, *, aug_smooth: bool = False) -> None:
        super().__init__(loaded.model, loaded.target_layers, loaded.reshape_transform)
        self.loaded, self.images, self.aug_smooth = loaded, images, aug_smooth
        self.passes: list[tuple[Any, list[Tensor]]] = []
        self._calls, self._model_failed = 0, False

    def maps(self, method: Callable[..., BaseCAM]) -> NDArray[np.float32]:
        """Return a method's maps, batch x spatial, float32 in [0, 1].

        A method that asks for a class runs the model on its own, and explains the predicted class; gradients that the
        parameters already hold are kept. Errors of the model or the host are passed on.
        """
        self._calls = 0
        cam = method(self.model, self.target_layers, self.reshape_transform)
        try:
            if cam.uses_gradients or isinstance(cam, (AblationCAM, ScoreCAM)):
                return self._of_a_class(cam)
            cam.activations_and_grads.release()
            cam.activations_and_grads = self
            # Without a list of targets the host would read the output, which need not be a tensor.
            with _the_same_start() if isinstance(cam, KPCA_CAM) else nullcontext():
                maps: NDArray[np.float32] = cam(self.images, targets=[], aug_smooth=self.aug_smooth)
            return maps
        finally:  # the host's own block would swallow an IndexError
            cam.activations_and_grads.release()

    def maps_or_errors(self, method: Callable[..., BaseCAM]) -> tuple[NDArray[np.float32], dict[int, Exception]]:
        """Return a method's maps, and its errors by the image's place; the map of a failed image is NaN.

        Errors of the model in the pass that all methods share are passed on.
        """
        try:
            return self.maps(method), {}
        except Exception as error:
            if self._model_failed:
                raise
            if len(self.images) == 1:
                return np.full((1, *self.images.shape[2:]), np.nan, np.float32), {0: error}
        found, errors = [], {}
        for place in range(len(self.images)):
            this = slice(place, place + 1)
            with OnePass(self.loaded, self.images[this], aug_smooth=self.aug_smooth) as alone:
                # Other outputs cannot be cut, so the model runs again: a method may read its output.
                if all(isinstance(output, Tensor) and len(output) == len(self.images) for output, _ in self.passes):
                    alone.passes = [(output[this], [each[this] for each in maps]) for output, maps in self.passes]
                own, failed = alone.maps_or_errors(method)
            found.append(own)
            if failed:
                errors[place] = failed[0]
        return np.concatenate(found), errors

    def _of_a_class(self, cam: BaseCAM) -> NDArray[np.float32]:
        parameters = list(self.model.parameters())
        before = [parameter.grad for parameter in parameters]
        # Even where no parameter of the model has a gradient, the image has one.
        images = self.images.clone().requires_grad_(cam.uses_gradients)
        try:
            with torch.set_grad_enabled(cam.uses_gradients):
                maps: NDArray[np.float32] = cam(images, targets=None, aug_smooth=self.aug_smooth)
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
        return maps

    def output_and_features(self) -> tuple[Any, list[Tensor]]:
        """Return the model's output for the unaugmented images, and each target layer's feature maps of them."""
        if self.aug_smooth:
            return self._run_model(self.images)
        if not self.passes:
            self.passes.append(self._run_model(self.images))
        return self.passes[0]

    def __call__(self, images: Any) -> Any:
        """Return the model's output, and run the model only if no earlier CAM object has done so."""
        if self._calls == len(self.passes):
            self.passes.append(self._run_model(images))
        outputs, features = self.passes[self._calls]
        # A user-defined method may work in place, and the next method reads the same features.
        self.activations = [each.clone() for each in features]
        self._calls += 1
        return outputs

    def _run_model(self, images: Tensor) -> tuple[Any, list[Tensor]]:
        self._model_failed = True
        with torch.no_grad():
            outputs = super().__call__(images)
        self._model_failed = False
        return outputs, self.activations

    def release(self) -> None:
        """Do nothing when the host has finished with a CAM object: the next one shares the hooks."""

    def __exit__(self, *_: object) -> None:
        # An error that is stored keeps this object in memory.
        self.passes.clear()
        super().release()
