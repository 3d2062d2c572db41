"""Pictures that differ in a corner in, whether a layer's output answers in that corner out: positions, not queries."""

from typing import Any

import torch
from torch import Tensor

from tucker_cam.activations import ReshapeTransform
from tucker_cam.models.reshape import TokensToMaps

_FOLLOWS = 0.3
"""Of some hundred networks with random weights, the last maps had 0.4 to 0.65, queries at most 0.16. Below it falls now
and then a network whose random attention drowns the positions (torchvision's MaxViT): it gets no layer."""
_BLANK, _VANISHED = 5e-7, 1e-18
"""Of the largest value, and the value whose square is no float32 any more."""


def differing_pictures(example: Tensor) -> Tensor:
    """Return noise of the example's shape, and it with other noise in its upper right and in its lower left quarter.

    Everything else that a network might look at, such as the mean, stays what it is. The quarters are not on the
    diagonal, where a matrix of queries and keys answers to each of them.
    """
    drawn = torch.rand(2, *example.shape[1:], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    noise, other = (drawn if example.is_floating_point() else 255 * drawn).to(example)
    height, width = example.shape[-2:]
    upper_right, lower_left = noise.clone(), noise.clone()
    upper_right[..., : height // 2, width - width // 2 :] = other[..., : height // 2, width - width // 2 :]
    lower_left[..., height - height // 2 :, : width // 2] = other[..., height - height // 2 :, : width // 2]
    return torch.stack([noise, upper_right, lower_left])


def follows(output: Any, transform: ReshapeTransform | None) -> bool | None:
    """Tell whether a layer's maps, for the `differing_pictures`, change where these do.

    Of each position it is asked to which of the two corners it answers more: in a map that goes up and to the right,
    as in the picture, whereas queries answer in an order of their own. None is for maps that are the same everywhere,
    as random weights can have it: nothing in them is in a wrong place.
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
    """Return the correlation of the maps' answers with up and with right, the smaller one."""
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
