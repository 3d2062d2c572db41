"""What holds for feature maps of any shape, on features that hypothesis draws.

Each tolerance is a share of a map's largest value. The equivariances hold in exact arithmetic; LAPACK's rounding errors
of 1e-16 grow with the inverse of the gap between the singular values.
"""

from functools import partial

import networks
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from registry import CASES
from torch.testing import assert_close

from tucker_cam import channel_modes
from tucker_cam.decomposition.projection import combined_map, leading_map

ROUNDING = 1e-8
LAYER = networks.passing_on()
MAPS = {name: method(LAYER, [LAYER.layer]).saliency for name, (method, _) in CASES.items() if "truncated" not in name}
TRUNCATED = {"tsm": leading_map, "mtsm": combined_map, "mtsm-energy": partial(combined_map, combine="energy")}
WITHOUT_SIGN_RULE = {name: MAPS[name] for name in ("tsm", "mtsm-energy", "multivec-eigencam, energy")}

every_map = pytest.mark.parametrize("project", MAPS.values(), ids=MAPS)
every_truncated_map = pytest.mark.parametrize("project", TRUNCATED.values(), ids=TRUNCATED)
# The same examples in each run: a failure that comes once in a thousand runs belongs into the nightly fuzzer.
examples = settings(derandomize=True, deadline=None, max_examples=40)


@st.composite
def features(draw, most_batch=3, axes=(1, 3), dtype=torch.float64):
    """Draw batch x channels x spatial: signed, rectified as after a ReLU, of low rank, or of very unequal channels."""
    batch, channels = draw(st.integers(1, most_batch)), draw(st.integers(1, 40))
    spatial = draw(st.lists(st.integers(1, 6), min_size=axes[0], max_size=axes[1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    drawn = normal(batch, channels, *spatial)
    kind = draw(st.sampled_from(["signed", "rectified", "low rank", "unequal"]))
    if kind == "rectified":
        drawn = torch.relu(drawn + 0.3)
    elif kind == "low rank":
        drawn = torch.einsum("bcr,br...->bc...", normal(batch, channels, 2), normal(batch, 2, *spatial))
    elif kind == "unequal":
        drawn = drawn * torch.logspace(0, -4, channels, dtype=torch.float64).reshape(-1, *(1 for _ in spatial))
    return drawn.to(dtype)


@st.composite
def ranks(draw, drawn, *, kinds=("int", "tuple", "share")):
    """Draw a rank that TensorLy's users might write for these features."""
    kind = draw(st.sampled_from(kinds))
    if kind == "int":
        return draw(st.integers(1, 8))
    if kind == "share":
        return draw(st.floats(0.05, 1))
    return tuple(draw(st.integers(1, length + 1)) for length in drawn.shape[1:])


def peaks(maps):
    """Return each map's largest value, in a shape that divides the maps; 1 for a map of zeros."""
    largest = maps.double().flatten(1).amax(1)
    return torch.where(largest > 0, largest, 1).reshape(-1, *(1 for _ in maps.shape[1:]))


def assert_same_maps(actual, expected, tolerance=ROUNDING):
    scale = peaks(expected)
    assert_close(actual.double() / scale, expected.double() / scale, rtol=0, atol=tolerance)


def has_one_map(project, drawn):
    """Tell whether an image has a map at all, of values that lie apart, and one entry that decides each sign.

    In a tie no vector is better than another.
    """
    modes = channel_modes(drawn, center=project.__self__.center)
    values = torch.cat([modes.values, torch.zeros_like(modes.values[:, :1])], dim=1)
    negligible = modes.values <= 1e-9 * modes.values[:, :1]
    apart = -values.diff(dim=1) > 1e-3 * modes.values
    leads = largest_entries_lead(modes) > 1e-6
    return bool((modes.values[:, 0] > 1e-9 * drawn.abs().amax()).all() and ((apart & leads) | negligible).all())


def largest_entries_lead(modes):
    """Return by how much each vector's largest entry exceeds the next one; 1 where it is the only one."""
    if modes.vectors.shape[1] == 1:
        return torch.ones_like(modes.values)
    first, second = modes.vectors.abs().topk(2, dim=1).values.unbind(1)
    return first - second


@every_map
@given(drawn=features(), exponent=st.integers(-200, 200))
@examples
def test_the_scale_of_the_features_does_not_matter(project, drawn, exponent):
    assume(has_one_map(project, drawn))
    expected, actual = project(drawn), project(drawn * 10.0**exponent)
    assert_same_maps(actual / peaks(actual), expected / peaks(expected))


@every_map
@given(drawn=features(), seed=st.integers(0, 2**32 - 1))
@examples
def test_the_order_of_the_channels_does_not_matter(project, drawn, seed):
    assume(has_one_map(project, drawn))
    order = torch.randperm(drawn.shape[1], generator=torch.Generator().manual_seed(seed))
    assert_same_maps(project(drawn[:, order]), project(drawn))


@pytest.mark.parametrize("project", WITHOUT_SIGN_RULE.values(), ids=WITHOUT_SIGN_RULE)
@given(drawn=features(), seed=st.integers(0, 2**32 - 1))
@examples
def test_rotating_the_channels_does_not_matter_where_no_sign_does(project, drawn, seed):
    assume(has_one_map(project, drawn))
    noise = torch.randn(drawn.shape[1], drawn.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    rotated = torch.einsum("ij,bj...->bi...", torch.linalg.qr(noise).Q, drawn)
    assert_same_maps(project(rotated), project(drawn))


@every_map
@given(drawn=features(axes=(2, 3)), data=st.data())
@examples
def test_flipped_or_transposed_features_give_the_flipped_or_transposed_map(project, drawn, data):
    assume(has_one_map(project, drawn))
    axis = data.draw(st.integers(2, drawn.dim() - 1))
    assert_same_maps(project(drawn.flip(axis)), project(drawn).flip(axis - 1))
    assert_same_maps(project(drawn.transpose(2, axis)), project(drawn).transpose(1, axis - 1))


@every_truncated_map
@given(drawn=features(axes=(2, 3)), data=st.data())
@examples
def test_a_truncated_map_is_flipped_with_the_features(project, drawn, data):
    rank, axis = data.draw(ranks(drawn)), data.draw(st.integers(2, drawn.dim() - 1))
    assume(truncated_stands_out(drawn, rank))
    assert_same_maps(project(drawn.flip(axis), rank=rank), project(drawn, rank=rank).flip(axis - 1))


def truncated_stands_out(drawn, rank):
    modes = channel_modes(drawn, rank=rank)
    values, leads = modes.values, largest_entries_lead(modes)
    return bool(
        ((-values.diff(dim=1) > 1e-2 * values[:, :-1]).all() and (values > 1e-3 * values[:, :1]).all())
        and (leads > 1e-3).all()
    )


# To the bit it would be if BLAS did not block its products by the size of the batch.
@every_map
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, ROUNDING), (torch.float32, 1e-5)])
@given(drawn=features(most_batch=5))
@examples
def test_a_batch_gives_what_its_images_give_alone(project, drawn, dtype, tolerance):
    drawn = drawn.to(dtype)
    assume(has_one_map(project, drawn))
    assert_same_maps(torch.cat([project(image[None]) for image in drawn]), project(drawn), tolerance)


@every_map
@given(drawn=features(dtype=torch.float32))
@examples
def test_the_same_features_give_the_same_map_to_the_bit_and_with_more_threads_to_rounding(project, drawn):
    once, again = project(drawn), project(drawn.clone())
    assert torch.equal(once, again)
    assume(has_one_map(project, drawn))
    torch.set_num_threads(2)
    try:
        assert_same_maps(project(drawn), once)
    finally:
        torch.set_num_threads(1)


@every_truncated_map
@given(drawn=features(most_batch=2), data=st.data())
@examples
def test_the_engines_agree(project, drawn, data):
    rank = data.draw(st.none() | ranks(drawn))
    assume(truncated_stands_out(drawn, rank))
    assert_same_maps(project(drawn, rank=rank), project(drawn, rank=rank, engine="tensorly"), tolerance=1e-5)


@given(drawn=features(), center=st.booleans())
@examples
def test_all_modes_together_rebuild_the_features(drawn, center):
    modes = channel_modes(drawn, center=center)
    rebuilt = torch.einsum("bcr,br...->bc...", modes.vectors, modes.maps)
    mean = drawn.flatten(2).mean(-1).reshape(*drawn.shape[:2], *(1 for _ in drawn.shape[2:]))
    assert_close(rebuilt, drawn - mean if center else drawn)


@given(drawn=features(), data=st.data())
@examples
def test_modes_are_orthonormal_descending_and_of_one_sign(drawn, data):
    rank, center = data.draw(st.none() | ranks(drawn)), data.draw(st.booleans())
    modes = channel_modes(drawn, rank=rank, center=center)
    count = modes.values.shape[1]
    assert_close(modes.vectors.mT @ modes.vectors, torch.eye(count).double().expand(len(drawn), -1, -1))
    assert (modes.values >= 0).all()
    assert (modes.values.diff(dim=1) <= 0).all()
    assert (modes.vectors.amax(1) >= -modes.vectors.amin(1)).all()
    if rank is None:
        assert_close(modes.maps.flatten(2).norm(dim=2), modes.values, rtol=1e-6, atol=1e-9)
        unfolding = drawn.flatten(2).numpy()
        unfolding = unfolding - unfolding.mean(-1, keepdims=True) if center else unfolding
        assert_close(modes.values.numpy(), np.linalg.svd(unfolding, compute_uv=False), rtol=1e-6, atol=1e-9)
