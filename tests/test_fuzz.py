"""A seeded fuzzer: whatever the arguments, a finite and correct map or an error of ours, and never a hang."""

import contextlib
import random
import signal
from functools import partial
from inspect import signature

import networks
import numpy as np
import pytest
import references
import torch
import ttach
from pytorch_grad_cam.utils.reshape_transforms import vit_reshape_transform
from registry import CLASSES
from timm.models import VisionTransformer
from torch import nn

from tucker_cam import TSM, ChannelModes

SECONDS = 300  # TensorLy's engine takes many on a large image
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DTYPES = [torch.float32] * 40 + [torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.complex64]
GOOD_RANKS = [*[None] * 10, 1, 2, 5, 99, 0.1, 1.0, 3.5, "same"]
GOOD_RANKS += [(2, 2, 2), (1, 1, 1), (99, 3, 2), (3, 99, 99), (2, 2, 2, 2)]
BAD_RANKS = [0, -1, float("nan"), float("inf"), "full", (), (0, 1, 1), (2, 2), (1.5, 2, 2), True, b"2", {1}, object]
# Of these numbers a reference in float64 knows the only map.
TELLING = ["normal", "rectified"]


def with_one(number):
    def put(images, draw):
        images.view(-1)[draw.randrange(images.numel())] = number
        return images

    return put


NUMBERS = {
    "normal": lambda images, draw: images,
    "rectified": lambda images, draw: torch.relu(images + 0.3),
    "zeros": lambda images, draw: images * 0,
    "constant": lambda images, draw: images * 0 + 0.7,
    "huge": lambda images, draw: images * 1e37,
    "tiny": lambda images, draw: images * 1e-42,
    "NaN": with_one(torch.nan),
    "Inf": with_one(torch.inf),
    "low rank": lambda images, draw: images[:, :1].expand_as(images),
}
LAYOUTS = {
    "plain": lambda images: images,
    "channels last": lambda images: images.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda images: torch.stack([images, images], -1)[..., 1],
    "transposed": lambda images: images.mT.contiguous().mT,
    "gradient": lambda images: images.requires_grad_() if images.is_floating_point() else images,
}


def choose_model(draw):
    """Return a model, its layers, the number of axes and channels it takes, and a transform that fits it."""
    kind = draw.choice(["cnn"] * 4 + ["passing on"] * 4 + ["tuple", "in place", "volume", "vit"])
    if kind == "vit":
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=2)
        layers = [model.blocks[0].norm1, model.blocks[1].norm1]
        return model, layers, 4, 3, partial(vit_reshape_transform, height=4, width=4)
    if kind == "volume":
        model = networks.small_volume_cnn()
        return model, [model.conv, model.head], 5, 1, None
    if kind == "passing on":
        model = networks.passing_on()
        return model, [model.layer], draw.choice([4, 4, 5]), draw.choice([1, 2, 3, 7, 40]), None
    model = {
        "cnn": networks.small_cnn,
        "in place": networks.in_place_cnn,
        "tuple": partial(networks.returning, lambda x: (x, None)),
    }[kind]()
    return model, [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.ReLU)], 4, 3, None


def choose_images(draw, axes, channels, generator):
    """Return images, mostly of a shape that the model takes, and of what numbers they are."""
    lengths = [32] * (axes - 2) if draw.random() < 0.5 else [draw.choice([2, 5, 8, 16, 33]) for _ in range(axes - 2)]
    shape = [draw.choice([1, 1, 2, 3]), channels if draw.random() < 0.97 else draw.choice([1, 4]), *lengths]
    if axes == 5:
        shape = [*shape[:2], *(min(length, 8) for length in shape[2:])]
    images = torch.randn(*shape, generator=generator, dtype=torch.float64)
    numbers = draw.choice([*TELLING * 5, *NUMBERS])
    images = NUMBERS[numbers](images, draw).to(draw.choice(DTYPES))
    layout = draw.choice([*LAYOUTS] * 4 + ["misshapen"])
    if layout != "misshapen":
        return LAYOUTS[layout](images), numbers
    misshapen = [images[0], images[:0], images.movedim(1, -1), images.flatten(), images.float().numpy(), None, [1]]
    return draw.choice(misshapen), numbers


def choose_options(draw, transform):
    method = draw.choice([*CLASSES])
    accepted, options = signature(method).parameters, {}
    if "rank" in accepted:
        options["rank"] = draw.choice(GOOD_RANKS if draw.random() < 0.95 else BAD_RANKS)
        options["engine"] = draw.choice(["torch"] * 16 + ["tensorly"] * 3 + ["jax"])
    if "combine" in accepted:
        options["combine"] = draw.choice(["signed", "energy"] * 16 + ["sum", None])
    if draw.random() < 0.1:
        options["tta_transforms"] = ttach.Compose([ttach.Multiply([1, 2])])
    nonsense = [lambda x: x[0], lambda x: None, lambda x: x.flatten(1), "vit", 3]
    options["reshape_transform"] = transform if draw.random() < 0.96 else draw.choice(nonsense)
    return method, options


def choose_layers(draw, layers):
    if draw.random() < 0.96:
        return draw.choices(layers, k=draw.choice([1, 1, 1, 1, 2, 3]))
    return draw.choice([[], None, layers[0], [nn.ReLU()], ["conv"], tuple(layers), [None]])


class HangError(BaseException):
    pass


def stop(*_):
    raise HangError(f"a call took more than {SECONDS} s")


def run_case(seed):
    """Make one call and return how it ended: with a map that was compared, with a map, or with an error of ours."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, layers, axes, channels, transform = choose_model(draw)
    device, dtype = draw.choice(DEVICES), draw.choice([torch.float32] * 8 + [torch.float64, torch.bfloat16])
    model = model.to(device, dtype)
    images, numbers = choose_images(draw, axes, channels, generator)
    if draw.random() < 0.97 and isinstance(images, torch.Tensor):
        images = images.to(dtype if images.is_floating_point() else images.dtype)
    method, options = choose_options(draw, transform)
    layers = choose_layers(draw, layers)
    context = draw.choice([contextlib.nullcontext, torch.no_grad, torch.inference_mode])
    call = draw.choice(["map"] * 8 + ["smoothed", "modes"])
    try:
        with context():
            cam = method(model, layers, **options)
            found = cam.modes(images) if call == "modes" else cam(images, aug_smooth=call == "smoothed")
    except Exception as error:
        if isinstance(error, TypeError | ValueError) and str(error).startswith("expected "):
            return "error"
        # The model's own, which comes through.
        with pytest.raises(type(error)), torch.no_grad():
            model(images)
        return "model"
    if call == "modes":
        assert all(isinstance(modes, ChannelModes) for modes in found)
        # The values of numbers near the end of float32 are beyond it.
        assert numbers == "huge" or all(part.isfinite().all() for modes in found for part in modes)
        return "modes"
    assert found.dtype == np.float32
    assert found.shape == (len(images), *images.shape[2:])
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() <= 1 + 1e-6
    features = cam.activations_and_grads.activations[0]
    without_sign_rule = options.get("combine") != "signed" and options.get("rank") is None
    if call != "map" or len(layers) > 1 or numbers not in TELLING or not without_sign_rule:
        return "map"
    if features.numel() > 200_000 or min(features[0, 0].shape) == 1 or "tta_transforms" in options:
        return "map"
    oracle = partial(CLASSES[method], combine="energy") if "combine" in options else CLASSES[method]
    expected = references.explained(oracle, features, size=found.shape[:0:-1])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    return "compared"


def run_cases(seeds):
    ends = []
    before = signal.signal(signal.SIGALRM, stop)
    try:
        for seed in seeds:
            signal.alarm(SECONDS)
            try:
                ends.append(run_case(seed))
            except Exception as error:
                raise AssertionError(f"case {seed}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return ends


# What the host, ttach or OpenCV say of odd numbers is theirs; ours about NaN and Inf has its own tests.
@pytest.mark.filterwarnings("ignore")
def test_five_hundred_cases_end_with_a_map_or_an_error_of_ours():
    ends = run_cases(range(500))
    # The fuzzer itself is worth nothing if it only finds errors.
    assert ends.count("compared") > 20
    assert sum(end in ("compared", "map", "modes") for end in ends) > 200
    assert ends.count("error") > 50


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", range(20))
def test_ten_thousand_cases_end_with_a_map_or_an_error_of_ours(block):
    run_cases(range(500 * (block + 1), 500 * (block + 2)))


# Shapes for each way to solve, small enough for a plain SVD of each image.
HARD_SHAPES = [(64, 7, 7), (200, 7, 7), (24, 14, 14), (100, 20, 20), (150, 12, 12), (200, 14, 14), (40, 4, 5, 6)]
HARD_KINDS = ["hot position", "massive channel", "massive means", "lacks rank", "near tie", "noise", "rectified"]
HARD_DTYPES = [torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64]


def hard_tensors(seed, batch=50):
    """Return feature maps of one shape, kind and precision that are hard to decompose, each by a degree of its own."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shape, kind, dtype = draw.choice(HARD_SHAPES), draw.choice(HARD_KINDS), draw.choice(HARD_DTYPES)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    tensors = normal(batch, *shape)
    degrees = 10 ** (torch.rand(batch, generator=generator, dtype=torch.float64) * 4)
    tensors = tensors if kind == "noise" else torch.relu(tensors + 0.3)
    flat = tensors.flatten(2)
    if kind == "hot position":
        flat[..., draw.randrange(flat.shape[2])] *= degrees[:, None]
    elif kind == "massive channel":
        flat[:, draw.randrange(shape[0])] += degrees[:, None]
    elif kind == "massive means":
        flat += degrees[:, None, None] * normal(batch, shape[0], 1)
    elif kind == "lacks rank":
        flat = normal(batch, shape[0], 3) @ normal(batch, 3, flat.shape[2]) + flat / degrees[:, None, None] ** 2
    elif kind == "near tie":
        left, right = (torch.linalg.qr(normal(batch, n, 2)).Q for n in flat.shape[1:])
        flat = 100 * left @ torch.stack([torch.ones(batch).double(), 1 - 1 / degrees], 1).diag_embed() @ right.mT
        flat = flat + 0.01 * normal(*flat.shape)
    return flat.reshape(batch, *shape).to(dtype)


def counting_components_lie_apart(image, *, center=False):
    """Tell whether the first singular value, and whether all that show in a map with their signs, have no near tie."""
    unfolding = image.reshape(len(image), -1)
    unfolding = unfolding - unfolding.mean(1, keepdims=True) if center else unfolding
    vectors, values, _ = np.linalg.svd(unfolding, full_matrices=False)
    counting = values > 1e-4 * values[0]
    apart = -np.diff(values, append=0) > 1e-5 * values[0]
    largest, smallest = vectors.max(0), vectors.min(0)
    leads = np.abs(largest + smallest) > 1e-6
    return bool(apart[0]), bool(((apart & leads) | ~counting).all())


@pytest.mark.nightly
@pytest.mark.parametrize("method", CLASSES)
def test_eight_thousand_hard_tensors_have_their_map_to_one_part_in_a_hundred_thousand(method):
    model, oracle, worst, compared = networks.passing_on(), CLASSES[method], 0.0, 0
    with method(model, [model.layer]) as cam:
        for seed in range(160):
            tensors = hard_tensors(seed)
            for saliency, image in zip(cam(tensors), tensors.double().numpy(), strict=True):
                first, all_of_them = counting_components_lie_apart(image, center=method.center)
                expected = oracle(image)
                flat = np.ptp(expected) < 2e-5 * expected.max()  # such a map becomes zeros
                if not flat and (first if method is TSM else all_of_them):
                    off = np.abs(saliency - references.scaled(expected)).max()
                    assert off <= 1e-5, f"seed {seed}"
                    worst, compared = max(worst, off), compared + 1
    print(f"{method.__name__}: off by {worst:.1e} at most, of {compared:,} tensors")  # shown by -rP
    assert compared > 4000 or method is not TSM
