"""Explaining from Python: whatever holds pictures in, explanations of the user's own pictures out."""

import re

import networks
import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from repositories import make_repositories
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from tucker_cam import MTSM, TSM, evaluate, explain
from tucker_cam.errors import BadFileError, BadValueError
from tucker_cam.methods import METHODS
from tucker_cam.models import Network, load_model

TINY = "networks:tiny_loaded_model"


def noise(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def assert_is_map_of(saliency, seed, method=TSM):
    loaded = load_model(TINY)
    expected = method(loaded.model, loaded.target_layers)(loaded.preprocess(noise(seed=seed))[None])[0]
    np.testing.assert_allclose(saliency, expected, atol=1e-5)


def network_inputs(count):
    return torch.stack([load_model(TINY).preprocess(noise(seed=index)) for index in range(count)])


@pytest.fixture
def folder(tmp_path):
    for index in range(5):
        noise(seed=index).save(tmp_path / f"p{index}.png")
    (tmp_path / "p2.png").write_text("no picture")
    return tmp_path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_a_folder_is_explained_one_after_the_other_and_what_fails_keeps_its_error(folder):
    explanations = explain(folder, TINY, ["tsm", "mtsm"], batch_size=2)
    assert len(explanations) == 5
    assert len(explain(folder, TINY, limit=2)) == 2
    for _ in range(2):
        found = list(explanations)
        assert [each.name for each in found] == ["p0", "p1", "p3", "p4"]
        (failure,) = explanations.failures
        assert failure.name == str(folder / "p2.png")
        assert isinstance(failure.error, OSError)
        assert failure.error.__traceback__ is not None
    for index, explanation in zip((0, 1, 3, 4), found, strict=True):
        assert explanation.maps.keys() == {"tsm", "mtsm"}
        assert_is_map_of(explanation.maps["tsm"], index)
        assert_is_map_of(explanation.maps["mtsm"], index, MTSM)


def test_pictures_arrays_and_paths_in_a_list_are_explained_and_what_is_broken_costs_no_other(folder, caplog):
    array, missing = np.asarray(noise()), str(folder / "missing.png")
    (folder / "half.png").write_bytes((folder / "p0.png").read_bytes()[:700])
    with Image.open(folder / "half.png") as half:
        pictures = [noise(), array, (array / 255).astype(np.float32), folder / "p0.png", missing, half]
        explanations = explain(pictures, TINY)
    assert len(explanations) == 6
    for explanation in explanations:
        assert_is_map_of(explanation.maps["tsm"], 0)
        assert np.array_equal(np.asarray(explanation.picture), array)
    failed = [(failure.name, type(failure.error)) for failure in explanations.failures]
    assert failed == [(missing, BadValueError), ("picture-5", BadFileError)]
    assert [record.getMessage() for record in caplog.records] == [str(failure) for failure in explanations.failures]


def test_a_grey_array_is_a_grey_picture():
    grey = np.asarray(noise().convert("L"))
    for array in (grey, (grey / 255).astype(np.float32)):
        (explanation,) = explain(array, TINY)
        assert np.array_equal(np.asarray(explanation.picture), np.stack([grey] * 3, axis=2))


def test_batches_of_network_inputs_are_explained_also_from_a_loader():
    loaded, images = load_model(TINY), network_inputs(5)
    loader = DataLoader([(image, 7) for image in images], batch_size=2)
    for pictures in (images, loader, list(loader), [images[:3], images[3:]], iter([images[:3], images[3:]])):
        found = list(explain(pictures, loaded))
        assert len(found) == 5
        for index, explanation in enumerate(found):
            assert_is_map_of(explanation.maps["tsm"], index)
            assert explanation.overlay().size == (24, 24)
    assert len(explain(images, loaded)) == 5
    assert [each.name for each in explain(loader, loaded, limit=3)] == ["000000", "000001", "000002"]
    with pytest.raises(TypeError, match="not known"):
        len(explain(loader, loaded))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_and_inputs_are_given_to_a_model_in_the_precision_of_its_weights(precision):
    model = networks.small_cnn()
    whole = [next(iter(explain(given, model))).maps["tsm"] for given in (noise(), network_inputs(1))]
    (saliency,) = explain(network_inputs(1).to(precision), model)
    np.testing.assert_allclose(saliency.maps["tsm"], whole[1], atol=0.02)
    model.to(precision)
    for given, expected in zip((noise(), network_inputs(1)), whole, strict=True):
        (explanation,) = explain(given, model)
        np.testing.assert_allclose(explanation.maps["tsm"], expected, atol=0.02)


def test_a_gallery_that_is_saved_shows_the_components(tmp_path):
    found = explain(noise(), networks.small_cnn(), out=None)
    found.save(tmp_path, gallery=True, progress=False)
    (shown,) = re.findall(r'"components":\[(.*?)\]', (tmp_path / "gallery.html").read_text())
    assert shown.count('"image"') == 6
    assert all(explanation.components.shape[0] == 0 for explanation in found)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_module_is_tried_on_the_inputs_that_it_is_given(kind):
    images = torch.rand(3, 1, 20, 20).to(kind)
    body = [nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AvgPool2d(2)]
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(6 * 9 * 9, 4)).to(kind)
    expected = TSM(model, [model[2]])(images)
    for pictures in (images, [images], iter([(images, torch.zeros(3))])):
        explanations = explain(pictures, model)
        assert explanations.loaded.layer_names == ["2"]
        np.testing.assert_allclose(np.stack([each.maps["tsm"] for each in explanations]), expected, atol=1e-5)
    # The host's GradCAM, which stands beside a classifier's methods, takes no bfloat16.
    network = Network(model, classifies=kind == torch.float32)
    evaluation = evaluate([images], network, "tsm", metrics=("drop", "curves", "road"))
    assert (evaluation.scored, evaluation.failures) == (3, [])
    with pytest.raises(ValueError, match="one picture of 3x224x224, and it failed on it"):
        explain(noise(), model)


@pytest.mark.parametrize(
    ("convolution", "shape"),
    [(nn.Conv3d(3, 4, 3, padding=1), (2, 3, 8, 16, 16)), (nn.Conv2d(3, 4, 224, stride=56), (2, 3, 448, 448))],
    ids=["clips", "larger pictures"],
)
def test_a_module_in_which_a_picture_finds_no_layer_is_tried_on_its_inputs(convolution, shape):
    model, images = nn.Sequential(convolution, nn.ReLU()), torch.rand(shape)
    explanations = explain(images, model)
    assert explanations.loaded.layer_names == ["1"]
    expected = TSM(model, [model[1]])(images)
    np.testing.assert_allclose(np.stack([each.maps["tsm"] for each in explanations]), expected, atol=1e-5)


def test_a_model_of_ones_own_is_explained_at_the_layer_that_is_named_or_found():
    model = networks.small_cnn()
    network = Network(model, networks.tiny_loaded_model().preprocess, (0.5,) * 3, (0.5,) * 3)
    expected = TSM(model, [model[0]])(network.preprocess(noise())[None])[0]
    for layers in ([model[0]], ["0"], [-4]):
        (explanation,) = explain(noise(), network, layers=layers)
        np.testing.assert_allclose(explanation.maps["tsm"], expected, atol=1e-5)
    assert explain(noise(), model).loaded.layer_names == ["3"]


def test_classes_are_methods_by_the_users_name_and_components_come_on_demand():
    (explanation,) = explain(noise(), TINY, {"mine": MTSM, "tsm": METHODS["tsm"]}, components=True)
    assert_is_map_of(explanation.maps["mine"], 0, MTSM)
    assert len(explanation.components) == 6


def test_clips_are_explained():
    (explanation,) = explain(noise(), "networks:tiny_video_network")
    assert explanation.maps["tsm"].shape == (4, 16, 21)
    assert explanation.view == pytest.approx((0, 0, 40, 30), abs=1)
    assert explanation.overlay().size == (40, 30)


@pytest.mark.parametrize(
    ("pictures", "options", "error", "message"),
    [
        (np.zeros((3, 30, 40)), {}, ValueError, "height x width x 3"),
        (np.full((30, 40, 3), 200.0), {}, ValueError, "divide by 255"),
        (np.zeros((30, 40, 3), np.int64), {}, TypeError, "uint8"),
        (torch.zeros(3, 24, 24), {}, ValueError, r"images\[None\]"),
        (7, {}, TypeError, "got int"),
        ([7], {}, TypeError, "picture-0, got int"),
        ([], {}, ValueError, "empty list"),
        ("nowhere.png", {}, ValueError, "nowhere.png: expected pictures"),
        (noise(), {"methods": "TMS"}, ValueError, "near it: tsm"),
        (noise(), {"methods": 3}, TypeError, "methods as names, or as a dict of your own classes by name, got 3"),
        (noise(), {"methods": {"mine": 3}}, TypeError, "mine: expected a subclass of the host's BaseCAM .* got 3"),
        (noise(), {"methods": {"mine": dict}}, TypeError, "mine: expected a subclass of the host's BaseCAM"),
        (noise(), {"engine": "dask"}, ValueError, "expected engine as one of 'torch', 'ray', got 'dask'"),
        (noise(), {"workers": -1}, ValueError, "expected workers of at least 0, got -1"),
        (noise(), {"methods": []}, ValueError, "at least one method"),
        (noise(), {"batch_size": 0}, ValueError, "batch_size"),
        (noise(), {"gallery": True, "out": None}, ValueError, "expected out with gallery"),
        (noise(), {"model": 7}, TypeError, "a Network, got int"),
        (noise(), {"formats": ["pgn"]}, ValueError, "no format 'pgn'; near it: npy"),
        (noise(), {"colormap": "jett"}, ValueError, "no colormap 'jett'; near it: jet"),
        (noise(), {"alpha": 1.5}, ValueError, r"alpha in \[0, 1\]"),
        (noise(), {"alpha": "0.5"}, ValueError, r"alpha in \[0, 1\], got '0.5'"),
        (noise(), {"colormap": 2}, TypeError, "a colormap's name, got 2"),
        (noise(), {"limit": 2.5}, ValueError, "a limit of at least 1 picture, got 2.5"),
        (noise(), {"methods": {1: TSM}}, TypeError, "a method's name, got 1"),
        (noise(), {"methods": {"tsm": MTSM}}, ValueError, "names of your own for methods of your own, got tsm"),
        (noise(), {"out": "memory://maps"}, ValueError, "a folder of this machine, a URL only with Ray"),
        (torch.zeros(0, 3, 24, 24), {}, ValueError, "an empty batch"),
        ({"a.png"}, {}, TypeError, "got str: explain takes pictures and paths in a list"),
        (noise(), {"methods": {"../x": TSM}}, ValueError, "a method's name that can be part of a file name"),
        (noise(), {"engine": "ray", "gallery": True}, ValueError, "with Ray, which writes Parquet"),
        (noise(), {"engine": "ray", "alpha": 0.1}, ValueError, "with Ray, which writes Parquet"),
        (noise(), {"engine": "ray"}, ValueError, "expected paths or URLs with Ray"),
    ],
)
def test_what_cannot_be_explained_or_written_is_one_clear_error_before_the_work(
    tmp_path, pictures, options, error, message
):
    with pytest.raises(error, match=message):
        explain(pictures, **({"model": "no:model", "out": tmp_path} | options))


def bright():
    """Return a network whose feature map is the picture in cells of 16 x 16, brighter where the picture is."""
    parts = {"cells": nn.AvgPool2d(16), "offset": nn.Parameter(torch.tensor(3.0))}
    return networks.Wired(lambda self, x: self.cells(x + self.offset), **parts)


def photograph(size, place, exif=None):
    """Return a dark picture with a bright spot at a place, and where it is after it is turned as its EXIF data says."""
    width, height = size
    pixels = np.full((height, width, 3), 20, np.uint8)
    x, y = place
    pixels[y - height // 30 : y + height // 30, x - width // 30 : x + width // 30] = 250
    picture = Image.fromarray(pixels)
    if exif is None:
        return picture, place
    picture.getexif()[0x0112] = exif
    return picture, (height - 1 - y, x)


@pytest.fixture(scope="module")
def preprocessings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("hub"))
        make_repositories()
        names = ("timm:resnet18", "torchvision:resnet18", "hf:microsoft/resnet-50")
        found = {name: load_model(name, pretrained=False) for name in names}
    squeeze = transforms.Resize((224, 224))
    own = {
        "whole": [transforms.Resize((240, 320))],
        "padded": [transforms.Pad((0, 200)), squeeze],
        "padded all around": [transforms.Pad((150, 200)), squeeze],
    }
    return {name: (loaded.preprocess, loaded.mean, loaded.std) for name, loaded in found.items()} | {
        name: (transforms.Compose([*steps, transforms.ToTensor()]), (0,) * 3, (1,) * 3) for name, steps in own.items()
    }


@pytest.mark.parametrize("exif", [None, 6])
@pytest.mark.parametrize("place", [(500, 300), (1000, 800), (820, 610)])
@pytest.mark.parametrize(
    "name",
    ["timm:resnet18", "torchvision:resnet18", "hf:microsoft/resnet-50", "whole", "padded", "padded all around"],
)
def test_the_overlay_has_the_pictures_size_and_its_peak_is_where_the_object_is(preprocessings, name, place, exif):
    preprocess, mean, std = preprocessings[name]
    picture, (x, y) = photograph((1600, 1200), place, exif)
    (explanation,) = explain([picture], Network(bright(), preprocess, mean, std), layers=["cells"])
    overlay = explanation.overlay()
    assert overlay.size == ((1600, 1200) if exif is None else (1200, 1600))
    # The host's colours: red is where the map is high.
    red = np.asarray(overlay).astype(float) @ (1, -0.5, -1)
    row, column = np.unravel_index(red.argmax(), red.shape)
    down, across = explanation.maps["tsm"].shape
    assert abs(column - x) <= explanation.view.width * 16 / across
    assert abs(row - y) <= explanation.view.height * 16 / down


def test_what_was_cropped_away_is_dimmed_and_the_network_view_is_the_crop():
    picture = Image.new("RGB", (80, 40), (200, 100, 50))
    (explanation,) = explain(picture, TINY)
    assert explanation.view == pytest.approx((20, 0, 40, 40), abs=0.5)
    pixels = np.asarray(explanation.overlay())
    assert np.abs(pixels[:, :19].astype(int) - (80, 40, 20)).max() <= 1
    assert np.abs(pixels[:, 61:].astype(int) - (80, 40, 20)).max() <= 1
    assert (pixels[:, 21:59].reshape(-1, 3).max(0) > 80).any()
    assert explanation.overlay(view="network").size == (24, 24)


def test_a_notebook_shows_the_picture_beside_its_overlays_without_fetching_anything(tmp_path):
    (tmp_path / "broken.png").touch()
    explanations = explain([noise(), noise(seed=1), tmp_path / "broken.png"], TINY, ["tsm", "mtsm"])
    page = explanations._repr_html_()
    assert page.count("<img") == 6
    assert page.count("<p>") == page.count("broken.png") == 1
    assert explanations.failures == []
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))
    assert "http" not in page
    assert page.count("<figcaption>tsm<") == 2
    assert repr(explanations).startswith("<Explanations of 3 pictures by tsm, mtsm; model: networks:tiny")
    list(explanations)
    assert "mtsm, 1 failed; model" in repr(explanations)


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_pictures_that_a_program_holds_are_written_and_others_of_their_place_are_not_taken_for_them(out):
    for seed in (0, 1, 1):
        explain(noise(seed=seed), TINY, out=out, formats="npy", progress=False)
        assert_is_map_of(np.load(out / "picture-0_tsm.npy"), seed)
    for seen in (np.asarray(noise()).reshape(40, 30, 3), noise()):
        explain(seen, TINY, out=out, formats="npy", progress=False)
    assert_is_map_of(np.load(out / "picture-0_tsm.npy"), 0)
    explanations = explain(DataLoader(network_inputs(5), batch_size=2), TINY, out=out, progress=False)
    assert not explanations.failures
    assert files_in(out) == [*(f"{i:06}_tsm.png" for i in range(5)), "manifest.json", "picture-0_tsm.npy"]


def test_a_stream_is_written_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr("tucker_cam.explanations.folder._PART", 4)
    images = network_inputs(10)
    explain([images[:3], images[3:6], images[6:]], TINY).save(tmp_path, ["npy", "zarr"], progress=False)
    for index in (0, 5, 9):
        assert_is_map_of(np.load(tmp_path / f"{index:06}_tsm.npy"), index)
        assert_is_map_of(zarr.open_group(tmp_path / "maps.zarr")["tsm"][index], index)


def test_what_another_model_layer_or_preprocessing_makes_goes_beside_and_is_found_again(folder, out, caplog):
    caplog.set_level("INFO", "tucker_cam")
    options = {"out": out, "gallery": True, "progress": False}
    explain(folder / "p0.png", TINY, **options)
    first = {name: (out / name).read_bytes() for name in files_in(out) if name != "gallery.html"}
    smooth = {"layers": ["1"], "aug_smooth": True}
    for other, place in (({"layers": ["1"]}, "_1"), (smooth, "_1-2"), ({"size": 48}, "_3"), ({"layers": ["1"]}, "_1")):
        explain(folder / "p0.png", TINY, **other, **options)
        assert (out / f"networks-tiny_loaded_model{place}" / "p0_tsm.png").is_file()
    assert {name: (out / name).read_bytes() for name in first} == first
    assert len({path.read_bytes() for path in out.rglob("p0_tsm.png")}) == 4
    said = [record.getMessage() for record in caplog.records if "go beside" in record.getMessage()]
    assert said == [f"note: {out} holds the results of another run: these go beside them"] * 3
    names = re.findall(r'"name":"([^"]*)"', (out / "gallery.html").read_text())
    assert names == [f"p0 (networks:tiny_loaded_model, {layer})" for layer in "3113"]


def test_of_a_changed_picture_the_files_of_ones_own_method_are_removed_too(folder, out):
    pictures, options = [folder / "p0.png", folder / "p1.png"], {"out": out, "formats": ["npy"], "progress": False}
    explain(pictures, TINY, {"mine": MTSM}, **options)
    noise(seed=9).save(folder / "p0.png")
    explain(pictures, TINY, **options)
    assert files_in(out) == ["manifest.json", "p0_tsm.npy", "p1_mine.npy", "p1_tsm.npy"]


def test_overlays_that_are_asked_for_in_another_look_are_drawn_again_and_no_others(folder, out):
    options = {"out": out, "progress": False}
    explain([folder / "p0.png", folder / "p1.png"], TINY, ["tsm", "mtsm"], **options)
    (explanation,) = explain(folder / "p0.png", TINY)
    drawn, others = [], []
    for look in {}, {"alpha": 1.0}, {"view": "network"}, {"colormap": "viridis"}, {"colormap": "viridis"}:
        explain(folder / "p0.png", TINY, **options, **look)
        with Image.open(out / "p0_tsm.png") as overlay:
            assert np.array_equal(np.asarray(overlay), np.asarray(explanation.overlay(**look)))
        files = {path.name: path.read_bytes() for path in out.glob("*.png")}
        drawn.append(files.pop("p0_tsm.png"))
        others.append(files)
    assert len(set(drawn)) == 4
    assert len(others[0]) == 3
    assert all(each == others[0] for each in others)


def test_the_look_that_is_asked_for_is_that_of_overlays_and_of_what_is_saved(out):
    look = {"view": "network", "colormap": "viridis", "alpha": np.float32(0.75)}
    explanations = explain(noise(40, 30), TINY, **look)
    (plain,), (explanation,) = explain(noise(40, 30), TINY), explanations
    expected = np.asarray(plain.overlay(**look))
    assert np.array_equal(np.asarray(explanation.overlay()), expected)
    assert explanation.overlay(view="picture").size == (40, 30)
    explanations.save(out, progress=False)
    with Image.open(out / "picture-0_tsm.png") as overlay:
        assert np.array_equal(np.asarray(overlay), expected)


def test_an_iterator_is_gone_through_once_and_says_so(tmp_path):
    explanations = explain(iter([torch.rand(2, 3, 24, 24)]), TINY)
    assert len(list(explanations)) == 2
    with pytest.raises(ValueError, match="give a list of them"):
        explanations.save(tmp_path, progress=False)


def test_of_other_channels_than_one_or_three_there_are_maps_and_no_overlay(out):
    model = nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU())
    explanations = explain(torch.rand(1, 5, 12, 12), model, out=out, formats=iter(["overlay", "npy"]), progress=False)
    (failure,) = explanations.failures
    assert "could not be written (expected a network input of one or three" in str(failure)
    (explanation,) = explanations
    assert np.array_equal(np.load(out / "000000_tsm.npy"), explanation.maps["tsm"])
    with pytest.raises(ValueError, match="one or three channels to draw, got 5: take the maps, or the format npy"):
        explanation.overlay()
    assert "one or three channels to draw, got 5" in explanation._repr_html_()


def test_a_network_of_one_channel_is_shown_in_grey():
    model, images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), torch.rand(1, 1, 12, 12, requires_grad=True)
    network = Network(
        model, lambda picture: transforms.ToTensor()(picture.convert("L").resize((12, 12))), (0.0,), (1.0,)
    )
    (explanation,) = explain(images, network)
    assert explanation.overlay().size == (12, 12)
    # ImageNet's mean and deviation are those of three channels.
    (explanation,) = explain(images, Network(model))
    assert np.ptp(np.asarray(explanation.picture), axis=2).max() == 0
