"""The channel modes of feature maps: the mode-1 factor of a Tucker decomposition, with its values and maps.

The terms are those of Kolda and Bader, *Tensor Decompositions and Applications* (SIAM Review, 2009). The mode-1
unfolding has one row for each channel and one column for each position. A full-rank Tucker decomposition is the
higher-order SVD (De Lathauwer et al., 2000); a truncated one is found by higher-order orthogonal iteration (HOOI).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import tensorly as tl
import torch
from tensorly.decomposition import tucker
from torch import Tensor

from tucker_cam.arguments import all_finite, check_choice, check_features
from tucker_cam.decomposition.gram import is_tall, rescale_extremes, unfold
from tucker_cam.decomposition.hooi import truncated_components
from tucker_cam.decomposition.rank import Rank, feasible_rank, full_rank
from tucker_cam.errors import BadValueError

if TYPE_CHECKING:
    from jaxtyping import Float

Engine = Literal["torch", "tensorly"]


class ChannelModes(NamedTuple):
    r"""The channel directions of each image, strongest first.

    Attributes:
        vectors: batch x channels x rank; the columns $a_i$ of the mode-1 factor, orthonormal. The entry of largest
            magnitude in each column is positive (TensorLy's u-based ``svd_flip``).
        values: batch x rank, descending, not negative; $s_i$, the Frobenius norm of the core's i-th mode-1 slice. At
            full rank these are the singular values of the mode-1 unfolding.
        maps: batch x rank x spatial; $a_i^\top F_{(1)}$, where in the picture each direction is strong, signed.
    """

    vectors: Tensor
    values: Tensor
    maps: Tensor

    def __repr__(self) -> str:
        shapes = (f"{name} {'x'.join(map(str, part.shape))}" for name, part in self._asdict().items())
        return f"ChannelModes({', '.join(shapes)})"


def channel_modes(
    features: Tensor, *, rank: Rank = None, center: bool = False, engine: Engine = "torch"
) -> ChannelModes:
    r"""Decompose each image's feature maps and return their mode-1 (channel) factor.

    At full multilinear rank all factors except the first are square and orthogonal, so the mode-1 factor is exactly the
    left singular basis of the unfolding, $F_{(1)} = A_1\,\mathrm{diag}(s)\,V^\top$. The thin SVD gives it without a
    channels x channels matrix. At a lower rank HOOI finds the factor, with TensorLy's initialisation, order of updates
    and stopping rule for each image, but on the whole batch at once and, if there are no fewer channels than positions,
    on the Gram matrix of the positions.

    Args:
        features: batch x channels x spatial (one axis or more), floating point, finite. Float16 and bfloat16 are
            computed, and returned, in float32; the arithmetic is done in float64.
        rank: None for full multilinear rank. Otherwise as in TensorLy's `validate_tucker_rank`: an int for all modes,
            one int for each of (channels, *spatial), a float for that share of the tensor's number of parameters, or
            "same" for as many parameters. The rank is clipped to what is feasible.
        center: subtract each channel's spatial mean first, as PCA does.
        engine: "torch", or "tensorly" for TensorLy's own `tucker`, one image at a time: slow, with the same result.

    Returns:
        The modes, with the dtype (at least float32) and device of `features`; a number beyond that dtype is Inf. A
        truncated decomposition is ordered by the values too. TensorLy's column order can differ if two values are
        closer than its stopping rule.

    Raises:
        TypeError: `features` is no floating point tensor, or `rank` is of another kind.
        ValueError: no spatial axis, an empty axis, non-finite numbers, an impossible rank or an unknown engine.

    Example:
        >>> features = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, -4.0]]])
        >>> modes = channel_modes(features)
        >>> modes.values
        tensor([[4., 3.]])
        >>> modes.maps
        tensor([[[ 0.,  0., -4.],
                 [ 3.,  0.,  0.]]])
    """
    check_features(features, "features")
    if not all_finite(features):
        raise BadValueError("expected finite features, got NaN or Inf: use torch.nan_to_num")
    check_choice("engine", engine, Engine)
    spatial = features.shape[2:]
    ranks = feasible_rank(rank, tuple(features.shape[1:]))
    rescaled, divisors = rescale_extremes(unfold(features))
    unfolding = rescaled.double()
    divisors = divisors.to(unfolding)
    if center:
        unfolding = unfolding - unfolding.mean(-1, keepdim=True)
    if engine == "tensorly":
        vectors, values = _tensorly_factor(unfolding.reshape(features.shape), ranks)
    elif ranks is None:
        vectors, values, _ = torch.linalg.svd(unfolding, full_matrices=False)
    else:
        components = truncated_components(unfolding, spatial, ranks, rescaled=True)
        values, order = components.values.sort(dim=1, descending=True)
        directions = components.directions.take_along_dim(order[:, None, :], dim=2)
        # Orthonormal except for rounding; if the features lack rank, QR fills in the missing columns.
        vectors = torch.linalg.qr(unfolding @ directions if is_tall(unfolding) else directions).Q
    signs, _ = fixed_signs(vectors)
    vectors = vectors * signs[:, None, :]
    values = values * divisors[:, None]
    maps = (vectors.mT @ unfolding * divisors[:, None, None]).reshape(*values.shape, *spatial)
    dtype = torch.promote_types(features.dtype, torch.float32)
    return ChannelModes(*(part.to(features.device, dtype) for part in (vectors, values, maps)))


def fixed_signs(
    vectors: Float[Tensor, "batch channels rank"],
) -> tuple[Float[Tensor, "batch rank"], Float[Tensor, "batch rank"]]:
    """Return the sign, +1 or -1, that makes each column's entry of largest magnitude positive: of ties, the first.

    A singular vector is defined only up to its sign. Multiplying it by this sign makes it unique, as TensorLy's
    ``svd_flip`` does (which returns 0, not 1, for a column of zeros).

    Returns:
        The signs, and by how much each column's largest entry exceeds the largest one of the other sign.
    """
    largest, smallest = vectors.amax(1), vectors.amin(1)
    signs = torch.where(largest + smallest < 0, -1.0, 1.0).to(vectors.dtype)
    tied = (largest == -smallest) & (largest > 0)
    if tied.any():
        first = vectors.abs().argmax(1, keepdim=True)
        signs = torch.where(tied, vectors.gather(1, first).squeeze(1).sign(), signs)
    return signs, (largest + smallest).abs()


def _tensorly_factor(
    features: Float[Tensor, "batch channels *spatial"], rank: tuple[int, ...] | None
) -> tuple[Float[Tensor, "batch channels rank"], Float[Tensor, "batch rank"]]:
    """Run TensorLy's `tucker` on each image, and order the result by the values."""
    factors, norms = [], []
    # For an image of zeros its relative error is 0 / 0, and it stops after the fewest sweeps.
    with tl.backend_context("numpy", local_threadsafe=True), np.errstate(invalid="ignore"):
        for image in features.detach().cpu().numpy():
            core, (factor, *_) = tucker(image, rank=full_rank(image.shape) if rank is None else rank)
            factors.append(torch.from_numpy(factor))
            norms.append(torch.from_numpy(core).flatten(1).norm(dim=1))
    values, order = torch.stack(norms).sort(descending=True, stable=True)
    vectors = torch.stack(factors).take_along_dim(order[:, None, :], dim=2)
    return vectors.to(features.device), values.to(features.device)
