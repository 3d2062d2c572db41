import re

import numpy as np
import pytest
from tensorly.tucker_tensor import validate_tucker_rank

from tucker_cam.decomposition.rank import feasible_rank


@pytest.mark.parametrize(
    ("rank", "shape", "expected"),
    [
        (None, (8, 3, 3), None),
        ([99, 99, 99], (20, 3, 4), None),
        ((4, 9, 2), (20, 3, 4), (4, 3, 2)),
        ((1, 1, 4), (20, 3, 4), (1, 1, 1)),
        ((2, 2, 2, 2), (8, 3, 3, 3), (2, 2, 2, 2)),
        (2, (20, 3, 4), (2, 2, 2)),
        (99, (20, 3, 4), None),
        (np.int64(2), (20, 3, 4), (2, 2, 2)),
        (tuple(np.array([4, 2, 2])), (20, 3, 4), (4, 2, 2)),
        (np.float32(1e9), (20, 3, 4), None),
        (1e9, (20, 3, 4), None),
        (1e300, (20, 3, 4), None),
    ],
)
def test_a_rank_is_clipped_to_what_is_feasible(rank, shape, expected):
    assert feasible_rank(rank, shape) == expected


@pytest.mark.parametrize("shape", [(64, 7, 7), (30, 4, 5, 6)])
@pytest.mark.parametrize("rank", [0.05, 0.3, "same"])
def test_a_share_of_the_parameters_is_tensorlys(rank, shape):
    ours, theirs = feasible_rank(rank, shape), validate_tucker_rank(shape, rank=rank)
    assert ours[1:] == tuple(theirs[1:])
    assert ours[0] == min(theirs[0], np.prod(theirs[1:]))


@pytest.mark.parametrize("rank", [0, -3, (2, 0, 2), 0.0, float("nan"), float("inf"), (2, 2), (2, 2, 2, 2)])
def test_a_rank_that_no_tensor_of_this_shape_has_is_a_value_error(rank):
    with pytest.raises(ValueError, match=re.escape(f"got {rank!r}")):
        feasible_rank(rank, (20, 3, 4))


@pytest.mark.parametrize("rank", [(), True, (2.0, 2, 2), "full", np.array([3, 2, 2]), {2, 3}])
def test_what_is_no_rank_is_a_type_error(rank):
    with pytest.raises(TypeError, match=re.escape(f"got {rank!r}")):
        feasible_rank(rank, (20, 3, 4))
