"""What the recorder keeps of a forward pass: the layer's own output, also where the model would rewrite it."""

import networks
import pytest
import torch
from networks import images
from torch import nn
from torch.testing import assert_close

from tucker_cam.activations import FeatureRecorder, features


class Counting(nn.Module):
    """Runs a network and counts how often; what goes before it may rewrite the images."""

    def __init__(self, network, before=lambda x: x):
        super().__init__()
        self.network, self.before, self.runs = network, before, 0

    def forward(self, x):
        self.runs += 1
        return self.network(self.before(x))


def recorded(model, layer, batch):
    recorder = FeatureRecorder(model, [layer], None)
    recorder(batch)
    (maps,) = recorder.activations
    recorder.release()
    return maps


def test_what_no_module_rewrites_is_the_layers_own_output():
    model, outputs = networks.small_cnn().eval(), []
    model[2].register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    maps = recorded(model, model[2], images())
    assert maps.data_ptr() == outputs[0].data_ptr()
    assert maps.grad_fn is None


def test_a_model_that_rewrites_a_layers_output_runs_twice_the_first_time_and_once_from_then_on():
    model = Counting(networks.in_place_cnn()).eval()
    batch, layer = images(), model.network[0]
    first, second = (FeatureRecorder(model, [layer], None) for _ in range(2))
    for recorder, runs in ((first, 2), (first, 3), (second, 4)):
        recorder(batch)
        assert model.runs == runs
        assert_close(recorder.activations[0], layer(batch).detach(), rtol=0, atol=0)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("training", [False, True])
def test_a_rewritten_output_is_what_the_layer_put_out(context, training):
    model = Counting(networks.in_place_cnn()).train(training)
    batch, layer = images(), model.network[0]
    expected = layer(batch).detach()
    with context():
        maps = recorded(model, layer, batch)
    assert_close(maps.clone(), expected, rtol=0, atol=0)
    assert model.runs == (2 if context is not torch.inference_mode and not training else 1)


def test_a_model_that_rewrites_its_own_images_runs_but_once():
    model = Counting(networks.in_place_cnn(), before=lambda x: x.mul_(0.5)).eval()
    batch = images()
    expected = model.network[0](batch / 2).detach()
    assert_close(recorded(model, model.network[0], batch), expected, rtol=0, atol=0)
    assert model.runs == 1


def test_images_that_are_the_features_are_copied():
    model, batch = networks.passing_on().eval(), images()
    maps, before = recorded(model, model.layer, batch), batch.clone()
    batch.zero_()
    assert_close(maps, before, rtol=0, atol=0)


@pytest.mark.parametrize(("layers", "error"), [(["0"], TypeError), ([], ValueError), (nn.ReLU(), TypeError)])
def test_what_is_no_list_of_layers_is_told(layers, error):
    with pytest.raises(error, match="expected layers "):
        features(nn.Sequential(nn.Conv2d(3, 4, 3)), layers, images())


def test_images_in_a_container_are_explained_with_copies():
    network, batch = networks.in_place_cnn(), images()
    model = networks.Wired(lambda self, pair: self.network(pair["x"]), network=network).eval()
    maps = recorded(model, network[0], {"x": batch})
    assert_close(maps, model.network[0](batch).detach(), rtol=0, atol=0)


def test_a_view_of_the_output_by_a_reshape_transform_is_kept_when_the_output_is_rewritten():
    model, batch = networks.in_place_cnn().eval(), images()
    (maps,) = features(model, [model[0]], batch, lambda output: output[:, :4])
    assert_close(maps, model[0](batch)[:, :4].detach(), rtol=0, atol=0)
