"""Feature maps of numbers that nobody expects: the map is finite, in [0, 1], and the right one where there is one."""

from functools import partial

import networks
import numpy as np
import pytest
import references
import torch
from numpy.testing import assert_allclose
from registry import every_dtype, every_method, every_method_and_its_oracle, rectified
from torch import nn

from tucker_cam import MTSM, TSM
from tucker_cam.decomposition.projection import combined_map, leading_map

TALL, WIDE = (20, 3, 4), (5, 4, 6)
both_shapes = pytest.mark.parametrize("shape", [TALL, WIDE], ids=["tall", "wide"])


def explain(method, maps):
    """Return the method's map of these feature maps: finite, in [0, 1], of their height and width."""
    model = networks.passing_on()
    with method(model, [model.layer]) as cam:
        saliency = cam(maps)
    assert saliency.dtype == np.float32
    assert saliency.shape == (len(maps), *maps.shape[2:])
    assert np.isfinite(saliency).all()
    assert saliency.min() >= 0
    assert saliency.max() <= 1
    return saliency


@every_dtype
# In the last three, a product in float32 differs in its last digit from one position to another.
@pytest.mark.parametrize("shape", [TALL, WIDE, (6, 1, 1), (17, 5, 5), (140, 13, 13), (511, 23, 29)])
@every_method
@pytest.mark.parametrize("constant", [0.0, 1.0, -0.1, "a channel"])
def test_constants_have_a_map_of_zeros(method, constant, shape, dtype):
    each = rectified((shape[0], 1, 1), torch.float64) if constant == "a channel" else torch.tensor(constant)
    maps = torch.zeros(3, *shape, dtype=dtype) + each.to(dtype)
    assert not explain(method, maps).any()


@every_dtype
@pytest.mark.parametrize("method", [TSM, MTSM, partial(MTSM, combine="energy")])
def test_layers_whose_maps_have_a_flat_mean_have_a_map_of_zeros(method, dtype):
    maps = torch.rand(3, 1, 6, 7).to(dtype)
    # Another layer is weak where the first is strong.
    parts = {"layer": nn.Identity(), "complement": nn.Identity(), "unused": nn.Linear(1, 1)}
    model = networks.Wired(lambda self, x: self.complement(1 - self.layer(x).double()), **parts)
    with method(model, [model.layer, model.complement]) as cam:
        assert not cam(maps).any()


@both_shapes
@every_method_and_its_oracle
def test_features_that_lack_rank_have_the_references_map(method, oracle, shape):
    maps = torch.zeros(2, *shape, dtype=torch.float64)
    maps[0] = torch.einsum("c,h,w->chw", *(torch.rand(n, dtype=torch.float64) for n in shape))  # rank one
    maps[1, 1], maps[1, 3] = torch.randn(2, *shape[1:], dtype=torch.float64)  # two channels
    for dtype in (torch.float32, torch.float64):
        rounded = maps.to(dtype)
        assert_allclose(explain(method, rounded), references.explained(oracle, rounded), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("channels", "height", "width"), [(12, 3, 4), (30, 3, 4), (6, 3, 4)])
def test_equal_singular_values_give_one_of_the_equal_directions_and_the_only_energy(channels, height, width, dtype):
    count = min(channels, height * width)
    left = torch.linalg.qr(torch.randn(channels, count, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(height * width, count, dtype=torch.float64)).Q
    maps = (3 * left @ right.mT).reshape(1, channels, height, width).to(dtype)
    assert leading_map(maps).norm().item() == pytest.approx(3, rel=1e-5)
    lengths = 9 * right.norm(dim=1).reshape(1, height, width)
    assert_allclose(combined_map(maps, combine="energy"), lengths, rtol=1e-5, atol=1e-5)


# Of the first, one channel only; the last two are large enough for the other ways to solve it.
@pytest.mark.parametrize("shape", [(1, 4, 5), TALL, WIDE, (40, 5, 5), (130, 10, 13)])
@every_method_and_its_oracle
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float64, 1e-310),
        (torch.float64, 1e-200),
        (torch.float64, 1e300),
        (torch.float32, 1e-40),
        (torch.float32, 1e-30),
        (torch.float32, 1e-11),
        (torch.float32, 1e11),
        (torch.float32, 1e30),
        (torch.float32, 5e37),
        (torch.float64, 2e307),
        (torch.bfloat16, 1e-39),
        (torch.bfloat16, 1e30),
        (torch.float16, 1e-6),
        (torch.float16, 1e4),
    ],
)
def test_tiny_and_huge_numbers_have_the_map_of_the_same_numbers_in_between(method, oracle, dtype, scale, shape):
    maps = (rectified(shape, torch.float64) * scale).to(dtype)
    assert_allclose(explain(method, maps), references.explained(oracle, maps), atol=1e-5)


@both_shapes
@every_method
def test_one_image_of_numbers_far_from_the_others_changes_none_of_them(method, shape):
    maps = rectified(shape)
    clean = explain(method, maps)
    maps[1] *= 1e30
    assert_allclose(explain(method, maps)[[0, 2]], clean[[0, 2]], rtol=0, atol=0)
    assert_allclose(explain(method, maps)[1], clean[1], atol=1e-5)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@every_dtype
@both_shapes
@every_method
def test_numbers_that_are_none_count_as_zero_with_one_warning_and_leave_the_other_images_alone(
    method, shape, dtype, number
):
    maps = rectified(shape, dtype, batch=4)
    filled = maps.clone()
    filled[1, 2, 1:], filled[3] = 0, 0
    maps[1, 2, 1:], maps[3] = number, number
    alone = explain(method, filled)
    with pytest.warns(RuntimeWarning) as caught:
        saliency = explain(method, maps)
    assert [str(warning.message) for warning in caught] == [
        "`layer` put out NaN or Inf for image 1, 3 of the batch; these numbers count as zero"
    ]
    assert_allclose(saliency, alone, rtol=0, atol=0)


def test_sums_that_overflow_are_no_reason_to_warn():
    explain(TSM, torch.full((1, 4, 3, 3), 3e38))


@pytest.mark.parametrize("raised", [1e3, 3e4])
@both_shapes
@every_method_and_its_oracle
def test_a_map_of_low_contrast_is_exact_when_it_is_finished(method, oracle, shape, raised):
    maps = rectified(shape, torch.float64)
    maps[:, 0] += raised
    rounded = maps.float()
    assert_allclose(explain(method, rounded), references.explained(oracle, rounded), atol=1e-5)
