"""The conformance kit: the project's own methods keep all of it, and each broken one is found by what it breaks."""

import numpy as np
import pytest
import torch
from registry import every_method

from tucker_cam.cams import LabelFreeCAM
from tucker_cam.testing import check_cam


@every_method
def test_our_methods_keep_what_every_method_must(method):
    before = torch.get_rng_state()
    check_cam(method)
    assert torch.equal(torch.get_rng_state(), before)


class Mean(LabelFreeCAM):
    def saliency(self, features):
        return features.mean(1).abs()


def projecting(function):
    class Projecting(LabelFreeCAM):
        def saliency(self, features):
            return function(features)

    return Projecting


class Half(Mean):
    def forward(self, *arguments, **options):
        return super().forward(*arguments, **options).astype(np.float16)


class Writing(Mean):
    def forward(self, images, *arguments, **options):
        return super().forward(images.mul_(1.01), *arguments, **options)


class Hooked(Mean):
    def __exit__(self, *exception):
        pass


class OfTargets(Mean):
    def forward(self, images, targets=None, eigen_smooth=False):
        return super().forward(images, targets, eigen_smooth) * (0.5 if targets else 1)


class Lenient(Mean):
    def __init__(self, model, target_layers, *arguments):
        super().__init__(model, target_layers or [model[0]], *arguments)


@pytest.mark.parametrize(
    ("method", "promise"),
    [
        (projecting(lambda x: (x + x.mean(0)).mean(1).abs()), "alone as in a batch"),
        (projecting(lambda x: x.mean(1).abs() * torch.linspace(1, 3, x.shape[-1])), "mirrored"),
        (projecting(lambda x: (x + 0.1 * x[:, :1].sign()).mean(1).abs()), "scale"),
        (projecting(lambda x: torch.ones_like(x[:, 0])), "not flat"),
        (projecting(lambda x: -x.mean(1).abs()), "nor below 0"),
        (Half, "float32"),
        (Writing, "not written to"),
        (Hooked, "no hook stays"),
        (OfTargets, "targets play no part"),
        (Lenient, "no target layers"),
    ],
)
def test_a_method_that_breaks_a_promise_is_told_which(method, promise):
    with pytest.raises(AssertionError, match=promise):
        check_cam(method)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean((1, 2)),
        lambda x: x[0].abs().mean(0),
        lambda x: x[:1].abs().mean(1),
        lambda x: x.abs().mean(1, keepdim=True),
        lambda x: x.abs().mean(1).numpy(),
    ],
)
def test_a_saliency_of_another_shape_is_one_clear_error(function):
    with pytest.raises(TypeError, match=r"expected maps as a tensor, batch x spatial, from Projecting\.saliency"):
        check_cam(projecting(function))


def test_maps_that_are_not_finite_are_refused_and_not_drawn_as_empty_ones():
    with pytest.raises(ValueError, match=r"expected finite maps from Projecting\.saliency, got NaN or Inf"):
        check_cam(projecting(lambda features: features.mean(1) / 0))
