r"""Feature maps in, one saliency map for each image out: the equations of TSM, MTSM and Multivec-EigenCAM.

A truncated decomposition is projected as the paper writes it, on the mode-1 factor. At full rank the same maps follow
from the Gram matrix of the unfolding alone: with $F_{(1)} = A\,\mathrm{diag}(s)\,V^\top$, each component
$a_i^\top F_{(1)} = s_i v_i^\top$ is an eigenvector of $G = F_{(1)}^\top F_{(1)}$ and $s_i^2$ its eigenvalue, so a
matrix no larger than min(channels, positions) squared is all that is ever decomposed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tucker_cam.decomposition import channel_modes, feasible_rank, signs

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Combine = Literal["signed", "energy"]

# A float32 Gram matrix is off by about 1e-7 of its largest eigenvalue, and the leading eigenvector by that over the
# relative gap to the second one: above this gap the vector is good to 1e-5, below it float64 is worth its time.
_NARROW_GAP = 1e-2
# Beyond these the sums of squares leave float32's range, or lose digits to its denormal numbers.
_SMALLEST_TRACE, _LARGEST_TRACE = 1e-30, 1e30
# Rows of the unfolding that are turned into float64 at a time: the copy stays in the processor's cache.
_ROWS_AT_A_TIME = 256


def leading_map(
    features: Float[Tensor, "batch channels *spatial"], *, rank: tuple[int, ...] | None = None
) -> Float[Tensor, " batch *spatial"]:
    r"""Project each image on its first channel direction: the Tucker Saliency Map.

    $|a_1^\top F_{(1)}|$, with $a_1$ the first column of the mode-1 factor (arXiv 2410.23072).

    Args:
        features: feature maps F, finite, not centred.
        rank: see `channel_modes`.

    Returns:
        Not negative, not normalised, on the device of `features`.

    Example:
        >>> leading_map(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, -4.0]]]))
        tensor([[0., 0., 4.]], dtype=torch.float64)
    """
    if feasible_rank(rank, tuple(features.shape[1:])) is not None:
        return channel_modes(features, rank=rank).maps[:, 0].abs()
    unfolding = _unfold(features)
    values, vectors = _leading_eigenpair(unfolding)
    if _is_tall(unfolding):
        leading = values.clamp_min(0).sqrt()[:, None] * vectors
    else:
        leading = (vectors.to(unfolding.dtype)[:, None, :] @ unfolding).squeeze(1).double()
    return leading.abs().reshape(len(features), *features.shape[2:])


def combined_map(
    features: Float[Tensor, "batch channels *spatial"],
    *,
    combine: Combine = "signed",
    rank: tuple[int, ...] | None = None,
    center: bool = False,
) -> Float[Tensor, " batch *spatial"]:
    r"""Sum the projections on all channel directions: MTSM, and with `center` Multivec-EigenCAM.

    ``signed``: $|\sum_i s_i\, a_i^\top F_{(1)}|$ (arXiv 2410.23072), with TensorLy's sign for each $a_i$.
    ``energy``: $\sqrt{\sum_i (s_i\, a_i^\top F_{(1)})^2}$, this project's own, for which no sign matters.

    Args:
        features: feature maps F, finite.
        combine: how the projections are put together.
        rank: see `channel_modes`.
        center: subtract each channel's spatial mean first.

    Returns:
        Not negative, not normalised, on the device of `features`.

    Example:
        >>> combined_map(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, -4.0]]]))
        tensor([[ 9.,  0., 16.]], dtype=torch.float64)
    """
    if feasible_rank(rank, tuple(features.shape[1:])) is not None:
        modes = channel_modes(features, rank=rank, center=center)
        weighted = modes.maps.flatten(2) * modes.values[..., None]
        combined = weighted.sum(1).abs() if combine == "signed" else weighted.norm(dim=1)
    else:
        unfolding = _unfold(features)
        if center:
            unfolding = unfolding - unfolding.mean(-1, keepdim=True)
        combined = _signed_sum(unfolding) if combine == "signed" else _energy(unfolding)
    return combined.reshape(len(features), *features.shape[2:])


def _signed_sum(unfolding: Float[Tensor, "batch channels positions"]) -> Float[Tensor, "batch positions"]:
    r"""$|\sum_i s_i a_i^\top F|$: tall, $|V\,\mathrm{diag}(s^2)\,\sigma|$; wide, $|w^\top F|$ with $w = A\,s\,\sigma$.

    The signs $\sigma$ hang on which entry of a vector is the largest, so the Gram matrix is float64 throughout: from a
    float32 one, a map of real features came out wrong by 5e-3.
    """
    values, vectors = torch.linalg.eigh(_gram(unfolding))
    values = values.clamp_min(0)
    if _is_tall(unfolding):
        # Transposed, so that the channels lie side by side in memory when their extremes are looked for.
        projected = vectors.mT.to(unfolding.dtype) @ unfolding.mT
        summed: Tensor = vectors @ (values * signs(projected.mT))[..., None]
        return summed.squeeze(-1).abs()
    weights = vectors @ (values.sqrt() * signs(vectors))[..., None]
    return _in_float64(unfolding.mT, lambda rows: (rows @ weights).squeeze(-1)).abs()


def _energy(unfolding: Float[Tensor, "batch channels positions"]) -> Float[Tensor, "batch positions"]:
    r"""$\sqrt{\sum_i (s_i\,a_i^\top f_n)^2} = \sqrt{\sum_i s_i^4 v_{ni}^2}$ is the length of row n of $G$.

    So no decomposition is needed. Where the features are wide, K = FF' is smaller than G, and
    $|F^\top f_n|^2 = f_n^\top K f_n$.
    """
    if _is_tall(unfolding):
        lengths: Tensor = torch.linalg.vector_norm(_gram(unfolding), dim=-1)
        return lengths
    gram = _gram(unfolding)
    return _in_float64(unfolding.mT, lambda rows: (rows * (rows @ gram)).sum(-1)).clamp_min(0).sqrt()


def _leading_eigenpair(
    unfolding: Float[Tensor, "batch channels positions"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch small"]]:
    """Return the largest eigenvalue of each image's Gram matrix, and its vector."""
    tall = unfolding if _is_tall(unfolding) else unfolding.mT
    gram = tall.mT @ tall
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    in_range = (trace > _SMALLEST_TRACE) & (trace < _LARGEST_TRACE)
    values, vectors = torch.linalg.eigh(torch.where(in_range[:, None, None], gram, 0).double())
    doubtful = ~in_range | _narrow(values)
    if unfolding.dtype != torch.float64 and doubtful.any():
        values[doubtful], vectors[doubtful] = torch.linalg.eigh(_gram(unfolding[doubtful]))
    return values[:, -1], vectors[..., -1]


def _narrow(values: Float[Tensor, "batch small"]) -> Bool[Tensor, " batch"]:
    if values.shape[-1] == 1:
        return torch.zeros_like(values[:, 0], dtype=torch.bool)
    return values[:, -1] - values[:, -2] < _NARROW_GAP * values[:, -1]


def _gram(unfolding: Float[Tensor, "batch channels positions"]) -> Float[Tensor, "batch small small"]:
    """Return F'F, or FF' where that is smaller, in float64."""
    tall = unfolding if _is_tall(unfolding) else unfolding.mT
    gram = unfolding.new_zeros(tall.shape[0], tall.shape[2], tall.shape[2], dtype=torch.float64)
    for rows in tall.split(_ROWS_AT_A_TIME, dim=1):
        precise = rows.double()
        gram.baddbmm_(precise.mT, precise)
    return gram


def _in_float64(
    matrix: Float[Tensor, "batch long short"], function: Callable[[Tensor], Tensor]
) -> Float[Tensor, "batch long"]:
    """Apply a function of a matrix's rows to them in float64, some rows at a time."""
    return torch.cat([function(rows.double()) for rows in matrix.split(_ROWS_AT_A_TIME, dim=1)], dim=1)


def _is_tall(unfolding: Tensor) -> bool:
    return unfolding.shape[1] >= unfolding.shape[2]


def _unfold(features: Float[Tensor, "batch channels *spatial"]) -> Float[Tensor, "batch channels positions"]:
    """Return the mode-1 unfolding, at least float32."""
    return features.flatten(2).to(torch.promote_types(features.dtype, torch.float32))
