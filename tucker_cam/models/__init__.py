"""A model's name in, a model ready to be explained out: its weights, its preprocessing, its target layer."""

from tucker_cam.models.layers import find_target_layer, layer_named
from tucker_cam.models.loading import LoadedModel, load_model

__all__ = ["LoadedModel", "find_target_layer", "layer_named", "load_model"]
