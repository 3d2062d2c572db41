"""A model and an example input in, the layer to explain out: found in a dry run, not guessed from names."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from torch import Tensor, nn


def find_target_layer(model: nn.Module, example: Tensor) -> tuple[str, nn.Module]:
    """Return the last module with a spatial map on the way to the output, and its dotted name.

    Args:
        model: a convolutional network; its train and eval flags are left as they were.
        example: one input, batch x channels x height x width.

    Raises:
        ValueError: no module puts out a map batch x channels x height x width larger than 1x1, or the model goes on
            in tokens after the last one, as vision transformers do.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> find_target_layer(model, torch.zeros(1, 3, 8, 8))
        ('1', ReLU())
    """
    found: tuple[str, nn.Module] | None = None
    tokens_after = False

    def look(name: str, module: nn.Module, output: object) -> None:
        nonlocal found, tokens_after
        if not isinstance(output, Tensor) or len(output) != len(example):
            return
        if output.dim() == 4 and not _is_channels_last(output, example):
            if output.shape[-2:].numel() > 1:
                found, tokens_after = (name, module), False
        elif output.dim() in (3, 4):
            tokens_after = True

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: look(name, module, output))
        for name, module in model.named_modules()
        if module is not model
    ]
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
    if found is None or tokens_after:
        raise ValueError(
            f"expected a layer with feature maps (B, C, H, W) at the end of {type(model).__name__}, found "
            f"{'tokens' if tokens_after else 'none'}: give the layer's name, and for a transformer use the "
            "Python classes with a reshape_transform"
        )
    return found


def layer_named(model: nn.Module, name: str) -> nn.Module:
    """Return the layer of this dotted name.

    Raises:
        ValueError: the model has no such layer; the message holds the names nearest to it.
    """
    layers: dict[str, nn.Module] = dict(model.named_modules())
    layers.pop("")
    if name not in layers:
        near = get_close_matches(name, layers, n=3, cutoff=0.4) or list(layers)[-3:]
        raise ValueError(f"{type(model).__name__} has no layer {name!r}; near it: {', '.join(near)}")
    return layers[name]


def _is_channels_last(output: Tensor, example: Tensor) -> bool:
    """Tell whether the picture's proportions are those of axes 1 and 2, as in Swin, and not those of axes 2 and 3."""
    height, width = example.shape[-2:]
    _, first, second, third = output.shape
    return first * width == second * height and second * width != third * height
