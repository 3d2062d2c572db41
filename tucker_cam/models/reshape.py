"""Turns the output of a transformer or a feature pyramid into feature maps: the host's reshape transforms.

Each transform is a callable that compares equal to one made from the same shapes, and that can be pickled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tucker_cam.activations import ReshapeTransform
from tucker_cam.errors import BadValueError

_MOST_PREFIX_TOKENS = 16
"""Tokens before the patches: a class token, a distillation token and registers. DINOv2 has 1 or 5 of them."""
_LARGEST_PATCH = 64


@dataclass(frozen=True)
class TokensToMaps:
    """Lay out a transformer's patch tokens as the picture they came from; in a list or tuple, the tokens come first.

    Attributes:
        prefix: number of tokens before the patches (class, distillation, registers), which are left out.
        aspect: the picture's height divided by its width.
    """

    prefix: int
    aspect: float

    def __call__(self, output: Tensor | Sequence[Tensor]) -> Tensor:
        """Turn batch x tokens x channels into batch x channels x height x width; ValueError if they form no grid."""
        tokens = output if isinstance(output, Tensor) else output[0]  # attention weights, for example, come after
        patches = tokens.shape[1] - self.prefix
        height = round((patches * self.aspect) ** 0.5)
        if height < 1 or patches % height:
            raise BadValueError(
                f"expected {self.prefix} tokens and a grid of patches {self.aspect:g} times as high as wide, got "
                f"{tuple(tokens.shape)}: load the model for pictures of this size, or pass your own reshape_transform"
            )
        maps: Tensor = tokens[:, self.prefix :].mT.unflatten(2, (height, patches // height))
        return maps


def channels_last_to_maps(output: Tensor) -> Tensor:
    """Turn batch x spatial x channels, as in Swin, into batch x channels x spatial."""
    return output.movedim(-1, 1)


def only_map(output: Any) -> Tensor:
    """Take the one feature map out of a list or a tuple."""
    (maps,) = _maps_in(output)
    return maps


def pyramid_to_maps(output: Any) -> Tensor:
    """Concatenate the levels of a feature pyramid along the channels, resized to the middle one; drop 1x1 levels."""
    levels = sorted(_maps_in(output), key=lambda level: level.shape[-1], reverse=True)
    size = levels[(len(levels) - 1) // 2].shape[-2:]
    resized = [interpolate(level.float(), size=size, mode="bilinear", antialias=True) for level in levels]
    return torch.cat(resized, dim=1)


def spatial_output(output: object, pictures: Tensor) -> tuple[tuple[int, ...], ReshapeTransform | None] | None:
    """Return the shape of a layer's output for one picture, and its transform to maps; None if it is not spatial.

    `pictures` is the model's input, batch x channels x (time x) height x width.
    """
    if isinstance(output, Tensor):
        if not _is_map(output, pictures):
            return None
        channels_last = channels_last_to_maps if _is_channels_last(output, pictures) else None
        return (1, *output.shape[1:]), _tokens_to_maps(output, pictures) if output.dim() == 3 else channels_last
    if isinstance(output, (list, tuple)) and output and isinstance(output[0], Tensor):
        first = spatial_output(output[0], pictures)
        if first and isinstance(first[1], TokensToMaps):
            return first
    levels = _maps_in(output)
    if not all(_is_map(level, pictures) and not _is_channels_last(level, pictures) for level in levels):
        return None
    if len(levels) == 1 and not isinstance(output, Mapping):
        return (1, *levels[0].shape[1:]), only_map
    if pictures.dim() == 4 and len({level.shape[-2:] for level in levels}) > 1:
        return (1, *pyramid_to_maps(output).shape[1:]), pyramid_to_maps
    return None


def positions_in(output: object, pictures: Tensor) -> list[Tensor]:
    """Return all tensors with positions in an output, at any depth; channels come second, also in tokens."""
    return [
        each.movedim(-1, 1) if each.dim() == 3 or _is_channels_last(each, pictures) else each
        for each in tensors_in(output)
        if _has_positions(each, pictures)
    ]


def shows(output: object, pictures: Tensor) -> bool:
    """Return whether an output is, or holds at any depth, a map or tokens of the picture."""
    return any(_is_map(each, pictures) for each in tensors_in(output))


def tensors_in(output: object) -> list[Tensor]:
    """Return all tensors in an output, at any depth."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for value in _values(output) for tensor in tensors_in(value)]


def _is_map(value: Tensor, pictures: Tensor) -> bool:
    """Return whether a tensor shows where in the picture something is, and is not the (normalised) picture itself."""
    return _has_positions(value, pictures) and value.shape != pictures.shape


def _has_positions(value: Tensor, pictures: Tensor) -> bool:
    if not value.is_floating_point() or not value.dim() or len(value) != len(pictures):
        return False
    if value.dim() == 3:
        return pictures.dim() == 4 and value.shape[2] > 1 and _tokens_to_maps(value, pictures) is not None
    if value.dim() != pictures.dim():
        return False
    spatial = value.shape[1:-1] if _is_channels_last(value, pictures) else value.shape[2:]
    return spatial[-2:].numel() > 1


def _tokens_to_maps(tokens: Tensor, pictures: Tensor) -> TokensToMaps | None:
    """Return how batch x tokens x channels becomes maps of the picture; None if the tokens form no grid.

    The grid has the picture's proportions and as few other tokens before it as possible. A patch is a whole number of
    pixels high and wide, and no larger than any network's, as a detector's queries may be a square number too.
    """
    height, width = pictures.shape[-2:]
    for prefix in range(min(_MOST_PREFIX_TOKENS, tokens.shape[1] // 3) + 1):
        patches = tokens.shape[1] - prefix
        rows = isqrt(patches * height // width)
        if patches < 2 or not rows or rows * rows * width != patches * height:
            continue
        if not height % rows and not width % (patches // rows) and height // rows <= _LARGEST_PATCH:
            return TokensToMaps(prefix, height / width)
    return None


def _is_channels_last(output: Tensor, pictures: Tensor) -> bool:
    """Return whether the two axes before the last, as in Swin, have the picture's proportions, and the last two not."""
    height, width = pictures.shape[-2:]
    first, second, third = output.shape[-3:]
    return first * width == second * height and second * width != third * height


def _maps_in(output: object) -> list[Tensor]:
    tensors = [value for value in _values(output) if isinstance(value, Tensor) and value.dim() in (4, 5)]
    return [tensor for tensor in tensors if tensor.shape[2:].numel() > 1]


def _values(output: object) -> list[object]:
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, (list, tuple)) else []
