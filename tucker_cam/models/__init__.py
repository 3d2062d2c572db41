"""A model's name in, a model ready to be explained out: its weights, its preprocessing, its target layers."""

from tucker_cam.models.families import Network
from tucker_cam.models.layers import NoLayerError, SpatialLayer, find_target_layer
from tucker_cam.models.loading import LoadedModel, load_model

__all__ = ["LoadedModel", "Network", "NoLayerError", "SpatialLayer", "find_target_layer", "load_model"]
