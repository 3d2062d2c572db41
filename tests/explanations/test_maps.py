"""The maps of several methods from one forward pass are those of the methods' own classes."""

from threading import Thread

import networks
import numpy as np
import pytest
import torch
from pytorch_grad_cam import AblationCAM, GradCAM, ScoreCAM

from tucker_cam import channel_modes
from tucker_cam.cams import LabelFreeCAM
from tucker_cam.explanations.explainer import Explainer, ReadBatch
from tucker_cam.explanations.maps import OnePass, _the_same_start
from tucker_cam.methods import METHODS
from tucker_cam.models import load_model
from tucker_cam.pictures.held import Held


def loaded_with(layers=("2",)):
    return load_model(networks.small_cnn(), layers=layers)


@pytest.mark.parametrize("aug_smooth", [False, True])
@pytest.mark.parametrize("layers", [["2"], ["0", "2"]])
@pytest.mark.parametrize("name", METHODS)
def test_the_maps_of_one_pass_are_those_of_the_class_to_the_bit(name, layers, aug_smooth):
    loaded, batch = loaded_with(layers), networks.images()
    with _the_same_start():
        expected = METHODS[name](loaded.model, loaded.target_layers)(batch, targets=[], aug_smooth=aug_smooth)
    with OnePass(loaded, batch, aug_smooth=aug_smooth) as one_pass:
        one_pass.maps(METHODS["tsm"])
        assert np.array_equal(one_pass.maps(METHODS[name]), expected)
        assert len(one_pass.passes) == (6 if aug_smooth else 1)
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_a_map_of_many_positions_is_the_same_every_time_and_numpys_generator_is_left_as_it_was():
    # Of so many, KPCA-CAM's solver starts at random.
    loaded, batch, maps = loaded_with(["0"]), networks.images(), []
    before = np.random.get_state()[1].copy()

    def explain():
        with OnePass(loaded, batch) as one_pass:
            maps.append(one_pass.maps(METHODS["kpca-cam"]))
            assert one_pass.output_and_features()[1][0][0, 0].numel() > 200

    threads = [Thread(target=explain) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(maps) == 3
    assert all(np.array_equal(each, maps[0]) for each in maps)
    assert np.array_equal(np.random.get_state()[1], before)


def test_a_method_that_writes_to_the_features_leaves_those_of_the_others_as_they_were():
    class InPlace(LabelFreeCAM):
        def saliency(self, features):
            return features.sub_(features.mean((2, 3), keepdim=True)).abs().sum(1)

    with OnePass(loaded_with(), networks.images()) as one_pass:
        before, _, after = (one_pass.maps(method) for method in (METHODS["tsm"], InPlace, METHODS["tsm"]))
    assert np.array_equal(before, after)


def test_a_method_that_reads_the_output_has_it_where_an_image_is_explained_alone():
    class OfTheOutput(LabelFreeCAM):
        def saliency(self, features):
            if len(features) > 1:
                raise RuntimeError("one at a time")
            return features.abs().mean(1) + self.outputs[-1].norm()

    loaded, batch = loaded_with(), networks.images(2)
    for answer in (lambda output: output, lambda output: [output]):
        hook = loaded.model.register_forward_hook(lambda *given, answer=answer: answer(given[-1]))
        with hook, OnePass(loaded, batch) as one_pass:
            one_pass.output_and_features()
            maps, errors = one_pass.maps_or_errors(OfTheOutput)
        assert not errors
        assert np.isfinite(maps).all()
        # An error that is kept would keep them too.
        assert not one_pass.passes


@pytest.mark.parametrize("aug_smooth", [False, True])
def test_a_method_that_fails_on_an_image_costs_no_other_its_map_and_no_pass(aug_smooth):
    loaded, batch = loaded_with(), networks.images(3)
    batch[1] = 0.5
    runs = []
    loaded.model.register_forward_hook(lambda *_: runs.append(None))
    with OnePass(loaded, batch, aug_smooth=aug_smooth) as one_pass:
        one_pass.maps(METHODS["tsm"])
        maps, errors = one_pass.maps_or_errors(networks.FailsOnFlat)
        assert list(errors) == [1]
        assert str(errors[1]) == "nothing to see"
        assert np.isnan(maps[1]).all()
        expected = one_pass.maps(METHODS["eigencam"])
        np.testing.assert_allclose(maps[[0, 2]], expected[[0, 2]], atol=1e-5)
    assert len(runs) == (6 if aug_smooth else 1)


@pytest.mark.parametrize("aug_smooth", [False, True])
def test_output_and_features_are_those_of_the_images_themselves(aug_smooth):
    loaded, batch = loaded_with(), networks.images()
    with OnePass(loaded, batch, aug_smooth=aug_smooth) as one_pass:
        one_pass.maps(METHODS["eigencam"])
        output, (features,) = one_pass.output_and_features()
    assert torch.equal(features, loaded.model[:3](batch))
    torch.testing.assert_close(output, loaded.model(batch))
    assert not output.requires_grad


def test_explanations_with_every_method_and_components_take_one_pass_and_the_components_are_mtsms():
    loaded, inputs, seen = loaded_with(), networks.images(3), []
    loaded.model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    explainer = Explainer(loaded, METHODS, components=True)
    found = explainer.explain([Held(str(i), each) for i, each in enumerate(inputs)], ReadBatch(inputs, [None] * 3))
    assert seen == [3]
    modes = channel_modes(loaded.model[:3](inputs).detach())
    for index, explanation in enumerate(found):
        assert explanation.maps.keys() == METHODS.keys()
        np.testing.assert_allclose(explanation.components, modes.maps[index, :6], atol=1e-4)
        np.testing.assert_allclose(explanation.values, modes.values[index], rtol=1e-4)


@pytest.mark.parametrize("kind", [AblationCAM, GradCAM, ScoreCAM])
def test_the_hosts_methods_of_a_class_explain_the_predicted_one_and_leave_model_and_gradients(kind):
    loaded = load_model("networks:tiny_loaded_model")
    images, layer = torch.rand(2, 3, 24, 24), loaded.target_layers[0]
    expected = kind(loaded.model, [layer])(images, targets=None)
    loaded.model(images).sum().backward()
    before = [parameter.grad.clone() for parameter in loaded.model.parameters()]
    with torch.no_grad(), OnePass(loaded, images) as one_pass:
        np.testing.assert_allclose(one_pass.maps(kind), expected, atol=1e-6)
    assert layer in loaded.model.modules()
    for parameter, gradient in zip(loaded.model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)
    loaded.model.requires_grad_(False)
    with OnePass(loaded, images) as one_pass:
        np.testing.assert_allclose(one_pass.maps(kind), expected, atol=1e-6)
