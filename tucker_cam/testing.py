"""Checks a saliency method of your own, and raises an AssertionError if it breaks a promise of this package."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tucker_cam.cams import LabelFreeCAM
from tucker_cam.seeding import seeded

# Relative to a map's largest value, 1: BLAS splits its sums by the size of the batch and the layout of the features.
_TOLERANCE = 1e-4


def check_cam(method: Callable[..., LabelFreeCAM]) -> None:
    """Check a subclass of `LabelFreeCAM`, or a function that returns one, on small networks with random weights.

    A map must be float32, finite, in [0, 1], of the images' size, and the same alone as in a batch. It must be mirrored
    with the features and ignore their scale; zeros give zeros. NaN and Inf count as zero, with one warning. The model
    may return anything. Its flags, gradients, weights and hooks, and the images, stay unchanged. Targets play no part.

    Args:
        method: called with the same arguments as `TSM`.

    Raises:
        AssertionError: one of these does not hold; the message says which. Errors of the method itself pass through.

    Example:
        >>> class ChannelMean(LabelFreeCAM):
        ...     def saliency(self, features):
        ...         return features.mean(1).abs()
        >>> check_cam(ChannelMean)
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.relu(torch.randn(3, 6, 5, 7, generator=generator) + 0.3)
    whole = _explain(method, features)
    _check(whole.dtype == np.float32 and whole.shape == (3, 5, 7), "a map is float32, batch x height x width")
    _check(bool(np.isfinite(whole).all() and whole.min() >= 0 and whole.max() <= 1 + 1e-6), "a map lies in [0, 1]")
    _check(bool((np.ptp(whole.reshape(3, -1), axis=1) > 0.5).all()), "a map of random features is not flat nor below 0")
    alone = np.concatenate([_explain(method, image[None]) for image in features])
    _check_close(alone, whole, "an image has the same map alone as in a batch")
    _check_close(_explain(method, features.flip(-1)), whole[..., ::-1], "mirrored features have the mirrored map")
    for scale in (1e-6, 1e30):
        _check_close(_explain(method, features * scale), whole, "the scale of the features does not matter")
    _check(not _explain(method, torch.zeros_like(features)).any(), "features that are zero have a map of zeros")
    _check_close(_explain(method, features.double()), whole, "float64 features have the map of float32 ones")
    _check(_explain(method, features[:, :, None]).shape == (3, 1, 5, 7), "a volume has a volume's map")
    _check_broken_numbers(method, features)
    _check_state(method, generator)


def _check_broken_numbers(method: Callable[..., LabelFreeCAM], features: Tensor) -> None:
    broken, cleaned = features.clone(), features.clone()
    broken[1, 2, 0, 0], broken[1, 3, 1, 1] = torch.nan, torch.inf
    cleaned[1, 2, 0, 0] = cleaned[1, 3, 1, 1] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _explain(method, broken)
    _check(len(caught) == 1 and "image 1 " in str(caught[0].message), "one warning names the images with NaN or Inf")
    _check_close(found, _explain(method, cleaned), "NaN and Inf count as zero")


def _check_state(method: Callable[..., LabelFreeCAM], generator: torch.Generator) -> None:
    with seeded():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), _Answer()).eval()
    images = torch.randn(2, 3, 16, 16, generator=generator)
    before, seen = [tensor.clone() for tensor in model.state_dict().values()], images.clone()
    with method(model, [model[1]]) as cam:
        expected = cam(images)
        _check_close(cam(images, targets=[None, None]), expected, "targets play no part")
        _check_close(cam(images, targets=None), expected, "an object can be called again")
    _check(not any(module._forward_hooks for module in model.modules()), "no hook stays on the model")
    _check(torch.equal(images, seen), "the images are not written to")
    after = model.state_dict().values()
    _check(all(torch.equal(*pair) for pair in zip(before, after, strict=True)), "the model's numbers stay as they were")
    _check(all(parameter.requires_grad for parameter in model.parameters()), "requires_grad stays as it was")
    _check(all(parameter.grad is None for parameter in model.parameters()), "no gradient is left")
    try:
        method(model, [])
    except ValueError:
        return
    raise AssertionError("no target layers are a ValueError")


class _PassingOn(nn.Module):
    """A model whose layer has the images themselves as its feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Identity(), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": self.layer(x)}


class _Answer(nn.Module):
    """Returns an output from which no class can be read."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


def _explain(method: Callable[..., LabelFreeCAM], features: Tensor) -> NDArray[np.float32]:
    model = _PassingOn()
    with method(model, [model.layer]) as cam:
        return cam(features)


def _check(holds: bool, promise: str) -> None:
    if not holds:
        raise AssertionError(f"expected that {promise}")


def _check_close(actual: NDArray[Any], expected: NDArray[Any], promise: str) -> None:
    worst = float(np.abs(actual - expected).max()) if actual.shape == expected.shape else np.inf
    _check(worst <= _TOLERANCE, f"{promise}; it is off by {worst:.2g} of the largest value")
