"""Feature maps in, their channel modes out: the mode-1 factor of a Tucker decomposition, with its values and maps.

The terms are those of Kolda and Bader, *Tensor Decompositions and Applications* (SIAM Review, 2009): the mode-1
unfolding lists one row per channel and one column per position; a full-rank Tucker decomposition is the
higher-order SVD (De Lathauwer et al., 2000), a truncated one is found by higher-order orthogonal iteration (HOOI).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

import tensorly as tl
import torch
from tensorly.decomposition import tucker
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


class ChannelModes(NamedTuple):
    r"""The channel directions of each image, strongest first.

    Attributes:
        vectors: batch x channels x rank; the columns $a_i$ of the mode-1 factor, orthonormal. The entry of largest
            magnitude in each column is positive (TensorLy's u-based ``svd_flip``).
        values: batch x rank, descending, not negative; $s_i$, the Frobenius norm of the core's i-th mode-1 slice. At
            full rank these are the singular values of the mode-1 unfolding.
        maps: batch x rank x spatial; $a_i^\top F_{(1)}$, what each direction shows in the picture, signed.
    """

    vectors: Tensor
    values: Tensor
    maps: Tensor


def channel_modes(features: Tensor, *, rank: tuple[int, ...] | None = None, center: bool = False) -> ChannelModes:
    r"""Decompose each image's feature maps and return their mode-1 (channel) factor.

    At full multilinear rank all factors but the first are square and orthogonal, so the mode-1 factor is exactly the
    left singular basis of the unfolding, $F_{(1)} = A_1\,\mathrm{diag}(s)\,V^\top$: the thin SVD gives it without a
    channels x channels matrix.

    Args:
        features: batch x channels x spatial (one axis or more), floating point, finite. Float16 and bfloat16 are
            computed, and returned, in float32; the arithmetic is done in float64.
        rank: None for full multilinear rank, or one rank for the channels and one for each spatial axis. A rank
            larger than its axis, or than the product of the other ranks, is clipped: no tensor has a larger one.
        center: subtract each channel's spatial mean first, as PCA does.

    Returns:
        The modes, with the dtype (at least float32) and device of `features`. A truncated decomposition is ordered
        by the values too; TensorLy's column order can differ where two values are closer than its stopping rule.

    Raises:
        TypeError: `features` is no floating point tensor, or `rank` is of another kind.
        ValueError: no spatial axis, an empty axis, non-finite numbers, or a rank that fits no tensor of this shape.

    Example:
        >>> features = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, -4.0]]])
        >>> modes = channel_modes(features)
        >>> modes.values
        tensor([[4., 3.]])
        >>> modes.maps
        tensor([[[ 0.,  0., -4.],
                 [ 3.,  0.,  0.]]])
    """
    check_features(features)
    ranks = feasible_rank(rank, tuple(features.shape[1:]))
    spatial = features.shape[2:]
    precise = features.to(torch.float64)
    if center:
        precise = precise - precise.flatten(2).mean(-1).reshape(*features.shape[:2], *(1 for _ in spatial))
    vectors, values = _higher_order_svd(precise.flatten(2)) if ranks is None else _tucker_modes(precise, ranks)
    vectors = vectors * signs(vectors)[:, None, :]
    maps = (vectors.mT @ precise.flatten(2)).reshape(*values.shape, *spatial)
    dtype = torch.promote_types(features.dtype, torch.float32)
    return ChannelModes(vectors.to(dtype), values.to(dtype), maps.to(dtype))


def signs(vectors: Float[Tensor, "batch channels rank"]) -> Float[Tensor, "batch rank"]:
    """Return the sign, +1 or -1, of the entry of largest magnitude in each column: the first such entry where two tie.

    A singular vector is defined up to its sign. Multiplying by this makes it unique, as TensorLy's ``svd_flip`` does
    (which returns 0, not 1, for a column of zeros).
    """
    largest, smallest = vectors.amax(1), vectors.amin(1)
    sign = torch.where(largest + smallest < 0, -1.0, 1.0).to(vectors.dtype)
    tied = (largest == -smallest) & (largest > 0)
    if tied.any():
        first = vectors.abs().argmax(1, keepdim=True)
        sign = torch.where(tied, vectors.gather(1, first).squeeze(1).sign(), sign)
    return sign


def check_features(features: Tensor) -> None:
    """Raise TypeError or ValueError unless `features` is a finite float tensor, batch x channels x spatial."""
    if not isinstance(features, Tensor):
        raise TypeError(f"expected features as a torch.Tensor, got {type(features).__name__}: use torch.as_tensor")
    if not features.is_floating_point():
        raise TypeError(f"expected floating point features, got {features.dtype}: use features.float()")
    shape = tuple(features.shape)
    if len(shape) < 3:
        raise ValueError(
            f"expected features as batch x channels x spatial, got {shape}: "
            "add the batch axis with features[None], or pass maps that still have a spatial axis"
        )
    if 0 in shape:
        raise ValueError(f"expected features without an empty axis, got {shape}")
    if not features.isfinite().all():
        raise ValueError("expected finite features, got NaN or Inf: use torch.nan_to_num")


def feasible_rank(rank: tuple[int, ...] | None, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Clip a multilinear rank to what a tensor of this shape can have; None where that is the full rank.

    The rank of one mode is at most the length of its axis, and at most the product of the other ranks.

    Args:
        rank: one rank for each axis of `shape`, or None.
        shape: channels x spatial, one image.

    Raises:
        TypeError: `rank` is neither None nor a sequence of ints.
        ValueError: `rank` has the wrong length, or a part below 1.

    Example:
        >>> feasible_rank((100, 4, 9), (1280, 7, 7))
        (28, 4, 7)
        >>> feasible_rank((1280, 7, 7), (1280, 7, 7)) is None
        True
    """
    if rank is None:
        return None
    if not isinstance(rank, (tuple, list)) or any(isinstance(r, bool) or not isinstance(r, int) for r in rank):
        raise TypeError(f"expected rank as None or a tuple of ints, one for each of channels x spatial, got {rank!r}")
    if len(rank) != len(shape) or min(rank) < 1:
        raise ValueError(
            f"expected a rank of {len(shape)} positive ints for feature maps of shape {shape} "
            f"(channels x spatial), got {rank!r}"
        )
    clipped = _clip(rank, shape)
    return None if clipped == _clip(shape, shape) else clipped


def _clip(rank: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    clipped = [min(r, length) for r, length in zip(rank, shape, strict=True)]
    # At most one part, the largest, can exceed the product of the others.
    return tuple(min(r, prod(clipped) // r) for r in clipped)


def _higher_order_svd(
    unfolding: Float[Tensor, "batch channels positions"],
) -> tuple[Float[Tensor, "batch channels rank"], Float[Tensor, "batch rank"]]:
    vectors, values, _ = torch.linalg.svd(unfolding, full_matrices=False)
    return vectors, values


def _tucker_modes(
    features: Float[Tensor, "batch channels *spatial"], rank: tuple[int, ...]
) -> tuple[Float[Tensor, "batch channels rank"], Float[Tensor, "batch rank"]]:
    """Run TensorLy's HOOI on each image, ordered by the values."""
    factors, norms = [], []
    with tl.backend_context("numpy", local_threadsafe=True):
        for image in features.cpu().numpy():
            core, (channel_factor, *_) = tucker(image, rank=rank)
            factors.append(torch.from_numpy(channel_factor))
            norms.append(torch.from_numpy(core).flatten(1).norm(dim=1))
    values, order = torch.stack(norms).to(features.device).sort(descending=True, stable=True)
    vectors = torch.stack(factors).to(features.device)
    return vectors.gather(2, order[:, None, :].expand_as(vectors)), values
