"""Pictures that differ in one corner in, whether a layer's output answers in that corner out: positions, not queries.

Outputs are kept as sketches, random mixtures of their channels: small enough to hold those of a whole network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from tucker_cam.activations import ReshapeTransform
from tucker_cam.models.reshape import TokensToMaps, has_positions, maps_of, tensors_in

_FEWEST_MIXTURES, _MOST_MIXTURES, _SKETCH = 4, 64, 2**15
"""The fewer the positions, the less noise may each have: of so many numbers in all, and 8 mixtures lose a 7 x 7 map."""
_FOLLOWS = 0.3
"""Of some hundred networks with random weights, the last maps had 0.4 to 0.65, queries at most 0.16. Below it falls now
and then a network whose random attention drowns the positions (torchvision's MaxViT): it gets no layer."""
_BLANK, _VANISHED = 5e-7, 1e-18
"""Of the largest value, and the value whose square is no float32 any more."""
_EQUAL = 1e-4
"""What is done twice in float32 differs by less, of the largest value."""


class Sketch(NamedTuple):
    """What is kept of a map or of tokens.

    Attributes:
        values: batch x mixtures x spatial, or batch x mixtures x tokens.
        channels: how many were mixed.
    """

    values: Tensor
    channels: int


def with_other_corners(example: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return noise of the example's shape, and it with other noise in its upper right and in its lower left quarter.

    Everything else that a network might look at, such as the mean, stays what it is. The quarters are not on the
    diagonal, where a matrix of queries and keys answers to each of them.
    """
    noise, other = torch.rand(2, *example.shape, generator=torch.Generator().manual_seed(0)).to(example)
    height, width = example.shape[-2:]
    upper_right, lower_left = noise.clone(), noise.clone()
    upper_right[..., : height // 2, width - width // 2 :] = other[..., : height // 2, width - width // 2 :]
    lower_left[..., height - height // 2 :, : width // 2] = other[..., height - height // 2 :, : width // 2]
    return noise, upper_right, lower_left


def sketches(output: object, picture: Tensor) -> list[Sketch]:
    """Return a sketch of all that has positions in an output, at any depth."""
    return [_sketch(maps_of(each, picture)) for each in tensors_in(output) if has_positions(each, picture)]


def _sketch(maps: Tensor) -> Sketch:
    channels = maps.shape[1]
    count = min(max(_SKETCH // maps[0, 0].numel(), _FEWEST_MIXTURES), _MOST_MIXTURES)
    mixtures = _mixtures(channels)[:count].to(maps.device)
    return Sketch(torch.einsum("mc,bc...->bm...", mixtures, maps.float()), channels)


@lru_cache(maxsize=64)
def _mixtures(channels: int) -> Tensor:
    return torch.randn(_MOST_MIXTURES, channels, generator=torch.Generator().manual_seed(0))


def same(part: Sketch, whole: Sketch) -> bool:
    """Tell whether these are of the same values, the first perhaps enlarged to the second by interpolation."""
    count = min(part.values.shape[1], whole.values.shape[1])
    first, second = part.values[:, :count], whole.values[:, :count]
    if part.channels != whole.channels or first.dim() != second.dim() or first.numel() > second.numel():
        return False
    sizes = [first]
    if first.shape != second.shape:
        if first.dim() == 3:
            return False
        mode, size = "bilinear" if first.dim() == 4 else "trilinear", second.shape[2:]
        sizes = [interpolate(first, size, mode=mode, align_corners=corners) for corners in (False, True)]
    largest = float(second.abs().max())
    return any(bool(torch.allclose(each, second, rtol=0, atol=_EQUAL * largest)) for each in sizes)


def changes(before: Sequence[Sketch], *after: Sequence[Sketch]) -> bool:
    """Tell whether a layer puts out something else for another picture."""
    return any(
        not torch.equal(first.values, other.values) for run in after for first, other in zip(before, run, strict=True)
    )


def follows(
    transform: ReshapeTransform | None,
    before: Sequence[Sketch],
    upper_right: Sequence[Sketch],
    lower_left: Sequence[Sketch],
) -> bool:
    """Tell whether a layer's maps change where the picture does.

    Of each position it is asked to which of the two corners it answers more: in a map that goes up and to the right,
    as in the picture, whereas queries answer in an order of their own. Maps that are the same everywhere, as random
    weights can have it, are believed: there is nothing in them to show in a wrong place.

    Args:
        transform: of the layer's output.
        before: the layer's sketches for the noise.
        upper_right: for the noise whose upper right was changed.
        lower_left: for the noise whose lower left was changed.
    """
    tokens = isinstance(transform, TokensToMaps)
    kept = [
        [each.values for each in run if tokens or each.values.dim() > 3] for run in (before, upper_right, lower_left)
    ]
    # Of a pyramid, the level with the most positions: the others are too few to be sure.
    largest = [max(run, key=lambda values: values[0, 0].numel(), default=torch.empty(0)) for run in kept]
    if len({values.shape for values in largest}) > 1:
        return False
    return _follows(transform, *largest)


def _follows(transform: ReshapeTransform | None, before: Tensor, upper_right: Tensor, lower_left: Tensor) -> bool:
    values = (before[..., transform.prefix :] if isinstance(transform, TokensToMaps) else before).flatten(2)
    largest, spread = values.abs().max(), (values - values.mean(-1, keepdim=True)).abs().max()
    if largest < _VANISHED or spread <= _BLANK * largest:
        return True
    changes = torch.stack([upper_right - before, lower_left - before])
    first, second = (changes / changes.abs().max().clamp(min=_VANISHED)).square().flatten(1, 2).sum(1)
    answers = (first - second) / (first + second + 1e-6)
    if not isinstance(transform, TokensToMaps):
        return _place(answers.flatten(0, -3).mean(0) if answers.dim() > 2 else answers) >= _FOLLOWS
    # Tokens after the patches, as a detector has them, must not be taken for tokens before them.
    lay_out, patches = TokensToMaps(0, transform.aspect), len(answers) - transform.prefix
    places = [
        _place(lay_out(answers[None, start : start + patches, None])[0, 0]) for start in range(transform.prefix + 1)
    ]
    return places[-1] == max(places) and places[-1] >= _FOLLOWS


def _place(answers: Tensor) -> float:
    """Return the correlation of height x width answers with up and with right, the smaller one."""
    height, width = answers.shape
    up, right = torch.meshgrid(torch.linspace(1, -1, height), torch.linspace(-1, 1, width), indexing="ij")
    axes = [axis.to(answers) for axis, size in ((up, height), (right, width)) if size > 1]
    found = [torch.corrcoef(torch.stack([answers.flatten(), axis.flatten()]))[0, 1] for axis in axes]
    return min(float(each.nan_to_num(0)) for each in found)
