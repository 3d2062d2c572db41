r"""The channel part of a truncated Tucker decomposition, by higher-order orthogonal iteration (HOOI).

The iteration (De Lathauwer et al., 2000) is that of TensorLy's `partial_tucker`: the same initialisation, order of
updates and stopping rule for each image, but on the whole batch at once.

A sweep updates the channels' factor $A_1$ from F with its spatial modes projected on $A_2, A_3, \dots$, and then each
of these from $P = A_1^\top F_{(1)}$ with the others projected. The spatial updates need only P. If there are no fewer
channels than positions (F is tall), P follows from the Gram matrix $G = F_{(1)}^\top F_{(1)}$, so no sweep reads the
features themselves.
"""

from __future__ import annotations

from functools import reduce
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from tucker_cam.decomposition.gram import LARGEST_NORM, SMALLEST_NORM, gram_matrix, is_tall, rescale_extremes

if TYPE_CHECKING:
    from jaxtyping import Float

    from tucker_cam.decomposition.gram import Unfolding

# TensorLy's rule: stop after at least three sweeps, when the relative error changes by less than this.
_TOLERANCE = 1e-4
_LEAST_SWEEPS, _MOST_SWEEPS = 3, 100
# Squared singular values from a float64 Gram matrix are noise if they are below this share of the largest one.
_NEGLIGIBLE = 1e-14


class Components(NamedTuple):
    r"""The channel part of a truncated decomposition, in no particular order and without fixed signs.

    Attributes:
        values: batch x rank; $s_i$, the norms of the core's mode-1 slices.
        maps: batch x rank x positions; $a_i^\top F_{(1)}$.
        parts: matrices whose product is the factor $A_1$ if F is wide. If F is tall, the product is D, batch x
            positions x rank, with $A_1 = F_{(1)} D$.
    """

    values: Tensor
    maps: Tensor
    parts: list[Tensor]

    @property
    def directions(self) -> Tensor:
        return reduce(torch.bmm, self.parts)


def truncated_components(
    unfolding: Unfolding, spatial: tuple[int, ...], rank: tuple[int, ...], *, rescaled: bool = False
) -> Components:
    """Truncate each image's Tucker decomposition to a feasible rank, one for each mode, in float64.

    Extreme features are rescaled first, unless that was done already. An image whose relative error has settled leaves
    the iteration, so a batch gives the same result as its images alone.
    """
    tall = is_tall(unfolding)
    update = _update_from_gram if tall else _update_from_features
    # All that a sweep reads: G if F is tall, F if it is wide.
    source = gram_matrix(unfolding) if tall else unfolding.double()
    squared_norm = source.diagonal(dim1=-2, dim2=-1).sum(-1) if tall else source.square().sum((1, 2))
    bounded = squared_norm.clamp(SMALLEST_NORM**2, LARGEST_NORM**2)
    if not rescaled and not torch.equal(squared_norm, bounded):
        return truncated_components(rescale_extremes(unfolding)[0], spatial, rank, rescaled=True)
    squared_norm = bounded
    # TensorLy also initialises A_1, but the first update replaces it before it is read.
    factors = _initial_factors(source, spatial, rank[1:], tall=tall)
    running = torch.arange(len(source), device=source.device)
    error = torch.zeros_like(squared_norm)
    found: list[Tensor] = []
    for sweep in range(1, _MOST_SWEEPS + 1):
        maps, parts = update(source, factors, spatial, rank[0])
        projected = maps.reshape(*maps.shape[:2], *spatial)
        for mode, length in enumerate(rank[1:]):
            others = _project(projected, {m: factor for m, factor in enumerate(factors) if m != mode})
            squares, factors[mode] = _leading_left_vectors(others.movedim(mode + 2, 1).flatten(2), length)
        if sweep < _LEAST_SWEEPS - 1:
            continue
        # The last update leaves the core, whose squared norm is the sum of these squared singular values.
        previous, error = error, ((squared_norm - squares.sum(1)).abs() / squared_norm).sqrt()
        if sweep < _LEAST_SWEEPS:
            continue
        settled = ((error - previous).abs() < _TOLERANCE) | (sweep == _MOST_SWEEPS)
        if settled.any():
            norms = _project(others, {mode: factors[mode]}).flatten(2).norm(dim=2)
            outcome = [norms, maps, *parts]
            # A later sweep replaces the entries of images that have not settled.
            for whole, part in zip(found, outcome, strict=False):
                whole.index_copy_(0, running, part)
            found = found or outcome
            if settled.all():
                break
            rest = (~settled).nonzero()[:, 0]
            source, squared_norm, running, error, *factors = (
                part.index_select(0, rest) for part in (source, squared_norm, running, error, *factors)
            )
    values, maps, *parts = found
    return Components(values, maps, parts)


def _initial_factors(source: Tensor, spatial: tuple[int, ...], rank: tuple[int, ...], *, tall: bool) -> list[Tensor]:
    """Return each spatial mode's leading left singular vectors."""
    factors = []
    for mode, length in enumerate(rank):
        if tall:
            before, own, after = prod(spatial[:mode]), spatial[mode], prod(spatial[mode + 1 :])
            # The Gram matrix of a spatial unfolding, computed from that of the positions.
            matrix = source.reshape(-1, before, own, after, before, own, after).diagonal(dim1=1, dim2=4)
            matrix = matrix.diagonal(dim1=2, dim2=4).sum((-2, -1))
            factors.append(torch.linalg.eigh(matrix)[1][..., -length:])
        else:
            tensor = source.reshape(*source.shape[:2], *spatial)
            factors.append(_leading_left_vectors(tensor.movedim(mode + 2, 1).flatten(2), length)[1])
    return factors


def _update_from_gram(
    matrix: Float[Tensor, "batch positions positions"], factors: list[Tensor], spatial: tuple[int, ...], rank: int
) -> tuple[Float[Tensor, "batch rank positions"], list[Tensor]]:
    r"""Return $A_1^\top F$, and B and $X \sigma^{-1}$ with $A_1 = F B X \sigma^{-1}$: $B^\top G B = X \sigma^2 X^\top$.

    B, positions x columns, is the Kronecker product of the spatial factors.
    """
    basis = _kronecker(factors)
    mixed = basis.mT.bmm(matrix)
    squares, right = torch.linalg.eigh(mixed.bmm(basis))
    squares = squares[:, None, -rank:]
    inverse = squares.rsqrt().masked_fill_(squares <= _NEGLIGIBLE * squares[..., -1:], 0)
    scaled = right[..., -rank:] * inverse
    return scaled.mT.bmm(mixed), [basis, scaled]


def _update_from_features(
    unfolding: Unfolding, factors: list[Tensor], spatial: tuple[int, ...], rank: int
) -> tuple[Float[Tensor, "batch rank positions"], list[Tensor]]:
    r"""Return $A_1^\top F$ and $A_1$, the leading left singular vectors of F with its spatial modes projected."""
    projected = _project(unfolding.reshape(*unfolding.shape[:2], *spatial), dict(enumerate(factors)))
    _, factor = _leading_left_vectors(projected.flatten(2), rank)
    return factor.mT.bmm(unfolding), [factor]


def _leading_left_vectors(
    matrix: Float[Tensor, "batch rows columns"], rank: int
) -> tuple[Float[Tensor, "batch rank"], Float[Tensor, "batch rows rank"]]:
    """Return the largest squared singular values, and their left vectors, by way of the smaller Gram matrix."""
    tall = is_tall(matrix)
    squares, vectors = torch.linalg.eigh(matrix.mT.bmm(matrix) if tall else matrix.bmm(matrix.mT))
    vectors = vectors[..., -rank:]
    # The strongest first: QR keeps each column, minus its part along the columns before it.
    return squares[:, -rank:], torch.linalg.qr(matrix @ vectors.flip(-1)).Q if tall else vectors


def _kronecker(factors: list[Tensor]) -> Float[Tensor, "batch positions columns"]:
    """Return the Kronecker product of each image's factors, with its rows in the order of the positions."""
    product, *rest = factors
    for factor in rest:
        product = (product[:, :, None, :, None] * factor[:, None, :, None, :]).flatten(3, 4).flatten(1, 2)
    return product


def _project(tensor: Tensor, factors: dict[int, Tensor]) -> Tensor:
    """Multiply each image's tensor, channels x spatial, by the transposed factors of these spatial modes.

    The last mode comes first: its memory layout suits a product, and afterwards there is less to move for the others.
    """
    for mode, factor in reversed(factors.items()):
        rows = tensor.movedim(mode + 2, -1)
        tensor = rows.flatten(1, -2).bmm(factor).reshape(*rows.shape[:-1], -1).movedim(-1, mode + 2)
    return tensor
