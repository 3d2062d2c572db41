import numpy as np
import pytest
import references
import torch
from torch.testing import assert_close

from tucker_cam.projection import combined_map, leading_map

SHAPES = [(20, 3, 4), (5, 4, 6), (12, 3, 4), (9, 2, 3, 4), (30, 2, 2, 2), (1, 3, 4), (4, 1, 1), (300, 3, 4)]
CASES = [(shape, None) for shape in SHAPES] + [
    ((20, 3, 4), (4, 2, 2)),
    ((20, 3, 4), (1, 1, 1)),
    ((5, 4, 6), (3, 2, 2)),
    ((9, 2, 3, 4), (3, 2, 2, 2)),
    ((9, 2, 3, 4), (1, 1, 1, 1)),
    ((1, 3, 4), (1, 1, 1)),
]
# Float32 features against a float64 reference on the same numbers; the maps are of the order of 1 to 1000.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def features(shape, batch=3):
    """Post-activation features: not negative, so that their mean stands out, as in a network."""
    return torch.relu(torch.randn(batch, *shape) + 0.3)


def stacked(reference, batch, *arguments):
    return torch.from_numpy(np.stack([reference(image.numpy(), *arguments) for image in batch]))


@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_the_leading_map_is_tensorlys(shape, rank):
    batch = features(shape)
    expected = stacked(references.tsm, batch, rank)
    assert_close(leading_map(batch, rank=rank), expected, check_dtype=False, **TOLERANCE)


@pytest.mark.parametrize("combine", ["signed", "energy"])
@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_the_combined_map_is_tensorlys(shape, rank, combine):
    batch = features(shape)
    expected = stacked(references.mtsm, batch, rank, combine)
    assert_close(combined_map(batch, combine=combine, rank=rank), expected, check_dtype=False, **TOLERANCE)


@pytest.mark.parametrize("combine", ["signed", "energy"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_centred_map_is_that_of_a_plain_svd(shape, combine):
    batch = features(shape)
    expected = stacked(references.multivec_eigencam, batch, combine)
    actual = combined_map(batch, combine=combine, center=True)
    assert_close(actual, expected, check_dtype=False, **TOLERANCE)


def test_a_near_tie_of_the_leading_values_is_resolved_in_float64():
    # Singular values 1 and 1 - 1e-5: the float32 Gram matrix cannot tell their vectors apart, float64 can.
    left, right = (torch.linalg.qr(torch.randn(2, n, 12, dtype=torch.float64)).Q for n in (40, 12))
    values = torch.linspace(1, 0.1, 12, dtype=torch.float64)
    values[1] = 1 - 1e-5
    batch = (left @ (values[:, None] * right.mT)).unflatten(2, (3, 4)).float()
    exact = leading_map(batch.double())
    assert_close(leading_map(batch), exact, rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_features_beyond_the_range_of_float32_squares_keep_their_map(scale):
    batch = features((20, 3, 4))
    for project in (leading_map, combined_map, lambda f: combined_map(f, combine="energy")):
        expected, actual = project(batch), project(batch * scale)
        assert_close(actual / actual.amax(), expected / expected.amax(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 3, 4), (5, 4, 6)])
def test_no_features_no_map(shape):
    zeros = torch.zeros(2, *shape)
    for saliency in (
        leading_map(zeros),
        combined_map(zeros),
        combined_map(zeros, combine="energy", center=True),
    ):
        assert_close(saliency, torch.zeros(2, *shape[1:], dtype=saliency.dtype))


@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_the_layout_in_memory_does_not_matter(layout):
    batch = features((20, 3, 4))
    if layout == "channels_last":
        same = batch.contiguous(memory_format=torch.channels_last)
    else:
        same = torch.stack([batch, batch], dim=-1)[..., 0]
    assert same.stride() != batch.stride()
    assert_close(leading_map(same), leading_map(batch))
    assert_close(combined_map(same), combined_map(batch))
