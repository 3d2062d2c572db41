"""Checks the arguments that several public names share; a bad one raises an error of this package."""

from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from tucker_cam.errors import BadTypeError, BadValueError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_features(features: object, name: object) -> Tensor:
    """Return the features if they are floating point, batch x channels x spatial; else raise TypeError or ValueError.

    `name` is what the message calls them.
    """
    if not isinstance(features, Tensor):
        raise BadTypeError(
            f"expected {name} as one torch.Tensor, got {type(features).__name__}: choose a layer inside it, or pick "
            "the tensor in a reshape_transform"
        )
    check_kind(features, name)
    if features.dtype not in _FLOATS:
        raise BadTypeError(f"expected {name} as floating point numbers of 16 bits or more, got {features.dtype}")
    shape = tuple(features.shape)
    if len(shape) < 3 or 0 in shape:
        raise BadValueError(
            f"expected {name} as batch x channels x spatial, none of them empty, got {shape}: choose a layer before "
            "the spatial axes are pooled, or make room for them in a reshape_transform"
        )
    return features


def check_kind(tensor: Tensor, name: object) -> None:
    """Raise TypeError for kinds of tensor that PyTorch's arithmetic supports only in part: nested, sparse and meta."""
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_meta:
        raise BadTypeError(
            f"expected {name} as a dense tensor with numbers in it, got one that is nested, sparse or meta"
        )


def all_finite(numbers: Tensor) -> bool:
    """Return whether there is neither NaN nor Inf among the numbers."""
    # If the sum is finite, as it usually is, so are all numbers. If not, it may have overflowed: they are checked.
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())


def list_of_layers(layers: object, name: str) -> list[nn.Module]:
    """Return the layers as a list; raise TypeError or ValueError if they are not layers."""
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise BadTypeError(
            f"expected {name} as a list of layers, got {type(layers).__name__}: put a layer in brackets, [layer]"
        )
    listed = list(layers)
    if not listed or not all(isinstance(layer, nn.Module) for layer in listed):
        raise (BadTypeError if listed else BadValueError)(
            f"expected {name} to hold at least one torch.nn.Module, and nothing else, got {listed!r}"
        )
    return listed


def check_parameters(model: Any, named: str = "") -> None:
    """Raise ValueError for a model without parameters; the message begins with `named`."""
    if next(iter(model.parameters()), None) is None:
        raise BadValueError(
            f"{named}expected a model with parameters, which say where it is, got {type(model).__name__}: instead of a "
            "quantised model, take the float one that it was made from"
        )


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise ValueError if the value is not among the choices of a `Literal`."""
    if value not in get_args(choices):
        raise BadValueError(f"expected {name} as one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")
