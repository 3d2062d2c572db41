"""Turns a model's name into a model that is ready to be explained: weights, preprocessing, target layers."""

from importlib import import_module
from typing import TYPE_CHECKING

from tucker_cam.models.network import Network, Preprocessing

if TYPE_CHECKING:
    from tucker_cam.models.layers import NoLayerError, SpatialLayer, find_target_layer
    from tucker_cam.models.loading import LoadedModel, load_model

__all__ = [
    "LoadedModel",
    "Network",
    "NoLayerError",
    "Preprocessing",
    "SpatialLayer",
    "find_target_layer",
    "load_model",
]


def __getattr__(name: str) -> object:
    """Import a public name on first access, so that the model families can be listed without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "loading" if name in ("LoadedModel", "load_model") else "layers"
    return getattr(import_module(f"{__name__}.{home}"), name)
