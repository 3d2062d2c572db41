r"""The equations of TSM, MTSM and Multivec-EigenCAM: from feature maps to one saliency map for each image.

With a truncated rank the features are projected on the mode-1 factor, as the paper writes it. At full rank the same
maps follow from the Gram matrix of the unfolding alone: with $F_{(1)} = A\,\mathrm{diag}(s)\,V^\top$, each component
$a_i^\top F_{(1)} = s_i v_i^\top$ is an eigenvector of $G = F_{(1)}^\top F_{(1)}$, and $s_i^2$ its eigenvalue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tucker_cam.arguments import check_choice
from tucker_cam.decomposition.gram import (
    eigenpairs,
    float32_products_do,
    gram_matrix,
    is_tall,
    largest_magnitude,
    rescale_extremes,
    rows_in_float64,
    unfold,
)
from tucker_cam.decomposition.hooi import truncated_components
from tucker_cam.decomposition.leading import leading_maps
from tucker_cam.decomposition.modes import ChannelModes, Engine, channel_modes, fixed_signs
from tucker_cam.decomposition.rank import Rank, feasible_rank

if TYPE_CHECKING:
    from jaxtyping import Float

    from tucker_cam.decomposition.gram import Means, Unfolding

Combine = Literal["signed", "energy"]
# As a share of the largest projection: errors in float32 are smaller.
_LEAST_LEAD = 1e-6
# As a share of the first squared value: a component below it changes no map by 1e-5, whatever its sign.
_NEGLIGIBLE = 1e-6


def leading_map(
    features: Float[Tensor, "batch channels *spatial"], *, rank: Rank = None, engine: Engine = "torch"
) -> Float[Tensor, " batch *spatial"]:
    r"""Project each image on its first channel direction: the Tucker Saliency Map.

    $|a_1^\top F_{(1)}|$, with $a_1$ the first column of the mode-1 factor (arXiv 2410.23072). The features must be
    finite and are not centred; for the options see `channel_modes`. The map is not negative and not normalised, and no
    gradient flows through it. Features whose norm is above 1e12 or below 1e-12 are divided by a power of two first.

    Example:
        >>> leading_map(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, -4.0]]])).round(decimals=6)
        tensor([[0., 0., 4.]], dtype=torch.float64)
    """
    spatial = features.shape[2:]
    with torch.inference_mode():  # small operations take an eighth less time than under no_grad
        if engine != "torch":
            maps = _modes(features, rank=rank, engine=engine).maps[:, 0].abs()
        elif (ranks := feasible_rank(rank, tuple(features.shape[1:]))) is None:
            maps = leading_maps(unfold(features))
        else:
            components = truncated_components(unfold(features), spatial, ranks)
            strongest = components.values.argmax(1)[:, None, None]
            maps = components.maps.take_along_dim(strongest, dim=1).abs()
    return maps.reshape(len(features), *spatial).clone()  # outside, so that the result is an ordinary tensor


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
    ``energy``: $\sqrt{\sum_i (s_i\, a_i^\top F_{(1)})^2}$, this project's own, on which the signs have no influence.

    `center` subtracts each channel's spatial mean first. For everything else see `leading_map`.

    Example:
        >>> combined_map(torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, -4.0]]]))
        tensor([[ 9.,  0., 16.]], dtype=torch.float64)
    """
    check_choice("combine", combine, Combine)
    with torch.inference_mode():
        if engine != "torch" or feasible_rank(rank, tuple(features.shape[1:])) is not None:
            modes = _modes(features, rank=rank, center=center, engine=engine)
            weighted = modes.maps.flatten(2) * modes.values[..., None]
            combined = weighted.sum(1).abs() if combine == "signed" else weighted.norm(dim=1)
        else:
            unfolding = rescale_extremes(unfold(features))[0]
            means = unfolding.mean(2, keepdim=True, dtype=torch.float64) if center else None
            combined = (_signed_sum if combine == "signed" else _energy)(unfolding, means)
    return combined.reshape(len(features), *features.shape[2:]).clone()


def _modes(features: Float[Tensor, "batch channels *spatial"], **options: Any) -> ChannelModes:
    """Return `channel_modes` in float64, because rounding would be visible in a map of low contrast."""
    rescaled, _ = rescale_extremes(unfold(features))
    return channel_modes(rescaled.double().reshape(features.shape), **options)


def _signed_sum(unfolding: Unfolding, means: Means | None) -> Float[Tensor, "batch positions"]:
    r"""$|\sum_i s_i a_i^\top F|$: tall, $|V\,\mathrm{diag}(s^2)\,\sigma|$; wide, $|w^\top F|$ with $w = A\,s\,\sigma$.

    The signs $\sigma$ depend on which entry of a vector is the largest, so the Gram matrix is float64 throughout: with
    float32, a map of real features was wrong by 5e-3.
    """
    values, vectors = eigenpairs(gram_matrix(unfolding, means))
    if is_tall(unfolding):
        signs = _signs(unfolding, means, values, vectors.mT)
        return (values * signs)[:, None, :].matmul(vectors.mT).squeeze(1).abs()
    signs, _ = fixed_signs(vectors)
    weights = (values.sqrt() * signs)[:, None, :] @ vectors.mT
    return torch.cat([weights @ rows.mT for rows in rows_in_float64(unfolding, means)], dim=2).squeeze(1).abs()


def _signs(
    unfolding: Unfolding,
    means: Means | None,
    values: Float[Tensor, "batch rank"],
    vectors: Float[Tensor, "batch rank positions"],
) -> Float[Tensor, "batch rank"]:
    """Return the sign of each $F v_i$; in float64 if its largest entry's lead in float32 may be a rounding error."""
    if not float32_products_do(unfolding):
        return _signs_in_float64(unfolding, means, vectors)
    features = unfolding
    if means is not None:  # in two steps, because the error of a rounded mean would be too large
        rounded = means.to(unfolding.dtype)
        features = (unfolding - rounded).sub_((means - rounded).to(unfolding.dtype))
    projections = vectors.to(unfolding.dtype) @ features.mT
    signs, leads = fixed_signs(projections.mT)
    narrow = leads < _LEAST_LEAD * largest_magnitude(projections[:, :1])[:, None]
    in_doubt = narrow & (values > _NEGLIGIBLE * values[:, :1])
    images = in_doubt.any(1)
    if images.any():
        # From each image, as many components as are in doubt in the image that has most of them.
        most = int(in_doubt.sum(1).max())
        components = in_doubt[images].byte().topk(most, dim=1).indices
        chosen = vectors[images].gather(1, components[..., None].expand(-1, -1, vectors.shape[2]))
        exact = _signs_in_float64(unfolding[images], None if means is None else means[images], chosen)
        signs[images] = signs[images].scatter(1, components, exact.to(signs.dtype))
    return signs


def _signs_in_float64(
    unfolding: Unfolding,
    means: Means | None,
    vectors: Float[Tensor, "batch some positions"],
) -> Float[Tensor, "batch some"]:
    projections = torch.cat([vectors @ rows.mT for rows in rows_in_float64(unfolding, means)], dim=2)
    return fixed_signs(projections.mT)[0]


def _energy(unfolding: Unfolding, means: Means | None) -> Float[Tensor, "batch positions"]:
    r"""$\sqrt{\sum_i (s_i\,a_i^\top f_n)^2} = \sqrt{\sum_i s_i^4 v_{ni}^2}$ is the length of row n of $G$.

    So no decomposition is needed. If the features are wide, $K = F F^\top$ is smaller than G, and
    $|F^\top f_n|^2 = f_n^\top K f_n$.
    """
    matrix = gram_matrix(unfolding, means)
    if is_tall(unfolding):
        lengths: Tensor = matrix.norm(dim=2)
        return lengths
    squares = [(rows * (rows @ matrix)).sum(2) for rows in rows_in_float64(unfolding, means)]
    return torch.cat(squares, dim=1).clamp_min(0).sqrt()
