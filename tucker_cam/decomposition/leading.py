r"""A mode-1 unfolding in, the map along its leading singular vector out: the equation of TSM at full rank.

With $F_{(1)} = A\,\mathrm{diag}(s)\,V^\top$ that is $|a_1^\top F_{(1)}| = s_1 |v_1|$, and $v_1$ the leading
eigenvector of $G = F_{(1)}^\top F_{(1)}$; where $K = F_{(1)} F_{(1)}^\top$ is smaller, $a_1$ is that of K. A small
matrix is formed and squared again and again; of a large one nothing is formed, since a Krylov subspace needs but its
products with vectors. Both start in float32, and know by how much that may put a map off.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tucker_cam.decomposition.gram import (
    as_tall,
    eigenpairs,
    float32_products_do,
    gram_matrix,
    is_tall,
    rows_in_float64,
    settled,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# What a map may be off, as a share of its contrast, its largest less its smallest value.
_PROMISE, _PROMISE_OF_FLOAT64 = 1e-5, 1e-9
# The error of products accumulated in float32, relative to the Gram matrix's largest eigenvalue, in the 2-norm: 1e-8 to
# 1.3e-7 was measured on feature maps, 4e-7 on Gaussian noise, which has no eigenvalue that stands out.
_SINGLE_NOISE, _DOUBLE_NOISE = 2e-7, 1e-14
# Channels whose squares are summed at a time: the squares stay in the processor's cache.
_ROWS_AT_A_TIME = 32
# Of a Krylov subspace in float64, relative to the eigenvalue.
_RESIDUAL_TOLERANCE = 1e-11
# From this size on a Krylov subspace is faster than the products that squaring takes.
_LARGE = 128
# After four squarings the matrix is its 16th power; a step with a power costs a tenth of a squaring, and four of these
# leave of a second eigenvalue of 0.8 times the first one 1e-8. Five squarings more: of one of 0.99, too.
_SQUARINGS, _MORE_SQUARINGS = 4, 5
_STEPS_WITH_THE_POWER, _STEPS_WITH_THE_MATRIX = 4, 2
# Most feature maps take four steps; what is not found in these many is decomposed.
_KRYLOV_STEPS_AT_A_TIME, _KRYLOV_STEPS, _PRECISE_KRYLOV_STEPS = 2, 20, 12
_TINY = torch.finfo(torch.float64).tiny


def leading_maps(unfolding: Float[Tensor, "batch channels positions"]) -> Float[Tensor, "batch positions"]:
    """Return each image's map along its leading singular vector, not negative, in float64."""
    single = float32_products_do(unfolding)
    if min(unfolding.shape[1:]) >= _LARGE:
        careful = [partial(_by_lanczos, single=False), partial(_by_decomposition, exact=False)]
        solvers = [partial(_by_lanczos, single=True), *careful] if single else careful
        return settled(solvers, unfolding, _longest(unfolding), _start(unfolding))
    tall = as_tall(unfolding)
    matrix = (tall.mT @ tall).double() if single else gram_matrix(unfolding)
    power = matrix / _trace(matrix)
    longest = matrix.diagonal(dim1=-2, dim2=-1).amax(1).sqrt() if is_tall(unfolding) else _longest(unfolding)
    noise = _SINGLE_NOISE if single else _DOUBLE_NOISE
    solvers = [
        partial(_by_squaring, noise=noise),
        partial(_corrected, noise=noise),
        partial(_by_decomposition, exact=not single),
    ]
    return settled(solvers, unfolding, longest, matrix, power)


def _by_squaring(
    unfolding: Float[Tensor, "batch channels positions"],
    longest: Float[Tensor, " batch"],
    matrix: Float[Tensor, "batch n n"],
    power: Float[Tensor, "batch n n"],
    *,
    noise: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Find the leading eigenvector of the matrix in a power of it."""
    power, vectors, gaps = _squared(matrix, power, _SQUARINGS)
    values, residuals = _residuals(vectors, vectors @ matrix)
    turned = _turned(residuals, values, gaps, noise)
    maps = _along(unfolding, vectors, values)
    return maps, _in_doubt(unfolding, longest, maps, turned), (unfolding, longest, matrix, power)


def _corrected(
    unfolding: Float[Tensor, "batch channels positions"],
    longest: Float[Tensor, " batch"],
    matrix: Float[Tensor, "batch n n"],
    power: Float[Tensor, "batch n n"],
    *,
    noise: float,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    r"""Square on, and correct the vector by one product with the features in float64.

    With $r = F^\top F v - \theta v$ the vector that is missing is, to first order, $x = (\theta - G)^+ r$; what the
    matrix at hand is off by enters in the second order only, times x.
    """
    power, vectors, gaps = _squared(matrix, power, _MORE_SQUARINGS, before=_SQUARINGS)
    values, residuals = _residuals(vectors, _product(unfolding, vectors, single=False))
    scale = values[:, None, None]
    shifted = scale * (torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device) + vectors.mT @ vectors)
    missing = torch.linalg.solve_ex(shifted - matrix, residuals.mT).result.mT
    lengths = missing.norm(dim=(1, 2))
    vectors = _unit(vectors + missing)
    turned = lengths * (lengths + noise / _above_zero(gaps)) + _DOUBLE_NOISE / _above_zero(gaps)
    maps = _along(unfolding, vectors, values)
    return maps, _in_doubt(unfolding, longest, maps, turned), (unfolding, longest, matrix)


def _squared(
    matrix: Float[Tensor, "batch n n"], power: Float[Tensor, "batch n n"], times: int, before: int = 0
) -> tuple[Float[Tensor, "batch n n"], Float[Tensor, "batch 1 n"], Float[Tensor, " batch"]]:
    r"""Square a power of trace one, and return it, the leading eigenvector in it and a lower bound of the relative gap.

    The column with the largest diagonal entry has the largest part of the vector; steps with the power leave less of
    the others, and steps with the matrix itself take away the rounding errors of the squarings.

    After k squarings the power P has the eigenvalues $p_i \propto \lambda_i^{2^k}$. For any q and v,
    $p_2 \le \|P - q\,v v^\top\|_F$: taking away a matrix of rank one leaves at least the second singular value (Eckart
    and Young, 1936). With $q = v^\top P v \le p_1$ that bounds $\lambda_2 / \lambda_1 = (p_2 / p_1)^{1/2^k}$, but for
    the rounding errors, which a squaring doubles and adds to.
    """
    for _ in range(times):
        power = power @ power
    power = power / _trace(power)
    column = power.diagonal(dim1=-2, dim2=-1).argmax(1)
    vectors = power[torch.arange(len(power), device=power.device), None, column]
    for factor in [power] * _STEPS_WITH_THE_POWER + [matrix] * _STEPS_WITH_THE_MATRIX:
        vectors = vectors @ factor
    vectors = _unit(vectors)
    first = vectors @ power @ vectors.mT
    rest = (power - first * vectors.mT * vectors).norm(dim=(1, 2))
    exponent = 2 ** (before + times)
    rounding = exponent * len(power[0]) * torch.finfo(power.dtype).eps
    ratios = (rest / _above_zero(first.flatten()) + rounding) ** (1 / exponent)
    return power, vectors, (1 - ratios).clamp_min(0)


def _by_lanczos(
    unfolding: Float[Tensor, "batch channels positions"],
    longest: Float[Tensor, " batch"],
    start: Float[Tensor, "batch 1 n"],
    *,
    single: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Find the vector by Rayleigh-Ritz on a Krylov subspace (Lanczos with full reorthogonalisation)."""
    noise, tolerance, most = (
        (_SINGLE_NOISE, _SINGLE_NOISE, _KRYLOV_STEPS)
        if single
        else (_DOUBLE_NOISE, _RESIDUAL_TOLERANCE, _PRECISE_KRYLOV_STEPS)
    )
    basis = start
    images = _product(unfolding, basis, single=single)
    while True:
        for _ in range(_KRYLOV_STEPS_AT_A_TIME):
            direction = images[:, -1:]
            for _ in range(2):  # once leaves rounding errors of the order of the part that was taken away
                direction = direction - (direction @ basis.mT) @ basis
            direction = _unit(direction)
            basis = torch.cat([basis, direction], dim=1)
            images = torch.cat([images, _product(unfolding, direction, single=single)], dim=1)
        ritz, mixing = eigenpairs(basis @ images.mT)
        vectors, values = _unit(mixing[..., :1].mT @ basis), ritz[:, 0]
        residuals = mixing[..., :1].mT @ images - values[:, None, None] * vectors
        gaps = 1 - ritz[:, 1] / _above_zero(values)
        if (residuals.norm(dim=(1, 2)) <= tolerance * values).all() or basis.shape[1] > most:
            break
    turned = _turned(residuals, values, gaps, noise)
    maps = _along(unfolding, vectors, values)
    return maps, _in_doubt(unfolding, longest, maps, turned), (unfolding, longest, vectors)


def _by_decomposition(
    unfolding: Float[Tensor, "batch channels positions"], longest: Tensor, matrix: Tensor, *, exact: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Decompose the Gram matrix, the one at hand where that is exact, whatever the gap."""
    values, vectors = eigenpairs(matrix if exact else gram_matrix(unfolding))
    maps = _along(unfolding, vectors[..., :1].mT, values[:, 0])
    return maps, torch.zeros_like(values[:, 0], dtype=torch.bool), ()


def _turned(
    residuals: Float[Tensor, "batch 1 n"],
    values: Float[Tensor, " batch"],
    gaps: Float[Tensor, " batch"],
    noise: float,
) -> Float[Tensor, " batch"]:
    """Return by what angle each direction may be off: residual and noise over the gap (Davis and Kahan, 1970)."""
    angles: Tensor = (residuals.norm(dim=(1, 2)) / _above_zero(values) + noise) / _above_zero(gaps)
    return angles


def _in_doubt(
    unfolding: Float[Tensor, "batch channels positions"],
    longest: Float[Tensor, " batch"],
    maps: Float[Tensor, "batch positions"],
    turned: Float[Tensor, " batch"],
) -> Bool[Tensor, " batch"]:
    """Tell which maps may be off by more than the promise, where their directions may be turned by these angles."""
    promise = _PROMISE_OF_FLOAT64 if unfolding.dtype == torch.float64 else _PROMISE
    return ~(turned * longest <= promise * (maps.amax(1) - maps.amin(1)))


def _longest(unfolding: Float[Tensor, "batch channels positions"]) -> Float[Tensor, " batch"]:
    """Return the length of the longest position: by so much a map is off at most, for what its direction is off."""
    squares = torch.stack([rows.square().sum(1) for rows in unfolding.split(_ROWS_AT_A_TIME, dim=1)])
    return squares.sum(0).amax(1).double().sqrt()


def _along(
    unfolding: Float[Tensor, "batch channels positions"],
    vectors: Float[Tensor, "batch 1 n"],
    values: Float[Tensor, " batch"],
) -> Float[Tensor, "batch positions"]:
    """Return the map along each leading eigenvector of the smaller Gram matrix."""
    if is_tall(unfolding):
        maps = values.sqrt()[:, None, None] * vectors
    else:
        maps = torch.cat([vectors @ rows.mT for rows in rows_in_float64(unfolding)], dim=2)
    return maps.squeeze(1).abs()


def _product(
    unfolding: Float[Tensor, "batch channels positions"], vectors: Float[Tensor, "batch 1 n"], *, single: bool
) -> Float[Tensor, "batch 1 n"]:
    """Return each vector's product with the smaller Gram matrix, which is not formed: as rows, they are fastest."""
    if single:
        tall = as_tall(unfolding)
        return ((vectors.to(tall.dtype) @ tall.mT) @ tall).double()
    total = torch.zeros_like(vectors)
    for rows in rows_in_float64(unfolding):
        total.baddbmm_(vectors @ rows.mT, rows)
    return total


def _start(unfolding: Float[Tensor, "batch channels positions"]) -> Float[Tensor, "batch 1 n"]:
    """Return what a Krylov subspace starts from: ones, near the answer for rectified features, and fixed random noise.

    Whatever is regular, ones alone for example, can be orthogonal to a regular eigenvector.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(min(unfolding.shape[1:]), generator=generator, dtype=torch.float64, device="cpu")
    return _unit((1 + 0.3 * noise).to(unfolding.device).expand(len(unfolding), 1, -1))


def _residuals(vectors: Tensor, images: Tensor) -> tuple[Float[Tensor, " batch"], Float[Tensor, "batch 1 n"]]:
    """Return the Rayleigh quotients of vectors with these products, and what they leave."""
    values = (vectors * images).sum((1, 2))
    return values, images - values[:, None, None] * vectors


def _unit(vectors: Float[Tensor, "batch 1 n"]) -> Float[Tensor, "batch 1 n"]:
    return vectors / _above_zero(vectors.norm(dim=2, keepdim=True))


def _trace(matrix: Float[Tensor, "batch n n"]) -> Float[Tensor, "batch 1 1"]:
    return _above_zero(matrix.diagonal(dim1=-2, dim2=-1).sum(1))[:, None, None]


def _above_zero(numbers: Tensor) -> Tensor:
    return numbers.clamp_min(_TINY)
