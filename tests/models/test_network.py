"""What a network sees of a picture, and how that can be changed."""

import json
import pickle
from dataclasses import replace
from functools import partial

import networks
import numpy as np
import pytest
import torch
from PIL import Image
from repositories import make_repositories
from torch import nn
from torchvision import transforms
from transformers import BitImageProcessor, EfficientNetImageProcessor, MobileViTImageProcessor, ViTImageProcessor

from tucker_cam.models import Network, Preprocessing, load_model
from tucker_cam.models.network import IMAGENET_MEAN, IMAGENET_STD, colours_of, imagenet_preprocessing

TINY = "networks:tiny_loaded_model"
# The left half is black, the right one white, the upper and lower quarters are red.
PICTURE = np.zeros((120, 200, 3), np.uint8)
PICTURE[:, 100:] = 255
PICTURE[:30] = PICTURE[-30:] = 255, 0, 0
PICTURE = Image.fromarray(PICTURE)


def test_imagenets_preprocessing_is_torchvisions_usual_one():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 410, 3), np.uint8))
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()]
    expected = transforms.Compose([*steps, transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])(noise)
    assert torch.equal(imagenet_preprocessing(noise), expected)


def test_the_middle_or_the_whole_picture_is_seen():
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    middle, whole = (Preprocessing(70, crop=crop, **plain)(PICTURE) for crop in (True, False))
    assert middle.shape == whole.shape == (3, 70, 70)
    # The shorter side, 120, becomes 80: from 5 on each side is cropped, and the first red quarter ends at 20 - 5.
    for seen, end in [(middle, 15), (whole, 17.5)]:
        red = (seen[0] - seen[2])[:, 10]
        assert float((red[:35] > 0.5).sum()) == pytest.approx(end, abs=1)
    assert float(middle[2, 35, 32]) < 0.1 < 0.9 < float(middle[2, 35, 37])


@pytest.mark.parametrize("name", [TINY, "torchvision:resnet18", "hf:microsoft/resnet-50"])
def test_a_larger_size_gives_a_finer_map(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_repositories()
    options = {} if name == TINY else {"pretrained": False}
    own = load_model(name, **options)
    side = own.example().shape[-1]
    larger = load_model(name, size=2 * side, **options)
    assert larger.layers[0].shape[-1] == 2 * own.layers[0].shape[-1]
    assert (own.preprocessing, larger.preprocessing["size"]) == (None, 2 * side)
    assert (larger.mean, larger.std) == (tuple(own.mean), tuple(own.std))
    whole = load_model(name, crop=False, **options)
    assert whole.preprocess == Preprocessing(side, False, tuple(own.mean), tuple(own.std))


def test_mean_and_std_are_used_and_what_was_seen_can_be_shown():
    loaded = load_model(networks.small_cnn(), crop=False, mean=np.array([0.1, 0.2, 0.3]), std=[0.4, 0.5, 0.6])
    seen = loaded.preprocess(Image.new("RGB", (30, 20), (255, 0, 51)))
    assert seen[:, 5, 5].tolist() == pytest.approx([0.9 / 0.4, -0.2 / 0.5, -0.1 / 0.6])
    assert loaded.picture(seen)[5, 5] == pytest.approx([1, 0, 0.2], abs=1e-6)
    found = loaded.preprocessing
    numbers = {"size": 224, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert found == {"crop": False, "interpolation": "bilinear"} | numbers
    assert json.loads(json.dumps(found)) == found
    assert pickle.loads(pickle.dumps(loaded.preprocess)) == loaded.preprocess  # noqa: S301 - our own bytes


def test_a_loaded_model_is_returned_as_it_is_or_loaded_again_with_what_is_asked_for():
    loaded = load_model(TINY, layers=["0"])
    loaded.model.train()
    assert load_model(loaded) is loaded
    assert not loaded.model.training
    other = load_model(loaded, size=48)
    assert (other.name, other.layer_names, other.layers[0].shape) == (TINY, ["0"], (1, 8, 24, 24))
    assert load_model(loaded, layers=[-1]).layer_names == ["3"]
    assert load_model(other, layers=[-1]).preprocessing == other.preprocessing


def blue_green_red(picture):
    """Return the input of networks that were trained in Caffe."""
    return 255 * transforms.functional.to_tensor(picture).flip(0)


CAFFE = Network(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), blue_green_red, (0,) * 3, (1 / 255,) * 3)
RED = Image.new("RGB", (64, 48), (200, 60, 10))


@pytest.mark.parametrize(
    "processor",
    [
        MobileViTImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        EfficientNetImageProcessor(size={"height": 64, "width": 64}),
        ViTImageProcessor(rescale_factor=1 / 127.5, image_mean=[1] * 3, image_std=[1] * 3),
        BitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        None,
    ],
    ids=["blue, green, red", "normalised twice", "scaled otherwise", "the usual", "of one's own"],
)
def test_what_is_shown_of_a_networks_input_has_the_pictures_colours(processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_repositories()
    if processor is not None:
        processor.save_pretrained("microsoft/resnet-50")
    network = CAFFE if processor is None else load_model("hf:microsoft/resnet-50")
    np.testing.assert_allclose(255 * network.picture(network.preprocess(RED)).mean((0, 1)), [200, 60, 10], atol=2)


def test_a_network_of_bytes_and_one_that_normalises_each_picture_show_its_colours():
    as_bytes = replace(CAFFE, preprocess=transforms.functional.pil_to_tensor)
    np.testing.assert_allclose(255 * as_bytes.picture(as_bytes.preprocess(RED))[0, 0], [200, 60, 10], atol=1)

    def standardised(picture, least):
        pixels = transforms.functional.to_tensor(picture)
        return (pixels - pixels.mean((1, 2), keepdim=True)) / (pixels.std((1, 2), keepdim=True) + least)

    for least in (1e-6, 0):  # by 0, plain pictures become NaN
        preprocess = partial(standardised, least=least)
        network = replace(CAFFE, preprocess=preprocess, mean=(0.3, 0.4, 0.5), std=(0.2,) * 3)
        shown = network.picture(preprocess(PICTURE))
        assert np.corrcoef(shown[..., 0].ravel(), np.asarray(PICTURE)[..., 0].ravel())[0, 1] > 0.9


def test_what_a_preprocessing_makes_of_colours_is_told_from_padding_and_its_edges():
    padding = transforms.Pad((0, 0, 500, 500)), transforms.Pad(20, fill=127)
    resizing = transforms.Resize(80, transforms.InterpolationMode.BICUBIC)
    last = transforms.ToTensor(), transforms.Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    for first in padding:
        for steps in ((first, *last), (first, resizing, *last)):
            matrix, offset = colours_of(transforms.Compose(steps))
            np.testing.assert_allclose(matrix, np.diag([5, 4, 10 / 3]), atol=1e-5)
            np.testing.assert_allclose(offset, [-2, -2, -2], atol=1e-5)


def test_a_preprocessing_that_cuts_off_black_borders_is_shown_and_replaced_as_others_are():
    def without_borders(picture):
        return transforms.functional.to_tensor(picture.crop(picture.getbbox() or (0, 0, 8, 8)))

    network = replace(CAFFE, preprocess=without_borders, std=(1,) * 3)
    np.testing.assert_allclose(255 * network.picture(without_borders(RED))[0, 0], [200, 60, 10], atol=1)
    assert load_model(network, size=32).preprocess.size == 32


@pytest.mark.parametrize("changed", [{"size": 32}, {"crop": False}, {"mean": (0,) * 3}])
def test_a_preprocessing_that_does_more_to_the_colours_than_the_usual_one_is_not_replaced(changed):
    def with_opacity(picture):
        return transforms.functional.to_tensor(picture.convert("RGBA"))

    def brighter(picture):
        return 0.1 + transforms.functional.to_tensor(picture)

    whole, opaque, bright = (
        replace(CAFFE, preprocess=lambda picture, own=own: own(picture)[:, 80:170, 80:170], std=(std,) * 3)
        for own, std in ((blue_green_red, 1 / 255), (with_opacity, 1), (brighter, 1))
    )
    row = replace(CAFFE, preprocess=lambda picture: whole.preprocess(picture).flatten())
    for network in (whole, opaque, bright, row):
        with pytest.raises(ValueError, match="Sequential: its preprocessing does more to the colours"):
            load_model(network, **changed)
    assert load_model(whole, size=32, mean=(0,) * 3, std=(1,) * 3).preprocess.size == 32
