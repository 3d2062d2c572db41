import numpy as np
import pytest
import references
import torch
from torch.testing import assert_close

from tucker_cam import channel_modes
from tucker_cam.decomposition.modes import fixed_signs
from tucker_cam.decomposition.projection import leading_map

TALL, WIDE, VOLUME = (20, 3, 4), (5, 4, 6), (9, 2, 3, 4)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [
        (TALL, None),
        (WIDE, None),
        ((12, 3, 4), None),
        (VOLUME, None),
        (TALL, (4, 2, 2)),
        (TALL, (3, 3, 4)),
        (TALL, (1, 1, 1)),
        (WIDE, (2, 3, 2)),
        (WIDE, (4, 2, 2)),
        (VOLUME, (3, 2, 2, 3)),
        ((40, 2, 3, 4), (5, 2, 2, 3)),
        ((30, 8), (3, 5)),
        ((8, 30), (3, 5)),
    ],
)
def test_modes_are_those_of_tensorlys_tucker(shape, rank):
    batch = torch.randn(3, *shape, dtype=torch.float64)
    modes = channel_modes(batch, rank=rank)
    for image, vectors, values in zip(batch, modes.vectors, modes.values, strict=True):
        factor, norms = references.tensorly_factor(image, rank)
        order = np.argsort(-norms)[: len(values)]
        assert_close(vectors.numpy(), factor[:, order])
        assert_close(values.numpy(), norms[order])


def test_values_descend_and_maps_follow_also_where_the_last_sweep_changed_their_order():
    # About one image of Gaussian noise in 500 has two values that near.
    batch = torch.randn(3000, 20, 4, 5, dtype=torch.float64)
    modes = channel_modes(batch, rank=(6, 2, 2))
    assert (modes.values.diff(dim=1) <= 0).all()
    assert_close(leading_map(batch, rank=(6, 2, 2)), modes.maps[:, 0].abs())
    nearest = modes.values.diff(dim=1).abs().amin(1).topk(30, largest=False).indices
    assert (channel_modes(batch[nearest], rank=(6, 2, 2), engine="tensorly").values.diff(dim=1) <= 0).all()


def test_the_sign_rule_looks_at_the_largest_entry_and_at_the_first_of_two():
    columns = [
        [0.5, -0.7, 0.6],
        [-0.5, 0.7, -0.6],
        [-1.0, 1.0, 0.0],
        [1.0, -1.0, 0.0],
        [0.0, 0.0, 0.0],
        [-1.0, -2.0, -3.0],
    ]
    assert_close(fixed_signs(torch.tensor(columns).T[None])[0], torch.tensor([[-1.0, 1.0, -1.0, 1.0, 1.0, -1.0]]))


@pytest.mark.parametrize("rank", [None, (4, 2, 2)])
@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_values_and_maps_grow_with_the_features_however_large_or_small(scale, rank):
    batch = torch.randn(2, *TALL, dtype=torch.float64)
    expected, actual = channel_modes(batch, rank=rank), channel_modes(batch * scale, rank=rank)
    assert_close(actual.vectors, expected.vectors)
    for ordinary, extreme in zip(expected[1:], actual[1:], strict=True):
        assert_close(extreme / scale, ordinary)


@pytest.mark.parametrize("rank", [None, (3, 2, 2)])
def test_features_that_record_a_graph_are_decomposed_by_both_engines(rank):
    features = torch.rand(2, 8, 3, 4, requires_grad=True)
    ours, theirs = (channel_modes(features, rank=rank, engine=engine) for engine in ("torch", "tensorly"))
    assert_close(theirs.values, ours.values, rtol=1e-3, atol=1e-5)
