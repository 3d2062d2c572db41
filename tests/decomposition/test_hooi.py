import pytest
import torch
from made_tensors import sizes_made_by
from registry import rectified

from tucker_cam.decomposition.hooi import truncated_components


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((8, 24, 24), (4, 24, 24)), ((6, 8, 8, 8), (6, 7, 8, 8)), ((40, 6, 6), (4, 6, 6)), ((4, 1, 64), (2, 1, 60))],
)
def test_nothing_is_much_larger_than_the_features_however_high_the_spatial_rank(shape, rank):
    unfolding = rectified(shape, batch=2).flatten(2)
    sizes = sizes_made_by(lambda: truncated_components(unfolding, shape[1:], rank))
    assert max(sizes) <= 1.5 * unfolding.numel()


def test_directions_that_the_features_do_not_have_are_nothing_and_no_noise():
    unfolding = torch.rand(3, 40, 1) * torch.rand(3, 1, 30, dtype=torch.float64)
    unfolding[2] = 0
    values, maps, _ = components = truncated_components(unfolding, (5, 6), (4, 2, 3))
    there = values > 0
    assert there.sum(1).tolist() == [1, 1, 0]
    assert (maps != 0).any(2).equal(there)
    assert (components.directions != 0).any(1).equal(there)
