"""Finds the part of a picture that the network looks at, from the preprocessing and the picture's size.

A picture whose red and green are coordinates is sent through the preprocessing itself, so that any preprocessing will
do. If it mixes or exchanges colours, grey pictures are sent instead, one for each colour.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tucker_cam.models.network import colours_of

# Interpolation bends the coordinates at the edges of what is seen.
_EDGE = 0.04
# Relative to the picture's side: a preprocessing that turns or warps a picture leaves a larger residual.
_RESIDUAL = 0.01
# Padding has another blue. Where interpolation mixes padding in, or overshoots, blue changes by more than rounding.
_BLUE, _ROUNDING = 200 / 255, 1.5 / 255


class View(NamedTuple):
    """A box in a picture, in pixels from the picture's left and upper edges; it may reach beyond the picture."""

    left: float
    top: float
    width: float
    height: float


def view_of(
    preprocess: Callable[[Any], Tensor], size: tuple[int, int] | None, frames: int | None = None
) -> View | None:
    """Return the box that a network sees of pictures of this size, width and height; the result is cached.

    None if there is no such box, because the preprocessing does more than resize, crop and pad; if it accepts only the
    pictures that it is made for; or if there is no picture, and so no size.
    """
    if size is None:
        return None
    # Bound methods are compared by the identity of their object, so that a preprocessing need not be hashable.
    return _view(preprocess.__call__, size, frames)  # type: ignore[operator]


@lru_cache(maxsize=256)
def _view(preprocess: Callable[[Any], Tensor], size: tuple[int, int], frames: int | None) -> View | None:
    width, height = size
    for grey in (False, True):
        # A user-defined preprocessing can fail in any way.
        with suppress(Exception):
            across, down = _coordinates(preprocess, size, frames, grey=grey)
            x, y = _line(across), _line(down.T)
            inside = np.ix_((y > _EDGE) & (y < 1 - _EDGE), (x > _EDGE) & (x < 1 - _EDGE))
            error = np.maximum(np.abs(across - x), np.abs(down - y[:, None]))[inside]
            if error.size and error.max() <= _RESIDUAL and min(x[-1] - x[0], y[-1] - y[0]) > _RESIDUAL:
                right, low = (x[1] - x[0]) * width, (y[1] - y[0]) * height
                box = (x[0] * width - right / 2, y[0] * height - low / 2, len(x) * right, len(y) * low)
                return View(*map(float, box))
    return None


def _coordinates(
    preprocess: Callable[[Any], Tensor], size: tuple[int, int], frames: int | None, *, grey: bool
) -> NDArray[np.float64]:
    """Return the x and y in the picture, in [0, 1], of each place in the network's input; NaN for padding."""
    black, white = _levels(preprocess, frames)
    width, height = size
    planes = np.full((height, width, 3), 255 * _BLUE, np.uint8)
    planes[..., 0] = np.rint(255 * (np.arange(width) + 0.5) / width)
    planes[..., 1] = np.rint(255 * (np.arange(height)[:, None] + 0.5) / height)
    pictures = [planes[..., [plane] * 3] for plane in range(3)] if grey else [planes]
    found = [np.asarray((_sent(preprocess, each, frames) - black) / (white - black)) for each in pictures]
    red, green, blue = np.concatenate([each[:1] for each in found] if grey else found)
    return np.where(np.abs(blue - _BLUE) > _ROUNDING, np.nan, [red, green])


@lru_cache(maxsize=8)
def _levels(preprocess: Callable[[Any], Tensor], frames: int | None) -> tuple[Tensor, Tensor]:
    """Return what black and white become in each channel."""
    matrix, black = colours_of(preprocess, frames)
    return black[:, None, None], (black + matrix.sum(1))[:, None, None]


def _sent(preprocess: Callable[[Any], Tensor], picture: NDArray[np.uint8], frames: int | None) -> Tensor:
    """Return the network's input, channels x height x width; for a clip, that of the first frame."""
    image = Image.fromarray(picture)
    found = preprocess(image if frames is None else [image] * frames).to(torch.float64)
    return found if frames is None else found[:, 0]


def _line(coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the straight line along the second axis that fits best; NaN if too few coordinates are seen."""
    inside = (coordinates > _EDGE) & (coordinates < 1 - _EDGE)
    places, shown = np.arange(coordinates.shape[1]), np.flatnonzero(inside.any(0))
    if len(shown) < 2:
        return np.full(len(places), np.nan)
    means = coordinates[:, shown].mean(0, where=inside[:, shown])
    return np.asarray(np.polyval(np.polyfit(shown, means, 1), places))
