r"""A mode-1 unfolding in, its Gram matrix and the eigenpairs of that out: all numerical care is taken here.

An unfolding F is batch x channels x positions. It is *tall* where it has at least as many channels as positions; then
its Gram matrix is $F^\top F$, over positions, otherwise $F F^\top$, over channels: never larger than min(channels,
positions) squared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

# An image's features outside of these are scaled first: sums of their squares could leave float32's range, or lose
# digits to its denormal numbers.
_SMALLEST_PEAK, _LARGEST_PEAK = 1e-12, 1e12
# Others, Apple's MPS for one, have no float64 or no eigendecompositions.
_DEVICES_THAT_DECOMPOSE = ("cpu", "cuda")
# Rows that are turned into float64 at a time: the copy stays in the processor's cache.
_ROWS_AT_A_TIME = 256
# From this size on a Krylov subspace is faster than a full eigendecomposition, for one vector of it.
_LARGE = 128
# Eight steps do for most feature maps; 32 resolve a relative gap of about 0.05.
_KRYLOV_STEPS_AT_A_TIME, _KRYLOV_STEPS = 8, 32
# Of the leading eigenvector, where no noise sets the limit: below the tolerance of a map by more than its length can be
# above its contrast.
_RESIDUAL_TOLERANCE = 1e-8


def rescale_extremes(
    features: Float[Tensor, "batch channels *spatial"],
) -> tuple[Float[Tensor, "batch channels *spatial"], Float[Tensor, " batch"]]:
    """Return the features, at least float32, with squares that a float can hold, and what each image was divided by.

    That is 1, but for an image whose largest magnitude is above 1e12 or below 1e-12: there it is that magnitude.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    axes = tuple(range(1, features.dim()))
    peaks = torch.maximum(features.amax(axes), -features.amin(axes))
    extreme = (peaks > _LARGEST_PEAK) | ((peaks < _SMALLEST_PEAK) & (peaks > 0))
    divisors = torch.where(extreme, peaks, 1)
    return (features / divisors.reshape(-1, *(1 for _ in axes)) if extreme.any() else features), divisors


def unfold(features: Float[Tensor, "batch channels *spatial"]) -> Float[Tensor, "batch channels positions"]:
    """Return the mode-1 unfolding, on a device that can decompose it, in a dtype whose products can be relied on.

    A view where the layout in memory allows one, as NCHW and channels_last do.
    """
    unfolding = (features if features.device.type in _DEVICES_THAT_DECOMPOSE else features.cpu()).flatten(2)
    return unfolding.double() if _products_may_be_rounded() else unfolding


def is_tall(unfolding: Tensor) -> bool:
    return unfolding.shape[1] >= unfolding.shape[2]


def as_tall(unfolding: Tensor) -> Tensor:
    return unfolding if is_tall(unfolding) else unfolding.mT


def gram_matrix(unfolding: Float[Tensor, "batch channels positions"]) -> Float[Tensor, "batch small small"]:
    r"""Return $F^\top F$, or $F F^\top$ where that is smaller, accumulated in float64."""
    tall = as_tall(unfolding)
    product = unfolding.new_zeros(tall.shape[0], tall.shape[2], tall.shape[2], dtype=torch.float64)
    for rows in tall.split(_ROWS_AT_A_TIME, dim=1):
        precise = rows.double()
        product.baddbmm_(precise.mT, precise)
    return product


def rows_in_float64(
    matrix: Float[Tensor, "batch long short"], function: Callable[[Tensor], Tensor]
) -> Float[Tensor, "batch long"]:
    """Apply a function of a matrix's rows to them in float64, some rows at a time."""
    return torch.cat([function(rows.double()) for rows in matrix.split(_ROWS_AT_A_TIME, dim=1)], dim=1)


def eigenpairs(
    matrix: Float[Tensor, "batch n n"],
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, "batch n n"]]:
    """Return the eigenvalues of a positive semidefinite matrix, descending and not negative, and its eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def leading_eigenvector(
    matrix: Float[Tensor, "batch n n"], *, exact: bool
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, " batch"]]:
    """Return each leading eigenvector, times the root of its eigenvalue, and the gap to the second eigenvalue.

    The gap is relative to the first eigenvalue; unless `exact`, it is 0 where the vector was not found in a few steps.
    """
    if matrix.shape[-1] < _LARGE:
        return _complete(matrix)
    vectors, gaps, converged = _krylov(matrix)
    if exact and not converged.all():
        vectors[~converged], gaps[~converged] = _complete(matrix[~converged])
        return vectors, gaps
    return vectors, gaps.masked_fill(~converged, 0)


def _complete(matrix: Float[Tensor, "batch n n"]) -> tuple[Float[Tensor, "batch n"], Float[Tensor, " batch"]]:
    values, vectors = eigenpairs(matrix)
    return values[:, :1].sqrt() * vectors[..., 0], _relative_gap(values)


def _krylov(
    matrix: Float[Tensor, "batch n n"],
) -> tuple[Float[Tensor, "batch n"], Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Find it by Rayleigh-Ritz on a Krylov subspace (Lanczos with full reorthogonalisation), and say where it was."""
    # A fixed random start: whatever is regular, ones for example, can be orthogonal to a regular eigenvector.
    generator = torch.Generator("cpu").manual_seed(0)
    start = torch.randn(matrix.shape[-1], generator=generator, dtype=matrix.dtype, device="cpu").to(matrix.device)
    basis = (start / start.norm()).expand(len(matrix), 1, -1)
    images = basis @ matrix
    while True:
        for _ in range(_KRYLOV_STEPS_AT_A_TIME):
            direction = images[:, -1:]
            for _ in range(2):  # once leaves rounding errors of the order of the part that was taken away
                direction = direction - (direction @ basis.mT) @ basis
            direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
            basis = torch.cat([basis, direction], dim=1)
            images = torch.cat([images, direction @ matrix], dim=1)
        values, mixing = eigenpairs(basis @ images.mT)
        vector, image = ((mixing[:, None, :, 0] @ rows).squeeze(1) for rows in (basis, images))
        residual = (image - values[:, :1] * vector).norm(dim=-1)
        gaps = _relative_gap(values)
        converged = residual <= _RESIDUAL_TOLERANCE * gaps * values[:, 0]
        if converged.all() or basis.shape[1] > _KRYLOV_STEPS:
            return values[:, :1].sqrt() * vector, gaps, converged


def _relative_gap(values: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
    first = values[:, 0]
    gap = first - values[:, 1] if values.shape[1] > 1 else first
    return gap / first.clamp_min(torch.finfo(values.dtype).tiny)


def _products_may_be_rounded() -> bool:
    """Tell whether PyTorch was allowed to round the factors of float32 products, to TF32 or bfloat16."""
    backends = (torch.backends.cuda, torch.backends.mkldnn)
    settings = {getattr(getattr(backend, "matmul", None), "fp32_precision", None) for backend in backends}
    if None in settings:  # before torch 2.9; since then, this fails where it and the newer settings were used both
        return torch.get_float32_matmul_precision() != "highest"
    return not settings <= {"none", "ieee"}
