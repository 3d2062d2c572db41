from functools import partial

import numpy as np
import pytest
import references
import torch
from registry import every_dtype, rectified
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from tucker_cam.decomposition.projection import combined_map, leading_map

SHAPES = [
    (20, 3, 4),
    (5, 4, 6),
    (12, 3, 4),
    (9, 2, 3, 4),
    (30, 2, 2, 2),
    (1, 3, 4),
    (4, 1, 1),
    (300, 3, 4),
    (150, 11, 13),
    (130, 4, 5, 7),
    (140, 12, 13),
]
CASES = [(shape, None) for shape in SHAPES] + [
    ((20, 3, 4), (4, 2, 2)),
    ((20, 3, 4), (1, 1, 1)),
    ((20, 3, 4), (5, 3, 4)),
    ((8, 6, 7), (4, 6, 7)),
    ((5, 4, 6), (3, 2, 2)),
    ((9, 2, 3, 4), (3, 2, 2, 2)),
    ((30, 2, 3, 4), (3, 2, 2, 2)),
    ((30, 2, 3, 4), (1, 1, 1, 1)),
    ((9, 2, 3, 4), (1, 1, 1, 1)),
    ((1, 3, 4), (1, 1, 1)),
]
TOLERANCE = 1e-5


def assert_is_the_reference(maps, reference, batch, *arguments):
    """Compare with a float64 reference on the very same numbers, each map scaled by its largest value."""
    for saliency, image in zip(maps.double().numpy(), batch.double().numpy(), strict=True):
        expected = reference(image, *arguments)
        np.testing.assert_allclose(saliency / expected.max(), expected / expected.max(), rtol=0, atol=TOLERANCE)


@every_dtype
@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_the_leading_map_is_tensorlys(shape, rank, dtype):
    batch = rectified(shape, dtype)
    assert_is_the_reference(leading_map(batch, rank=rank), references.tensorly_tsm, batch, rank)


@pytest.mark.parametrize("shape", [(32, 4, 4), (5, 4, 4)])
@pytest.mark.parametrize("center", [False, True])
def test_signs_that_float32_could_not_tell_are_those_of_float64(center, shape):
    batch = torch.rand(100, *shape)
    # Two channels that are strong and oppose each other, so nearly that either could be the largest.
    batch[:, 0] *= 10
    batch[:, 1] = -batch[:, 0] * (1 + 2e-7 * torch.randn(100, 4, 4))
    for image in batch[:, None]:
        exact = combined_map(image.double(), center=center)
        assert_close(combined_map(image, center=center).double(), exact, rtol=0, atol=1e-5 * exact.max().item())


@every_dtype
@pytest.mark.parametrize("combine", ["signed", "energy"])
@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_the_combined_map_is_tensorlys(shape, rank, combine, dtype):
    batch = rectified(shape, dtype)
    assert_is_the_reference(
        combined_map(batch, combine=combine, rank=rank), references.tensorly_mtsm, batch, rank, combine
    )


@every_dtype
@pytest.mark.parametrize("combine", ["signed", "energy"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (4, 1, 1)])
def test_the_centred_map_is_that_of_a_plain_svd(shape, combine, dtype):
    batch = rectified(shape, dtype)
    actual = combined_map(batch, combine=combine, center=True)
    assert_is_the_reference(actual, references.multivec_eigencam, batch, combine)


@pytest.mark.parametrize("combine", ["signed", "energy"])
@pytest.mark.parametrize("shape", [(20, 3, 4), (5, 4, 6), (300, 3, 4)])
def test_channels_whose_mean_is_ten_thousand_times_their_spread_are_centred_exactly(shape, combine):
    batch = rectified(shape, batch=20) + 1e4 * torch.randn(20, shape[0], 1, 1)
    actual = combined_map(batch, combine=combine, center=True)
    assert_is_the_reference(actual, references.multivec_eigencam, batch, combine)


@pytest.mark.parametrize("rank", [None, (3, 2, 2)])
@pytest.mark.parametrize("shape", [(64, 7, 7), (32, 14, 14), (300, 10, 14), (140, 15, 20)])
def test_a_map_of_low_contrast_is_right_after_it_is_scaled(shape, rank):
    batch = rectified(shape, batch=15)
    batch[:, 0] += torch.logspace(0, 4, 15)[:, None, None]  # one massive channel
    for saliency, image in zip(leading_map(batch, rank=rank).numpy(), batch.double().numpy(), strict=True):
        expected = references.scaled(references.tensorly_tsm(image, rank))
        np.testing.assert_allclose(references.scaled(saliency), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(16, 112 * 112), (400, 120)])
def test_a_map_with_one_very_strong_position_is_right_there(shape):
    # The gap of the eigenvalues, 0.0101, leaves an error of the vector that is small beside its length of 1, and not
    # beside its largest entry but one.
    channels, positions = shape
    generator = np.random.default_rng(12)
    first = generator.uniform(0.5, 1, positions)
    first[7] = 0
    second = np.zeros(positions)
    second[7] = 1
    left, _ = np.linalg.qr(generator.standard_normal((channels, 2)))
    matrix = np.outer(left[:, 0], first / np.linalg.norm(first)) + np.sqrt(1 - 0.0101) * np.outer(left[:, 1], second)
    matrix += 1e-5 / np.sqrt(positions) * generator.standard_normal(shape)
    batch = torch.from_numpy(matrix).float()[None]
    assert_is_the_reference(leading_map(batch), references.tsm, batch)


class TF32(TorchDispatchMode):
    """Rounds the factors of float32 products to ten bits of mantissa, as CUDA does where it is allowed to."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.mv):
            args = [self.rounded(x) if x.dtype == torch.float32 else x for x in args]
        return function(*args, **(kwargs or {}))

    @staticmethod
    def rounded(factor):
        mantissa, exponent = factor.frexp()
        return (mantissa * 2**11).round().ldexp(exponent - 11)


@pytest.mark.parametrize("rank", [None, (3, 2, 2)])
@pytest.mark.parametrize("shape", [(40, 5, 6), (20, 5, 6)])
def test_products_that_may_be_rounded_to_tf32_are_not_relied_on(shape, rank):
    batch = rectified(shape, batch=200)
    methods = [partial(project, rank=rank) for project in (leading_map, combined_map)]
    methods += [partial(combined_map, combine=combine, center=True) for combine in ("signed", "energy")]
    expected = [method(batch.double()) for method in methods]
    torch.set_float32_matmul_precision("high")
    try:
        with TF32():
            actual = [method(batch) for method in methods]
    finally:
        torch.set_float32_matmul_precision("highest")
    for saliency, exact in zip(actual, expected, strict=True):
        assert_close(saliency / exact.amax(), exact / exact.amax(), rtol=0, atol=TOLERANCE)


def test_at_full_rank_the_maps_come_without_a_factor(monkeypatch):
    def never(*_, **__):
        raise AssertionError("a decomposition was computed")

    monkeypatch.setattr("tucker_cam.decomposition.projection.channel_modes", never)
    for shape in ((20, 3, 4), (5, 4, 6)):
        leading_map(rectified(shape))
        for combine in ("signed", "energy"):
            combined_map(rectified(shape), combine=combine)


@pytest.mark.parametrize("rank", [None, (4, 2, 2)])
@pytest.mark.parametrize("project", [leading_map, combined_map])
def test_a_map_is_an_ordinary_tensor_without_a_graph(project, rank):
    saliency = project(rectified((20, 3, 4)).requires_grad_(), rank=rank)
    assert not saliency.requires_grad
    weight = torch.ones((), requires_grad=True)
    (weight * saliency.mul_(2)).sum().backward()
    assert_close(weight.grad, saliency.sum().float())
