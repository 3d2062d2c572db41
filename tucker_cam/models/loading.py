"""Turns a model's name into a `LoadedModel`, which is ready to be explained: weights, preprocessing, target layers."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from tucker_cam.activations import ReshapeTransform
from tucker_cam.arguments import check_parameters
from tucker_cam.errors import BadTypeError, BadValueError
from tucker_cam.models.checkpoints import load_checkpoint
from tucker_cam.models.families import build_network, family_of
from tucker_cam.models.layers import DryRun, SpatialLayer, choose_layers, common_transform, dry_run
from tucker_cam.models.network import Network, Preprocessing, colours_of, imagenet_preprocessing, preprocessed
from tucker_cam.seeding import seeded
from tucker_cam.text import kind_and_line, one_line

_COLOUR = 0.05
"""How far a normalised colour may be off, as resizing and processors round."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LoadedModel(Network):
    """A network in eval mode, with everything that is needed to explain it.

    Attributes:
        name: a short name of the model and its weights.
        description: one line that also says which layers were chosen and what was loaded from a checkpoint.
        layers: the target layers.
        spatial_layers: all layers with a spatial map, in the order in which they run.
        last_layer: the last spatial layer before the head, even if other layers were asked for.
    """

    name: str
    description: str
    layers: list[SpatialLayer]
    spatial_layers: list[SpatialLayer]
    last_layer: SpatialLayer

    def __repr__(self) -> str:
        return f"<LoadedModel: {self.description}>"

    @property
    def target_layers(self) -> list[nn.Module]:
        """The modules to explain, for any CAM class of the host."""
        return [layer.module for layer in self.layers]

    @property
    def layer_names(self) -> list[str]:
        """Dotted names of the target layers."""
        return [layer.name for layer in self.layers]

    @property
    def reshape_transform(self) -> ReshapeTransform | None:
        """The transform that turns the target layers' outputs into maps; None if they already are maps."""
        return common_transform(self.layers)

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """The `Preprocessing` as a dictionary fit for JSON; None for ImageNet's usual one and for other callables."""
        own = self.preprocess
        if not isinstance(own, Preprocessing) or own == imagenet_preprocessing:
            return None
        return asdict(own) | {"mean": [*own.mean], "std": [*own.std]}

    def digest(self) -> str:
        """Return a short hash of the weights, the layers' shapes, and what a preprocessing of another class does.

        It tells apart two models with the same name.
        """
        digest = hashlib.sha256(str([layer.shape for layer in self.spatial_layers]).encode())
        for network_input in _tries(self, 1):
            # Means hide the last bits, which differ between machines; means of squares still show the interpolation.
            means = adaptive_avg_pool2d(network_input.double().square().flatten(0, -3), 4).round(decimals=2)
            digest.update(str([network_input.shape, means.tolist()]).encode())
        for value in self.model.state_dict().values():
            if isinstance(value, Tensor):
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]


class Loading(TypedDict, total=False):
    """The arguments that `load_model` takes besides the model."""

    weights: str | Path | None
    pretrained: bool
    layers: Sequence[str | int | nn.Module]
    device: str | torch.device | None
    size: int | None
    crop: bool
    mean: Sequence[float] | None
    std: Sequence[float] | None


def load_model(
    model: str | nn.Module | Network,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    layers: Sequence[str | int | nn.Module] = (),
    device: str | torch.device | None = None,
    size: int | None = None,
    crop: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> LoadedModel:
    """Load a model by its name, or take one that you pass, and find the layer to explain.

    Args:
        model: a name: ``demo`` (an EfficientNet-Lite0 whose weights are an installed package), ``timm:NAME``,
            ``torchvision:NAME``, ``hf:REPOSITORY_OR_FOLDER`` (without its head), ``hub:OWNER/REPOSITORY:ENTRY`` or
            ``hub:FOLDER:ENTRY`` (torch.hub, which runs the repository's code), or ``MODULE:CALLABLE``: your own
            function without arguments, also from the working directory. It returns a `torch.nn.Module`, for which
            ImageNet's usual preprocessing is assumed, or a `Network`. Or pass such an object itself, which is put into
            eval mode. A `LoadedModel` is returned as it is if you ask for nothing else.
        weights: a checkpoint as self-supervised projects publish it, a file of ``torch.save`` or ``.safetensors``. Its
            backbone is found, and loaded into the module in place. No code in the file is run.
        pretrained: whether to download the published weights. Without them the weights are random, but the same every
            time. ``demo`` and your own models have none to download, and accept False only together with `weights`.
        layers: the layers to explain, as dotted names, modules, or negative indices into all layers with a spatial map
            (-1 is the last). By default, the layer that `find_target_layer` finds.
        device: where to run the model. By default, a CUDA device if there is one; an object that you pass is not moved.
        size: side of the network's input in pixels. A larger one gives a finer map, if the network accepts it. `size`,
            `crop`, `mean` and `std` replace the preprocessing by a `Preprocessing`, which resizes in its own way; those
            that you do not give keep the model's values. A video network accepts none of the four.
        crop: False squeezes the whole picture into a square instead of cutting out its middle.
        mean: of each channel, in [0, 1].
        std: of each channel.

    Raises:
        NoLayerError: no layer can be chosen. It is a ValueError, and holds the layers that you can name instead.
        ValueError: the model or a layer does not exist, several layers need different reshape transforms, the file does
            not hold the whole backbone of this model, or the network does not accept a picture of this size.
        ModuleNotFoundError: a package is missing; the message holds the command that installs it.
        TypeError: the object that you pass, or that your own function returns, is not a model.
        OSError: the weights could not be downloaded or read.

    Example:
        >>> load_model("torchvision:resnet18", pretrained=False).layer_names
        ['layer4']
    """
    if not isinstance(weights, (str, PathLike, NoneType)):
        raise BadTypeError(
            f"expected weights as the path of a file, got {type(weights).__name__}: load a state dict into the "
            "module, and pass that as the model"
        )
    layers = [layers] if isinstance(layers, (str, int, nn.Module)) else layers
    if isinstance(model, LoadedModel):
        if pretrained and crop and not layers and all(each is None for each in (weights, device, size, mean, std)):
            model.model.eval()
            return model
        layers = layers or model.target_layers
    spec, network = _network_of(model, pretrained=pretrained and weights is None)
    if not pretrained and weights is None and not (isinstance(model, str) and family_of(spec).random):
        raise BadValueError(f"{spec}: expected a model of a library or hub for random weights, and it brings its own")
    network = _with_preprocessing(spec, network, size, crop, mean, std)
    tries = _tries(network, 4) if network.takes is None else []
    if not all(torch.equal(each, tries[0]) for each in tries):
        # It would be unknown which part of a picture a map shows.
        raise BadValueError(
            f"{spec}: expected a preprocessing that makes the same of a picture each time, and it does not: give the "
            "one for evaluation, without random crops and flips"
        )
    module = network.model.eval()
    check_parameters(module, f"{spec}: ")
    run = _dry_run(spec, network)
    chosen = choose_layers(module, run, layers)
    common_transform(chosen)
    if device is None and isinstance(model, str) and torch.cuda.is_available():
        device = "cuda"
    try:
        if device is not None:
            module.to(device)
    except Exception as error:
        # Each backend that is missing raises its own kind of error.
        raise BadValueError(f"the model cannot run on {str(device)!r} ({one_line(error)}): use cpu") from error
    name, report = spec, ""
    if weights is not None:
        file = Path(weights)
        explained = {layer.name for layer in (*chosen, run.target) if layer is not None}
        loaded = load_checkpoint(module, file, frozenset().union(*(run.upstream[name] for name in explained)))
        name, report = f"{spec} with {file.name}", f"; {file.name}: {loaded}"
        # A head that the file lacks is random.
        network = replace(network, classifies=network.classifies and not loaded.missing)
    elif not pretrained:
        name = f"{spec} with random weights"
    shown = ", ".join(f"{layer.name} {'x'.join(map(str, layer.shape[1:]))}" for layer in chosen)
    return LoadedModel(
        **{field.name: getattr(network, field.name) for field in fields(Network)},
        name=name,
        description=f"model: {name}; layer: {shown}{report}",
        layers=chosen,
        spatial_layers=run.layers,
        last_layer=run.target or chosen[-1],
    )


def that_takes(model: str | nn.Module | Network, example: Tensor | None) -> str | nn.Module | Network:
    """Return a module or network with `takes` set to `example`, if it has none; return anything else as it is."""
    if example is None or isinstance(model, LoadedModel) or not isinstance(model, (nn.Module, Network)):
        return model
    network = model if isinstance(model, Network) else Network(model)
    # A copy, so that the batch that the example was taken from can be freed.
    return network if network.takes is not None else replace(network, takes=example.detach().clone())


def _network_of(model: object, *, pretrained: bool) -> tuple[str, Network]:
    """Return a model's name for messages, and the network."""
    if isinstance(model, str):
        # Random weights are the same when a run is resumed, and in every process. A user's function does not run alone,
        # as it may load models in threads.
        with seeded(alone=family_of(model).random):
            return model, build_network(model, pretrained=pretrained)
    if not isinstance(model, (nn.Module, Network)):
        raise BadTypeError(f"expected a model's name, a torch.nn.Module or a Network, got {type(model).__name__}")
    network = model if isinstance(model, Network) else Network(model)
    return network.name if isinstance(network, LoadedModel) else type(network.model).__name__, network


def _with_preprocessing(
    spec: str, network: Network, size: int | None, crop: bool, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Network:
    only_crop = size is None and mean is None and std is None
    if only_crop and crop:
        return network
    if network.frames is not None:
        raise BadValueError(f"{spec}: expected no size, crop, mean or std, as it takes {network.frames} frames at once")
    own = network.preprocess
    base = own if isinstance(own, Preprocessing) else Preprocessing(network.example().shape[-1], _crops(own))
    if only_crop and not base.crop:
        return network
    if base is not own and (mean is None or std is None) and not _same_colours(own, network.mean, network.std):
        raise BadValueError(
            f"{spec}: its preprocessing does more to the colours than to normalise them by {network.mean} and "
            f"{network.std}, so it cannot be replaced: give a Network with a preprocessing of your own"
        )
    preprocess = replace(
        base,
        size=base.size if size is None else size,
        crop=crop and base.crop,
        mean=network.mean if mean is None else mean,
        std=network.std if std is None else std,
    )
    return replace(network, preprocess=preprocess, mean=preprocess.mean, std=preprocess.std)


def _tries(network: Network, number: int) -> list[Tensor]:
    """Return the input for coloured squares with noise, made `number` times; none for `Preprocessing` or on failure."""
    if isinstance(network.preprocess, Preprocessing):
        return []
    from PIL import Image

    draw = np.random.default_rng(0)
    squares = draw.integers(128, size=(8, 10, 3)).repeat(37, axis=0).repeat(37, axis=1)
    picture = Image.fromarray((squares + draw.integers(128, size=squares.shape)).astype(np.uint8))
    # A preprocessing may accept only the pictures that it is made for.
    with suppress(BadValueError, BadTypeError), seeded():
        tries = [network.made_of(picture, "a picture").nan_to_num() for _ in range(number)]
        return tries if tries[0].dim() > 2 else []
    return []


def _same_colours(preprocess: Callable[[Any], Tensor], mean: Sequence[float], std: Sequence[float]) -> bool:
    """Return whether a preprocessing changes a colour as this mean and deviation do; one for BGR does not."""
    own, usual = (torch.column_stack(colours_of(each)) for each in (preprocess, Preprocessing(mean=mean, std=std)))
    return own.shape == usual.shape and bool(((own - usual).abs() < _COLOUR).all())


def _crops(preprocess: Callable[[Any], Tensor]) -> bool:
    """Return whether a preprocessing cuts off the edge of a wide picture."""
    from PIL import Image

    picture = Image.new("RGB", (512, 256))
    without = preprocessed(preprocess, picture, "a black picture")
    picture.paste((255, 255, 255), (0, 0, 32, 256))
    return torch.equal(preprocessed(preprocess, picture, "a picture with a white edge"), without)


def _dry_run(spec: str, network: Network) -> DryRun:
    example = network.example()
    try:
        return dry_run(network.model, example)
    except Exception as error:
        # A model that takes something else (text, several pictures, another size) can raise any error.
        size = "x".join(map(str, example.shape[1:]))
        raise BadValueError(
            f"{spec}: expected a network that takes one picture of {size}, and it failed on it ({kind_and_line(error)})"
        ) from error
