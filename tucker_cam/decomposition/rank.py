"""Turns a Tucker rank, as users of TensorLy write it, into one feasible rank for each mode."""

from collections.abc import Sequence
from math import inf, prod
from numbers import Integral, Real
from typing import Any, Literal

from tensorly.tucker_tensor import validate_tucker_rank

from tucker_cam.errors import BadTypeError, BadValueError

Rank = int | float | Sequence[int] | Literal["same"] | None


def check_rank(rank: Rank) -> None:
    """Raise TypeError or ValueError for a rank that no tensor can have."""
    if rank is None or (isinstance(rank, str) and rank == "same"):
        return
    sequence = isinstance(rank, (tuple, list))
    parts: Sequence[Any] = rank if sequence else [rank]  # type: ignore[assignment]
    kind = Integral if sequence else Real
    if not parts or any(isinstance(part, bool) or not isinstance(part, kind) for part in parts):
        raise BadTypeError(
            "expected rank as None (full), an int, a tuple of ints (channels, *spatial), a float (share of the "
            f"parameters) or 'same', got {rank!r}"
        )
    if not all(0 < part < inf for part in parts):
        raise BadValueError(f"expected a rank above 0, got {rank!r}: None is full rank")


def feasible_rank(rank: Rank, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the rank of each mode that a tensor of this shape can have; None if that is the full rank.

    The rank of a mode is at most the length of its axis, and at most the product of the other ranks. Larger ranks are
    clipped.

    The shape is that of one image, channels x spatial. For the rank and the errors see `channel_modes`.

    Example:
        >>> feasible_rank((100, 4, 9), (1280, 7, 7))
        (28, 4, 7)
        >>> feasible_rank(8, (1280, 7, 7))
        (8, 7, 7)
        >>> feasible_rank((1280, 7, 7), (1280, 7, 7)) is None
        True
    """
    check_rank(rank)
    if rank is None:
        return None
    parts: Sequence[int]
    if isinstance(rank, Sequence) and not isinstance(rank, str):
        parts = [int(part) for part in rank]
    elif isinstance(rank, (int, Integral)):
        parts = [int(rank)] * len(shape)
    else:
        parts = validate_tucker_rank(shape, rank=rank if rank == "same" else min(float(rank), float(prod(shape))))
    if len(parts) != len(shape):
        raise BadValueError(
            f"expected a rank of {len(shape)} parts for feature maps of shape {shape}, channels first, got {rank!r}"
        )
    clipped = _clip(parts, shape)
    return None if clipped == full_rank(shape) else clipped


def full_rank(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the highest multilinear rank that a tensor of this shape can have."""
    return _clip(shape, shape)


def _clip(rank: Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    clipped = [min(r, length) for r, length in zip(rank, shape, strict=True)]
    # At most one part, the largest, can exceed the product of the others.
    return tuple(min(r, prod(clipped) // r) for r in clipped)
