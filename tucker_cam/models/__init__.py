"""A model's name in, a model ready to be explained out: its weights, its preprocessing, its target layers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tucker_cam.models.layers import NoLayerError, SpatialLayer, find_target_layer
    from tucker_cam.models.loading import LoadedModel, load_model
    from tucker_cam.models.network import Network, Preprocessing

__all__ = [
    "LoadedModel",
    "Network",
    "NoLayerError",
    "Preprocessing",
    "SpatialLayer",
    "find_target_layer",
    "load_model",
]

_HOMES = {
    "LoadedModel": "loading",
    "Network": "network",
    "NoLayerError": "layers",
    "Preprocessing": "network",
    "SpatialLayer": "layers",
    "find_target_layer": "layers",
    "load_model": "loading",
}


def __getattr__(name: str) -> object:
    """Import a public name where it is first asked for, so that the families can be listed without PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
