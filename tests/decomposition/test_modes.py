import numpy as np
import pytest
import references
import torch
from torch.testing import assert_close

from tucker_cam import channel_modes
from tucker_cam.decomposition.modes import fixed_signs

TALL, WIDE, SQUARE, VOLUME = (20, 3, 4), (5, 4, 6), (12, 3, 4), (9, 2, 3, 4)


def features(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def test_a_hand_computed_tensor():
    # Rows of the unfolding are orthogonal, of length 3 and 5; the larger entry of the second is negative.
    image = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 3.0], [0.0, -4.0]]])
    modes = channel_modes(image[None])
    assert_close(modes.values, torch.tensor([[5.0, 3.0]]))
    assert_close(modes.vectors, torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))
    assert_close(modes.maps, torch.stack([image[1], image[0]])[None])


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE, VOLUME])
def test_full_rank_modes_are_those_of_tensorlys_tucker(shape):
    batch = features(3, *shape)
    modes = channel_modes(batch)
    for image, vectors, values in zip(batch, modes.vectors, modes.values, strict=True):
        factor, norms = references.tensorly_factor(image)
        assert_close(vectors.numpy(), factor[:, : vectors.shape[1]])
        assert_close(values.numpy(), norms[: len(values)])


@pytest.mark.parametrize(
    ("shape", "rank"),
    [
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
def test_truncated_modes_are_those_of_tensorlys_tucker(shape, rank):
    batch = features(3, *shape)
    modes = channel_modes(batch, rank=rank)
    for image, vectors, values in zip(batch, modes.vectors, modes.values, strict=True):
        factor, norms = references.tensorly_factor(image, rank)
        order = np.argsort(-norms)
        assert_close(vectors.numpy(), factor[:, order])
        assert_close(values.numpy(), norms[order])


@pytest.mark.parametrize("shape", [TALL, WIDE, VOLUME])
def test_centred_modes_are_the_svd_of_the_centred_unfolding(shape):
    batch = features(2, *shape) + 3
    modes = channel_modes(batch, center=True)
    for image, values in zip(batch, modes.values, strict=True):
        unfolding = image.numpy().reshape(shape[0], -1)
        centred = unfolding - unfolding.mean(axis=1, keepdims=True)
        assert_close(values.numpy(), np.linalg.svd(centred, compute_uv=False))


@pytest.mark.parametrize("rank", [None, (4, 2, 2)])
def test_vectors_are_orthonormal_also_where_the_features_lack_rank(rank):
    batch = features(2, *TALL)
    batch[1, :, 1:] = 0  # rank 4 at most
    vectors = channel_modes(batch, rank=rank).vectors
    assert_close(vectors.mT @ vectors, torch.eye(vectors.shape[2], dtype=vectors.dtype).expand(2, -1, -1))


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
    batch = features(2, *TALL)
    expected, actual = channel_modes(batch, rank=rank), channel_modes(batch * scale, rank=rank)
    assert_close(actual.vectors, expected.vectors)
    for ordinary, extreme in zip(expected[1:], actual[1:], strict=True):
        assert_close(extreme / scale, ordinary)


@pytest.mark.parametrize("rank", [None, (3, 2, 2)])
def test_features_that_record_a_graph_are_decomposed_by_both_engines(rank):
    features = torch.rand(2, 8, 3, 4, requires_grad=True)
    ours, theirs = (channel_modes(features, rank=rank, engine=engine) for engine in ("torch", "tensorly"))
    assert_close(theirs.values, ours.values, rtol=1e-3, atol=1e-5)
