"""The maps of several methods from one forward pass are those of the methods' own classes."""

import networks
import numpy as np
import pytest
import torch
import ttach
from pytorch_grad_cam import EigenCAM, GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from tucker_cam import TSM, channel_modes
from tucker_cam.explanations.explainer import Explainer
from tucker_cam.explanations.maps import OnePass
from tucker_cam.methods import METHODS
from tucker_cam.models import load_model
from tucker_cam.pictures.held import Held


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size)


class Counting(nn.Module):
    """Counts how many images go through it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model.eval(), []

    def forward(self, x):
        self.seen.append(len(x))
        return self.model(x)


@pytest.mark.parametrize("aug_smooth", [False, True])
@pytest.mark.parametrize("layers", [[2], [0, 2]])
@pytest.mark.parametrize("name", METHODS)
def test_the_maps_of_one_pass_are_those_of_the_class_to_the_bit(name, layers, aug_smooth):
    model, batch = networks.small_cnn(), images()
    target_layers = [model[index] for index in layers]
    np.random.seed(0)  # KPCA-CAM starts anywhere
    expected = METHODS[name](model, target_layers)(batch, targets=[], aug_smooth=aug_smooth)
    with OnePass(model, target_layers, None, batch, aug_smooth=aug_smooth) as one_pass:
        one_pass.maps(METHODS["tsm"])
        np.random.seed(0)
        assert np.array_equal(one_pass.maps(METHODS[name]), expected)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("aug_smooth", "passes"), [(False, 1), (True, 6)])
def test_the_model_runs_once_for_all_methods_or_once_for_each_transform(aug_smooth, passes):
    model = Counting(networks.small_cnn())
    with OnePass(model, [model.model[2]], None, images(), aug_smooth=aug_smooth) as one_pass:
        for method in METHODS.values():
            one_pass.maps(method)
    assert model.seen == [2] * passes


def test_output_and_features_are_those_of_the_images_themselves():
    model, batch = networks.small_cnn(), images()
    expected = model.eval()[:3](batch).detach()
    for aug_smooth in (False, True):
        with OnePass(model, [model[2]], None, batch, aug_smooth=aug_smooth) as one_pass:
            one_pass.maps(METHODS["eigencam"])
            output, (features,) = one_pass.output_and_features()
        assert torch.equal(features, expected)
        torch.testing.assert_close(output, model(batch))
        assert not output.requires_grad


def test_a_method_with_gradients_runs_the_model_by_itself_for_the_predicted_class():
    model, batch = Counting(networks.small_cnn()), images()
    layers = [model.model[2]]
    expected = GradCAM(model, layers)(batch, targets=[ClassifierOutputTarget(c) for c in model(batch).argmax(1)])
    model.seen.clear()
    with OnePass(model, layers, None, batch) as one_pass:
        for method in (TSM, GradCAM, EigenCAM):
            maps = one_pass.maps(method)
            if method is GradCAM:
                np.testing.assert_allclose(maps, expected, atol=1e-6)
    assert model.seen == [2, 2]


def test_a_method_that_fails_halfway_leaves_the_others_their_maps():
    model, batch = networks.small_cnn(), images()
    expected = METHODS["tsm"](model, [model[2]])(batch, aug_smooth=True)

    def failing(*arguments):
        return METHODS["mtsm"](*arguments, tta_transforms=ttach.Compose([ttach.Multiply([1, "none"])]))

    with OnePass(model, [model[2]], None, batch, aug_smooth=True) as one_pass:
        with pytest.raises(TypeError):
            one_pass.maps(failing)
        one_pass.passes.clear()
        assert np.array_equal(one_pass.maps(METHODS["tsm"]), expected)


def test_explanations_with_every_method_and_components_take_one_pass_and_the_components_are_mtsms():
    loaded = load_model("networks:tiny_loaded_model")
    seen = []
    loaded.model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    inputs = images(3, 24)
    found = Explainer(loaded, METHODS, components=True).explain(
        [Held(str(i), each) for i, each in enumerate(inputs)], inputs
    )
    assert seen == [3]
    features = loaded.model[: int(loaded.layer_names[0]) + 1](inputs).detach()
    modes = channel_modes(features)
    for index, explanation in enumerate(found):
        assert explanation.maps.keys() == METHODS.keys()
        np.testing.assert_allclose(explanation.components, modes.maps[index, :6], atol=1e-4)
        np.testing.assert_allclose(explanation.values, modes.values[index], rtol=1e-4)
