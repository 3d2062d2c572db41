"""Tells maps from queries: in a map, the output changes in the corner in which two pictures differ."""

from typing import Any

import torch
from torch import Tensor

from tucker_cam.activations import ReshapeTransform
from tucker_cam.models.reshape import TokensToMaps

_FOLLOWS = 0.3
"""In about a hundred networks with random weights, the last maps had 0.4 to 0.65 and queries at most 0.16. Now and then
a network is below because its random attention drowns the positions (torchvision's MaxViT): it gets no layer."""
_BLANK, _VANISHED = 5e-7, 1e-18
"""The first is relative to the largest value; the square of the second is near the smallest normal float32."""


def differing_pictures(example: Tensor) -> Tensor:
    """Return three pictures like the example: noise, and two copies with other noise upper right or lower left.

    Everything else that a network might react to, such as the mean, stays the same. The two changed quarters are not on
    the diagonal, where a matrix of queries and keys would answer to either of them.
    """
    drawn = torch.rand(2, *example.shape[1:], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    noise, other = (drawn if example.is_floating_point() else 255 * drawn).to(example)
    height, width = example.shape[-2:]
    upper_right, lower_left = noise.clone(), noise.clone()
    upper_right[..., : height // 2, width - width // 2 :] = other[..., : height // 2, width - width // 2 :]
    lower_left[..., height - height // 2 :, : width // 2] = other[..., height - height // 2 :, : width // 2]
    return torch.stack([noise, upper_right, lower_left])


def follows(output: Any, transform: ReshapeTransform | None) -> bool | None:
    """Return whether a layer's maps of the `differing_pictures` change where these pictures do.

    At each position, the answers to the two changed corners are compared. In a map the upper right corner wins more
    and more towards the upper right, as in the picture; queries answer in an order of their own. Maps that are the
    same everywhere, as random weights can make them, give None: nothing in them is in a wrong place.
    """
    maps = output if transform is None else transform(output)
    noise = maps[0].float().flatten(1)
    largest, spread = noise.abs().max(), (noise - noise.mean(1, keepdim=True)).abs().max()
    if largest < _VANISHED or spread <= _BLANK * largest:
        return None
    place = _place(maps)
    if not isinstance(transform, TokensToMaps):
        return place >= _FOLLOWS
    # Tokens after the patches, as a detector has them, must not be taken for tokens before them.
    tokens = output if isinstance(output, Tensor) else output[0]
    lay_out, patches = TokensToMaps(0, transform.aspect), tokens.shape[1] - transform.prefix
    places = [_place(lay_out(tokens[:, start : start + patches])) for start in range(transform.prefix)]
    return place >= max([_FOLLOWS, *places])


def _place(maps: Tensor) -> float:
    """Return the smaller of two correlations: of the maps' answers with "up" and with "right"."""
    maps = maps.float()
    changes = maps[1:] - maps[:1]
    first, second = (changes / changes.abs().max().clamp(min=_VANISHED)).square().sum(1)
    height, width = maps.shape[-2:]
    answers = ((first - second) / (first + second + 1e-6)).reshape(-1, height, width).mean(0)
    sides = [torch.linspace(-1, 1, size, device=answers.device) for size in (height, width)]
    up, right = torch.meshgrid(-sides[0], sides[1], indexing="ij")
    axes = [axis for axis, size in ((up, height), (right, width)) if size > 1]
    found = [torch.corrcoef(torch.stack([answers.flatten(), axis.flatten()]))[0, 1] for axis in axes]
    return min(float(each.nan_to_num(0)) for each in found)
