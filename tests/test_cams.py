from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace

import networks
import numpy as np
import pytest
import references
import torch
from networks import images
from numpy.testing import assert_allclose
from registry import every_class, every_method, every_method_and_its_oracle
from torch import nn

from tucker_cam import MTSM, TSM, MultivecEigenCAM, channel_modes, features
from tucker_cam.cams import LaFAM
from tucker_cam.decomposition import modes
from tucker_cam.models import load_model


@pytest.mark.parametrize("autocast", [False, True])
@every_method_and_its_oracle
def test_a_call_returns_the_references_map_scaled_by_the_host_and_autocast_reaches_only_the_network(
    method, oracle, autocast
):
    model, batch = networks.small_cnn(), images()
    with method(model, [model[2]]) as cam, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        actual, maps = cam(batch), model[:3](batch)
    assert actual.dtype == np.float32
    assert maps.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert_allclose(actual, references.explained(oracle, maps, size=(32, 32)), atol=1e-5)


@pytest.mark.parametrize(
    "make_output",
    [
        lambda x: (x, x),
        lambda x: {"out": x},
        lambda x: SimpleNamespace(logits=x),
        lambda x: None,
        lambda x: x.to(torch.bfloat16),
    ],
    ids=["tuple", "dict", "object", "None", "bfloat16"],
)
@every_method
def test_the_output_is_never_read(method, make_output):
    model, batch = networks.returning(make_output), images()
    expected = networks.returning(lambda x: x.mean((2, 3)))
    expected.load_state_dict(model.state_dict())
    cam = method(model, [model.conv])
    assert_allclose(cam(batch), method(expected, [expected.conv])(batch))
    assert type(cam.outputs) is type(make_output(torch.zeros(1)))


@pytest.mark.parametrize(
    ("method", "given", "options"),
    [(TSM, {}, {}), (MTSM, {"rank": (3, 2, 2)}, {"rank": (3, 2, 2)}), (MultivecEigenCAM, {}, {"center": True})],
)
def test_modes_are_given_for_each_layer(method, given, options):
    model, batch = networks.small_cnn(), images()
    found = method(model, [model[0], model[2]], **given).modes(batch)
    expected = [channel_modes(part(batch).detach(), **options) for part in (model[:1], model[:3])]
    torch.testing.assert_close(found, expected)


def test_layers_keep_their_order_and_a_layer_that_runs_twice_its_first_output():
    parts = {"last": nn.Conv2d(3, 4, 1), "shared": nn.Conv2d(3, 3, 1)}
    model, batch = networks.Wired(lambda self, x: self.last(self.shared(self.shared(x))), **parts), images()
    cam = TSM(model, [model.last, model.shared])
    cam(batch)
    last, shared = cam.activations_and_grads.activations
    assert last.shape[1] == 4
    assert_allclose(shared, model.shared(batch).detach())


@every_method
def test_a_compiled_model_is_explained(method):
    model, batch = networks.small_cnn(), images()
    expected = method(model, [model[2]])(batch)
    compiled = torch.compile(model, backend="eager")
    assert_allclose(method(compiled, [model[2]])(batch), expected, atol=1e-6)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("built", ["before it is compiled", "before it runs", "after it ran"])
def test_a_module_that_is_compiled_in_place_is_explained_whenever_the_cam_is_built(built, fullgraph):
    model, batch = networks.small_cnn().eval(), images()
    expected = TSM(model, [model[2]])(batch)
    moments = ["before it is compiled", "before it runs", "after it ran"]
    steps = [None, lambda: model.compile(backend="eager", fullgraph=fullgraph), lambda: model(batch)]
    for moment, step in zip(moments, steps, strict=True):
        if step is not None:
            with torch.no_grad():
                step()
        if moment == built:
            cam = TSM(model, [model[2]])
    for _ in range(2):
        assert_allclose(cam(batch), expected, atol=1e-6)
        with torch.no_grad():
            model(batch)


@every_class
@pytest.mark.filterwarnings("ignore:Dynamo")
def test_a_compiled_function_may_explain(method):
    model, batch = networks.small_cnn(), images()
    cam = method(model, [model[2]])
    expected = cam(batch)
    explain = torch.compile(lambda x: (cam(x + 1 - 1), x + 1), backend="eager")
    for _ in range(2):
        saliency, shifted = explain(batch)
        assert_allclose(saliency, expected, atol=1e-5)
        assert_allclose(shifted, batch + 1)


def test_while_one_thread_explains_others_may_too_and_then_the_compiler_is_as_before():
    import torch._dynamo.eval_frame as compiler  # where torch keeps the stance, which it has no getter for

    model, batch = networks.small_cnn(), images()
    expected = TSM(model, [model[2]])(batch)
    compiled, stance = torch.compile(model, backend="eager"), compiler._stance
    with torch.no_grad():
        compiled(batch)
    started, others_done = Event(), Event()

    def slow(x):
        started.set()
        assert others_done.wait(20)
        return x

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(TSM(compiled, [model[2]], slow), batch)
        assert started.wait(20)
        assert_allclose(TSM(compiled, [model[2]])(batch), expected, atol=1e-6)
        assert compiler._stance.stance == "force_eager"
        others_done.set()
        assert_allclose(first.result(), expected, atol=1e-6)
    assert compiler._stance is stance


@pytest.mark.parametrize(("rank", "expected"), [((3, 2, 2), (3, 2, 2)), (None, (16, 8, 8))])
@pytest.mark.parametrize("method", [TSM, MTSM])
def test_the_tensorly_engine_is_tensorly(method, rank, expected, monkeypatch):
    decomposed, tucker = [], modes.tucker
    monkeypatch.setattr(modes, "tucker", lambda x, rank: (decomposed.append(rank), tucker(x, rank))[1])
    model = networks.small_cnn()
    method(model, [model[2]], rank=rank, engine="tensorly")(images())
    assert decomposed == [expected] * 2
    method(model, [model[2]], rank=rank)(images())
    assert len(decomposed) == 2


@pytest.mark.cuda
@pytest.mark.parametrize("rank", [None, (3, 2, 2)])
@pytest.mark.parametrize("method", [TSM, MTSM])
def test_the_map_is_the_same_on_a_gpu(method, rank):
    model, batch = networks.small_cnn(), images()
    expected = method(model, [model[2]], rank=rank)(batch)
    with method(model.cuda(), [model[2]], rank=rank) as cam:
        assert_allclose(cam(batch), expected, atol=1e-3)
        assert cam.activations_and_grads.activations[0].is_cuda


def test_features_are_what_a_forward_hook_sees_finite_in_single_precision_and_without_a_graph():
    model, batch = networks.small_cnn().bfloat16(), images().bfloat16()
    batch[1, 0, 4, 4] = torch.nan
    expected = [model[:1](batch), model[:3](batch)]
    with pytest.warns(RuntimeWarning, match="image 1"):
        found = features(model, [model[0], model[2]], batch)
    for actual, seen in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, seen.detach().float().nan_to_num())
        assert not actual.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


def test_objects_say_in_one_line_what_they_are():
    model = networks.small_cnn()
    cam = MTSM(model, [model[0], model[2]])
    assert repr(cam) == "<MTSM of Sequential at `0`, `2`>"
    assert repr(cam.modes(images())[1]) == "ChannelModes(vectors 2x16x16, values 2x16, maps 2x16x8x8)"
    loaded = load_model("networks:tiny_loaded_model")
    assert repr(loaded) == "<LoadedModel: model: networks:tiny_loaded_model; layer: 3 16x6x6>"


def test_a_mean_below_zero_that_differs_by_rounding_errors_only_is_flat():
    maps, model = -1 - 1e-9 * torch.rand(1, 4, 5, 5, dtype=torch.float64), networks.small_cnn()
    with LaFAM(model, [model[2]]) as cam:
        assert not cam.saliency(maps).any()
