"""A model and an example input in, the layer to explain out: found in a dry run, not guessed from names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tucker_cam.activations import ReshapeTransform
from tucker_cam.errors import BadValueError
from tucker_cam.models.reshape import holds_maps, is_map, maps_of, spatial_output, tensors_in
from tucker_cam.models.responses import Sketch, changes, follows, same, sketches, with_other_corners

_LINEAR = (nn.Linear, _ConvNd)


class SpatialLayer(NamedTuple):
    """A layer whose output shows where in the picture something is.

    Attributes:
        name: dotted.
        module: the layer.
        shape: of its output for the example; a pyramid's is that of its maps put together.
        reshape_transform: turns its output into maps, batch x channels x spatial; None where it is one already.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    reshape_transform: ReshapeTransform | None


class DryRun(NamedTuple):
    """What three forward passes showed of a model.

    Attributes:
        layers: all whose maps follow the picture, in the order in which they were done: those that are listed.
        doubtful: those that put out something of a map's shape which did not follow.
        target: the last layer before the head; None if it does not follow the picture, or there is none.
        upstream: by layer, the names of all modules that had begun when it was done: what its maps can depend on.
    """

    layers: list[SpatialLayer]
    doubtful: list[SpatialLayer]
    target: SpatialLayer | None
    upstream: dict[str, frozenset[str]]


@dataclass(kw_only=True)
class _Call:
    """A module's first call in the forward pass.

    Attributes:
        begun: how many modules had begun when it was done.
        layer: None if it has no spatial map.
        sketches: of the maps and tokens in its output.
        shape: of the output, if that is one tensor.
        width: how many channels the one map that it took had; None if it took something else.
        several: whether it took several maps and returns none by name.
        took: sketches of what it took, if it has no weights.
        head: whether it turns maps into something else.
        gridless: whether it returned tokens that lie on no grid.
        names_maps: whether it returned its maps by name.
    """

    module: nn.Module
    begun: int
    layer: SpatialLayer | None
    sketches: list[Sketch]
    shape: tuple[int, ...] | None
    width: int | None
    several: bool
    took: list[Sketch]
    head: bool
    gridless: bool
    names_maps: bool


def find_target_layer(model: nn.Module, example: Tensor) -> SpatialLayer:
    """Return the last layer with a spatial map on the way to the output.

    Feature maps, channels-last maps (Swin), tokens (ViT, with class and register tokens) and feature pyramids
    count, if they follow the picture: change a corner, and the map answers there. A detector's queries do not.
    What comes after it is a head: a small part that turns maps into numbers; all that follows a backbone which
    returns its maps by name, as in segmentation and detection; or a part that predicts the model's own output.

    A small part predicts, in distinction from a backbone's last layers, if its output is (part of) the model's own
    and it ends in a linear layer that narrows what it took, enlarges smaller maps to the picture's size, or takes
    several maps; or if it is a twin of the layer that puts out the classes.

    Args:
        model: its train and eval flags are left as they were.
        example: one input, batch x channels x height x width, or batch x channels x time x height x width. Noise of
            its shape is looked at.

    Raises:
        NoLayerError: a ValueError that holds the layers that could be named instead.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> find_target_layer(model, torch.zeros(1, 3, 8, 8))
        SpatialLayer(name='1', module=ReLU(), shape=(1, 8, 6, 6), reshape_transform=None)
    """
    return target_of(model, dry_run(model, example))


class NoLayerError(BadValueError):
    """No layer of a model can be chosen.

    Attributes:
        layers: those that could be named, in the order in which they run.
    """

    def __init__(self, model: str, layers: list[SpatialLayer]) -> None:
        last = ", ".join(f"`{layer.name}` {'x'.join(map(str, layer.shape[1:]))}" for layer in layers[-3:])
        super().__init__(
            f"expected a layer of {model} with feature maps (B, C, H, W) or a picture's tokens, found none at its end: "
            "give the layer's name, or use the Python classes with a reshape_transform"
            + (f". `tucker-cam layers` lists {len(layers)}, up to {last}" if layers else "")
        )
        self.layers = layers


def target_of(model: nn.Module, run: DryRun) -> SpatialLayer:
    """Return the layer to explain that a dry run found.

    Raises:
        NoLayerError: it found none.
    """
    if run.target is None:
        raise NoLayerError(type(model).__name__, run.layers)
    return run.target


def dry_run(model: nn.Module, example: Tensor) -> DryRun:
    """Run the model in eval mode and without gradients, and note which layers put out spatial maps.

    A layer that is called more than once counts at its first call, which is the one that is explained.
    """
    picture, *changed = with_other_corners(example)
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        begun, calls, output = _observe(model, picture)
        answers = [_sketch_again(model, each, [name for name, call in calls.items() if call.layer]) for each in changed]
    finally:
        for module, flag in training.items():
            module.training = flag
    layers = {name: call.layer for name, call in calls.items() if call.layer is not None}
    following = {
        name
        for name, layer in layers.items()
        if follows(layer.reshape_transform, calls[name].sketches, *(answer.get(name, []) for answer in answers))
    }
    # What is most of the network is no head, but a body with its head.
    most = _size(model) / 2
    small = {name for name, call in calls.items() if _size(call.module) < most}
    heads, outputs = _predictions(small, calls, output, picture)
    heads |= {name for name in small if calls[name].head}
    inside = tuple(f"{name}." for name in heads)
    path = [name for name, call in calls.items() if call.layer is not None or call.gridless or call.names_maps]
    named = [index for index, name in enumerate(path) if calls[name].names_maps]
    path = path[: named[-1] + 1] if named else path
    body = [
        name
        for name in path
        if (name in layers or calls[name].gridless) and name not in outputs and not f"{name}.".startswith(inside)
    ]
    # A part that is never called, whose parent uses its weights itself, as attention does with its projection.
    silent = [name for name, module in model.named_modules() if name not in begun and not any(module.children())]
    upstream = {}
    for name in layers:
        reached = set(begun[: calls[name].begun])
        upstream[name] = frozenset(reached | {name for name in silent if name.rpartition(".")[0] in reached})
    target = layers[body[-1]] if body and body[-1] in following else None
    if target is None:
        # Nothing will be chosen, and what no picture changes, such as positions that are learnt, is none to name.
        following = {name for name in following if changes(calls[name].sketches, *(each[name] for each in answers))}
    return DryRun(
        [layer for name, layer in layers.items() if name in following],
        [layer for name, layer in layers.items() if name not in following],
        target,
        upstream,
    )


def _observe(model: nn.Module, picture: Tensor) -> tuple[list[str], dict[str, _Call], object]:
    """Return the modules in the order in which they began, their calls in the order of their ends, and the output."""
    begun: dict[str, list[Sketch]] = {}
    calls: dict[str, _Call] = {}

    def shows(value: object) -> bool:
        return is_map(value, picture) or holds_maps(value, picture)

    def begin(name: str, module: nn.Module, inputs: Sequence[Any]) -> None:
        if name not in begun:
            weightless = next(module.parameters(), None) is None
            begun[name] = sketches(inputs[0], picture) if inputs and weightless else []

    def end(name: str, module: nn.Module, inputs: Sequence[Any], output: object) -> None:
        if name in calls or module is model:
            return
        found = spatial_output(output, picture)
        # A transformers model's parts return dataclasses, which are mappings too; only a plain one ends a backbone.
        names_maps = isinstance(output, Mapping) and not is_dataclass(output) and shows(output)
        first = inputs[0] if inputs else None
        several = not isinstance(first, Tensor) and holds_maps(first, picture)
        head = found is None and not names_maps and bool(inputs) and (several or shows(first) > shows(output))
        tokens = isinstance(output, Tensor) and output.dim() == 3 and min(output.shape[1:]) > 1
        calls[name] = _Call(
            module=module,
            begun=len(begun),
            layer=SpatialLayer(name, module, *found) if found is not None else None,
            sketches=sketches(output, picture),
            shape=tuple(output.shape) if isinstance(output, Tensor) else None,
            width=maps_of(first, picture).shape[1] if isinstance(first, Tensor) and is_map(first, picture) else None,
            several=several and not names_maps,
            took=begun[name],
            head=head,
            gridless=found is None and not names_maps and not head and tokens,
            names_maps=names_maps,
        )

    with torch.no_grad(), _hooked(model, begin, end):
        output = model(picture)
    return list(begun), calls, output


def _sketch_again(model: nn.Module, picture: Tensor, names: Sequence[str]) -> dict[str, list[Sketch]]:
    """Return the sketches of these modules' first outputs for another picture."""
    found: dict[str, list[Sketch]] = {}
    wanted = set(names)

    def end(name: str, _: nn.Module, __: Sequence[Any], output: object) -> None:
        if name in wanted and name not in found:
            found[name] = sketches(output, picture)

    with torch.no_grad(), _hooked(model, lambda *_: None, end):
        model(picture)
    return found


@contextmanager
def _hooked(model: nn.Module, begin: Callable[..., None], end: Callable[..., None]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(module.register_forward_pre_hook(partial(begin, name)))
            stack.enter_context(module.register_forward_hook(partial(end, name)))
        yield


def _predictions(
    small: set[str], calls: Mapping[str, _Call], output: object, picture: Tensor
) -> tuple[set[str], set[str]]:
    """Return those small parts that predict the model's own output, and all that pass it on."""
    heads: set[str] = set()
    passing: set[str] = set()
    smallest = min((each.values[0, 0].numel() for call in calls.values() for each in call.sketches), default=0)
    for own in sketches(output, picture):
        enlarged = own.values.shape[2:] == picture.shape[2:] and own.values[0, 0].numel() > smallest
        wanted, makers = own, []
        for name, call in reversed(list(calls.items())):
            if any(same(each, wanted) for each in call.sketches):
                makers.append(name)
                # A module without weights, such as a sigmoid or a resizing, hands on what it took.
                wanted = call.took[0] if len(call.took) == 1 else wanted
        # Of random weights the normalisation after a convolution changes nothing, and the convolution seems the last.
        last = next((calls[name].module for name in makers if _own(calls[name].module)), None)
        found = set()
        for name in small.intersection(makers):
            width, leaves = calls[name].width, _leaves(name, calls)
            narrows = width is not None and own.channels < width and isinstance(last, _LINEAR)
            if leaves and (enlarged or calls[name].several or (narrows and leaves[-1] is last)):
                found.add(name)
        heads |= found
        passing |= set(makers) if found else set()
    shapes = {tuple(each.shape) for each in tensors_in(output)}
    classes = [call.module for call in calls.values() if call.layer is None and call.shape in shapes]
    twins = {name for name in small if calls[name].layer and any(_twins(calls[name].module, each) for each in classes)}
    return heads | twins, passing


def _leaves(name: str, calls: Mapping[str, _Call]) -> list[nn.Module]:
    """Return the modules in this one, itself included, that have weights of their own, in the order of their ends."""
    inside = [call.module for part, call in calls.items() if f"{part}.".startswith(f"{name}.")]
    return [module for module in inside if _own(module)]


def _twins(first: nn.Module, second: nn.Module) -> bool:
    """Tell whether these are linear layers of one kind and size."""
    alike = isinstance(first, _LINEAR) and type(first) is type(second)
    return alike and [each.shape for each in _own(first)] == [each.shape for each in _own(second)]


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def choose_layers(model: nn.Module, run: DryRun, layers: Sequence[str | int | nn.Module]) -> list[SpatialLayer]:
    """Return these layers: modules, dotted names, or negative indices into ``run.layers`` (-1 is the last).

    Raises:
        ValueError: there is no such layer (the message holds the nearest names), or it has no spatial map.
    """
    # A name is an order: attention of random weights, to be replaced by a checkpoint's, follows nothing yet.
    by_name = {layer.name: layer for layer in (*run.layers, *run.doubtful)}
    parts = {name: module for name, module in model.named_modules() if name}
    chosen = []
    for layer in layers:
        if isinstance(layer, nn.Module):
            names = [name for name, module in parts.items() if module is layer]
            if not names:
                raise BadValueError(f"expected a layer that is part of the model, got a {type(layer).__name__}")
            name = names[0]
        else:
            name = str(layer)
        if name.startswith("-") and name[1:].isdecimal():
            if not 1 <= int(name[1:]) <= len(run.layers):
                raise BadValueError(f"expected a layer's index from -{len(run.layers)} to -1, got {name}")
            chosen.append(run.layers[int(name)])
        elif name in by_name:
            chosen.append(by_name[name])
        elif name in parts:
            raise BadValueError(
                f"expected a layer with a spatial map, and `{name}` has none (or is not reached): "
                "`load_model(...).spatial_layers` holds those that have"
            )
        else:
            near = get_close_matches(name, parts, n=3, cutoff=0.4) or list(parts)[-3:]
            raise BadValueError(f"{type(model).__name__} has no layer {name!r}; near it: {', '.join(near)}")
    return chosen


def common_transform(layers: Sequence[SpatialLayer]) -> ReshapeTransform | None:
    """Return the one reshape transform of these layers, as the host takes one for all.

    Raises:
        ValueError: they need different ones.
    """
    transforms = [layer.reshape_transform for layer in layers]
    if any(transform != transforms[0] for transform in transforms):
        kinds = ", ".join(f"`{layer.name}` {layer.shape}" for layer in layers)
        raise BadValueError(f"expected layers that become maps in one way, got {kinds}: explain them one at a time")
    return transforms[0] if transforms else None
