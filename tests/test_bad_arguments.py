"""Everything that is not an argument is answered with one error: what was expected, what came, and the way out."""

import gc
import inspect
import sys
from functools import partial

import networks
import pytest
import torch
import ttach
from networks import hook_count
from registry import CLASSES, every_class
from timm.models import VisionTransformer
from torch import nn

from tucker_cam import MTSM, TSM, MultivecEigenCAM, channel_modes
from tucker_cam.decomposition.projection import combined_map, leading_map

CNN = networks.small_cnn()
CONVOLUTION = nn.Conv2d(3, 8, 3)
UNUSED = networks.Wired(
    lambda self, x: self.pool(self.convolution(x)),
    convolution=CONVOLUTION,
    listed=nn.ModuleList([CONVOLUTION]),
    unused=nn.Conv2d(3, 8, 3),
    pool=nn.MaxPool2d(2, return_indices=True),
)
VIT = VisionTransformer(img_size=32, patch_size=16, embed_dim=12, depth=1, num_heads=2, num_classes=2)
IMAGES = torch.zeros(2, 3, 32, 32)
ALL = list(CLASSES)
RANKED = [TSM, MTSM]
COMBINED = [MTSM, MultivecEigenCAM]

# The methods, the model, its layers and the options; the error and the words that tell a user what to do.
AT_CONSTRUCTION = [
    (ALL, CNN, CNN[2], {}, TypeError, r"list of layers, got Conv2d: put a layer in brackets, \[layer\]"),
    (ALL, CNN, "layer4", {}, TypeError, "list of layers, got str"),
    (ALL, CNN, ["layer4"], {}, TypeError, "one torch.nn.Module, and nothing else, got .'layer4'"),
    (ALL, CNN, [], {}, ValueError, "at least one torch.nn.Module"),
    (ALL, nn.Conv2d, [CNN[2]], {}, TypeError, "expected model as a torch.nn.Module, .*got <class"),
    (ALL, networks.small_cnn, [CNN[2]], {}, TypeError, "expected model as a torch.nn.Module, .*got <function"),
    (ALL, nn.ReLU(), [CNN[2]], {}, ValueError, "a model with parameters, .*got ReLU"),
    (ALL, CNN, [CNN[2]], {"reshape_transform": "vit"}, TypeError, "a callable or None, got str"),
    (ALL, CNN, [CNN[2]], {"tta_transforms": ttach.HorizontalFlip()}, TypeError, "ttach.Compose or None, got Horiz"),
    (RANKED, CNN, [CNN[2]], {"rank": 0}, ValueError, "a rank above 0, got 0: None is full rank"),
    (RANKED, CNN, [CNN[2]], {"engine": "numpy"}, ValueError, "engine as one of 'torch', 'tensorly', got 'numpy'"),
    (COMBINED, CNN, [CNN[2]], {"combine": "sum"}, ValueError, "combine as one of 'signed', 'energy', got 'sum'"),
]
UNREACHED = "to reach the target layer `{}`, but its hook never fired"
OF_THE_TRANSFORM = "expected feature maps from the reshape_transform after `2`"
# The model, its layers, the options and the images.
AT_THE_CALL = [
    (CNN, [nn.Conv2d(3, 3, 1)], {}, IMAGES, ValueError, UNREACHED.format("Conv2d")),
    (UNUSED, [UNUSED.unused], {}, IMAGES, ValueError, UNREACHED.format("unused") + ".*inside its `with` block"),
    (UNUSED, [UNUSED.listed], {}, IMAGES, ValueError, UNREACHED.format("listed") + ".*that the model loops over"),
    (UNUSED, [UNUSED.pool], {}, IMAGES, TypeError, "feature maps from `pool` as one torch.Tensor, got tuple"),
    (CNN, [CNN], {}, IMAGES, ValueError, r"feature maps from `Sequential` as batch x channels x spatial.*\(2, 10\)"),
    (CNN, [CNN[6]], {}, IMAGES, ValueError, r"from `6` as batch x channels x spatial.*, got \(2, 10\).*before"),
    (VIT, [VIT.blocks[0].norm1], {}, IMAGES, ValueError, r"from `blocks.0.norm1`.*\(2, 5, 12\).*tokens.*reshape_tran"),
    *(
        (CNN, [CNN[2]], {"reshape_transform": transform}, IMAGES, error, OF_THE_TRANSFORM + message)
        for transform, error, message in [
            (lambda x: None, TypeError, " as one torch.Tensor, got NoneType"),
            (lambda x: x.long(), TypeError, " as floating point numbers.*, got torch.int64"),
            (lambda x: x.to(torch.float8_e4m3fn), TypeError, " as floating point numbers.*, got torch.float8"),
            (torch.Tensor.to_sparse, TypeError, " as a dense tensor"),
            (lambda x: x[:, :, :0], ValueError, r".*none of them empty, got \(2, 16, 0, 8\)"),
            (
                lambda x: x[:, :, None],
                ValueError,
                r".*axes of the images \(2, 3, 32, 32\), got \(2, 16, 1, 8, 8\).*fold",
            ),
            (lambda x: x.repeat(4, 1, 1, 1), ValueError, ", one set for each of 2 images, got 8"),
        ]
    ),
    (CNN, [CNN[2]], {}, list(IMAGES), TypeError, "got list: put each picture through the model's preprocessing"),
    (CNN, [CNN[2]], {}, IMAGES.to("meta"), TypeError, "images as a dense tensor with numbers in it"),
    (CNN, [CNN[2]], {}, IMAGES[0], ValueError, r"got \(3, 32, 32\): a single picture needs images\[None\]"),
    (CNN, [CNN[2]], {}, IMAGES[:0], ValueError, r"none of them empty, got \(0, 3, 32, 32\)"),
]


@pytest.mark.parametrize(
    ("method", "model", "layers", "options", "images", "error", "message"),
    [(each, *case[:3], None, *case[3:]) for methods, *case in AT_CONSTRUCTION for each in methods]
    + [(each, *case) for case in AT_THE_CALL for each in ALL]
    + [(each, CNN, [CNN[2]], {"rank": (2, 2)}, IMAGES, ValueError, "a rank of 3 parts") for each in RANKED],
)
def test_a_bad_argument_is_answered_with_one_clear_error(
    method, model, layers, options, images, error, message, monkeypatch
):
    second_errors = []
    monkeypatch.setattr(sys, "unraisablehook", second_errors.append)
    if images is None:
        with pytest.raises(error, match=message):
            method(model, layers, **options)
    else:
        cam = method(model, layers, **options)
        for call in (cam, partial(cam, aug_smooth=True), cam.modes):
            with pytest.raises(error, match=message):
                call(images)
        del cam, call
    gc.collect(1)  # the youngest objects: all of them would take a second
    assert second_errors == []
    assert not any(map(hook_count, (CNN, UNUSED, VIT)))


@pytest.mark.parametrize("error", [KeyError("mine"), RuntimeError("of my size and type")], ids=["key", "runtime"])
@every_class
def test_an_error_of_the_model_or_of_the_transform_comes_through_as_it_is(method, error):
    def fail(*_):
        raise error

    failing, model = networks.Wired(fail, layer=nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 4, 3))
    for cam in (method(failing, [failing.layer]), method(model, [model[0]], fail)):
        with pytest.raises(type(error)) as caught:
            cam(IMAGES)
        assert caught.value is error


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (channel_modes, {"features": IMAGES.long()}, TypeError, "features as floating point numbers"),
        (channel_modes, {"features": IMAGES / 0}, ValueError, "finite features.*use torch.nan_to_num"),
        (channel_modes, {"engine": "jax"}, ValueError, "engine as one of 'torch', 'tensorly', got 'jax'"),
        (combined_map, {"combine": "Signed"}, ValueError, "combine as one of 'signed', 'energy', got 'Sign"),
        (leading_map, {"features": torch.ones(1, 2)}, ValueError, r"none of them empty, got \(1, 2\)"),
    ],
)
def test_a_bad_argument_of_the_mathematics_is_answered_with_one_clear_error(function, arguments, error, message):
    # Without the check of the annotations, which only the tests have.
    with pytest.raises(error, match=message):
        inspect.unwrap(function)(**({"features": IMAGES} | arguments))
