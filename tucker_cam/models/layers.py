"""Finds the layer of a model to explain, by a dry run on an example input and not by guessing from names.

Three pictures that differ in their corners go through the model in one batch. If a module is called several times,
only its first call counts, as that is the call that is explained.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tucker_cam.activations import UNCOMPILED, ReshapeTransform
from tucker_cam.errors import BadValueError
from tucker_cam.models.reshape import positions_in, shows, spatial_output, tensors_in
from tucker_cam.models.responses import differing_pictures, follows

_LINEAR = (nn.Linear, _ConvNd)
_ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
_SQUARE = 224  # a side that most networks take
_EQUAL = 0.01
"""Relative to the largest value: enlarging a map changes its means over the positions by less than this."""


class SpatialLayer(NamedTuple):
    """A layer whose output shows where in the picture something is.

    Attributes:
        name: the dotted name of the module.
        module: the layer itself.
        shape: of the output for one picture; for a pyramid, that of its levels put together into one map.
        reshape_transform: turns the output into maps, batch x channels x spatial; None if the output already is a map.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    reshape_transform: ReshapeTransform | None


class DryRun(NamedTuple):
    """What a forward pass shows about a model."""

    # All layers whose maps follow the picture, in the order in which they finished.
    layers: list[SpatialLayer]
    # By name, these layers and those whose output has a map's shape but does not follow the picture.
    named: dict[str, SpatialLayer]
    # The last layer before the head; None if there is none, or if it does not follow the picture.
    target: SpatialLayer | None
    # For each module, the names of all modules that had begun when it finished: its maps can depend on these only.
    upstream: dict[str, frozenset[str]]


class _Call(NamedTuple):
    """A module's first call in the forward pass."""

    module: nn.Module
    # The names of all modules that had begun when this one finished.
    begun: frozenset[str]
    layer: SpatialLayer | None  # None if the output is no spatial map
    # Whether the output follows the picture; None if it is the same everywhere.
    follows: bool | None
    # A head turns maps into something else; queries are tokens that form no grid; names lead to maps in a mapping.
    role: Literal["head", "queries", "names", None]
    # The means over the positions, pictures x channels, of each map that the module took and put out.
    took: list[Tensor]
    put_out: list[Tensor]
    several: bool  # whether the module took several maps


class NoLayerError(BadValueError):
    """No layer of a model can be chosen automatically.

    Attributes:
        layers: the layers that you can name instead, in the order in which they run.
    """

    def __init__(self, model: str, layers: list[SpatialLayer]) -> None:
        last = ", ".join(f"`{layer.name}` {'x'.join(map(str, layer.shape[1:]))}" for layer in layers[-3:])
        super().__init__(
            f"expected a layer of {model} with feature maps (B, C, H, W) or a picture's tokens, found none at its end: "
            "give the layer's name, or use the Python classes with a reshape_transform"
            + (f". {len(layers)} can be named, up to {last}" if layers else "")
        )
        self.layers = layers


def find_target_layer(model: nn.Module, example: Tensor) -> SpatialLayer:
    """Return the last layer with a spatial map before the model's head.

    Feature maps, channels-last maps (Swin), tokens (ViT, with class and register tokens) and feature pyramids count if
    they follow the picture: change a corner of it, and the map changes there. A detector's queries do not follow it.

    Everything after a backbone that returns its maps by name is a head. So is each of these parts if it holds less than
    half of the model's weights: one that turns maps into numbers; a linear layer like the one for the classes; one that
    narrows its input and does not affect the output; and one that predicts the output, or a map whose mean is the
    output. A part counts as predicting if it ends in a linear layer that narrows its input, has an output of the
    picture's size, or takes several maps. A map of one channel weighs other maps, and an adaptive pooling resizes them:
    either is chosen only if there is no other layer.

    Args:
        model: runs in eval mode; its train and eval flags are restored afterwards.
        example: an input, batch x channels x (time x) height x width. The model is run on noise of its shape.

    Raises:
        NoLayerError: no layer was found. It is a ValueError, and holds the layers that you can name instead.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> find_target_layer(model, torch.zeros(1, 3, 8, 8))
        SpatialLayer(name='1', module=ReLU(), shape=(1, 8, 6, 6), reshape_transform=None)
    """
    (layer,) = choose_layers(model, dry_run(model, example), [])
    return layer


def dry_run(model: nn.Module, example: Tensor) -> DryRun:
    """Run the model in eval mode and without gradients, and record which layers put out spatial maps.

    Across a long or small input the maps hardly vary: if no layer is found on it, a square picture shows which ones
    follow it.
    """
    run = _run_once(model, example)
    if run.target is None and example.shape[-2:] != (_SQUARE, _SQUARE):
        # A network for one input size fails on another.
        with suppress(Exception):
            square = _run_once(model, example.new_zeros(*example.shape[:-2], _SQUARE, _SQUARE))
            if square.target is not None and square.target.name in run.named:
                layers = [run.named[layer.name] for layer in square.layers if layer.name in run.named]
                return run._replace(layers=layers, target=run.named[square.target.name])
    return run


def _run_once(model: nn.Module, example: Tensor) -> DryRun:
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        return _look_at(model, differing_pictures(example))
    finally:
        for module, flag in training.items():
            module.training = flag


def _look_at(model: nn.Module, pictures: Tensor) -> DryRun:
    calls, output = _observe(model, pictures)
    # A part that holds most of the weights is not a head, but a body with its head.
    most = _size(model) / 2
    small = {name for name, call in calls.items() if _size(call.module) < most}
    passing = _passing_on(small, calls, output, pictures)
    heads = {name for name in small if name in passing or calls[name].role == "head"} | _twins(small, calls)
    inside = tuple(f"{name}." for name in heads)
    path = list(calls.items())
    named = [index for index, (_, call) in enumerate(path) if call.role == "names"]
    body = [
        call
        for name, call in path[: named[-1] + 1 if named else None]
        if (call.layer or call.role == "queries") and name not in passing and not f"{name}.".startswith(inside)
    ]
    while len(body) > 1 and (last := body[-1].layer) and not last.reshape_transform:
        before = [call for call in body if not (call.layer and f"{call.layer.name}.".startswith(f"{last.name}."))]
        repeats = isinstance(last.module, _ADAPTIVE) and (body[-1].follows is None or _takes_from(body[-1], body[-2]))
        if last.shape[1] == 1 or repeats:
            # One channel weighs other maps, as attention does; an adaptive pooling brings all maps to one size.
            body.pop()
        elif last.name in small and _narrows(body[-1]) and before and _is_beside(body[-1], before[-1], model, pictures):
            body = before
        else:
            break
    # Parts that are never called: their parent uses their weights itself, as attention does with its projection.
    silent = [name for name, module in model.named_modules() if name not in calls and not any(module.children())]
    target = body[-1].layer if body and body[-1].follows is not False else None
    # If no layer is chosen, maps that are the same everywhere are not offered either: they may be a detector's queries.
    believed = (True,) if target is None else (True, None)
    return DryRun(
        [call.layer for call in calls.values() if call.layer and call.follows in believed],
        {name: call.layer for name, call in calls.items() if call.layer},
        target,
        {
            name: call.begun.union(part for part in silent if part.rpartition(".")[0] in call.begun)
            for name, call in calls.items()
        },
    )


def _observe(model: nn.Module, pictures: Tensor) -> tuple[dict[str, _Call], object]:
    """Return the modules' first calls in the order in which they finished, and the model's output."""
    took: dict[str, list[Tensor]] = {}
    calls: dict[str, _Call] = {}

    def begin(name: str, module: nn.Module, inputs: Sequence[Any]) -> None:
        if name not in took:
            # Computed before the module runs, as it may change its input in place.
            took[name] = _means(inputs[0], pictures) if inputs else []

    def end(name: str, module: nn.Module, inputs: Sequence[Any], output: object) -> None:
        if name in calls or module is model:
            return
        found, first = spatial_output(output, pictures), inputs[0] if inputs else None
        showed, shown = shows(first, pictures), shows(output, pictures)
        several = showed and not isinstance(first, Tensor)
        role: Literal["head", "queries", "names", None] = None
        # A transformers model's parts return dataclasses that are mappings too; only a plain mapping ends a backbone.
        if shown and isinstance(output, Mapping) and not is_dataclass(output):
            role = "names"
        elif found is None and (several or showed > shown):
            role = "head"
        elif found is None and isinstance(output, Tensor) and output.dim() == 3 and min(output.shape[1:]) > 1:
            role = "queries"
        calls[name] = _Call(
            module=module,
            begun=frozenset(took),
            layer=SpatialLayer(name, module, *found) if found else None,
            follows=follows(output, found[1]) if found else False,
            role=role,
            took=took[name],
            put_out=_means(output, pictures),
            several=several,
        )

    with torch.no_grad(), ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(begin, name)))
            hooks.enter_context(module.register_forward_hook(partial(end, name)))
        with UNCOMPILED:
            output = model(pictures)
    return calls, output


def _means(output: object, pictures: Tensor) -> list[Tensor]:
    return [each.float().flatten(2).mean(2) for each in positions_in(output, pictures)]


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and float((first - second).abs().max()) <= _EQUAL * float(second.abs().max())


def _passing_on(small: set[str], calls: dict[str, _Call], output: object, pictures: Tensor) -> set[str]:
    """Return the parts that put out the model's output, or a map whose mean it is, if a small part predicts it."""
    passing: set[str] = set()
    pooled = [output] if isinstance(output, Tensor) and output.dim() == 2 else []
    for own in positions_in(output, pictures) + pooled:
        wanted, makers = own.float().flatten(2).mean(2) if own.dim() > 2 else own.float(), []
        for name, call in reversed(calls.items()):
            if any(_same(each, wanted) for each in call.put_out):
                makers.append(name)
                # A module without weights, such as a sigmoid or a resizing, only passes on what it took.
                wanted = call.took[0] if len(call.took) == 1 and not _size(call.module) else wanted
        # With random weights a normalisation changes nothing, so the convolution before it would seem to be the last.
        modules = [calls[name].module for name in makers]
        last = next((module for module in modules if list(module.parameters(recurse=False))), None)
        enlarged = own.shape[2:] == pictures.shape[2:]
        for name in small.intersection(makers):
            call = calls[name]
            narrows = len(call.took) == 1 and wanted.shape[1] < call.took[0].shape[1] and isinstance(last, _LINEAR)
            # A part that puts levels together and is averaged outside may just as well end a backbone.
            predicts = enlarged or (call.several and own.dim() > 2) or narrows
            if _size(call.module) and predicts:
                passing.update(makers)
    return passing


def _narrows(call: _Call) -> bool:
    """Return whether a part puts out fewer channels than it took, as a part that predicts classes does."""
    took, put_out = ([each.shape[1] for each in means] for means in (call.took, call.put_out))
    return bool(took and put_out) and max(put_out) < max(took)


def _takes_from(call: _Call, before: _Call) -> bool:
    """Return whether a part took the output of the one before it, and not, for example, the sum of several."""
    return len(call.took) == len(before.put_out) == 1 and _same(call.took[0], before.put_out[0])


def _is_beside(call: _Call, before: _Call, model: nn.Module, pictures: Tensor) -> bool:
    """Return whether a part is an auxiliary head, for a loss: only noise on the part before it changes the output.

    Return False if this cannot be told, because the output holds no floating point numbers but classes, for example.
    """

    def numbers(*noisy: nn.Module) -> list[Tensor]:
        with torch.no_grad(), UNCOMPILED, ExitStack() as hooks:
            for module in noisy:
                # Runs ahead of the model's own hooks, one of which may be the one that passes the maps on.
                hook = module.register_forward_hook(lambda module, inputs, found: _with_noise(found), prepend=True)
                hooks.enter_context(hook)
            return [each.clone() for each in tensors_in(model(pictures.clone())) if each.is_floating_point()]

    # A model may fail on noise.
    with suppress(Exception):
        own = numbers()
        same, same_before = (all(map(torch.equal, own, numbers(each.module))) for each in (call, before))
        return same and not same_before
    return False


def _with_noise(found: Any) -> Any:
    if isinstance(found, (list, tuple)):
        return type(found)(map(_with_noise, found))
    if not isinstance(found, Tensor) or not found.is_floating_point():
        return found
    noise = torch.rand(found.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return found + (found.abs().amax() + 1) * noise.to(found)


def _twins(small: set[str], calls: dict[str, _Call]) -> set[str]:
    """Return the small linear layers that are like the one for the classes: VOLO classifies its tokens too."""
    linear = {name: call for name, call in calls.items() if isinstance(call.module, _LINEAR)}
    classes = next((str(call.module) for call in reversed(linear.values()) if call.layer is None), None)
    return {name for name, call in linear.items() if name in small and call.layer and str(call.module) == classes}


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def choose_layers(model: nn.Module, run: DryRun, layers: Sequence[str | int | nn.Module]) -> list[SpatialLayer]:
    """Return the given layers: modules, dotted names, or negative indices into ``run.layers`` (-1 is the last).

    If none are given, return the layer that the run found.

    Raises:
        NoLayerError: no layers are given, and the run found none.
        ValueError: a layer does not exist or has no spatial map; the message holds the nearest names.
    """
    if not layers:
        if run.target is None:
            raise NoLayerError(type(model).__name__, run.layers)
        return [run.target]
    # Layers that are named need not follow the picture: attention cannot before its checkpoint is loaded.
    known = run.named | {str(index): layer for index, layer in enumerate(run.layers, start=-len(run.layers))}
    names = {module: name for name, module in model.named_modules()}
    chosen = []
    for layer in layers:
        name = names.get(layer, type(layer).__name__) if isinstance(layer, nn.Module) else str(layer)
        if name not in known:
            near = get_close_matches(name, run.named, n=3, cutoff=0.4) or list(run.named)[-3:]
            raise BadValueError(
                f"{type(model).__name__} has no layer {name!r} with a spatial map; near it: {', '.join(near)}; "
                f"`tucker-cam layers` and `load_model(...).spatial_layers` list all, from -{len(run.layers)} to -1"
            )
        chosen.append(known[name])
    return chosen


def common_transform(layers: Sequence[SpatialLayer]) -> ReshapeTransform | None:
    """Return the layers' common reshape transform, as the host takes one for all; ValueError if they differ."""
    transforms = {layer.reshape_transform for layer in layers}
    if len(transforms) > 1:
        kinds = ", ".join(f"`{layer.name}` {layer.shape}" for layer in layers)
        raise BadValueError(f"expected layers that become maps in one way, got {kinds}: explain them one at a time")
    return transforms.pop()
