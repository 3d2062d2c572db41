"""Checkpoints in the layouts in which self-supervised projects publish them, made here from a seeded backbone."""

import io
import os
import re

import pytest
import timm
import torch
from repositories import (
    backbone_alone,
    barlow_twins,
    dino,
    lightning,
    moco_v2,
    moco_v3,
    prefixed,
    simclr,
    swav,
    vicregl,
)
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from torch import nn
from torchvision.models.resnet import ResNet as TorchvisionResNet

from tucker_cam.models import load_model
from tucker_cam.models.checkpoints import load_checkpoint
from tucker_cam.models.layers import dry_run

IMAGE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def seeded(build, seed):
    """Return a model all of whose weights and statistics depend on the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.2 + 0.01)
    return model.eval()


def resnet():
    return ResNet(BasicBlock, (1, 1, 1, 1), channels=(4, 8, 8, 8), stem_width=4, num_classes=7)


def torchvision_resnet():
    from torchvision.models.resnet import BasicBlock as Block

    return TorchvisionResNet(Block, [1, 1, 1, 1], num_classes=7)


def convnext():
    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=7)


def backbone_of(model, head="fc."):
    return {name: value for name, value in model.state_dict().items() if not name.startswith(head)}


LAYOUTS = [moco_v2, moco_v3, swav, dino, barlow_twins, backbone_alone, simclr, lightning]


def upstream(model):
    run = dry_run(model, IMAGE)
    return run.upstream[run.target.name]


def load(model, content, tmp_path, name="checkpoint.pth"):
    file = tmp_path / name
    torch.save(content, file)
    return load_checkpoint(model, file, upstream(model))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_the_whole_backbone_is_loaded_and_the_head_left_out(layout, tmp_path):
    source, other, model = seeded(resnet, 1), seeded(resnet, 2), seeded(resnet, 3)
    head = model.fc.weight.clone()
    report = load(model, layout(backbone_of(source), backbone_of(other)), tmp_path)
    assert torch.equal(model.forward_features(IMAGE), source.forward_features(IMAGE))
    assert torch.equal(model.fc.weight, head)
    assert set(report.loaded) == set(backbone_of(source))
    assert report.missing == ["fc.weight", "fc.bias"]
    assert not set(report.left_out) & {report.place + name for name in report.loaded}
    others = [name for name in report.left_out if name.startswith(report.place)]
    assert all(re.search("fc|head|proj|prototypes|queue|bn.running_mean", name) for name in others)


@pytest.mark.parametrize("build", [resnet, torchvision_resnet])
def test_lightlys_numbered_children_are_named(build, tmp_path):
    source, other, model = seeded(build, 1), seeded(build, 2), seeded(build, 3)

    class SimCLR(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(*list(source.children())[:-1])
            self.backbone_momentum = nn.Sequential(*list(other.children())[:-1])
            self.projection_head = nn.Linear(8, 4)

    state = SimCLR().state_dict()
    assert "backbone.4.0.conv1.weight" in state
    report = load(model, {"state_dict": state, "epoch": 3}, tmp_path, "epoch=3.ckpt")
    assert report.place == "state_dict/backbone."
    left_out = [name for name in report.left_out if not name.startswith("state_dict/backbone_momentum.")]
    assert left_out == ["state_dict/projection_head.weight", "state_dict/projection_head.bias"]
    assert torch.equal(model.layer4[0].conv2.weight, source.layer4[0].conv2.weight)
    assert torch.equal(model.bn1.running_var, source.bn1.running_var)
    assert report.missing == ["fc.weight", "fc.bias"]


def test_vicregls_convnext_is_renamed_and_its_missing_layer_scale_is_one(tmp_path):
    source, model = seeded(convnext, 1), seeded(convnext, 3)
    for name, value in source.state_dict().items():
        if name.endswith("gamma"):
            value.fill_(1)
    for layer_scale in (True, False):
        content = vicregl(source, layer_scale=layer_scale)
        assert "module.backbone.downsample_layers.1.1.weight" in content["model"]
        assert "module.backbone.stages.2.0.pwconv1.weight" in content["model"]
        report = load(model, content, tmp_path)
        assert torch.equal(model.forward_features(IMAGE), source.forward_features(IMAGE))
        assert torch.equal(model.head.norm.weight, source.head.norm.weight)
        assert report.missing == ["head.fc.weight", "head.fc.bias"]
        assert report.left_out == ["model/module.maps_projector.0.weight"]


def test_safetensors_are_read_and_a_whole_classifier_keeps_its_head(tmp_path):
    source, model = seeded(resnet, 1), seeded(resnet, 3)
    save_file(prefixed("backbone.", source.state_dict()), tmp_path / "w.safetensors")
    report = load_checkpoint(model, tmp_path / "w.safetensors", upstream(model))
    assert torch.equal(model(IMAGE), source(IMAGE))
    assert (report.left_out, report.missing) == ([], [])
    # A head of other classes is left out.
    report = load(model, source.state_dict() | {"fc.weight": torch.rand(9, 8), "fc.bias": torch.rand(9)}, tmp_path)
    assert report.left_out == ["fc.weight", "fc.bias"]


def test_a_vit_is_loaded_with_its_class_token_and_position_embedding(tmp_path):
    def vit():
        return timm.models.VisionTransformer(img_size=64, patch_size=32, embed_dim=8, depth=1, num_heads=2)

    source, model = seeded(vit, 1), seeded(vit, 3)
    report = load(model, dino(backbone_of(source, "head."), {}), tmp_path)
    assert torch.equal(model.forward_features(IMAGE), source.forward_features(IMAGE))
    assert report.place == "teacher/backbone."


def test_less_than_the_whole_backbone_is_an_error_that_lists_the_keys_and_changes_nothing(tmp_path):
    model = seeded(resnet, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = backbone_of(seeded(resnet, 1))
    del state["layer2.0.conv1.weight"]
    state["conv1.weight"] = torch.rand(4, 3, 3, 3)
    needed = len([name for name in state if not name.endswith("num_batches_tracked")]) + 1
    with pytest.raises(
        ValueError, match=r"missing or of another shape: conv1.weight, layer2.0.conv1.weight; the fil"
    ) as e:
        load(model, prefixed("module.encoder_q.", state), tmp_path)
    assert f"found {needed - 2} of its {needed} entries" in str(e.value)
    assert "module.encoder_q.bn1.bias" in str(e.value)
    assert len(str(e.value).splitlines()) == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class RunsCode:
    """Opens a file for writing when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def truncated(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()[:-500]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a file of weights, found none that can be read"),
        (b"\n<!DOCTYPE html><html>404</html>", "found a web page: the download went wrong"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS: git lfs pull"),
        (b"", "a broken file"),
        (truncated({"a": torch.rand(99)}), "a broken file"),
    ],
    ids=["missing", "web page", "pointer", "empty", "truncated"],
)
def test_a_file_that_is_no_checkpoint_is_one_clear_line(tmp_path, suffix, content, message):
    file = tmp_path / f"w{suffix}"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises((OSError, ValueError), match=message) as error:
        load_checkpoint(seeded(resnet, 3), file, frozenset())
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "w.pth")
    with pytest.raises(OSError, match="expected a file of weights, found a folder, a pipe or a device"):
        load_checkpoint(seeded(resnet, 3), tmp_path / "w.pth", frozenset())


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_runs_nothing(tmp_path, legacy):
    file = tmp_path / "w.pth"
    torch.save({"state_dict": {}, "x": RunsCode(tmp_path / "ran")}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"found an object of (_io|io)\.open; nothing in it was run") as error:
        load_checkpoint(seeded(resnet, 3), file, frozenset())
    assert not (tmp_path / "ran").exists()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "expected a state dict, found no tensors with names"),
        ({"epoch": 3, "state_dict": {}}, "expected a state dict, found no tensors with names"),
        ({"features.0.weight": torch.zeros(4, 3, 3, 3)}, r"the whole backbone of ResNet, found 0 of its \d+ entries"),
    ],
)
def test_weights_of_nothing_or_of_another_architecture_are_one_clear_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load(seeded(resnet, 3), content, tmp_path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    "make",
    [
        lambda weight: weight.to("meta"),
        lambda weight: weight.to_sparse(),
        lambda weight: weight.to(torch.complex64),
        lambda weight: weight.to(torch.int64),
        lambda weight: weight[..., :1],
    ],
    ids=["meta", "sparse", "complex", "integers", "shape"],
)
def test_tensors_that_no_parameter_can_take_do_not_count(tmp_path, make):
    state = backbone_of(seeded(resnet, 1))
    # Also where a student and a teacher lack the same.
    for content in (state, {"student": state, "teacher": state}):
        state["conv1.weight"] = make(seeded(resnet, 1).conv1.weight.detach())
        with pytest.raises(ValueError, match=r"another shape: conv1\.weight;"):
            load(seeded(resnet, 3), content, tmp_path)


def test_a_model_that_lost_its_head_classifies_no_longer_and_says_what_was_loaded(tmp_path):
    source = seeded(lambda: timm.create_model("resnet18"), 1)
    torch.save(moco_v2(backbone_of(source), backbone_of(source)), tmp_path / "moco.pth")
    loaded = load_model("timm:resnet18", weights=tmp_path / "moco.pth")
    assert not loaded.classifies
    assert loaded.name == "timm:resnet18 with moco.pth"
    for words in (
        "moco.pth: 120 entries from state_dict/module.encoder_q.*",
        "left out",
        "missing, so random, fc.weight",
    ):
        assert words in loaded.description
    assert len(loaded.description.splitlines()) == 1
    torch.save(source.state_dict(), tmp_path / "whole.pth")
    assert load_model("timm:resnet18", weights=tmp_path / "whole.pth").classifies


@pytest.mark.parametrize(
    ("content", "place"),
    [
        # As DINOv2 and Lightly have it: both in one dictionary, the student first.
        (
            lambda a, b: {"model": prefixed("student.backbone.", b) | prefixed("teacher.backbone.", a)},
            "teacher.backbone.",
        ),
        (
            lambda a, b: {"state_dict": prefixed("backbone_momentum.", b) | prefixed("backbone.", a)},
            "state_dict/backbone.",
        ),
        (lambda a, b: {"target_network": b, "online_network": a}, "online_network/"),
        (lambda a, b: {"state_dict": b, "state_dict_ema": a}, "state_dict_ema/"),
        (lambda a, b: {"opt": {"exp_avg": b}, "net": a, "grads": b}, "net/"),
        (lambda a, b: {"model": prefixed("_orig_mod.module.model.student.backbone.", a)}, "model/_orig_mod.module."),
        (lambda a, b: {"0": a, "1": a}, "0/"),
    ],
)
def test_of_several_branches_the_published_one_is_loaded(content, place, tmp_path):
    source, other, model = seeded(resnet, 1), seeded(resnet, 2), seeded(resnet, 3)
    report = load(model, content(backbone_of(source), backbone_of(other)), tmp_path)
    assert torch.equal(model.forward_features(IMAGE), source.forward_features(IMAGE))
    assert place in report.place


@pytest.mark.parametrize("names", [("initial_state", "final_state"), ("teacher", "model")])
def test_of_several_backbones_that_no_convention_tells_apart_none_is_loaded(names, tmp_path):
    model = seeded(resnet, 3)
    content = {name: backbone_of(seeded(resnet, seed)) for seed, name in enumerate(names)}
    with pytest.raises(
        ValueError, match=rf"expected one backbone, found several, in {names[0]}/\*, {names[1]}/\*: save"
    ):
        load(model, content, tmp_path)


def test_weights_of_lower_precision_are_converted(tmp_path):
    source, model = seeded(resnet, 1), seeded(resnet, 3)
    load(model, backbone_of(seeded(resnet, 1).bfloat16()), tmp_path)
    torch.testing.assert_close(model.conv1.weight, source.conv1.weight, rtol=0.1, atol=0.01)
    assert model.conv1.weight.dtype == torch.float32


def test_numbers_that_are_none_are_refused(tmp_path):
    state = backbone_of(seeded(resnet, 1))
    with pytest.raises(ValueError, match=r"expected finite weights, found NaN or Inf in bn1\.bias$"):
        load(seeded(resnet, 3), state | {"bn1.bias": state["bn1.bias"] / 0}, tmp_path)


def test_a_vits_weights_of_another_patch_size_are_not_resized_silently(tmp_path):
    def vit(patch_size):
        return timm.models.VisionTransformer(img_size=64, patch_size=patch_size, embed_dim=8, depth=1, num_heads=2)

    with pytest.raises(ValueError, match=r"another shape: patch_embed\.proj\.weight, pos_embed;"):
        load(vit(16), vit(32).state_dict(), tmp_path)


def test_a_layer_scale_under_a_name_that_is_not_known_is_not_taken_for_one(tmp_path):
    source, model = seeded(convnext, 1), seeded(convnext, 3)
    state = {name.replace("gamma", "scale_of_layer"): value for name, value in source.state_dict().items()}
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0\.gamma"):
        load(model, state, tmp_path)


def test_a_layer_behind_the_default_one_needs_its_weights_too(tmp_path):
    source = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 1)
    torch.save({"backbone.weight": source[0].weight, "backbone.bias": source[0].bias}, tmp_path / "w.pth")
    assert load_model("networks:dense_model", weights=tmp_path / "w.pth").layer_names == ["backbone"]
    with pytest.raises(ValueError, match=r"found 2 of its 4 entries; .*: head\.bias, head\.weight"):
        load_model("networks:dense_model", weights=tmp_path / "w.pth", layers=["head"])
