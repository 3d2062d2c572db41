r"""The Gram matrix of a mode-1 unfolding, and its eigenpairs.

An unfolding F is batch x channels x positions. It is *tall* if it has at least as many channels as positions. Then its
Gram matrix is $F^\top F$, over positions; otherwise it is $F F^\top$, over channels. So the matrix has min(channels,
positions) rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tucker_cam.arguments import check_features

if TYPE_CHECKING:
    from jaxtyping import Float, Float64

    Unfolding = Float[Tensor, "batch channels positions"]
    Means = Float64[Tensor, "batch channels 1"]
    Square = Float[Tensor, "batch n n"]

# Features whose norm is outside these bounds are scaled first: sums of their squares could leave float32's range, or
# lose digits to its denormal numbers.
SMALLEST_NORM, LARGEST_NORM = 1e-12, 1e12
# Other devices, such as Apple's MPS, have no float64 or no eigendecompositions.
_DEVICES_THAT_DECOMPOSE = ("cpu", "cuda")
# How many numbers are converted to float64 at a time, and how many rows at least: the copy stays in the CPU's cache.
_NUMBERS_AT_A_TIME, _LEAST_ROWS_AT_A_TIME = 2**18, 128
# Float32 products of fewer rows are not trusted: BLAS sums them one number after the other, with errors of 5e-6.
_FEW_ROWS = 16
# BLAS computes the columns of a float64 product in groups of this size, and a group of one column takes as long as a
# full one: 48 of 7 x 7 positions take 0.6 times as long as 49. So every strip except the last ends with a full group.
_TILE, _MOST_STRIPS = 24, 8


def rescale_extremes(
    features: Float[Tensor, "batch channels *spatial"],
) -> tuple[Float[Tensor, "batch channels *spatial"], Float[Tensor, " batch"]]:
    """Return the features, scaled so that a float can hold their squares, and each image's divisor.

    It is 1, or the power of two below the image's largest magnitude if its norm is above 1e12 or below 1e-12.
    """
    norms = torch.linalg.vector_norm(features, dim=tuple(range(1, features.dim())))
    ordinary = (norms > SMALLEST_NORM) & (norms < LARGEST_NORM)
    if ordinary.all():
        return features, torch.ones_like(norms)
    peaks = largest_magnitude(features)
    powers = torch.ldexp(torch.ones_like(peaks), torch.frexp(peaks).exponent - 1)
    divisors = torch.where(ordinary | (peaks == 0), 1, powers)
    return features / divisors.reshape(-1, *[1] * (features.dim() - 1)), divisors


def largest_magnitude(features: Float[Tensor, "batch channels *spatial"]) -> Float[Tensor, " batch"]:
    axes = tuple(range(1, features.dim()))
    return torch.maximum(features.amax(axes), -features.amin(axes))


def unfold(features: Float[Tensor, "batch channels *spatial"]) -> Float[Tensor, "batch channels positions"]:
    """Return the mode-1 unfolding, at least float32, on a device that can decompose it.

    It is a view if the memory layout allows one, as NCHW and channels_last do.
    """
    features = check_features(features, "features").to(torch.promote_types(features.dtype, torch.float32))
    return (features if features.device.type in _DEVICES_THAT_DECOMPOSE else features.cpu()).flatten(2)


def is_tall(unfolding: Tensor) -> bool:
    return unfolding.shape[1] >= unfolding.shape[2]


def as_tall(unfolding: Tensor) -> Tensor:
    return unfolding if is_tall(unfolding) else unfolding.mT


def float32_products_do(unfolding: Tensor) -> bool:
    """Return whether float32 products of the unfolding do as a start: it is float32, summed in blocks, not rounded."""
    return unfolding.dtype == torch.float32 and min(unfolding.shape[1:]) >= _FEW_ROWS and not _products_may_be_rounded()


def rows_in_float64(unfolding: Unfolding, means: Means | None = None) -> Iterator[Float[Tensor, "batch some short"]]:
    """Yield the rows of the unfolding as a tall matrix, in float64, minus the channels' means, a few at a time.

    Each part is written over the one before it.
    """
    tall = as_tall(unfolding)
    batch, length, width = tall.shape
    size = min(max(_NUMBERS_AT_A_TIME // (batch * width), _LEAST_ROWS_AT_A_TIME), length)
    place = tall.new_empty(batch, size, width, dtype=torch.float64)
    for start in range(0, length, size):
        rows = place[:, : length - start].copy_(tall[:, start : start + size])
        if means is not None:
            rows -= means[:, start : start + size] if is_tall(unfolding) else means.mT
        yield rows


def gram_matrix(unfolding: Unfolding, means: Means | None = None) -> Float[Tensor, "batch small small"]:
    r"""Return $F^\top F$, or $F F^\top$ where that is smaller, accumulated in float64.

    The matrix is symmetric, so each strip of its rows is computed only up to the diagonal.
    """
    small = min(unfolding.shape[1:])
    matrix = unfolding.new_empty(len(unfolding), small, small, dtype=torch.float64)
    width = _TILE * ceil(small / (_TILE * _MOST_STRIPS))
    strips = []
    for start in range(0, small, width):
        own, reach = slice(start, start + width), slice(start + width)
        strips.append((own, reach, torch.zeros_like(matrix[:, own, reach], memory_format=torch.contiguous_format)))
    for rows in rows_in_float64(unfolding, means):
        for own, reach, strip in strips:
            strip.baddbmm_(rows[..., own].mT, rows[..., reach])
    for own, reach, strip in strips:
        matrix[:, own, reach] = strip
        matrix[:, reach, own] = strip.mT
    return matrix


def eigenpairs(matrix: Square) -> tuple[Float[Tensor, "batch n"], Square]:
    """Return the eigenvalues of a positive semidefinite matrix, descending and not negative, and its eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def _products_may_be_rounded() -> bool:
    """Return whether PyTorch may round the factors of float32 products to TF32 or bfloat16."""
    backends = (torch.backends.cuda, torch.backends.mkldnn)
    settings = {getattr(getattr(backend, "matmul", None), "fp32_precision", None) for backend in backends}
    if None in settings:  # before torch 2.9; since then, the call fails if both it and the newer settings were used
        return torch.get_float32_matmul_precision() != "highest"
    return not settings <= {"none", "ieee"}
