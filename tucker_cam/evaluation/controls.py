"""Maps that know nothing of the picture and are in every table: a method that is no better explains nothing."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from pytorch_grad_cam.utils.image import scale_cam_image
from torch import Tensor

CONTROLS = ("random", "uniform", "centre-gaussian")


def control_maps(name: str, *, pictures: Sequence[str], size: tuple[int, int], resolution: tuple[int, int]) -> Tensor:
    """Return the maps of a control for pictures of these names, float32 in [0, 1], batch x height x width.

    ``random`` is uniform noise at the resolution of the layer's features, scaled as the host scales its maps; it is
    seeded by the picture's name, so that it is the same in every run. ``uniform`` is 0.5 everywhere.
    ``centre-gaussian`` has a standard deviation of a quarter of each side.

    Example:
        >>> control_maps("uniform", pictures=["cat.jpg"], size=(1, 3), resolution=(1, 1))
        tensor([[[0.5000, 0.5000, 0.5000]]])
    """
    if name == "random":
        seeds = [zlib.crc32(each.encode(errors="surrogateescape")) for each in pictures]
        noise = np.stack([np.random.default_rng(seed).random(resolution, np.float32) for seed in seeds])
        return torch.from_numpy(scale_cam_image(noise, size[::-1]))
    if name == "uniform":
        return torch.full((len(pictures), *size), 0.5)
    rows, columns = (torch.exp(-0.5 * (torch.linspace(-0.5, 0.5, side) / 0.25) ** 2) for side in size)
    return (rows[:, None] * columns).expand(len(pictures), *size).contiguous()
