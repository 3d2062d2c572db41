r"""A mode-1 unfolding and a rank in, the channel part of its truncated Tucker decomposition out.

Higher-order orthogonal iteration (De Lathauwer et al., 2000) as TensorLy's `partial_tucker` does it: the same
initialisation, order of updates and stopping rule for each image, on the whole batch at once.

A sweep updates the channels' factor $A_1$ from F with its spatial modes projected on $A_2, A_3, \dots$, and then each
of these from $P = A_1^\top F_{(1)}$ with the others projected. P is all that the spatial updates see of the channels;
and where there are more channels than positions (F is tall), the Gram matrix $G = F_{(1)}^\top F_{(1)}$ is all that it
takes to find P, so that no sweep touches the features themselves.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tucker_cam.decomposition.gram import eigenpairs, gram, is_tall, map_within_tolerance, relative_error

if TYPE_CHECKING:
    from jaxtyping import Float

# TensorLy's rule: stop after at least three sweeps when the relative error moves by less than this.
_TOLERANCE = 1e-4
_LEAST_SWEEPS, _MOST_SWEEPS = 3, 100
# Where no direction stands out, sweeps multiply the noise in a Gram matrix. Of images with less than this share of
# their squared norm in the first direction, some that took 7 sweeps or more came out wrong by 1e-4.
_OUTSTANDING, _NOISY_SWEEPS = 0.25, 5
# Singular values from a float64 Gram matrix are noise below this share of the largest one.
_NEGLIGIBLE = 1e-7


class Components(NamedTuple):
    r"""The channel part of a truncated decomposition, its signs not fixed.

    Attributes:
        values: batch x rank, descending; $s_i$, the norms of the core's mode-1 slices.
        maps: batch x rank x positions; $a_i^\top F_{(1)}$.
        directions: the factor $A_1$ where F is wide; batch x positions x rank, with $A_1 = F_{(1)} D$, where tall.
        error: batch; how far the first direction may be off because of the noise in the Gram matrix, in the 2-norm;
            infinite where that is not known.
    """

    values: Tensor
    maps: Tensor
    directions: Tensor
    error: Tensor


def truncated_components(
    unfolding: Float[Tensor, "batch channels positions"], spatial: tuple[int, ...], rank: tuple[int, ...]
) -> Components:
    """Truncate each image's Tucker decomposition to a feasible rank, one for each mode, in float64."""
    if is_tall(unfolding):
        return _iterate(gram(unfolding), spatial, rank, tall=True)
    return _iterate(unfolding.double(), spatial, rank, tall=False)


def truncated_leading_map(
    unfolding: Float[Tensor, "batch channels positions"], spatial: tuple[int, ...], rank: tuple[int, ...]
) -> Float[Tensor, "batch positions"]:
    """Return the absolute first map alone, from a float32 Gram matrix where the difference cannot be seen."""
    if not is_tall(unfolding):
        return truncated_components(unfolding, spatial, rank).maps[:, 0].abs()

    def solve(matrix: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        components = _iterate(matrix, spatial, rank, tall=True, noise=noise)
        return components.maps[:, 0], components.error

    return map_within_tolerance(unfolding, solve, lambda _, first: first.abs())


def _iterate(
    source: Float[Tensor, "batch rows positions"],
    spatial: tuple[int, ...],
    rank: tuple[int, ...],
    *,
    tall: bool,
    noise: float = 0.0,
) -> Components:
    """Sweep until each image's relative error settles; `source` is G where F is tall, F where it is wide.

    An image that has settled takes no part in further sweeps, so a batch gives what its images give alone.
    """
    squared_norm = source.diagonal(dim1=-2, dim2=-1).sum(-1) if tall else source.square().sum((1, 2))
    squared_norm = squared_norm.clamp_min(torch.finfo(source.dtype).tiny)
    # TensorLy initialises A_1 too; the first update replaces it unread.
    factors = _initial_factors(source, spatial, rank[1:], tall=tall)
    running = torch.arange(len(source), device=source.device)
    error, trusted = torch.zeros_like(squared_norm), torch.ones_like(squared_norm, dtype=torch.bool)
    found = []
    for sweep in range(1, _MOST_SWEEPS + 1):
        maps, directions = (_update_from_gram if tall else _update_from_features)(source, factors, spatial, rank[0])
        projected = maps.reshape(*maps.shape[:2], *spatial)
        for mode, length in enumerate(rank[1:]):
            others = _project(projected, {m: factor for m, factor in enumerate(factors) if m != mode})
            factors[mode] = _leading_left_vectors(others.movedim(mode + 2, 1).flatten(2), length)
        core = _project(projected, dict(enumerate(factors))).flatten(2)
        previous, error = error, ((squared_norm - core.square().sum((1, 2))).abs() / squared_norm).sqrt()
        if sweep < _LEAST_SWEEPS:
            continue
        change = (error - previous).abs()
        # An error is the root of a share of the squared norm: noise in that is noise / (2 error) in the error.
        trusted &= (change - _TOLERANCE).abs() * error >= noise
        settled = (change < _TOLERANCE) | (sweep == _MOST_SWEEPS)
        values = core.norm(dim=2)
        if noise and sweep >= _NOISY_SWEEPS:
            given_up = ~settled & (values.amax(1).square() < _OUTSTANDING * squared_norm)
            trusted &= ~given_up
            settled |= given_up
        if settled.any():
            found.append([x[settled] for x in (running, values, maps, directions, trusted)])
            if settled.all():
                break
            left = ~settled
            source, squared_norm, running, error, trusted, *factors = (
                x[left] for x in (source, squared_norm, running, error, trusted, *factors)
            )
    images, values, maps, directions, trusted = (torch.cat(parts) for parts in zip(*found, strict=True))
    values, maps, directions, trusted = (x[images.argsort()] for x in (values, maps, directions, trusted))
    values, order = values.sort(dim=1, descending=True, stable=True)
    return Components(
        values,
        maps.gather(1, order[:, :, None].expand_as(maps)),
        directions.gather(2, order[:, None, :].expand_as(directions)),
        relative_error(values.square(), noise).masked_fill(~trusted, torch.inf),
    )


def _initial_factors(source: Tensor, spatial: tuple[int, ...], rank: tuple[int, ...], *, tall: bool) -> list[Tensor]:
    """Return each spatial mode's leading left singular vectors."""
    if not tall:
        tensor = source.reshape(*source.shape[:2], *spatial)
        return [_leading_left_vectors(tensor.movedim(mode + 2, 1).flatten(2), r) for mode, r in enumerate(rank)]
    factors = []
    for mode, r in enumerate(rank):
        before, length, after = prod(spatial[:mode]), spatial[mode], prod(spatial[mode + 1 :])
        # The Gram matrix of a spatial unfolding, from that of the positions.
        matrix = torch.einsum("bxhyxky->bhk", source.reshape(-1, before, length, after, before, length, after))
        factors.append(_leading_eigenvectors(matrix, r))
    return factors


def _update_from_gram(
    matrix: Float[Tensor, "batch positions positions"], factors: list[Tensor], spatial: tuple[int, ...], rank: int
) -> tuple[Float[Tensor, "batch rank positions"], Float[Tensor, "batch positions rank"]]:
    r"""Return $A_1^\top F$ and D with $A_1 = F D$: from $B^\top G B = X \sigma^2 X^\top$, $D = B X \sigma^{-1}$.

    B, positions x columns, is the Kronecker product of the spatial factors.
    """
    basis = _kronecker(factors)
    mixed = basis.mT @ matrix
    squares, right = eigenpairs(mixed @ basis)
    lengths = squares[:, None, :rank].sqrt()
    scaled = right[..., :rank] * torch.where(lengths > _NEGLIGIBLE * lengths[..., :1], 1 / lengths, 0)
    return scaled.mT @ mixed, basis @ scaled


def _update_from_features(
    unfolding: Float[Tensor, "batch channels positions"], factors: list[Tensor], spatial: tuple[int, ...], rank: int
) -> tuple[Float[Tensor, "batch rank positions"], Float[Tensor, "batch channels rank"]]:
    r"""Return $A_1^\top F$ and $A_1$, the leading left singular vectors of F with its spatial modes projected."""
    projected = _project(unfolding.reshape(*unfolding.shape[:2], *spatial), dict(enumerate(factors)))
    factor = _leading_left_vectors(projected.flatten(2), rank)
    return factor.mT @ unfolding, factor


def _leading_left_vectors(matrix: Float[Tensor, "batch rows columns"], rank: int) -> Float[Tensor, "batch rows rank"]:
    """Return the first left singular vectors, by way of the smaller Gram matrix."""
    if is_tall(matrix):
        orthonormal: Tensor = torch.linalg.qr(matrix @ _leading_eigenvectors(matrix.mT @ matrix, rank)).Q
        return orthonormal
    return _leading_eigenvectors(matrix @ matrix.mT, rank)


def _leading_eigenvectors(matrix: Float[Tensor, "batch n n"], rank: int) -> Float[Tensor, "batch n rank"]:
    _, vectors = eigenpairs(matrix)
    return vectors[..., :rank]


def _kronecker(factors: list[Tensor]) -> Float[Tensor, "batch positions columns"]:
    """Return the Kronecker product of each image's factors, its rows in the order of the positions."""
    product, *rest = factors
    for factor in rest:
        product = torch.einsum("bik,bjl->bijkl", product, factor).flatten(3, 4).flatten(1, 2)
    return product


def _project(tensor: Tensor, factors: dict[int, Tensor]) -> Tensor:
    """Multiply each image's tensor, channels x spatial, by the transposed factors of these spatial modes.

    The last mode comes first: it lies in memory as a product needs it, and leaves less to move for the others.
    """
    for mode, factor in reversed(factors.items()):
        rows = tensor.movedim(mode + 2, -1)
        tensor = (rows.flatten(1, -2) @ factor).reshape(*rows.shape[:-1], -1).movedim(-1, mode + 2)
    return tensor
