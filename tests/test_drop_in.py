"""How public code uses EigenCAM beyond the host's own examples: each pattern with EigenCAM itself, and with ours.

This module also runs with the oldest versions of grad-cam and tensorly that are supported.
"""

import warnings

import networks
import numpy as np
import pytest
import references
import torch
from numpy.testing import assert_allclose
from pytorch_grad_cam import EigenCAM
from pytorch_grad_cam.activations_and_gradients import ActivationsAndGradients
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from registry import CLASSES, every_class
from torch import nn

from tucker_cam import TSM
from tucker_cam.cams import LabelFreeCAM

every_class_and_the_hosts = pytest.mark.parametrize("method", [EigenCAM, *CLASSES])
ORACLES = {EigenCAM: lambda image: np.maximum(get_2d_projection(np.float32(image[None]))[0], 0), **CLASSES}


def assert_explains(saliency, method, features, size):
    """Compare with the reference's maps of these features, brought to this size (last axis first) by the host."""
    expected = references.explained(ORACLES[method], features, size=size)
    assert saliency.dtype == np.float32
    assert_allclose(saliency, expected, atol=1e-4 if method is EigenCAM else 1e-5)


class Batch(dict):
    """A batch as mmdet and transformers hand it on: a dictionary that can be moved to a device."""

    def to(self, device):
        return Batch({name: value.to(device) for name, value in self.items()})


# A layer with what the network takes, how the network makes of it what the layer takes, and the size of the maps.
NO_PICTURES = {
    "clips": (lambda: (nn.Conv2d(3, 6, 3), torch.rand(2, 3, 3, 16, 20)), lambda clips: clips.flatten(0, 1), (20, 16)),
    "signals": (lambda: (nn.Conv1d(2, 6, 5), torch.rand(3, 2, 40)), lambda signals: signals, None),
    "a dictionary": (
        lambda: (nn.Conv2d(3, 6, 3), Batch(images=torch.rand(2, 3, 16, 20))),
        lambda batch: batch["images"],
        (20, 16),
    ),
}


@pytest.mark.parametrize(("make", "unpack", "size"), NO_PICTURES.values(), ids=NO_PICTURES)
@every_class_and_the_hosts
def test_what_is_no_picture_has_its_maps_where_the_size_is_patched_on_the_object(method, make, unpack, size):
    layer, given = make()
    model = networks.Wired(lambda self, x: self.layer(unpack(x)).flatten(2).mean(2), layer=layer)
    cam = method(model, [layer])
    cam.get_target_width_height = lambda images: size
    assert_explains(cam(given, targets=[]), method, layer(unpack(given)), size)


def quarters(images):
    return torch.cat([half for rows in images.chunk(2, 2) for half in rows.chunk(2, 3)])


@every_class_and_the_hosts
def test_each_region_of_a_picture_has_a_map_where_a_subclass_says_the_size(method):
    class OfRegions(method):
        def get_target_width_height(self, input_tensor):
            return 10, 8

    model = networks.Wired(lambda self, x: self.layer(quarters(x)).mean((2, 3)), layer=nn.Conv2d(3, 6, 3))
    images = torch.rand(1, 3, 16, 20)
    saliency = OfRegions(model, [model.layer])(images, targets=[])
    assert_explains(saliency, method, model.layer(quarters(images)), (10, 8))


def test_several_feature_maps_may_become_one_map_where_a_subclass_says_the_size():
    class OfClips(TSM):
        def get_target_width_height(self, input_tensor):
            return 10, 8

        def saliency(self, features):
            return super().saliency(features).unflatten(0, (-1, 2)).mean(1)

    model = networks.Wired(lambda self, x: self.layer(x.flatten(0, 1)), layer=nn.Conv2d(3, 6, 3))
    assert OfClips(model, [model.layer])(torch.rand(3, 2, 3, 12, 12)).shape == (3, 8, 10)


@every_class_and_the_hosts
def test_a_python_object_around_the_network_is_a_model(method):
    class Wrapper:
        def __init__(self, network):
            self.network = network
            self.eval, self.parameters = network.eval, network.parameters

        def __call__(self, images):
            return self.network(images)[:, :3]

    network, images = networks.small_cnn(), torch.rand(2, 3, 32, 32)
    with method(Wrapper(network), [network[2]]) as cam:
        assert_explains(cam(images, targets=None), method, network[:3](images), (32, 32))


@every_class_and_the_hosts
def test_a_subclass_that_computes_the_map_with_numpy_is_handed_numpy(method):
    class ByHand(method):
        def get_cam_image(self, input_tensor, target_layer, target_category, activations, grads, eigen_smooth):
            maps = super().get_cam_image(
                input_tensor, target_layer, target_category, activations[:, :, ::-1], grads, eigen_smooth
            )
            return np.float32(maps * activations.copy().max(axis=1).mean())[:, ::-1]

    model, images = networks.small_cnn(), torch.rand(2, 3, 32, 32)
    assert_explains(ByHand(model, [model[2]])(images, targets=None), method, model[:3](images), (32, 32))


@every_class_and_the_hosts
def test_with_the_hosts_recorder_put_in_the_maps_are_the_same(method):
    model, images = networks.returning(lambda x: x.mean((2, 3))), torch.rand(2, 3, 16, 16)
    cam = method(model, [model.conv])
    cam.activations_and_grads.release()
    cam.activations_and_grads = ActivationsAndGradients(model, cam.target_layers, None)
    assert_explains(cam(images, targets=[]), method, model.conv(images), (16, 16))


@pytest.mark.parametrize("convert", [torch.from_numpy, np.asarray], ids=["tensor", "array"])
@every_class
def test_a_direct_call_of_get_cam_image_counts_numbers_that_are_none_as_zero_and_names_them(method, convert):
    model, activations = networks.small_cnn(), np.random.default_rng(0).random((2, 6, 4, 5), np.float32)
    activations[1, 2, 0, 0], activations[1, 3, 1, 1] = np.nan, np.inf
    given = convert(activations.copy())
    with pytest.warns(RuntimeWarning, match="`2` put out NaN or Inf for image 1 of the batch"):
        maps = method(model, [model[2]]).get_cam_image(None, model[2], None, given, None, False)
    cleaned = torch.from_numpy(np.nan_to_num(activations, posinf=0))
    assert_explains(scale_cam_image(maps), method, cleaned, None)
    assert np.isnan(given[1, 2, 0, 0])


def test_a_list_of_methods_made_of_the_hosts_subclasses_has_ours_and_only_what_can_be_built():
    registry = {each.__name__: each for each in BaseCAM.__subclasses__()}
    assert {"EigenCAM", "TSM", "MTSM", "MultivecEigenCAM"} <= registry.keys()
    with pytest.raises(TypeError, match="abstract"):
        LabelFreeCAM(networks.small_cnn(), [])


@every_class_and_the_hosts
def test_a_subclass_may_take_what_it_likes_in_forward(method):
    class OfPaths(method):
        def forward(self, names, targets=None, eigen_smooth=False):
            return super().forward(torch.stack([pictures[name] for name in names]), targets, eigen_smooth)

    model, pictures = networks.small_cnn(), {"cat": torch.rand(3, 32, 32), "dog": torch.rand(3, 32, 32)}
    features = model[:3](torch.stack([*pictures.values()]))
    assert_explains(OfPaths(model, [model[2]])(["cat", "dog"], targets=None), method, features, (32, 32))


@pytest.mark.parametrize("container", ["sequential", "listed"])
@every_class_and_the_hosts
def test_layers_in_a_container_without_brackets_are_averaged(method, container):
    stages, images = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)), torch.rand(2, 3, 16, 16)
    parts = {"sequential": stages, "listed": nn.ModuleList(stages)}
    model = networks.Wired(lambda self, x: self.sequential(x).mean((2, 3)), **parts)
    expected = method(model, list(model.sequential))(images, targets=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cam = method(model, getattr(model, container))
    assert_allclose(cam(images, targets=None), expected, atol=1e-6)
    if method is not EigenCAM:
        (warning,) = caught
        assert "2 layers, whose maps are averaged: put the layers that you mean in brackets" in str(warning.message)
        assert warning.filename == __file__


@every_class_and_the_hosts
def test_a_traced_part_is_a_layer(method):
    images = torch.rand(2, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), images)
    model = nn.Sequential(traced, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert_explains(method(model, [model[0]])(images, targets=None), method, traced(images), (16, 16))


def test_a_layer_that_takes_no_hook_leaves_none_on_the_others(monkeypatch):
    def fail(hook):
        raise RuntimeError("not supported on ScriptModules")

    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())
    monkeypatch.setattr(model[1], "register_forward_hook", fail, raising=False)
    with pytest.raises(RuntimeError, match="not supported on ScriptModules"):
        TSM(model, [model[0], model[1]])
    assert not model[0]._forward_hooks
