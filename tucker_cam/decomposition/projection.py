r"""Feature maps in, one saliency map for each image out: the equations of TSM, MTSM and Multivec-EigenCAM.

A truncated decomposition is projected as the paper writes it, on the mode-1 factor. At full rank the same maps follow
from the Gram matrix of the unfolding alone: with $F_{(1)} = A\,\mathrm{diag}(s)\,V^\top$, each component
$a_i^\top F_{(1)} = s_i v_i^\top$ is an eigenvector of $G = F_{(1)}^\top F_{(1)}$, and $s_i^2$ its eigenvalue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tucker_cam.decomposition.gram import (
    as_tall,
    eigenpairs,
    gram_matrix,
    is_tall,
    leading_eigenvector,
    rescale_extremes,
    rows_in_float64,
    unfold,
)
from tucker_cam.decomposition.hooi import truncated_components
from tucker_cam.decomposition.modes import ChannelModes, Engine, channel_modes, fixed_signs
from tucker_cam.decomposition.rank import Rank, feasible_rank

if TYPE_CHECKING:
    from jaxtyping import Float

Combine = Literal["signed", "energy"]
# The error of a Gram matrix accumulated in float32, relative to its largest eigenvalue, in the 2-norm: 1e-8 to 1.3e-7
# was measured on feature maps (4e-7 on Gaussian noise, which has no eigenvalue that stands out); but 5e-6 where fewer
# rows than these are multiplied, which BLAS sums one number after the other.
_SINGLE_NOISE = 2e-7
_FEW_ROWS = 16
# What a map may be off, as a share of its contrast, its largest less its smallest value.
_MAP_TOLERANCE = 1e-5
# Of the largest projection: in float32 one is off by less.
_LEAST_LEAD = 1e-6
# Of the first squared value: a component below it moves no map by 1e-5, whatever its sign.
_NEGLIGIBLE = 1e-6


def leading_map(
    features: Float[Tensor, "batch channels *spatial"], *, rank: Rank = None, engine: Engine = "torch"
) -> Float[Tensor, " batch *spatial"]:
    r"""Project each image on its first channel direction: the Tucker Saliency Map.

    $|a_1^\top F_{(1)}|$, with $a_1$ the first column of the mode-1 factor (arXiv 2410.23072). The features are finite
    and not centred, the options those of `channel_modes`. The map is neither negative nor normalised; an image's
    features above 1e12 or below 1e-12 are scaled to 1 first.

    Example:
        >>> leading_map(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, -4.0]]]))
        tensor([[0., 0., 4.]], dtype=torch.float64)
    """
    if engine == "tensorly":
        return _modes(features, rank=rank, engine=engine).maps[:, 0].abs()
    unfolding = unfold(rescale_extremes(features)[0])
    spatial = features.shape[2:]
    ranks = feasible_rank(rank, tuple(features.shape[1:]))
    leading = _leading(unfolding) if ranks is None else truncated_components(unfolding, spatial, ranks).maps[:, 0].abs()
    return leading.reshape(len(features), *spatial)


def _leading(unfolding: Float[Tensor, "batch channels positions"]) -> Float[Tensor, "batch positions"]:
    """Return each image's first map, from a Gram matrix accumulated in float32 where that does, or else in float64."""
    if min(unfolding.shape[1:]) < _FEW_ROWS:
        unfolding = unfolding.double()
    tall = as_tall(unfolding)
    matrix = (tall.mT @ tall).double()
    exact = unfolding.dtype == torch.float64
    vectors, gaps = leading_eigenvector(matrix, exact=exact)
    maps = vectors.abs() if is_tall(unfolding) else _along(unfolding, vectors)
    if not exact:
        # Noise turns an eigenvector by the noise over the gap (Davis and Kahan, 1970). An image is done again where
        # that may put its map off by more than the promise.
        contrast = maps.amax(1) - maps.amin(1)
        off = _SINGLE_NOISE * _reach(unfolding, matrix, maps) > _MAP_TOLERANCE * contrast * gaps
        if off.any():
            maps[off] = _leading(unfolding[off].double())
    return maps


def _along(
    unfolding: Float[Tensor, "batch channels positions"], vectors: Float[Tensor, "batch channels"]
) -> Float[Tensor, "batch positions"]:
    r"""Return the map along each leading eigenvector of $F F^\top$."""
    # Only zeros have length zero: whatever is there, however small, is a direction.
    length = vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
    direction: Tensor = (vectors / length).to(unfolding.dtype)
    return (direction[:, None, :] @ unfolding).squeeze(1).double().abs()


def _reach(
    unfolding: Float[Tensor, "batch channels positions"],
    matrix: Float[Tensor, "batch small small"],
    maps: Float[Tensor, "batch positions"],
) -> Float[Tensor, " batch"]:
    """Return by how much a map can be off at one position, for each part that its direction is off.

    That is the length of the features there: tall, the root of the matrix's diagonal. Wide, they are no longer than
    their largest number in all channels, nor is the whole map shorter than what an error of its direction adds to it.
    """
    if is_tall(unfolding):
        return matrix.diagonal(dim1=-2, dim2=-1).amax(1).sqrt()
    largest = torch.maximum(unfolding.amax((1, 2)), -unfolding.amin((1, 2))).double()
    return torch.minimum(maps.norm(dim=1), largest * unfolding.shape[1] ** 0.5)


def combined_map(
    features: Float[Tensor, "batch channels *spatial"],
    *,
    combine: Combine = "signed",
    rank: Rank = None,
    center: bool = False,
    engine: Engine = "torch",
) -> Float[Tensor, " batch *spatial"]:
    r"""Sum the projections on all channel directions: MTSM, and with `center` Multivec-EigenCAM.

    ``signed``: $|\sum_i s_i\, a_i^\top F_{(1)}|$ (arXiv 2410.23072), with TensorLy's sign for each $a_i$.
    ``energy``: $\sqrt{\sum_i (s_i\, a_i^\top F_{(1)})^2}$, this project's own, for which no sign matters.

    `center` subtracts each channel's spatial mean first. See `leading_map` for all else.

    Example:
        >>> combined_map(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, -4.0]]]))
        tensor([[ 9.,  0., 16.]], dtype=torch.float64)
    """
    if engine == "tensorly" or feasible_rank(rank, tuple(features.shape[1:])) is not None:
        modes = _modes(features, rank=rank, center=center, engine=engine)
        weighted = modes.maps.flatten(2) * modes.values[..., None]
        combined = weighted.sum(1).abs() if combine == "signed" else weighted.norm(dim=1)
    else:
        unfolding = unfold(rescale_extremes(features)[0])
        if combine == "signed":
            combined = _signed_sum(unfolding, center=center)
        else:
            combined = _energy(_centred(unfolding) if center else unfolding)
    return combined.reshape(len(features), *features.shape[2:])


def _modes(features: Float[Tensor, "batch channels *spatial"], **options: Any) -> ChannelModes:
    """Return `channel_modes` in float64: rounded, a map of low contrast would show it."""
    rescaled, _ = rescale_extremes(features)
    return channel_modes(unfold(rescaled).double().reshape(features.shape), **options)


def _signed_sum(
    unfolding: Float[Tensor, "batch channels positions"], *, center: bool
) -> Float[Tensor, "batch positions"]:
    r"""$|\sum_i s_i a_i^\top F|$: tall, $|V\,\mathrm{diag}(s^2)\,\sigma|$; wide, $|w^\top F|$ with $w = A\,s\,\sigma$.

    The signs $\sigma$ hang on which entry of a vector is the largest, so the Gram matrix is float64 throughout: from a
    float32 one, a map of real features came out wrong by 5e-3. Where that entry's lead may be a rounding error, in a
    component that counts, the image is done in float64 altogether.
    """
    features = _centred(unfolding) if center else unfolding
    values, vectors = eigenpairs(gram_matrix(features))
    # Transposed, so that the channels lie side by side in memory when their extremes are looked for.
    decisive = (vectors.mT.to(features.dtype) @ features.mT).mT if is_tall(features) else vectors
    sign, lead = fixed_signs(decisive)
    if is_tall(features):
        combined = (vectors @ (values * sign)[..., None]).squeeze(-1).abs()
    else:
        weights = vectors @ (values.sqrt() * sign)[..., None]
        combined = rows_in_float64(features.mT, lambda rows: (rows @ weights).squeeze(-1)).abs()
    if unfolding.dtype != torch.float64:
        narrow = lead < _LEAST_LEAD * decisive[..., :1].abs().amax(1)
        again = (narrow & (values > _NEGLIGIBLE * values[:, :1])).any(1)
        if again.any():
            combined[again] = _signed_sum(unfolding[again].double(), center=center)
    return combined


def _centred(unfolding: Float[Tensor, "batch channels positions"]) -> Float[Tensor, "batch channels positions"]:
    """Subtract each channel's mean, twice: after the first time only that mean's rounding error is left of it."""
    centred = unfolding - unfolding.mean(-1, keepdim=True)
    return centred.sub_(centred.mean(-1, keepdim=True))


def _energy(unfolding: Float[Tensor, "batch channels positions"]) -> Float[Tensor, "batch positions"]:
    r"""$\sqrt{\sum_i (s_i\,a_i^\top f_n)^2} = \sqrt{\sum_i s_i^4 v_{ni}^2}$ is the length of row n of $G$.

    So no decomposition is needed. Where the features are wide, $K = F F^\top$ is smaller than G, and
    $|F^\top f_n|^2 = f_n^\top K f_n$.
    """
    if is_tall(unfolding):
        lengths: Tensor = torch.linalg.vector_norm(gram_matrix(unfolding), dim=-1)
        return lengths
    matrix = gram_matrix(unfolding)
    return rows_in_float64(unfolding.mT, lambda rows: (rows * (rows @ matrix)).sum(-1)).clamp_min(0).sqrt()
