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
    eigenpairs,
    gram,
    is_tall,
    leading_eigenvector,
    map_within_tolerance,
    moderate,
    rows_in_float64,
    unfold,
)
from tucker_cam.decomposition.hooi import truncated_leading_map
from tucker_cam.decomposition.modes import ChannelModes, Engine, channel_modes, signs_and_leads
from tucker_cam.decomposition.rank import Rank, feasible_rank

if TYPE_CHECKING:
    from jaxtyping import Float

Combine = Literal["signed", "energy"]
# Of the largest projection: in float32 one is off by less.
_LEAST_LEAD = 1e-6
# Of the first squared value: a component below it moves no map by 1e-5, whatever its sign.
_NEGLIGIBLE = 1e-6


def leading_map(
    features: Float[Tensor, "batch channels *spatial"], *, rank: Rank = None, engine: Engine = "torch"
) -> Float[Tensor, " batch *spatial"]:
    r"""Project each image on its first channel direction: the Tucker Saliency Map.

    $|a_1^\top F_{(1)}|$, with $a_1$ the first column of the mode-1 factor (arXiv 2410.23072).

    Args:
        features: feature maps F, finite, not centred.
        rank: see `channel_modes`.
        engine: see `channel_modes`.

    Returns:
        Not negative, not normalised. An image's features above 1e12 or below 1e-12 are scaled to 1 first.

    Example:
        >>> leading_map(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, -4.0]]]))
        tensor([[0., 0., 4.]], dtype=torch.float64)
    """
    features, _ = moderate(features)
    spatial = features.shape[2:]
    ranks = feasible_rank(rank, tuple(features.shape[1:]))
    if engine == "tensorly":
        return _modes(features, rank=rank, engine=engine).maps[:, 0].abs()
    unfolding = unfold(features)
    if ranks is None:
        leading = map_within_tolerance(unfolding, leading_eigenvector, _along)
    else:
        leading = truncated_leading_map(unfolding, spatial, ranks)
    return leading.reshape(len(features), *spatial)


def _along(
    unfolding: Float[Tensor, "batch channels positions"], leading: Float[Tensor, "batch small"]
) -> Float[Tensor, "batch positions"]:
    """Return the map along the leading eigenvector of the Gram matrix: tall, it is the vector itself."""
    if is_tall(unfolding):
        return leading.abs()
    # Only zeros have length zero: whatever is there, however small, is a direction.
    length = leading.norm(dim=1, keepdim=True).clamp_min(torch.finfo(leading.dtype).tiny)
    direction: Tensor = (leading / length).to(unfolding.dtype)
    return (direction[:, None, :] @ unfolding).squeeze(1).double().abs()


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

    Args:
        features: feature maps F, finite.
        combine: how the projections are put together.
        rank: see `channel_modes`.
        center: subtract each channel's spatial mean first.
        engine: see `channel_modes`.

    Returns:
        Not negative, not normalised. An image's features above 1e12 or below 1e-12 are scaled to 1 first.

    Example:
        >>> combined_map(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, -4.0]]]))
        tensor([[ 9.,  0., 16.]], dtype=torch.float64)
    """
    features, _ = moderate(features)
    if engine == "tensorly" or feasible_rank(rank, tuple(features.shape[1:])) is not None:
        modes = _modes(features, rank=rank, center=center, engine=engine)
        weighted = modes.maps.flatten(2) * modes.values[..., None]
        combined = weighted.sum(1).abs() if combine == "signed" else weighted.norm(dim=1)
    else:
        unfolding = unfold(features)
        if combine == "signed":
            combined = _signed_sum(unfolding, center=center)
        else:
            combined = _energy(_centred(unfolding) if center else unfolding)
    return combined.reshape(len(features), *features.shape[2:])


def _modes(features: Float[Tensor, "batch channels *spatial"], **options: Any) -> ChannelModes:
    """Return `channel_modes` in float64, in which they are computed: rounded, a map of low contrast would show it."""
    return channel_modes(unfold(features).double().reshape(features.shape), **options)


def _signed_sum(
    unfolding: Float[Tensor, "batch channels positions"], *, center: bool
) -> Float[Tensor, "batch positions"]:
    r"""$|\sum_i s_i a_i^\top F|$: tall, $|V\,\mathrm{diag}(s^2)\,\sigma|$; wide, $|w^\top F|$ with $w = A\,s\,\sigma$.

    The signs $\sigma$ hang on which entry of a vector is the largest, so the Gram matrix is float64 throughout: from a
    float32 one, a map of real features came out wrong by 5e-3. Where that entry's lead may be a rounding error, in a
    component that counts, the image is done in float64 altogether.
    """
    features = _centred(unfolding) if center else unfolding
    values, vectors = eigenpairs(gram(features))
    # Transposed, so that the channels lie side by side in memory when their extremes are looked for.
    decisive = (vectors.mT.to(features.dtype) @ features.mT).mT if is_tall(features) else vectors
    sign, lead = signs_and_leads(decisive)
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
        lengths: Tensor = torch.linalg.vector_norm(gram(unfolding), dim=-1)
        return lengths
    matrix = gram(unfolding)
    return rows_in_float64(unfolding.mT, lambda rows: (rows * (rows @ matrix)).sum(-1)).clamp_min(0).sqrt()
