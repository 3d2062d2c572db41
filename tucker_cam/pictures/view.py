"""A preprocessing and a picture's size in, the part of the picture that the network looks at out.

It is read off pictures whose greys are coordinates, sent through the preprocessing itself: so it holds for any
resizing, cropping and padding, also for one that somebody else wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

# Interpolation bends the coordinates at the edges of what is seen.
_EDGE = 0.04
# Of the picture's side: a preprocessing that turns or warps a picture leaves more.
_RESIDUAL = 0.01


class View(NamedTuple):
    """A box in a picture, in its pixels, from its left and upper edges; it may reach beyond the picture.

    Attributes:
        left: of the box.
        top: of the box.
        width: of the box.
        height: of the box.
    """

    left: float
    top: float
    width: float
    height: float


def view_of(preprocess: Callable[[Any], Tensor], size: tuple[int, int], frames: int | None = None) -> View | None:
    """Return what a network sees of pictures of a size.

    Args:
        preprocess: as of `Network`.
        size: width and height.
        frames: as of `Network`.

    Returns:
        None where the preprocessing does more than resizing, cropping and padding, so that there is no such box.
    """
    width, height = size
    across = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    down = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))

    def seen(grey: NDArray[np.float64]) -> NDArray[np.float64]:
        picture = Image.fromarray(np.rint(255 * grey).astype(np.uint8)).convert("RGB")
        first, *_ = preprocess(picture if frames is None else [picture] * frames).double()
        return np.asarray(first if frames is None else first[0])

    # However the network's input is normalised, what lies between black and white is a coordinate; padding is neither.
    black, white = seen(np.zeros_like(across)), seen(np.ones_like(across))
    contrast = white - black
    valid = np.abs(contrast) > np.abs(contrast).max() / 2
    if not valid.any():
        return None
    rows, columns = ((seen(ramp) - black) / np.where(valid, contrast, np.nan) for ramp in (down, across))
    vertical, horizontal = _edges(rows.T), _edges(columns)
    if horizontal is None or vertical is None:
        return None
    (left, right), (top, bottom) = horizontal, vertical
    return View(left * width, top * height, (right - left) * width, (bottom - top) * height)


def _edges(coordinates: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return the coordinates at both ends of the second axis, if they depend on it alone, and linearly."""
    inside = (coordinates > _EDGE) & (coordinates < 1 - _EDGE)
    places = np.broadcast_to((np.arange(coordinates.shape[1]) + 0.5) / coordinates.shape[1], coordinates.shape)
    if inside.sum() < 2 or np.ptp(places[inside]) == 0:
        return None
    slope, start = np.polyfit(places[inside], coordinates[inside], 1)
    if slope <= 0 or np.abs(slope * places[inside] + start - coordinates[inside]).max() > _RESIDUAL:
        return None
    return float(start), float(start + slope)
