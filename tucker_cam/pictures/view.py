"""A preprocessing and a picture's size in, the part of the picture that the network looks at out.

It is read off a picture whose colours are coordinates, sent through the preprocessing itself: so it holds for any
resizing, cropping and padding, also for one that somebody else wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

# Interpolation bends the coordinates at the edges of what is seen.
_EDGE = 0.04
# Of the picture's side: a preprocessing that turns or warps a picture leaves more.
_RESIDUAL = 0.01
# Padding has another blue, and where interpolation mixes it in, or overshoots, blue moves by more than rounding does.
_BLUE, _ROUNDING = 200 / 255, 1.5 / 255


class View(NamedTuple):
    """A box in a picture, in its pixels, from its left and upper edges; it may reach beyond the picture."""

    left: float
    top: float
    width: float
    height: float


def view_of(preprocess: Callable[[Any], Tensor], size: tuple[int, int], frames: int | None = None) -> View | None:
    """Return what a network sees of pictures of a size; it is remembered.

    Args:
        preprocess: as of `Network`.
        size: width and height.
        frames: as of `Network`.

    Returns:
        None where the preprocessing does more than resizing, cropping and padding, so that there is no such box; or
        where it takes only the pictures that it is made for.
    """
    # Bound methods are told apart by whose they are: a preprocessing need not be hashable.
    return _view(preprocess.__call__, size, frames)


@lru_cache(maxsize=256)
def _view(preprocess: Callable[[Any], Tensor], size: tuple[int, int], frames: int | None) -> View | None:
    width, height = size
    try:
        for across, down in _coordinates(preprocess, size, frames):
            horizontal, vertical = _edges(across), _edges(down.T)
            if horizontal is not None and vertical is not None:
                (left, right), (top, bottom) = horizontal, vertical
                return View(left * width, top * height, (right - left) * width, (bottom - top) * height)
    except Exception:
        # A preprocessing of one's own fails in its own ways.
        return None
    return None


def _coordinates(
    preprocess: Callable[[Any], Tensor], size: tuple[int, int], frames: int | None
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Yield where in the picture, in [0, 1], each place of the network's input lies: its x and its y.

    They are read off red and green of one picture; then, should that be in vain since channels are mixed or exchanged,
    off the greys of two.
    """
    black, white = _levels(preprocess, frames)
    width, height = size
    across = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    down = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))

    def seen(*colours: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((_sent(preprocess, np.stack(colours, -1), frames) - black) / (white - black))

    channels = seen(across, down, np.full_like(across, _BLUE))
    if len(channels) == 3:
        red, green, blue = channels
        padding = np.abs(blue - _BLUE) > _ROUNDING
        yield np.where(padding, np.nan, red), np.where(padding, np.nan, green)
    yield seen(across, across, across)[0], seen(down, down, down)[0]


@lru_cache(maxsize=8)
def _levels(preprocess: Callable[[Any], Tensor], frames: int | None) -> tuple[Tensor, Tensor]:
    """Return what black and white of each channel become; in the middle, which is never padding."""
    # Of the size that every network takes in its dry run.
    sent = [_sent(preprocess, np.full((256, 256, 3), level), frames) for level in (0.0, 1.0)]
    black, white = (each[:, each.shape[1] // 2, each.shape[2] // 2, None, None] for each in sent)
    return black, white


def _sent(preprocess: Callable[[Any], Tensor], picture: NDArray[np.float64], frames: int | None) -> Tensor:
    """Return the network's input, channels x height x width; of a clip its first frame."""
    image = Image.fromarray(np.rint(255 * picture).astype(np.uint8))
    found = preprocess(image if frames is None else [image] * frames).to(torch.float64)
    return found if frames is None else found[:, 0]


def _edges(coordinates: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return the coordinates at both ends of the second axis, if they depend on it alone, and linearly."""
    inside = (coordinates > _EDGE) & (coordinates < 1 - _EDGE)
    places = np.broadcast_to((np.arange(coordinates.shape[1]) + 0.5) / coordinates.shape[1], coordinates.shape)[inside]
    if len(np.unique(places)) < 2:
        return None
    slope, start = np.polyfit(places, coordinates[inside], 1)
    if slope <= 0 or np.abs(slope * places + start - coordinates[inside]).max() > _RESIDUAL:
        return None
    return float(start), float(start + slope)
