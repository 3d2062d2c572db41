"""Checkpoints in the layouts in which self-supervised projects publish them, made here from a seeded backbone."""

import io
import os
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from repositories import LAYOUTS, RunsCode, dino, moco_v2, prefixed, projector, vicregl
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

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


def convnext():
    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=7)


def backbone_of(model, head="fc."):
    return {name: value for name, value in model.state_dict().items() if not name.startswith(head)}


def lightly(state, other):
    """Its backbone is a Sequential of the network's children: they have numbers in place of names."""
    children = [name for name, _ in resnet().named_children()]

    def numbered(state):
        parts = [(*name.split(".", 1), value) for name, value in state.items()]
        return {f"{children.index(child)}.{rest}": value for child, rest, value in parts}

    weights = prefixed("backbone.", numbered(state)) | prefixed("backbone_momentum.", numbered(other))
    return {"state_dict": weights | projector("projection_head.weight"), "epoch": 3}


def upstream(model):
    run = dry_run(model, IMAGE)
    return run.upstream[run.target.name]


def load(model, content, tmp_path):
    file = tmp_path / "checkpoint.pth"
    torch.save(content, file)
    return load_checkpoint(model, file, upstream(model))


@pytest.mark.parametrize("layout", [*LAYOUTS, lightly], ids=lambda layout: layout.__name__)
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


def test_vicregls_convnext_is_renamed_and_its_missing_layer_scale_is_one(tmp_path):
    source, model = seeded(convnext, 1), seeded(convnext, 3)
    for name, value in source.state_dict().items():
        if name.endswith("gamma"):
            value.fill_(1)
    for layer_scale in (True, False):
        report = load(model, vicregl(source, layer_scale=layer_scale), tmp_path)
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
    # A head of other classes is left out, and weights of lower precision are converted.
    other = {"fc.weight": torch.rand(9, 8), "fc.bias": torch.rand(9), "conv1.weight": source.conv1.weight.bfloat16()}
    report = load(model, source.state_dict() | other, tmp_path)
    assert report.left_out == ["fc.weight", "fc.bias"]
    assert model.conv1.weight.dtype == torch.float32


def vit(patch_size=32):
    return timm.models.VisionTransformer(img_size=64, patch_size=patch_size, embed_dim=8, depth=1, num_heads=2)


def test_a_vit_is_loaded_with_its_class_token_and_position_embedding_of_the_same_patch_size(tmp_path):
    source, model = seeded(vit, 1), seeded(vit, 3)
    report = load(model, dino(backbone_of(source, "head."), {}), tmp_path)
    assert torch.equal(model.forward_features(IMAGE), source.forward_features(IMAGE))
    assert report.place == "teacher/backbone."
    with pytest.raises(ValueError, match=r"another shape: patch_embed\.proj\.weight, pos_embed;"):
        load(vit(16), source.state_dict(), tmp_path)


def test_less_than_the_whole_backbone_is_an_error_that_lists_the_keys_and_changes_nothing(tmp_path):
    model = seeded(resnet, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = backbone_of(seeded(resnet, 1))
    del state["layer2.0.conv1.weight"]
    state["conv1.weight"] = torch.rand(4, 3, 3, 3)
    missing = "missing or of another shape: conv1.weight, layer2.0.conv1.weight"
    expected = f"found 63 of its 65 entries; {missing}; the file has module.encoder_q.bn1.bias, .* more$"
    with pytest.raises(ValueError, match=expected):
        load(model, prefixed("module.encoder_q.", state), tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_weights_of_a_deeper_network_are_not_cut_to_a_shallower_one(tmp_path):
    deeper = backbone_of(seeded(resnet, 1)) | {"layer2.1.conv1.weight": torch.rand(8, 8, 3, 3)}
    with pytest.raises(
        ValueError, match=r"backbone of ResNet, found a deeper one, with layer2\.1: take the model that"
    ):
        load(seeded(resnet, 3), prefixed("module.", deeper), tmp_path)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


CODE = RunsCode("ran")
PAGE = b"\n<!DOCTYPE html><html>404</html>"
BROKEN = "found a broken file, a web page or a pointer of Git LFS; nothing in it was run"
FOREIGN = r"found an object of \w+\.mkdir; nothing in it was run"
OTHER = r"backbone of ResNet, found another one \(entries: 2, needed: 65\); the file has bias, weight$"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("w.pth", PAGE, BROKEN, id="web page"),
        pytest.param("w.safetensors", PAGE, BROKEN, id="web page as safetensors"),
        pytest.param("w.pth", saved({"a": torch.rand(99)})[:-500], BROKEN, id="truncated"),
        pytest.param("w.pth", saved(CODE), FOREIGN, id="code"),
        pytest.param("w.pth", saved(CODE, _use_new_zipfile_serialization=False), FOREIGN, id="code, old format"),
        pytest.param("w.pth", saved({"epoch": 3, "state_dict": {}}), "found no tensors with names", id="no tensors"),
        pytest.param("w.pth", saved(nn.Linear(3, 4).state_dict()), OTHER, id="another network"),
    ],
)
def test_a_file_without_the_weights_is_one_clear_line_and_runs_nothing(name, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    model = seeded(resnet, 3)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(model, Path(name), upstream(model))
    assert len(str(error.value).splitlines()) == 1
    assert not Path("ran").exists()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: None], ids=["pipe", "folder", "nothing"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "w.pth")
    with pytest.raises(OSError, match="expected a file of weights, found none"):
        load_checkpoint(seeded(resnet, 3), tmp_path / "w.pth", frozenset())


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_what_is_no_dense_tensor_is_passed_over(tmp_path):
    source, model = seeded(resnet, 1), seeded(resnet, 3)
    odd = {"sparse": torch.eye(3).to_sparse(), "meta": torch.empty(2, device="meta")}
    load(model, source.state_dict() | odd, tmp_path)
    assert torch.equal(model(IMAGE), source(IMAGE))


def test_without_the_package_safetensors_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "w.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r"package safetensors: pip install '\.\[models\]'"):
        load_checkpoint(seeded(resnet, 3), tmp_path / "w.safetensors", frozenset())


def test_a_model_that_lost_its_head_classifies_no_longer_and_says_what_was_loaded(tmp_path):
    source = seeded(lambda: timm.create_model("resnet18"), 1)
    torch.save(moco_v2(backbone_of(source), backbone_of(source)), tmp_path / "moco.pth")
    loaded = load_model("timm:resnet18", weights=tmp_path / "moco.pth")
    assert not loaded.classifies
    assert loaded.name == "timm:resnet18 with moco.pth"
    assert "moco.pth: 120 entries from state_dict/module.encoder_q.*; left out" in loaded.description
    assert "missing, so random, fc.weight" in loaded.description
    torch.save(source.state_dict(), tmp_path / "whole.pth")
    assert load_model("timm:resnet18", weights=tmp_path / "whole.pth").classifies


@pytest.mark.parametrize(
    ("content", "place"),
    [
        # As DINOv2 has it: both in one dictionary, the student first.
        (
            lambda a, b: {"model": prefixed("student.backbone.", b) | prefixed("teacher.backbone.", a)},
            "teacher.backbone.",
        ),
        (lambda a, b: {"target_network": b, "online_network": a}, "online_network/"),
        (lambda a, b: {"state_dict": b, "state_dict_ema": a}, "state_dict_ema/"),
        (lambda a, b: {"optimizer": {"exp_avg": b}, "net": a}, "net/"),
        (lambda a, b: {"model": prefixed("_orig_mod.module.model.student.backbone.", a)}, "model/_orig_mod.module."),
        (lambda a, b: {"0": a, "1": a}, "0/"),
    ],
)
def test_of_several_branches_the_published_one_is_loaded(content, place, tmp_path):
    source, other, model = seeded(resnet, 1), seeded(resnet, 2), seeded(resnet, 3)
    report = load(model, content(backbone_of(source), backbone_of(other)), tmp_path)
    assert torch.equal(model.forward_features(IMAGE), source.forward_features(IMAGE))
    assert place in report.place


def test_of_several_backbones_that_no_convention_tells_apart_none_is_loaded(tmp_path):
    content = {name: backbone_of(seeded(resnet, seed)) for seed, name in enumerate(("teacher", "model"))}
    with pytest.raises(ValueError, match=r"expected one backbone, found several, in teacher/\*, model/\*: save"):
        load(seeded(resnet, 3), content, tmp_path)


def test_a_layer_behind_the_default_one_needs_its_weights_too(tmp_path):
    source = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 1)
    torch.save({"backbone.conv.weight": source[0].weight, "backbone.conv.bias": source[0].bias}, tmp_path / "w.pth")
    assert load_model("networks:dense_model", weights=tmp_path / "w.pth").layer_names == ["backbone.conv"]
    with pytest.raises(ValueError, match=r"found 2 of its 4 entries; .*: head\.bias, head\.weight"):
        load_model("networks:dense_model", weights=tmp_path / "w.pth", layers=["head"])
