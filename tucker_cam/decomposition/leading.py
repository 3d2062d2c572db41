r"""The map of a mode-1 unfolding along its leading singular vector: the equation of TSM at full rank.

With $F_{(1)} = A\,\mathrm{diag}(s)\,V^\top$ the map is $|a_1^\top F_{(1)}| = s_1 |v_1|$, where $v_1$ is the leading
eigenvector of $G = F_{(1)}^\top F_{(1)}$. If $K = F_{(1)} F_{(1)}^\top$ is smaller, $a_1$ is that of K instead. A small
matrix is formed and squared repeatedly. A large one is formed only as a last resort, because a Krylov subspace needs
only its products with vectors. Both ways start in float32 where it is precise enough, with a bound on a map's error.

There is one rule for precision. A solver returns its maps, says which of them certainly keep the promised error, and
passes on what it found. `_settled` gives the other images to the next solver, which is slower and more precise.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.linalg import vector_norm

from tucker_cam.decomposition.gram import (
    LARGEST_NORM,
    SMALLEST_NORM,
    as_tall,
    eigenpairs,
    float32_products_do,
    gram_matrix,
    is_tall,
    rescale_extremes,
    rows_in_float64,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jaxtyping import Float

    from tucker_cam.decomposition.gram import Square, Unfolding

    Row = Float[Tensor, "batch 1 n"]
    Scalars = Float[Tensor, " batch"]
    # Maps, which of them are certain, and what the next solver starts from.
    Attempt = tuple[Tensor, Tensor, tuple[Tensor, ...]]
    Solver = Callable[..., Attempt]

# The error that a map may have, as a share of its contrast: its largest minus its smallest value.
_PROMISE, _PROMISE_OF_FLOAT64 = 1e-5, 1e-9
# The error of products accumulated in float32, relative to the Gram matrix's largest eigenvalue, in the 2-norm: 1e-8 to
# 1.3e-7 was measured on feature maps, and 4e-7 on Gaussian noise, where no eigenvalue dominates.
_SINGLE_NOISE, _DOUBLE_NOISE = 2e-7, 1e-14
# A product with one row is summed number by number: 1e-6 was measured with one massive channel.
_ROW_NOISE = 2e-6
_NUMBERS_IN_CACHE = 2**20
# From this size on, a Krylov subspace is faster than squaring.
_LARGE = 128
# Three squarings give the 8th power of the matrix. A step with a power costs a fraction of a squaring. Eight leave 6e-7
# of the part along a second eigenvalue of 0.8 times the first; with five more squarings, 1e-9 along one of 0.99 times.
_SQUARINGS, _MORE_SQUARINGS, _STEPS_IN_POWER = 3, 5, 8
# Most maps take four steps. After 20 in float32 come up to 12 in float64, to this residual; the rest is decomposed.
_STEPS_AT_A_TIME, _STEPS, _PRECISE_STEPS, _RESIDUAL = 2, 20, 12, 1e-11
# As long as the first Ritz value has a residual, the second one may be too small, and so the gap too large: by a factor
# of at most 2.2 in 3,000 images of noise.
_UNSETTLED = 10


def leading_maps(unfolding: Unfolding, *, rescaled: bool = False) -> Float[Tensor, "batch positions"]:
    """Return each image's map along its leading singular vector, not negative, in float64.

    Extreme features are rescaled first, unless that was done already.
    """
    single = float32_products_do(unfolding)
    if min(unfolding.shape[1:]) >= _LARGE:
        solvers = [partial(_lanczos, noise=_ROW_NOISE), partial(_lanczos, noise=_DOUBLE_NOISE)][not single :]
        solvers.append(partial(_decomposed, exact=False))
        # Each product reads an image twice: the second time it is in the processor's cache.
        numbers = unfolding[0].numel() if unfolding.device.type == "cpu" else 1
        parts = unfolding.split(max(_NUMBERS_IN_CACHE // numbers, 1))
        return torch.cat([_in_krylov_subspace(rescale_extremes(part)[0], solvers) for part in parts])
    noise = _SINGLE_NOISE if single else _DOUBLE_NOISE
    tall = as_tall(unfolding)
    product = tall.mT.bmm(tall) if single else gram_matrix(unfolding)
    matrix = product.double()
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    squares = diagonal if is_tall(unfolding) else unfolding.square().sum(1).double()
    norms = vector_norm(matrix, dim=(1, 2), keepdim=True)
    bounded = norms.clamp(SMALLEST_NORM**2, LARGEST_NORM**2)
    if not rescaled and not torch.equal(norms, bounded):
        return leading_maps(rescale_extremes(unfolding)[0], rescaled=True)
    # It has fewer than 128 rows and a Frobenius norm of one, so no power of it leaves float32's range.
    power = product / bounded.to(product.dtype)
    solvers = [partial(_squared, noise=noise), partial(_corrected, noise=noise), partial(_decomposed, exact=not single)]
    return _settled(solvers, unfolding, squares, matrix, power)


def _settled(solvers: Sequence[Solver], *state: Tensor) -> Tensor:
    """Return the first solver's maps, or the next solvers' for images whose maps are not certain."""
    solver, *others = solvers
    maps, sure, state = solver(*state)
    if not others or sure.all():
        return maps
    if not sure.any():  # then nothing has to be copied
        return _settled(others, *state)
    maps[~sure] = _settled(others, *(part[~sure] for part in state))
    return maps


def _squared(unfolding: Unfolding, squares: Tensor, matrix: Square, power: Square, *, noise: float) -> Attempt:
    """Find the leading eigenvector of the matrix by means of a power of the matrix."""
    power, vectors, gaps = _found_in_power(matrix, power, _SQUARINGS)
    values, residuals = _residuals(vectors, vectors.bmm(matrix))
    off = vector_norm(residuals, dim=(1, 2)) + noise * values
    return *_judged(unfolding, squares, vectors, values, off, gaps * values), (unfolding, squares, matrix, power)


def _corrected(unfolding: Unfolding, squares: Tensor, matrix: Square, power: Square, *, noise: float) -> Attempt:
    r"""Square the power further, and correct the vector by one product with the features in float64.

    With $r = F^\top F v - \theta v$ the missing part of the vector is $x = (\theta - G)^+ r$, to first order. The error
    of the given matrix is multiplied by x, so it only enters in second order.
    """
    _, vectors, gaps = _found_in_power(matrix, power, _MORE_SQUARINGS, before=_SQUARINGS)
    values, residuals = _residuals(vectors, _product(unfolding, vectors, single=False))
    # The pseudoinverse, by a matrix that is shifted along the vector itself, where nothing is missing.
    shifted = torch.baddbmm(matrix, values[:, None, None] * vectors.mT, vectors, beta=-1)
    shifted.diagonal(dim1=-2, dim2=-1).add_(values[:, None])
    missing = torch.linalg.solve_ex(shifted, residuals.mT).result.mT
    length = vector_norm(missing, dim=(1, 2))
    off = length**2 * gaps + length * noise + _DOUBLE_NOISE
    return *_judged(unfolding, squares, _unit(vectors + missing), values, off, gaps), (unfolding, squares, matrix)


def _found_in_power(matrix: Square, power: Square, times: int, before: int = 0) -> tuple[Square, Row, Scalars]:
    r"""Square a power `times` times; return it, its leading eigenvector and a lower bound of the relative gap.

    The power has the precision of the product that it was made from, and in the end a leading eigenvalue of about one.

    Steps with the power suppress the other eigenvectors more and more. A final step with the matrix itself, in float64,
    removes the rounding errors of the squarings.

    After k squarings the power P has the eigenvalues $p_i \propto \lambda_i^{2^k}$. For any q and unit vector v,
    $p_2 \le \|P - q\,v v^\top\|_F$: subtracting a matrix of rank one leaves at least the second singular value (Eckart
    and Young, 1936). With $q = v^\top P v \le p_1$ that bounds $\lambda_2 / \lambda_1 = (p_2 / p_1)^{1/2^k}$, up to
    rounding errors, which each squaring doubles and adds to.
    """
    places = [power, torch.empty_like(power)]  # used in turn: new memory costs as much as a squaring
    for _ in range(times):
        power = torch.bmm(places[0], places[0], out=places[1])
        places.reverse()
    start = _start(len(power[0]), power.dtype, power.device).expand(len(power), -1, -1)
    vectors = _unit(start.bmm(power).bmm(power))
    images = vectors.bmm(power)
    power /= _above_zero(images.bmm(vectors.mT))
    rest = vector_norm(torch.baddbmm(power, vectors.mT, vectors, alpha=-1, out=places[1]), dim=(1, 2))
    for _ in range(_STEPS_IN_POWER - 3):
        images = images.bmm(power)
    vectors = _unit(images.double().bmm(matrix))
    exponent = 2 ** (before + times)
    rounding = exponent * len(power[0]) * torch.finfo(power.dtype).eps
    ratios = (rest + rounding) ** (1 / exponent)
    return power, vectors, (1 - ratios).clamp_min(0)


def _lanczos(unfolding: Unfolding, squares: Tensor, start: Row, *, noise: float) -> Attempt:
    """Find the vector by Rayleigh-Ritz on a Krylov subspace (Lanczos with full reorthogonalisation)."""
    single = noise == _ROW_NOISE
    tolerance, most = (_SINGLE_NOISE, _STEPS) if single else (_RESIDUAL, _PRECISE_STEPS)
    basis, images = start, _product(unfolding, start, single=single)
    while True:
        for _ in range(_STEPS_AT_A_TIME):
            direction = images[:, -1:]
            for _ in range(2):  # one pass leaves rounding errors that are large beside a small remainder
                direction = direction - (direction @ basis.mT) @ basis
            direction = _unit(direction)
            basis = torch.cat([basis, direction], dim=1)
            images = torch.cat([images, _product(unfolding, direction, single=single)], dim=1)
        ritz, mixing = eigenpairs(basis @ images.mT)
        vectors = mixing[..., :1].mT @ basis
        values, residuals = _residuals(vectors, mixing[..., :1].mT @ images)
        relative = vector_norm(residuals, dim=(1, 2)) / _above_zero(values)
        if (relative <= tolerance).all() or basis.shape[1] > most:
            break
    off, gaps = (_UNSETTLED * relative + noise) * values, values - ritz[:, 1]
    return *_judged(unfolding, squares, vectors, values, off, gaps), (unfolding, squares, vectors)


def _decomposed(unfolding: Unfolding, squares: Tensor, matrix: Tensor, *, exact: bool) -> Attempt:
    """Decompose the Gram matrix, the given one if that is exact; the gap does not matter."""
    values, vectors = eigenpairs(matrix if exact else gram_matrix(unfolding))
    nothing = torch.zeros_like(values[:, 0])
    return *_judged(unfolding, squares, vectors[..., :1].mT, values[:, 0], nothing, nothing), ()


def _judged(
    unfolding: Unfolding, squares: Tensor, vectors: Row, values: Scalars, off: Scalars, gaps: Scalars
) -> tuple[Tensor, Tensor]:
    """Return the maps along leading eigenvectors, and which of them keep the promise, given residual plus noise, `off`.

    The vector's angle of error is at most `off` divided by the gap (Davis and Kahan, 1970), and a map's error at a
    position at most this angle times the length of the features there.
    """
    if is_tall(unfolding):
        maps = (values.clamp_min(0).sqrt().view(-1, 1, 1) * vectors).squeeze(1).abs()
    else:
        maps = torch.cat([vectors @ rows.mT for rows in rows_in_float64(unfolding)], dim=2).squeeze(1).abs()
    promise = _PROMISE_OF_FLOAT64 if unfolding.dtype == torch.float64 else _PROMISE
    lowest, highest = torch.aminmax(maps, dim=1)
    # A vector that vanished is not certain: both sides are zero.
    return maps, off * squares.amax(1).sqrt() < promise * (highest - lowest) * gaps


def _product(unfolding: Unfolding, vectors: Row, *, single: bool) -> Float[Tensor, "batch 1 n"]:
    """Return each vector's product with the smaller Gram matrix, which is not formed; vectors as rows are fastest."""
    if single:
        tall = as_tall(unfolding)
        return ((vectors.to(tall.dtype) @ tall.mT) @ tall).double()
    total = torch.zeros_like(vectors)
    for rows in rows_in_float64(unfolding):
        total.baddbmm_(vectors @ rows.mT, rows)
    return total


def _in_krylov_subspace(unfolding: Unfolding, solvers: Sequence[Solver]) -> Float[Tensor, "batch positions"]:
    # A few channels at a time, so that their squares stay in the cache.
    squares = torch.stack([rows.square().sum(1) for rows in unfolding.split(32, dim=1)]).sum(0).double()
    start = _start(min(unfolding.shape[1:]), torch.float64, unfolding.device).expand(len(unfolding), -1, -1)
    return _settled(solvers, unfolding, squares, start)


@cache
def _start(length: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "1 1 n"]:
    """Return the start vector: ones, which are close to the answer for rectified features, plus fixed random noise.

    A regular vector, such as ones alone, could be orthogonal to a regular eigenvector.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(length, generator=generator, dtype=torch.float64, device="cpu")
    return _unit((1 + 0.3 * noise).view(1, 1, -1)).to(device, dtype)


def _residuals(vectors: Row, images: Row) -> tuple[Scalars, Row]:
    """Return the Rayleigh quotients of vectors, given their products with the matrix, and the residuals."""
    values = vectors.bmm(images.mT)
    return values.view(-1), torch.baddbmm(images, values, vectors, alpha=-1)


def _unit(vectors: Row) -> Row:
    # The squares of a vector's product with a power of the matrix can leave float32's range.
    lengths = vector_norm(vectors, dim=2, keepdim=True, dtype=torch.float64)
    return vectors / _above_zero(lengths.to(vectors.dtype))


def _above_zero(numbers: Tensor) -> Tensor:
    return numbers.clamp_min(torch.finfo(numbers.dtype).tiny)
