import numpy as np
import pytest
import tensorly as tl
import torch
from tensorly.decomposition import partial_tucker
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tucker_cam.decomposition import hooi
from tucker_cam.decomposition.hooi import truncated_components, truncated_leading_map

CASES = [
    ((40, 5, 6), (4, 2, 3)),
    ((10, 5, 6), (4, 2, 3)),
    ((60, 2, 4, 5), (5, 2, 3, 2)),
    ((9, 2, 4, 5), (5, 2, 3, 2)),
    ((40, 5, 6), (1, 1, 1)),
]


def features(shape, batch=6):
    return torch.relu(torch.randn(batch, *shape) + 0.3)


@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_each_image_stops_after_as_many_sweeps_as_in_tensorly(shape, rank, monkeypatch):
    batch = features(shape).double()
    sweeps = []
    for image in batch.numpy():
        with tl.backend_context("numpy"):
            _, errors = partial_tucker(image, rank=rank)
        sweeps.append(len(errors))
    running = []
    name = "_update_from_gram" if shape[0] >= np.prod(shape[1:]) else "_update_from_features"
    update = getattr(hooi, name)
    monkeypatch.setattr(hooi, name, lambda source, *rest: (running.append(len(source)), update(source, *rest))[1])
    truncated_components(batch.flatten(2), shape[1:], rank)
    # In the n-th sweep, those images take part that need n or more.
    assert running == [sum(s >= n for s in sweeps) for n in range(1, max(sweeps) + 1)]
    assert len(set(sweeps)) > 1 or rank == (1, 1, 1)


@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_a_batch_gives_what_its_images_give_one_at_a_time(shape, rank):
    unfolding = features(shape).flatten(2)
    together = truncated_components(unfolding, shape[1:], rank)
    for i in range(len(unfolding)):
        alone = truncated_components(unfolding[i : i + 1], shape[1:], rank)
        assert_close(together.values[i], alone.values[0], rtol=1e-9, atol=1e-9)
        assert_close(together.maps[i].abs(), alone.maps[0].abs(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("shape", "rank"), CASES)
def test_the_directions_make_the_maps(shape, rank):
    unfolding = features(shape).flatten(2).double()
    components = truncated_components(unfolding, shape[1:], rank)
    tall = shape[0] >= np.prod(shape[1:])
    factor = unfolding @ components.directions if tall else components.directions
    assert_close(factor.mT @ factor, torch.eye(rank[0], dtype=factor.dtype).expand(len(factor), -1, -1))
    assert_close(factor.mT @ unfolding, components.maps)


def test_the_quick_leading_map_is_the_careful_one():
    # From 200 images, some stop so near the tolerance, or have so narrow a gap, that float32 could decide otherwise.
    unfolding = features((40, 5, 6), 200).flatten(2)
    careful = truncated_components(unfolding.double(), (5, 6), (4, 2, 3)).maps[:, 0].abs()
    quick = truncated_leading_map(unfolding, (5, 6), (4, 2, 3)).abs()
    assert_close(quick / careful.amax(), careful / careful.amax(), rtol=0, atol=1e-5)


def test_sweeps_that_multiply_the_noise_of_a_quick_leading_map_are_done_carefully():
    # Gaussian noise has no first direction that stands out; three of these images came out wrong by up to 4e-5.
    unfolding = torch.randn(200, 320, 49)
    careful = truncated_leading_map(unfolding.double(), (7, 7), (3, 5, 3)).abs()
    quick = truncated_leading_map(unfolding, (7, 7), (3, 5, 3)).abs()
    peaks = careful.amax(1, keepdim=True)
    assert_close(quick / peaks, careful / peaks, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((8, 24, 24), (4, 24, 24)), ((6, 8, 8, 8), (6, 7, 8, 8)), ((40, 6, 6), (4, 6, 6)), ((4, 1, 64), (2, 1, 60))],
)
def test_nothing_is_much_larger_than_the_features_however_high_the_spatial_rank(shape, rank):
    unfolding = features(shape, 2).flatten(2)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(part.numel() for part in tree_leaves(result) if isinstance(part, torch.Tensor))
            return result

    with Watch():
        truncated_components(unfolding, shape[1:], rank)
    assert max(sizes) <= 1.5 * unfolding.numel()


def iterate(batch, noise):
    matrix = batch.mT @ batch
    return hooi._iterate(matrix, (5, 6), (4, 2, 3), tall=True, noise=noise)


def test_without_noise_no_map_is_off_and_with_little_almost_none():
    batch = features((40, 5, 6), 100).flatten(2).double()
    assert not iterate(batch, 0.0).error.any()
    assert (iterate(batch, 1e-7).error < 1e-6).sum() > 90


def test_a_stop_that_noise_could_shift_may_lead_anywhere():
    batch = features((40, 5, 6), 20).flatten(2).double()
    assert iterate(batch, 1e-9).error.isfinite().all()
    assert iterate(batch, 1e-3).error.isinf().all()


def test_the_error_of_a_first_map_is_the_noise_over_the_gap():
    # The same block twice, in other channels and positions: no first direction stands out.
    batch = torch.zeros(2, 40, 5, 6, dtype=torch.float64)
    batch[:, :20, :2, :3] = batch[:, 20:, 2:4, 3:] = torch.rand(20, 2, 3, dtype=torch.float64)
    batch[1, :20] *= 2
    tied, apart = iterate(batch.flatten(2), 1e-7).error
    assert tied > 1e-4
    assert apart == pytest.approx(1e-7 / (1 - 1 / 4), rel=1e-3)


def test_values_descend_also_where_the_last_sweep_changed_their_order():
    # About one image of Gaussian noise in 500 has two values that near.
    unfolding = torch.randn(3000, 20, 20)
    values = truncated_components(unfolding, (4, 5), (6, 2, 2)).values
    assert (values.diff(dim=1) <= 0).all()


def test_nothing_in_nothing_out():
    components = truncated_components(torch.zeros(2, 40, 30), (5, 6), (4, 2, 3))
    assert_close(components.maps, torch.zeros_like(components.maps))
    assert_close(components.values, torch.zeros_like(components.values))
