"""Everything that is not an argument: what was expected, what came, and the way out, word for word."""

import gc
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import networks
import numpy as np
import pytest
import torch
import ttach
from PIL import Image
from timm.models import VisionTransformer
from torch import nn

from tucker_cam import MTSM, TSM, MultivecEigenCAM, channel_modes

METHODS = [TSM, MTSM, MultivecEigenCAM]


class WithUnusedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.unused, self.pool = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.MaxPool2d(2, return_indices=True)

    def forward(self, x):
        return self.pool(self.conv(x))


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        raise self.error


class Looping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)])
        self.blocks = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 8, 3))

    def forward(self, x):
        for layer in (*self.layers, *self.blocks):
            x = layer(x)
        return x


class InAnotherThread(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.conv, x).result()


def two_gpus():
    model = nn.DataParallel(CNN)
    model.device_ids = [0, 1]
    return model


def partly_scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3))))


def exported():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(CNN, (IMAGES,)).module()


CNN = networks.small_cnn()
IMAGES = torch.zeros(2, 3, 32, 32)
EXPORTED = exported()
ELSEWHERE = InAnotherThread()
LOOPING = Looping()
SCRIPTED = partly_scripted()
UNUSED = WithUnusedLayer()
VIT = VisionTransformer(img_size=32, patch_size=16, embed_dim=12, depth=1, num_heads=2, num_classes=2)
STRANGER = nn.Conv2d(3, 3, 1)
HWC = torch.zeros(32, 32, 3)


@dataclass
class Case:
    name: str
    error: type[Exception]
    message: str
    model: object = CNN
    layers: object = field(default_factory=lambda: [CNN[2]])
    options: dict = field(default_factory=dict)
    images: object = None  # None: the error comes at construction
    methods: list = field(default_factory=lambda: METHODS)


RANK_KINDS = (
    "expected rank as None (full), an int, a tuple of ints (channels, *spatial), a float (share of the parameters) "
    "or 'same', got "
)
UNREACHED = (
    "expected the forward pass to reach the target layer `{}`, but its hook never fired in this thread: choose a layer "
    "that the model calls, of the very object that is passed as model, and one of those in it where it is a container "
    "that the model loops over; and call the CAM inside its `with` block, which takes the hooks off at its end"
)
NOT_MAPS = (
    "expected feature maps with spatial axes (B, C, H, W) or (B, C, D, H, W) from {}, got {}: choose a layer before "
    "the spatial axes are pooled, or for tokens pass a reshape_transform"
)
NOT_IMAGES = (
    "expected images as batch x channels x height x width (or batch x channels x depth x height x width), got {}: "
    "a single picture needs images[None], one with its channels last permute(2, 0, 1)"
)
TUCKER = [TSM, MTSM]
COMBINED = [MTSM, MultivecEigenCAM]
# Tensors that PyTorch has not the whole of its arithmetic for.
KINDS = [
    (
        "nested",
        lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
        TypeError,
        "expected {} of one size, got a nested tensor: torch.stack those of one size",
    ),
    *(
        (name, convert, TypeError, f"expected {{}} as a dense tensor, got one of layout {layout}: use to_dense()")
        for name, convert, layout in [
            ("sparse", torch.Tensor.to_sparse, "torch.sparse_coo"),
            ("MKLDNN", torch.Tensor.to_mkldnn, "torch._mkldnn"),
        ]
    ),
    (
        "float8",
        lambda x: x.to(torch.float8_e4m3fn),
        TypeError,
        "expected {} of 16 bits or more, got torch.float8_e4m3fn: use float()",
    ),
    (
        "meta",
        lambda x: x.to("meta"),
        ValueError,
        "expected {} with numbers in them, got a tensor on the meta device",
    ),
]

CASES = [
    Case(
        "a bare layer",
        TypeError,
        "expected target_layers as a list of layers, got the layer Conv2d: put it in brackets, [layer]",
        layers=CNN[2],
    ),
    Case("no layers", ValueError, "expected at least one target layer, got an empty list", layers=[]),
    Case("None as layers", TypeError, "expected target_layers as a list of layers, got NoneType", layers=None),
    Case("a name as layers", TypeError, "expected target_layers as a list of layers, got str", layers="layer4"),
    Case(
        "a name as layer",
        TypeError,
        "expected target_layers to hold torch.nn.Module objects, got 'layer4'",
        layers=["layer4"],
    ),
    Case(
        "a container as layer",
        ValueError,
        "expected target layers that are called, got the container ModuleList, which never is: take one of the layers "
        "in it, or all of them, list(layers)",
        model=LOOPING,
        layers=[LOOPING.layers],
    ),
    Case(
        "a scripted layer",
        ValueError,
        "expected target layers of Python, got the scripted Sequential, which takes no hooks: explain the model before "
        "torch.jit.script",
        model=SCRIPTED,
        layers=[SCRIPTED[0], SCRIPTED[1]],
    ),
    Case(
        "a function as model",
        TypeError,
        "expected model as a torch.nn.Module, or something that can be called and has its methods eval and parameters, "
        "got function",
        model=two_gpus,
    ),
    Case(
        "a model without parameters",
        ValueError,
        "expected a model with parameters, which say what device it is on, got ReLU",
        model=nn.ReLU(),
    ),
    Case(
        "a model on two GPUs",
        ValueError,
        "expected a model on one device, got DataParallel on 2, whose copies run layers of their own: pass the model "
        "inside it, model.module",
        model=two_gpus(),
    ),
    Case(
        "a model on the meta device",
        ValueError,
        "expected a model with weights, got Conv2d on the meta device: load them first",
        model=nn.Conv2d(3, 3, 1, device="meta"),
    ),
    Case(
        "an exported model",
        ValueError,
        "expected a model with an eval mode, got the exported GraphModule: explain the model before torch.export",
        model=EXPORTED,
        layers=[EXPORTED],
    ),
    Case(
        "a name as transform",
        TypeError,
        "expected reshape_transform as a callable or None, got str",
        options={"reshape_transform": "vit"},
    ),
    *(
        Case(
            f"{type(transforms).__name__} as transforms",
            TypeError,
            f"expected tta_transforms as a ttach.Compose or None, got {type(transforms).__name__}",
            options={"tta_transforms": transforms},
        )
        for transforms in ([], ttach.HorizontalFlip(), "flip")
    ),
    *(
        Case(f"rank {rank}", ValueError, f"expected a rank above 0, got {rank!r}: None is full rank", **at)
        for rank in (0, -3, 0.0, float("nan"), float("inf"), (4, 0, 2), (4, -1, 2))
        for at in [{"options": {"rank": rank}, "methods": TUCKER}]
    ),
    *(
        Case(f"rank {rank}", TypeError, f"{RANK_KINDS}{rank!r}", options={"rank": rank}, methods=TUCKER)
        for rank in ("full", True, (), (2.0, 2, 2), (2, None, 2), {3})
    ),
    *(
        Case(
            f"a rank of {len(rank)} parts",
            ValueError,
            f"expected a rank of 3 parts for feature maps of shape (16, 8, 8), channels first, got {rank}",
            options={"rank": rank},
            images=IMAGES,
            methods=TUCKER,
        )
        for rank in ((2, 2), (2, 2, 2, 2))
    ),
    Case(
        "an unknown engine",
        ValueError,
        "expected engine as one of 'torch', 'tensorly', got 'numpy'",
        options={"engine": "numpy"},
        methods=TUCKER,
    ),
    Case(
        "an unknown combination",
        ValueError,
        "expected combine as one of 'signed', 'energy', got 'sum'",
        options={"combine": "sum"},
        methods=COMBINED,
    ),
    *(
        Case(
            name,
            ValueError,
            UNREACHED.format(layer),
            model=model,
            layers=[STRANGER if model is CNN else model.get_submodule(layer)],
            images=IMAGES,
        )
        for name, model, layer in [
            ("a layer of another model", CNN, "Conv2d"),
            ("a layer that is not reached", UNUSED, "unused"),
            ("a container that could be called", LOOPING, "blocks"),
            ("a layer that another thread runs", ELSEWHERE, "conv"),
        ]
    ),
    Case(
        "a layer that puts out a tuple",
        TypeError,
        "expected one tensor of feature maps from `pool`, got tuple: choose a layer inside it, or pick the tensor in a "
        "reshape_transform",
        model=UNUSED,
        layers=[UNUSED.pool],
        images=IMAGES,
    ),
    Case("the model itself", ValueError, NOT_MAPS.format("`Sequential`", (2, 10)), layers=[CNN], images=IMAGES),
    Case("a linear layer", ValueError, NOT_MAPS.format("`6`", (2, 10)), layers=[CNN[6]], images=IMAGES),
    Case(
        "tokens without a transform",
        ValueError,
        NOT_MAPS.format("`blocks.0.norm1`", (2, 5, 12)),
        model=VIT,
        layers=[VIT.blocks[0].norm1],
        images=IMAGES,
    ),
    *(
        Case(
            f"a transform that returns {name}",
            error,
            message,
            options={"reshape_transform": transform},
            images=IMAGES,
        )
        for name, transform, error, message in [
            (
                "nothing",
                lambda x: None,
                TypeError,
                "expected one tensor of feature maps from the reshape_transform after `2`, got NoneType: choose a "
                "layer inside it, or pick the tensor in a reshape_transform",
            ),
            (
                "an array",
                lambda x: x.numpy(force=True),
                TypeError,
                "expected one tensor of feature maps from the reshape_transform after `2`, got ndarray: choose a layer "
                "inside it, or pick the tensor in a reshape_transform",
            ),
            (
                "whole numbers",
                lambda x: x.long(),
                TypeError,
                "expected floating point feature maps from the reshape_transform after `2`, got torch.int64",
            ),
            (
                "no channels",
                lambda x: x.mean(1),
                ValueError,
                NOT_MAPS.format("the reshape_transform after `2`", (2, 8, 8)),
            ),
            (
                "no positions",
                lambda x: x[..., :0],
                ValueError,
                "expected feature maps without an empty axis from the reshape_transform after `2`, got (2, 16, 8, 0)",
            ),
            (
                "windows",
                lambda x: x.unflatten(3, (2, 4)).movedim(3, 1).flatten(0, 1),
                ValueError,
                "expected one set of feature maps for each of 2 images from the reshape_transform after `2`, got 4: "
                "choose a layer outside the part of the model that cuts images into windows or regions, or merge them "
                "in a reshape_transform",
            ),
        ]
    ),
    Case(
        "an array of images",
        TypeError,
        "expected images as a torch.Tensor, batch x channels x height x width, got ndarray: use torch.from_numpy",
        images=IMAGES.numpy(),
    ),
    *(
        Case(
            f"{kind} as images",
            TypeError,
            f"expected images as a torch.Tensor, batch x channels x height x width, got {kind}: put each picture "
            "through the model's preprocessing, and the tensors through torch.stack",
            images=pictures,
        )
        for kind, pictures in [("list", list(IMAGES)), ("Image", Image.new("RGB", (32, 32)))]
    ),
    Case("one picture, channels last", ValueError, NOT_IMAGES.format((32, 32, 3)), images=HWC),
    Case("one picture, channels first", ValueError, NOT_IMAGES.format((3, 32, 32)), images=IMAGES[0]),
    Case(
        "pictures, channels last",
        ValueError,
        "expected images with their channels second, got (1, 32, 32, 3), on which the model failed: if their channels "
        "are last, pass images.movedim(-1, 1)",
        images=HWC[None],
    ),
    Case(
        "bytes",
        TypeError,
        "expected images of the model's torch.float32, got torch.uint8, on which the model failed: pass "
        "images.to(torch.float32), scaled as in training",
        images=IMAGES.byte(),
    ),
    *(
        case
        for name, convert, error, message in KINDS
        for case in (
            Case(f"{name} images", error, message.format("images"), images=convert(IMAGES)),
            Case(
                f"a transform that returns {name} features",
                error,
                message.format("feature maps from the reshape_transform after `2`"),
                options={"reshape_transform": convert},
                images=IMAGES,
            ),
        )
    ),
    Case(
        "an empty batch",
        ValueError,
        "expected images without an empty axis, got (0, 3, 32, 32)",
        images=IMAGES[:0],
    ),
]
CASES_AND_METHODS = [
    pytest.param(case, method, id=f"{case.name}-{method.__name__}") for case in CASES for method in case.methods
]


def hook_count(model):
    return sum(len(m._forward_hooks) for m in model.modules()) if isinstance(model, nn.Module) else 0


@pytest.mark.parametrize(("case", "method"), CASES_AND_METHODS)
def test_a_bad_argument_is_answered_with_one_clear_error(case, method, monkeypatch):
    second_errors, hooks = [], hook_count(case.model)
    monkeypatch.setattr(sys, "unraisablehook", second_errors.append)
    if case.images is None:
        with pytest.raises(case.error) as caught:
            method(case.model, case.layers, **case.options)
    else:
        cam = method(case.model, case.layers, **case.options)
        for call in (cam, partial(cam, aug_smooth=True), cam.modes):
            with pytest.raises(case.error) as caught:
                call(case.images)
            assert str(caught.value) == case.message
        del cam, call
    assert str(caught.value) == case.message
    del caught
    gc.collect(1)  # the youngest objects: all of them would take a second
    assert second_errors == []
    assert hook_count(case.model) == hooks


@pytest.mark.parametrize("method", METHODS)
def test_a_call_after_the_block_is_named(method):
    with method(CNN, [CNN[2]]) as cam:
        pass
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        cam(IMAGES)
    assert str(caught.value) == UNREACHED.format("2")


@pytest.mark.parametrize("method", METHODS)
def test_features_of_other_dimensions_than_the_images_are_one_clear_error(method):
    cam = method(CNN, [CNN[2]], lambda maps: maps[:, :, None])
    for call in (cam, partial(cam, aug_smooth=True), cam.modes):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
            call(IMAGES)
        assert str(caught.value) == (
            "expected feature maps with the images' spatial axes, got (2, 16, 1, 8, 8) for images (2, 3, 32, 32): fold "
            "or drop the other axes in a reshape_transform"
        )


@pytest.mark.parametrize("error", [KeyError("mine"), RuntimeError("mine"), torch.OutOfMemoryError("my size and type")])
@pytest.mark.parametrize("pictures", [IMAGES, IMAGES.byte(), IMAGES.movedim(1, -1)], ids=["images", "bytes", "HWC"])
@pytest.mark.parametrize("method", METHODS)
def test_an_error_of_the_model_comes_through_as_it_is_whatever_the_images_are(method, pictures, error):
    model = nn.Sequential(Failing(error), nn.Conv2d(3, 4, 3))
    with pytest.raises(type(error)) as caught:
        method(model, [model[1]])(pictures)
    assert caught.value is error


@pytest.mark.parametrize("pictures", [IMAGES.byte(), IMAGES.movedim(1, -1)], ids=["bytes", "HWC"])
@pytest.mark.parametrize("method", METHODS)
def test_an_error_of_the_transform_comes_through_as_it_is_whatever_the_images_are(method, pictures):
    error, model = RuntimeError("of my size and type"), nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3))
    with pytest.raises(RuntimeError) as caught:
        method(model, [model[0]], Failing(error))(pictures)
    assert caught.value is error


@pytest.mark.parametrize("method", METHODS)
def test_an_error_of_pytorch_comes_through_as_it_is(method):
    with pytest.raises(RuntimeError, match=r"expected input.* to have 3 channels, but got 1 channels"):
        method(CNN, [CNN[2]])(IMAGES[:, :1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"features": np.zeros((1, 2, 3, 4))},
            TypeError,
            "expected features as a torch.Tensor, got ndarray: use torch.as_tensor",
        ),
        (
            {"features": torch.zeros(1, 2, 3, 4, dtype=torch.int64)},
            TypeError,
            "expected floating point features, got torch.int64: use features.float()",
        ),
        (
            {"features": torch.zeros(2, 3)},
            ValueError,
            "expected features as batch x channels x spatial, got (2, 3): add the batch axis with features[None], or "
            "pass maps that still have a spatial axis",
        ),
        (
            {"features": torch.zeros(0, 2, 3, 4)},
            ValueError,
            "expected features without an empty axis, got (0, 2, 3, 4)",
        ),
        (
            {"features": torch.full((1, 2, 3, 4), torch.nan)},
            ValueError,
            "expected finite features, got NaN or Inf: use torch.nan_to_num",
        ),
        *(({"features": convert(IMAGES)}, error, message.format("features")) for _, convert, error, message in KINDS),
        ({"engine": "jax"}, ValueError, "expected engine as one of 'torch', 'tensorly', got 'jax'"),
        ({"rank": "all"}, TypeError, f"{RANK_KINDS}'all'"),
        ({"rank": np.array([2, 2, 2])}, TypeError, f"{RANK_KINDS}array([2, 2, 2])"),
        ({"rank": (2, 0, 2)}, ValueError, "expected a rank above 0, got (2, 0, 2): None is full rank"),
        (
            {"rank": (2, 2)},
            ValueError,
            "expected a rank of 3 parts for feature maps of shape (2, 3, 4), channels first, got (2, 2)",
        ),
    ],
)
def test_a_bad_argument_of_channel_modes_is_answered_with_one_clear_error(arguments, error, message):
    with pytest.raises(error) as caught:
        channel_modes(**({"features": torch.ones(1, 2, 3, 4)} | arguments))
    assert str(caught.value) == message
