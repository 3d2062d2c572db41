"""Describes a network and its preprocessing: what a model's name becomes, and what your ``MODULE:CALLABLE`` returns.

PyTorch is imported only when something is computed, so that the names of models can be listed without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from tucker_cam.errors import BadTypeError, BadValueError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_CROPPED = 0.875


@dataclass(frozen=True)
class Preprocessing:
    """Turns an RGB picture into a network's input, channels x height x width.

    Attributes:
        size: side of the square input, in pixels.
        crop: whether to resize the shorter side to ``size / 0.875`` and cut out the middle, as most ImageNet networks
            do. If False, the whole picture is squeezed into the square.
        mean: of each channel, in [0, 1].
        std: of each channel, above 0 and at most 1.
        interpolation: how the picture is resized; always with antialiasing.

    Raises:
        ValueError: the size is not a whole number above 0, or mean or std is not three numbers in its range.
    """

    size: int = 224
    crop: bool = True
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        if not (isinstance(self.size, Integral) and self.size > 0):
            raise BadValueError(f"expected a size of at least one pixel, a whole number, got {self.size!r}")
        mean: tuple[float, ...] = ()
        std: tuple[float, ...] = ()
        with suppress(TypeError, ValueError):
            mean, std = (tuple(map(float, each)) for each in (self.mean, self.std))
        in_range = all(0 <= value <= 1 for value in (*mean, *std)) and 0 not in std
        if not (len(mean) == len(std) == 3 and in_range):
            raise BadValueError(
                f"expected mean and std of three numbers in [0, 1], std above 0, got {self.mean} and {self.std}"
            )
        # All kinds of numbers become Python's own, because they are written as JSON.
        for name, value in {"size": int(self.size), "mean": mean, "std": std}.items():
            object.__setattr__(self, name, value)

    def __call__(self, picture: Image.Image) -> Tensor:
        """Resize, crop and normalise a picture."""
        from torchvision.transforms import InterpolationMode, functional

        size = round(self.size / _CROPPED) if self.crop else [self.size, self.size]
        resized = functional.resize(picture, size, InterpolationMode(self.interpolation))
        if self.crop:
            resized = functional.center_crop(resized, self.size)
        normalised: Tensor = functional.normalize(functional.to_tensor(resized).float(), self.mean, self.std)
        return normalised


imagenet_preprocessing = Preprocessing(interpolation="bilinear")


@dataclass(frozen=True)
class Network:
    """A network and its preprocessing.

    Attributes:
        model: the network.
        preprocess: turns an RGB picture, or a list of them for a video network, into the network's input, channels x
            height x width or channels x time x height x width.
        mean: of each channel, in [0, 1]; `preprocess` subtracts it.
        std: of each channel; `preprocess` then divides by it.
        classifies: whether the model returns logits, batch x classes.
        frames: how many pictures a video network takes; None for other networks.
        takes: a batch of one input with which the layers are found, for a network that takes, for example, one channel,
            small inputs or half precision. None if they are found with what `preprocess` makes of a picture.
    """

    model: nn.Module
    preprocess: Callable[[Any], Tensor] = imagenet_preprocessing
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    classifies: bool = False
    frames: int | None = None
    takes: Tensor | None = field(default=None, compare=False)

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        import torch

        return next(self.model.parameters(), torch.empty(0)).device

    def placed(self, inputs: Tensor) -> Tensor:
        """Return inputs on the model's device, and floating point ones in the precision of its weights."""
        weights = next((each for each in self.model.parameters() if each.is_floating_point()), inputs)
        return inputs.to(self.device, weights.dtype if inputs.is_floating_point() else None)

    def picture(self, network_input: Tensor) -> NDArray[np.float32]:
        """Return what the network saw, (time x) height x width x 3, in [0, 1]; an input of one channel becomes grey.

        ValueError if the input has neither one nor three channels.
        """
        import torch

        seen = network_input.detach().cpu().movedim(0, -1)
        mean, std = (torch.tensor(each, dtype=torch.float32, device="cpu") for each in (self.mean, self.std))
        if seen.shape[-1] not in (1, 3):
            raise BadValueError(
                f"expected a network input of one or three channels to draw, got {seen.shape[-1]}: take the maps, or "
                "the format npy"
            )
        if seen.shape[-1] == 1:
            mean, std = mean.mean(), std.mean()
        colours = (seen * std + mean).clamp(0, 1).expand(*seen.shape[:-1], 3)
        picture: NDArray[np.float32] = (colours.flip(-1) if self._exchanges_colours else colours).numpy()
        return picture

    @cached_property
    def _exchanges_colours(self) -> bool:
        """Whether the preprocessing turns red, green, blue into blue, green, red."""
        with suppress(BadValueError, BadTypeError):
            matrix, _ = colours_of(self.preprocess, self.frames)
            redder = (matrix[:, 0] - matrix[:, 2]) / matrix.sum(1)
            return bool(redder[-1] > 0 > redder[0])
        return False

    def example(self) -> Tensor:
        """Return `takes`, or the input made from a grey picture, as a batch of one on the model's device.

        ValueError if the preprocessing fails.
        """
        from PIL import Image

        if self.takes is not None:
            return self.placed(self.takes)
        grey = Image.new("RGB", (256, 256), (127, 127, 127))
        return self.placed(self.made_of(grey, "a grey picture")[None])

    def made_of(self, picture: Image.Image, name: str) -> Tensor:
        """Return the input for a picture, or for a clip that shows nothing else; raise the errors of `preprocessed`."""
        return preprocessed(self.preprocess, picture if self.frames is None else [picture] * self.frames, name)


def colours_of(preprocess: Callable[[Any], Tensor], frames: int | None = None) -> tuple[Tensor, Tensor]:
    """Find what a preprocessing makes of colours in [0, 1], by plain pictures; the errors are those of `preprocessed`.

    Returns:
        The matrix, channels x 3, and the offset of each channel, float64: the input is ``matrix @ colour + offset``.
    """
    import torch
    from PIL import Image

    # A fifth of white, and that with one colour at four fifths. None is black, which a preprocessing may cut off.
    levels = ((51, 51, 51), (204, 51, 51), (51, 204, 51), (51, 51, 204))
    plain = (Image.new("RGB", (256, 256), level) for level in levels)
    sent = [preprocessed(preprocess, each if frames is None else [each] * frames, "a plain picture") for each in plain]
    grey, *colours = (torch.atleast_2d(each.detach().cpu().double().nan_to_num()).flatten(1) for each in sent)
    changes = (torch.stack(colours, dim=-1) - grey[..., None]) / 0.6
    strengths = changes.abs().sum((0, 2))
    # What does not change is padding. At its edges interpolation overshoots, so the median place is taken.
    inside = strengths >= strengths.max() / 2
    matrix = changes[:, inside].median(1).values
    return matrix, grey[:, inside].median(1).values - 0.2 * matrix.sum(1)


def preprocessed(preprocess: Callable[[Any], Tensor], picture: object, name: str) -> Tensor:
    """Return the network's input for a picture.

    Raises:
        ValueError: the preprocessing failed with an error of any kind; the other pictures can still be processed.
        TypeError: the preprocessing did not return a tensor.
    """
    from torch import Tensor

    try:
        found = preprocess(picture)
    except Exception as error:
        raise BadValueError(f"{name}: its preprocessing failed ({type(error).__name__}: {error})") from error
    if not isinstance(found, Tensor):
        raise BadTypeError(f"{name}: expected a torch.Tensor from its preprocessing, got {type(found).__name__}")
    return found
