import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from PIL import Image
from repositories import make_repositories
from torch import nn
from torchvision import transforms
from transformers import AutoModel

from tucker_cam import TSM
from tucker_cam.models import LoadedModel, NoLayerError, load_model
from tucker_cam.models.families import FAMILIES, build_network
from tucker_cam.models.network import IMAGENET_MEAN, Network, Preprocessing, imagenet_preprocessing


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_repositories()


TINY = "networks:tiny_loaded_model"
DETECTOR = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn"
LAYERS = {
    "timm:resnet50": "layer4 2048x7x7",
    "timm:convnext_tiny": "norm_pre 768x7x7",
    "timm:deit_tiny_distilled_patch16_224": "norm 198x192",
    "timm:swin_tiny_patch4_window7_224": "norm 7x7x768",
    "torchvision:vgg11": "features 512x7x7",
    "torchvision:deeplabv3_mobilenet_v3_large": "backbone.16 960x33x33",
    # 256 levels of the pyramid's three, put together at the middle one.
    DETECTOR: "backbone 768x10x10",
    "torchvision:r3d_18": "layer4 512x2x7x7",
    "hf:microsoft/resnet-50": "encoder.stages.1 12x8x8",
    "hf:facebook/dinov2-small": "layernorm 5x16",
    # Of CLIP the part that sees the picture.
    "hf:openai/clip-vit-base-patch32": "encoder.layers.0 17x16",
    "hub:facebookresearch/vicreg:resnet50": "layer4 512x7x7",
}
UNABLE = replace(networks.tiny_loaded_model(), preprocess=lambda _: 1 / 0)
EXAMPLES = [family.example for family in FAMILIES.values() if family.random]


@pytest.mark.usefixtures("repositories")
@pytest.mark.parametrize("name", dict.fromkeys([*LAYERS, *EXAMPLES]))
def test_each_family_loads_a_model_that_can_be_explained(name):
    loaded = load_model(name, pretrained=False)
    assert loaded.description.startswith(f"model: {name} with random weights; layer: {LAYERS.get(name, '')}")
    assert not any(module.training for module in loaded.model.modules())
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    picture = Image.fromarray(noise) if loaded.frames is None else [Image.fromarray(noise)] * loaded.frames
    images = loaded.preprocess(picture)[None].to(loaded.device)
    with TSM(loaded.model, loaded.target_layers, loaded.reshape_transform) as cam:
        saliency = cam(images)[0]
    assert saliency.shape == images.shape[2:]
    assert (saliency.min(), saliency.max()) == pytest.approx((0, 1), abs=1e-4)


@pytest.mark.usefixtures("repositories")
def test_weights_in_a_local_folder_are_loaded_without_a_network(tmp_path):
    loaded = load_model("hf:microsoft/resnet-50")
    expected = AutoModel.from_pretrained("microsoft/resnet-50").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.name == "hf:microsoft/resnet-50"


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:r3d_18", "hf:microsoft/resnet-50", DETECTOR])
@pytest.mark.usefixtures("repositories")
def test_what_the_network_saw_can_be_shown_again(name):
    network = build_network(name, pretrained=False)
    # Of a video network each frame is of another red.
    reds = np.linspace(0, 255, network.frames or 1).astype(int)
    frames = [Image.new("RGB", (300, 280), (red, 0, 127)) for red in reds]
    network_input = network.preprocess(frames if network.frames else frames[0])
    picture = network.picture(network_input)
    assert picture.shape == (*network_input.shape[1:], 3)
    expected = [[red / 255, 0, 127 / 255] for red in reds]
    assert picture[..., 50, 50, :].reshape(-1, 3) == pytest.approx(np.array(expected), abs=1e-3)


def test_a_device_that_there_is_not_is_one_clear_error():
    for device in ("abacus", "hpu"):
        with pytest.raises(ValueError, match=f"the model cannot run on '{device}' .*: use cpu"):
            load_model(TINY, device=device)
    assert load_model(TINY, device="cpu").device.type == "cpu"


@pytest.mark.usefixtures("repositories")
def test_random_weights_are_the_same_every_time_and_the_callers_random_numbers_stay():
    digests = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        digests.add(load_model("hf:microsoft/resnet-50", pretrained=False).digest())
        assert torch.equal(torch.get_rng_state(), before)
    assert len(digests) == 1


def test_threads_that_load_at_once_get_what_each_would_alone():
    names = ["torchvision:resnet18", "timm:resnet10t"] * 6
    alone = {name: load_model(name, pretrained=False).model.state_dict() for name in dict.fromkeys(names)}
    with ThreadPoolExecutor(4) as pool:
        loaded = pool.map(lambda name: load_model(name, pretrained=False), names)
        for name, found in zip(names, loaded, strict=True):
            assert all(torch.equal(value, alone[name][key]) for key, value in found.model.state_dict().items())


def test_a_function_of_ones_own_may_load_models_in_threads():
    assert load_model("networks:loaded_in_a_thread").layer_names == ["layer4"]


@pytest.mark.parametrize(
    ("family", "package"), [(family, package) for family in FAMILIES.values() for package in family.packages]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, family, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}: pip install '\.\[{family.extra}\]' in a checkout"):
        load_model(family.example)


def test_ones_own_module_or_network_is_loaded_by_module_and_function():
    loaded = load_model(TINY)
    assert isinstance(loaded, LoadedModel)
    assert (loaded.name, loaded.layer_names, loaded.classifies) == (TINY, ["3"], True)
    bare = load_model("networks:small_cnn")
    assert (bare.preprocess, bare.mean, bare.classifies) == (imagenet_preprocessing, IMAGENET_MEAN, False)


@pytest.mark.usefixtures("repositories")
@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("resnet50", {}, ValueError, r"timm:NAME, .*: did you mean timm:resnet50 or torchvision:resnet50\?"),
        ("facebook/dinov2-small", {}, ValueError, r"did you mean hf:facebook/dinov2-small\?"),
        ("timm:", {}, ValueError, "got 'timm:'$"),
        ("timm", {}, ValueError, "got 'timm'$"),
        ("demo:x", {}, ValueError, "got 'demo:x'"),
        ("timm:resnet5", {}, ValueError, "timm has no model 'resnet5'; near it: .*resnet50"),
        ("torchvision:resnet5", {}, ValueError, "torchvision has no model 'resnet5'; near it: .*resnet50"),
        ("hub:vicreg:resnet50", {}, ValueError, "or hub:FOLDER:ENTRY .* with a hubconf.py, got 'hub:vicreg:resnet50'"),
        ("hub:facebookresearch/vicreg:unreachable", {}, OSError, r"be had \(no route to host\); with random"),
        ("hf:nobody/nothing", {}, OSError, "hf:nobody/nothing could not be had"),
        # A masked autoencoder shuffles the patches.
        ("hf:facebook/vit-mae-base", {}, NoLayerError, r"2 can be named, .* `embeddings\.patch_embeddings` 196x16"),
        ("nowhere:model", {}, ValueError, r"nowhere could not be imported \(.*No module named 'nowhere'\)$"),
        ("networks:missing", {}, ValueError, "networks has no function or class 'missing'"),
        ("builtins:dict", {}, TypeError, "torch.nn.Module or a tucker_cam.models.Network from .*, got dict"),
        ("networks:raises", {}, ValueError, r"networks:raises could not be built \(RuntimeError: .*\)"),
        (nn.Embedding(10, 4), {}, ValueError, r"one picture of 3x224x224, and it failed on it \(RuntimeError: "),
        ("broken:f", {}, ValueError, r"broken could not be imported \(SyntaxError"),
        ("needing:f", {}, ValueError, r"needing:f could not be built \(.*No module named 'no_such'\)$"),
        (TINY, {"mean": 0.5}, ValueError, r"of three numbers in \[0, 1\], std above 0, got 0.5 and"),
        ("ending:f", {}, ValueError, r"ending:f could not be built \(SystemExit: no arguments\)"),
        (TINY, {"pretrained": False}, ValueError, f"{TINY}: expected a model of a library or hub for random weights"),
        (TINY, {"size": 0}, ValueError, "a size of at least one pixel, a whole number, got 0"),
        (TINY, {"mean": (0.5, 0.5)}, ValueError, r"of three numbers in \[0, 1\], std above 0, got \(0.5, 0.5\) and"),
        (TINY, {"mean": (123.7, 116.3, 103.5)}, ValueError, r"got \(123.7"),
        (TINY, {"std": (0, 1, 1)}, ValueError, r"std above 0, got .* and \(0, 1, 1\)"),
        (
            "timm:vit_tiny_patch16_224",
            {"pretrained": False, "size": 100},
            ValueError,
            "one picture of 3x100x100, and it failed on it .*100",
        ),
        ("networks:tiny_video_network", {"size": 100}, ValueError, "no size, crop, mean or std, as it takes 4 frames"),
        (TINY, {"weights": {"0.weight": 1}}, TypeError, "weights as the path of a file, got dict: load a state dict"),
        (nn.Sequential(nn.ReLU()), {}, ValueError, "Sequential: expected a model with parameters.*float one that it"),
        (UNABLE, {}, ValueError, "a grey picture: its preprocessing failed"),
    ],
)
def test_what_gives_no_model_is_one_clear_line(model, options, error, message):
    Path("broken.py").write_text("def f(:")
    Path("needing.py").write_text("def f():\n    import no_such")
    Path("ending.py").write_text("def f():\n    raise SystemExit('no arguments')")
    with pytest.raises(error, match=message) as raised:
        load_model(model, **options)
    assert len(str(raised.value).splitlines()) == 1


def test_every_family_is_a_row_of_the_readme():
    rows = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").splitlines()
    for family in FAMILIES.values():
        said = [f"`{family.usage}`", family.loads, f"`.[{family.extra}]`" if family.extra else ""]
        assert [row for row in rows if row.startswith("| `") and all(part in row for part in said)], said


def test_models_of_one_name_and_of_the_same_weights_are_told_apart_by_their_layers_shapes():
    models = [nn.Sequential(nn.Conv2d(3, 4, 3, stride), nn.ReLU()) for stride in (1, 2)]
    models[1].load_state_dict(models[0].state_dict())
    first, again, second = (load_model(model, layers=["0"]).digest() for model in (*models[:1], *models))
    assert first == again != second


def test_models_are_told_apart_by_what_preprocessings_of_ones_own_do():
    model, last = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), [transforms.ToTensor()]
    half = transforms.Normalize((0.5,) * 3, (0.5,) * 3)
    crop, smooth = transforms.CenterCrop(64), transforms.InterpolationMode.BICUBIC
    several = [
        [transforms.Resize((64, 64)), *last],
        [transforms.Resize(64), crop, *last],
        [transforms.Resize(290), crop, *last],
        [transforms.Resize(290, smooth), crop, *last],
        [transforms.Resize(64), crop, transforms.Grayscale(3), *last],
        [transforms.Resize(64), crop, *last, half],
        [transforms.Resize(80), crop, *last],
    ]
    first, again = (
        [load_model(Network(model, transforms.Compose(steps)), layers=["0"]).digest() for steps in several]
        for _ in range(2)
    )
    assert first == again
    assert len({*first, load_model(model, layers=["0"]).digest()}) == len(several) + 1


@pytest.mark.parametrize("drawn", [transforms.RandomResizedCrop(64), transforms.RandomHorizontalFlip()])
def test_a_preprocessing_that_draws_is_refused_unless_only_network_inputs_come(drawn):
    preprocess = transforms.Compose([transforms.Resize((64, 64)), drawn, transforms.ToTensor()])
    network = Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), preprocess)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"makes the same of a picture each time.* without random crops and flips"):
        load_model(network)
    first, again = (load_model(replace(network, takes=torch.rand(1, 3, 64, 64)), layers=["0"]) for _ in range(2))
    torch.set_rng_state(before)
    assert first.digest() == again.digest()
    assert torch.equal(torch.get_rng_state(), before)
    # What is no number is so each time.
    logarithm = transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor(), lambda x: (x - 0.5).log()])
    assert load_model(replace(network, preprocess=logarithm), layers=["0"])


def test_what_is_not_given_of_a_preprocessing_stays():
    own = Preprocessing(96, crop=False, interpolation="bilinear")
    network = Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), own)
    assert load_model(network, mean=(0.5,) * 3).preprocess == replace(own, mean=(0.5,) * 3)
    assert load_model(load_model(network), size=48).preprocess == replace(own, size=48)
    # Whether one of somebody else's crops is seen by what it does.
    squeezing = transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()])
    network = Network(network.model, squeezing, (0,) * 3, (1,) * 3)
    assert load_model(network, size=48).preprocess == Preprocessing(48, crop=False, mean=(0,) * 3, std=(1,) * 3)
    assert load_model(network, crop=False).preprocess is squeezing
    cropping = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), transforms.ToTensor()])
    assert load_model(replace(network, preprocess=cropping), std=(0.5,) * 3).preprocess.crop
    assert not load_model(replace(network, preprocess=cropping), crop=False).preprocess.crop
