"""Tells whether a layer's feature maps of several pictures show where the pictures end, not what is in them.

A convolution sees padding at the border. If the padding causes the strongest features, TSM's largest values lie along
the border of every picture, and its map marks the background. No sign rule can detect this.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tucker_cam.decomposition.projection import leading_map

logger = logging.getLogger("tucker_cam")
_FEWEST, _MOST = 8, 64
_SIDES = 3
"""An object at the border or in a corner makes only one or two sides bright."""
_USUAL = 0.6
"""The share of pictures from which a layer is an artefact. On 50 of ECSSD's first half it was 0.94 at AugNet's
`layer3`, which shows the background, 0.18 at its `layer4`, and 0.00 at the last layer of EfficientNet-Lite0."""


class BorderStatistics(NamedTuple):
    """Where maps are strong, with one value for each map of a batch; the ring is a map's outermost cells.

    `maximum`: the share of the largest values that lie on the ring. `chance`: the same by chance, one value for all
    maps. `brighter`: whether the ring is brighter on average than the cells inside. `around`: whether at least three of
    its four sides are brighter.
    """

    maximum: Tensor
    chance: float
    brighter: Tensor
    around: Tensor


def border_statistics(maps: Tensor) -> BorderStatistics:
    """Return where maps, batch x height x width and at least 3 x 3 cells each, are strong.

    Example:
        >>> ring = torch.ones(1, 4, 4)
        >>> ring[:, 1:3, 1:3] = 0
        >>> border_statistics(ring)
        BorderStatistics(maximum=tensor([1.]), chance=0.75, brighter=tensor([True]), around=tensor([True]))
    """
    ring = torch.ones(maps.shape[1:], dtype=torch.bool, device=maps.device)
    ring[1:-1, 1:-1] = False
    maxima = (maps == maps.amax((1, 2), keepdim=True)).float()
    inside = maps[:, ~ring].mean(1)
    # Without the corners, which belong to two sides.
    sides = (maps[:, 0, 1:-1], maps[:, -1, 1:-1], maps[:, 1:-1, 0], maps[:, 1:-1, -1])
    brighter_sides = torch.stack([side.mean(1) > inside for side in sides])
    return BorderStatistics(
        (maxima * ring).sum((1, 2)) / maxima.sum((1, 2)),
        ring.float().mean().item(),
        maps[:, ring].mean(1) > inside,
        brighter_sides.sum(0) >= _SIDES,
    )


class BorderCheck:
    """Looks at a layer's feature maps, batch by batch, and warns once if they show the borders of the pictures."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.statistics: list[BorderStatistics] = []
        self._said = False

    def look_at(self, maps: Tensor) -> None:
        """Add TSM's maps of a batch; those of clips, or with a side of 3 positions or fewer, are left out."""
        if _has_border(maps.shape[1:]):
            self.statistics.append(border_statistics(maps))

    @property
    def is_artefact(self) -> bool:
        """Whether most maps are strong all around the border, not at an object; False for fewer than eight pictures."""
        around = [bool(each) for of_batch in self.statistics for each in of_batch.around]
        return len(around) >= _FEWEST and sum(around) >= _USUAL * len(around)

    def warn_of(self, features: Tensor) -> None:
        """Add the features of a batch, until enough pictures are seen, and log one warning if they are an artefact."""
        seen = sum(len(each.around) for each in self.statistics)
        if self._said or seen >= _MOST or not _has_border(features.shape[2:]):
            return
        self.look_at(leading_map(features))
        if self.is_artefact:
            self._said = True
            logger.warning(
                f"note: at {self.layer} the features are strongest all along the border of most pictures, as padding "
                "makes them: maps may mark the background; tucker-cam layers MODEL PICTURES compares layers"
            )


def _has_border(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and min(shape) > 3
