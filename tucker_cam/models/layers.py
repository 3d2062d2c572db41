"""A model and an example input in, the layer to explain out: found in a dry run, not guessed from names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tucker_cam.activations import ReshapeTransform
from tucker_cam.models.reshape import holds_maps, is_map, spatial_output


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
    """What one forward pass showed of a model.

    Attributes:
        layers: all that have a spatial map, in the order in which they were done.
        target: the last of them before the head; None if there is none.
        upstream: by layer, the names of all modules that had begun when it was done: what its maps can depend on.
    """

    layers: list[SpatialLayer]
    target: SpatialLayer | None
    upstream: dict[str, frozenset[str]]


def find_target_layer(model: nn.Module, example: Tensor) -> SpatialLayer:
    """Return the last layer with a spatial map on the way to the output.

    Feature maps, channels-last maps (Swin), tokens (ViT, with class and register tokens) and feature pyramids
    count. What comes after it is a head: a small part that turns maps into numbers, or all that follows a backbone
    which returns its maps by name, as in segmentation and detection.

    Args:
        model: its train and eval flags are left as they were.
        example: one input, batch x channels x height x width, or batch x channels x time x height x width.

    Raises:
        ValueError: there is no such layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> find_target_layer(model, torch.zeros(1, 3, 8, 8))
        SpatialLayer(name='1', module=ReLU(), shape=(1, 8, 6, 6), reshape_transform=None)
    """
    return target_of(model, dry_run(model, example))


def target_of(model: nn.Module, run: DryRun) -> SpatialLayer:
    """Return the layer to explain that a dry run found.

    Raises:
        ValueError: it found none.
    """
    if run.target is None:
        raise ValueError(
            f"expected a layer of {type(model).__name__} with feature maps (B, C, H, W) or a picture's tokens, found "
            "none at its end: give the layer's name, or use the Python classes with a reshape_transform"
        )
    return run.target


def dry_run(model: nn.Module, example: Tensor) -> DryRun:
    """Run the model once, in eval mode and without gradients, and note which layers put out spatial maps.

    A layer that is called more than once counts at its first call, which is the one that is explained.
    """
    begun: dict[str, None] = {}
    begun_when_done: dict[str, int] = {}
    # None stands for tokens that lie on no grid: a model that ends in them has no map that we could read.
    path: list[tuple[str, SpatialLayer | None]] = []
    pooling: dict[str, nn.Module] = {}
    backbone_end: int | None = None

    def shows(value: object) -> bool:
        return is_map(value, example) or holds_maps(value, example)

    def done(name: str, module: nn.Module, inputs: Sequence[Any], output: object) -> None:
        nonlocal backbone_end
        if name in begun_when_done:
            return
        begun_when_done[name] = len(begun)
        if module is model:
            return
        found = spatial_output(output, example)
        if found is not None:
            path.append((name, SpatialLayer(name, module, *found)))
        # A transformers model's parts return dataclasses, which are mappings too; only a plain one ends a backbone.
        if isinstance(output, Mapping) and not is_dataclass(output) and shows(output):
            backbone_end = len(path)
        elif found is None and inputs and (_takes_several(inputs[0], example) or shows(inputs[0]) > shows(output)):
            pooling[name] = module
        elif found is None and isinstance(output, Tensor) and output.dim() == 3 and min(output.shape[1:]) > 1:
            path.append((name, None))

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _, __, name=name: begun.setdefault(name)))
        handles.append(module.register_forward_hook(lambda m, i, o, name=name: done(name, m, i, o)))
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
    # What turns maps into numbers is a head, unless it is most of the network: then it is a body with its head.
    most = _size(model) / 2
    heads = tuple(f"{name}." for name, module in pooling.items() if _size(module) < most)
    body = [layer for name, layer in path[:backbone_end] if not f"{name}.".startswith(heads)]
    layers = [layer for _, layer in path if layer is not None]
    # A part that is never called, whose parent uses its weights itself, as attention does with its projection.
    silent = [name for name, module in model.named_modules() if name not in begun and not any(module.children())]
    order, upstream = list(begun), {}
    for layer in layers:
        reached = set(order[: begun_when_done[layer.name]])
        upstream[layer.name] = frozenset(reached | {name for name in silent if name.rpartition(".")[0] in reached})
    return DryRun(layers, body[-1] if body else None, upstream)


def _takes_several(value: object, example: Tensor) -> bool:
    """Tell whether a module takes several maps: with no map as its output it is a detector's head."""
    return not isinstance(value, Tensor) and holds_maps(value, example)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def choose_layers(model: nn.Module, run: DryRun, names: Sequence[str]) -> list[SpatialLayer]:
    """Return the layers of these dotted names, or of these negative indices into ``run.layers`` (-1 is the last).

    Raises:
        ValueError: there is no such layer (the message holds the nearest names), or it has no spatial map.
    """
    by_name = {layer.name: layer for layer in run.layers}
    parts = [name for name, _ in model.named_modules() if name]
    chosen = []
    for name in names:
        if name.startswith("-") and name[1:].isdecimal():
            if not 1 <= int(name[1:]) <= len(run.layers):
                raise ValueError(f"expected a layer's index from -{len(run.layers)} to -1, got {name}")
            chosen.append(run.layers[int(name)])
        elif name in by_name:
            chosen.append(by_name[name])
        elif name in parts:
            raise ValueError(
                f"expected a layer with a spatial map, and `{name}` has none (or is not reached): `tucker-cam layers` "
                "lists those that have"
            )
        else:
            near = get_close_matches(name, parts, n=3, cutoff=0.4) or parts[-3:]
            raise ValueError(f"{type(model).__name__} has no layer {name!r}; near it: {', '.join(near)}")
    return chosen


def common_transform(layers: Sequence[SpatialLayer]) -> ReshapeTransform | None:
    """Return the one reshape transform of these layers, as the host takes one for all.

    Raises:
        ValueError: they need different ones.
    """
    transforms = [layer.reshape_transform for layer in layers]
    if any(transform != transforms[0] for transform in transforms):
        kinds = ", ".join(f"`{layer.name}` {layer.shape}" for layer in layers)
        raise ValueError(f"expected layers that become maps in one way, got {kinds}: explain them one at a time")
    return transforms[0] if transforms else None
