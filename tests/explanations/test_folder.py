"""Folders of pictures: found, explained in batches, written complete or not at all, and gone on with."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from annotated import write_picture
from PIL import Image
from typer.testing import CliRunner

from tucker_cam import MTSM, TSM, explain
from tucker_cam.cli import app
from tucker_cam.errors import BadValueError, Failure
from tucker_cam.explanations import outputs
from tucker_cam.explanations.explainer import Explainer, ReadBatch
from tucker_cam.explanations.folder import remove_files
from tucker_cam.explanations.manifest import Manifest
from tucker_cam.explanations.outputs import MethodFiles
from tucker_cam.models import load_model
from tucker_cam.pictures.annotations import find_samples
from tucker_cam.pictures.files import open_picture
from tucker_cam.pictures.held import Held
from tucker_cam.pictures.sources import Source

MODEL = ("--model", "networks:tiny_loaded_model")


def run(*arguments):
    return CliRunner().invoke(app, ["explain", *(str(argument) for argument in arguments)])


def make_pictures(folder, count, seed=0):
    for index in range(count):
        write_picture(folder / f"p{index:03}.png", (40, 30), seed=(seed, index))
    return folder


@pytest.fixture
def pictures(tmp_path):
    make_pictures(tmp_path / "pictures", 9)
    make_pictures(tmp_path / "pictures" / "deeper", 2, seed=1)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    make_pictures(tmp_path / "pictures" / ".hidden", 1)
    return tmp_path / "pictures"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def expected_map(path, method=TSM):
    loaded = load_model("networks:tiny_loaded_model")
    with method(loaded.model, loaded.target_layers) as cam:
        return cam(loaded.preprocess(open_picture(path))[None])[0]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest_of(out):
    return json.loads((out / "manifest.json").read_text())


def shown_in(out):
    """Return the entries of a gallery by name."""
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', (out / "gallery.html").read_text())
    return {entry["name"]: entry for entry in map(json.loads, blocks)}


def test_a_folder_is_explained_at_any_depth_and_the_manifest_says_what_is_what(pictures, out):
    result = run(pictures, *MODEL, "--format", "npy", "--method", "tsm", "--method", "mtsm", "--out", out)
    assert result.exit_code == 0, result.output
    assert "11 pictures: 11 explained, 0 there already, 0 failed" in result.output
    path = pictures / "deeper" / "p001.png"
    assert len(contents(out)) == 23
    assert not list(out.rglob(".*"))
    np.testing.assert_allclose(np.load(out / "p003_tsm.npy"), expected_map(pictures / "p003.png"), atol=1e-5)
    np.testing.assert_allclose(np.load(out / "deeper" / "p001_mtsm.npy"), expected_map(path, MTSM), atol=1e-5)
    manifest = manifest_of(out)
    assert (manifest["model"], manifest["layers"]) == ("networks:tiny_loaded_model", ["3"])
    entry = {"name": "deeper/p001", "modified": path.stat().st_mtime_ns, "size": path.stat().st_size}
    assert manifest["pictures"][str(path)] == entry | {"view": pytest.approx([5, 0, 30, 30], abs=0.5)}
    assert {"tucker-cam", "torch", "grad-cam", "numpy"} <= manifest["versions"].keys()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_map_depends_neither_on_the_workers_nor_on_where_a_run_was_interrupted(pictures, out, workers):
    arguments = (pictures, *MODEL, "--format", "npy", "--batch-size", 4, "--out", out)
    assert run(*arguments, "--workers", 1).exit_code == 0
    whole = contents(out)
    for name in ("p001_tsm.npy", "p006_tsm.npy", "deeper/p000_tsm.npy"):
        (out / name).unlink()
    result = run(*arguments, "--workers", workers)
    assert "11 pictures: 3 explained, 8 there already, 0 failed" in result.output
    assert contents(out) == whole


def test_results_are_not_explained_in_whatever_folder_they_were_written(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    for found, out, already in (".", "out", 0), (".", "out", 11), ("**/*.png", ".", 0), ("**/*.png", ".", 11):
        said = run(found, *MODEL, "--out", out).output
        assert f"11 pictures: {11 - already} explained, {already} there already, 0 failed" in said
    assert "11 pictures: 11 explained" in run(".", "**/*.png", *MODEL, "--out", "other").output
    assert len(find_samples(pictures).samples) == 11
    assert "found none but results of earlier runs" in run("out", *MODEL, "--out", "third").stderr


def test_where_the_network_looked_is_noted_without_reading_a_picture_again_and_after_a_kill(pictures, out, monkeypatch):
    read, opened = [], Source.read
    monkeypatch.setattr(Source, "read", lambda source, frames: read.append(source.name) or opened(source, frames))
    arguments = (pictures, *MODEL, "--format", "npy", "--workers", "0", "--out", out)
    assert run(*arguments).exit_code == 0
    assert len(read) == len(set(read)) == 11
    whole, killed = manifest_of(out), manifest_of(out)
    for entry in killed["pictures"].values():
        assert entry.pop("view")
    (out / "manifest.json").write_text(json.dumps(killed))
    assert run(*arguments).exit_code == 0
    assert manifest_of(out) == whole


def test_a_folder_of_runs_is_none_of_them(pictures, out):
    assert run(pictures, *MODEL, "--out", out / "first").exit_code == 0
    assert "11 explained" in run(pictures, *MODEL, "--out", out).output
    assert (out / "p000_tsm.png").is_file()


def test_a_table_that_is_none_costs_no_picture_of_its_folder_its_map(pictures, tmp_path):
    pq.write_table(pa.table({"label": [1]}), pictures / "none.parquet")
    pq.write_table(pa.Table.from_arrays([pa.array([b"one"])] * 2, ["image"] * 2), pictures / "two.parquet")
    (pictures / "broken.parquet").write_bytes(b"PAR1 no table")
    result = run(pictures, *MODEL, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "none.parquet: expected one column image, found label" in result.stderr
    assert "two.parquet: expected one column image, found image, image" in result.stderr
    assert "broken.parquet: expected a Parquet file" in result.stderr
    assert "14 pictures: 11 explained, 0 there already, 3 failed" in result.output


def test_what_cannot_be_used_costs_a_line_and_alone_the_run_before_the_model_is_loaded(pictures, tmp_path, out):
    out.mkdir()
    (tmp_path / "file").write_text("mine")
    bad = {
        tmp_path / ("x" * 300): "expected pictures or Parquet files, found none",
        out: "expected another folder for the results",
    }
    result = run(pictures, *bad, "ftp://127.0.0.1:9/x.jpg", *MODEL, "--out", out)
    assert result.exit_code == 1, result.output
    assert "14 pictures: 11 explained, 0 there already, 3 failed" in result.output
    said = bad | {"ftp://127.0.0.1:9/x.jpg": "could not be opened ("}
    assert all(f"{argument}: {message}" in result.stderr.replace("\n", "") for argument, message in said.items())
    for arguments, message in [
        *(((argument, "--out", out), message) for argument, message in bad.items()),
        ((pictures, "--out", tmp_path / "file" / "out"), "Not a directory"),
        ((pictures, "--out", tmp_path / "file"), "expected a folder for what is written, found a file"),
    ]:
        alone = run(*arguments, "--model", "no:model")
        assert alone.exit_code == 2
        assert message in alone.stderr


def test_names_of_a_table_lead_nowhere_and_do_not_stand_in_the_way_of_our_files(pictures, tmp_path, out):
    names = [
        "good", "good_tsm.png/x", "good_tsm.npy/x", ".good_tsm.png.unfinished/x", ".manifest.json.unfinished/x",
        "manifest.json/x", "gallery.html/x", "maps.zarr/x", ".gallery/x", "good.json/x", ".x",
        "../../b", "/c", "n/" * 3000, "good", "broken",
    ]  # fmt: skip
    images = [(pictures / "p000.png").read_bytes()] * len(names)
    images[-2:] = (pictures / "p003.png").read_bytes(), b"no picture"
    pq.write_table(pa.table({"image": images, "name": names}), tmp_path / "t.parquet", row_group_size=2)
    formats = ("--format", "overlay", "--format", "npy", "--format", "zarr", "--gallery")
    for already in (0, 15):
        result = run(tmp_path / "t.parquet", *MODEL, *formats, "--out", out)
        assert f"16 pictures: {15 - already} explained, {already} there already, 1 failed" in result.output
        assert "t.parquet, row 1 of group 7: expected a picture" in result.stderr
    assert len(list(out.rglob("*_tsm.npy"))) == 15
    assert {"b_tsm.npy", "c_tsm.npy"} <= contents(out).keys()
    np.testing.assert_allclose(np.load(out / "good-2_tsm.npy"), expected_map(pictures / "p003.png"), atol=1e-5)


def test_ten_thousand_pictures_of_one_name_are_named_and_removed_without_a_search(tmp_path):
    sources = [Source("cat", "t.parquet", (0, row)) for row in range(10_000)]
    manifest = Manifest(tmp_path, None)
    started = time.process_time()
    manifest.add(sources)
    for source in sources[-1000:]:
        remove_files(manifest, source.key)
    assert time.process_time() - started < 3
    assert list(manifest.names.values()) == ["cat", *(f"cat-{number}" for number in range(2, 10_001))]


def test_a_zarr_store_of_the_older_format_whose_codec_unpickles_is_not_read(pictures, tmp_path, out, monkeypatch):
    monkeypatch.setattr("numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)
    assert run(pictures / "p000.png", *MODEL, "--out", out).exit_code == 0
    array = out / "maps.zarr" / "tsm"
    array.mkdir(parents=True)
    (array.parent / ".zgroup").write_text('{"zarr_format": 2}')
    filters = [{"id": "vlen-utf8"}, {"id": "pickle"}]
    kept = {"shape": [1, 24, 24], "chunks": [2, 24, 24], "dtype": "|O", "fill_value": "", "order": "C"}
    (array / ".zarray").write_text(json.dumps({"zarr_format": 2, "compressor": None, "filters": filters, **kept}))
    (array / "0.0.0").write_bytes(f"cposix\nmkdir\n(V{tmp_path / 'ran'}\ntR.".encode())
    run(pictures / "p000.png", *MODEL, "--format", "zarr", "--out", out)
    assert not (tmp_path / "ran").exists()


def test_a_zarr_store_has_the_maps_in_the_order_of_the_manifest_is_gone_on_with_and_grows(pictures, out):
    (pictures / "p004.png").write_bytes(b"broken")
    methods = ("--method", "tsm", "--method", "mtsm")
    arguments = (pictures, *MODEL, *methods, "--format", "zarr", "--format", "npy", "--out", out)
    assert "11 pictures: 10 explained, 0 there already, 1 failed" in run(*arguments).output
    store = out / "maps.zarr" / "tsm" / "c"
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    assert len(before) == 10
    (store / "3" / ".0.123.partial").write_bytes(b"what a killed run left")
    (store / "5" / "0" / "0").unlink()
    make_pictures(pictures / "new", 3)
    assert "14 pictures: 4 explained, 9 there already, 1 failed" in run(*arguments).output
    assert [path.parts[-3] for path in before if path.stat().st_mtime_ns != before[path]] == ["5"]
    assert not list(store.rglob("*.partial"))
    group = zarr.open_group(out / "maps.zarr", mode="r")
    assert group.attrs["model"] == "networks:tiny_loaded_model"
    names = [each["name"] for each in manifest_of(out)["pictures"].values()]
    assert group.attrs["pictures"] == names
    assert names[11:] == ["new/p000", "new/p001", "new/p002"]
    for method in ("tsm", "mtsm"):
        missing = np.full((24, 24), np.nan)
        expected = [missing if name == "p004" else np.load(out / f"{name}_{method}.npy") for name in names]
        np.testing.assert_array_equal(group[method][:], expected)


def test_a_map_of_another_size_does_not_fit_a_zarr_store_and_says_what_does(tmp_path, out):
    make_pictures(tmp_path / "pictures", 2)
    Image.new("RGB", (60, 30)).save(tmp_path / "pictures" / "z.png")
    arguments = (tmp_path / "pictures", "--model", "networks:uncropped_model", "--out", out)
    result = run(*arguments, "--format", "zarr")
    assert "2 explained, 0 there already, 1 failed" in result.output
    assert "its map is 30x60, the store's are 30x40: the format npy takes maps of any size" in result.stderr
    assert run(*arguments, "--format", "npy").exit_code == 0
    assert np.load(out / "z_tsm.npy").shape == (30, 60)


def test_what_cannot_be_removed_of_a_changed_picture_is_named_and_tried_again(pictures, out, monkeypatch):
    assert run(pictures, *MODEL, "--out", out).exit_code == 0
    os.utime(pictures / "p002.png", (1e9, 1e9))
    make_pictures(pictures / "new", 1)

    def denied(manifest, key):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("tucker_cam.explanations.folder.remove_files", denied)
        result = run(pictures, *MODEL, "--out", out)
    assert result.exit_code == 1
    assert "p002.png: what an earlier run wrote could not be removed" in result.stderr
    assert "12 pictures: 1 explained, 10 there already, 1 failed" in result.output
    assert "12 pictures: 1 explained, 11 there already" in run(pictures, *MODEL, "--out", out).output


def test_a_picture_that_changed_is_explained_again(pictures, out):
    path, npy = pictures / "p002.png", (pictures, *MODEL, "--format", "npy", "--out", out)
    everything = (*npy, "--format", "overlay", "--format", "zarr", "--gallery", "--method", "mtsm")
    assert run(*everything).exit_code == run(*npy).exit_code == 0
    before = np.load(out / "p002_tsm.npy")
    others = {name: content for name, content in contents(out).items() if re.search("p00[^2]", name)}
    write_picture(path, (40, 30), seed=9)
    # Older than the map, as a file that was moved or unpacked may be.
    os.utime(path, (1e9, 1e9))
    again = run(*npy).output
    assert "11 pictures: 1 explained, 10 there already" in again
    # Of MTSM in all four kinds, of TSM an array.
    assert f"note: {path} has changed; files removed that earlier runs wrote of it: 5" in again
    assert np.abs(np.load(out / "p002_tsm.npy") - before).max() > 0.01
    # What this run was not asked for is not left as it was: it would show another picture.
    assert "11 pictures: 1 explained, 10 there already" in run(*everything).output
    index = list(manifest_of(out)["pictures"]).index(str(path))
    saliency = zarr.open_group(out / "maps.zarr", mode="r")["mtsm"][index]
    np.testing.assert_array_equal(saliency, np.load(out / "p002_mtsm.npy"))
    np.testing.assert_allclose(saliency, expected_map(path, MTSM), atol=1e-5)
    assert len(others) == 40
    assert contents(out).items() >= others.items()
    # Of the same time and another size.
    Image.new("RGB", (30, 40), "red").save(path)
    os.utime(path, (1e9, 1e9))
    assert "11 pictures: 1 explained, 10 there already" in run(*npy).output


def test_what_no_manifest_lists_is_neither_taken_for_a_map_nor_overwritten(pictures, tmp_path, out):
    out.mkdir()
    for name in ("p003_tsm.png", "notes.txt"):
        (out / name).write_text("mine")
    for explained, there in ((10, 0), (0, 10)):
        result = run(pictures, *MODEL, "--out", out)
        assert result.exit_code == 1
        assert "p003_tsm.png is there already, and not of a run in this folder" in result.stderr
        assert f"11 pictures: {explained} explained, {there} there already, 1 failed" in result.output
    # Nor when another method is asked for in between.
    assert "p003_tsm.png is there already" in run(pictures, *MODEL, "--method", "mtsm", "--out", out).stderr
    assert "11 pictures: 0 explained, 10 there already, 1 failed" in run(pictures, *MODEL, "--out", out).output
    assert (out / "p003_tsm.png").read_text() == (out / "notes.txt").read_text() == "mine"
    (out / "p003_tsm.png").unlink()
    assert "11 pictures: 1 explained, 10 there already, 0 failed" in run(pictures, *MODEL, "--out", out).output
    for name in ("gallery.html", "maps.zarr"):
        other = tmp_path / name.partition(".")[0]
        other.mkdir()
        (other / name).write_text("mine")
        result = run(pictures, *MODEL, "--format", "zarr", "--gallery", "--out", other)
        assert result.exit_code == 2
        assert f"{name} is there already" in result.stderr
        assert (other / name).read_text() == "mine"


def test_a_broken_store_or_part_names_its_file_and_what_to_do(pictures, out):
    arguments = (pictures, *MODEL, "--format", "zarr", "--gallery", "--out", out)
    assert run(*arguments).exit_code == 0
    part, manifest = out / ".gallery" / "tsm" / "p001.json", manifest_of(out)
    (pictures / "broken.png").write_bytes(b"no picture")
    whole = part.read_text()
    for text in (whole[:100], "[]", "{}"):
        part.write_text(text)
        result = run(*arguments)
        assert result.exit_code == 1
        assert "p001.json: expected a part of the gallery, found a broken one: delete it" in result.stderr
        assert "broken.png: expected a picture" in result.stderr
        assert "12 pictures: 0 explained, 11 there already, 1 failed" in result.output
    (pictures / "broken.png").unlink()
    part.unlink()
    assert run(*arguments).exit_code == 0
    assert part.read_text() == whole
    manifest["pictures"] = dict(reversed(manifest["pictures"].items()))
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert "its pictures are not in the manifest's order" in " ".join(run(*arguments).stderr.split())
    (out / "maps.zarr" / "zarr.json").write_text("")
    assert "maps.zarr: expected a Zarr store of an earlier run" in run(*arguments).stderr


def test_one_picture_on_which_the_network_fails_costs_no_other_its_map(pictures):
    loaded = load_model("networks:tiny_loaded_model")
    paths = [pictures / f"p{index:03}.png" for index in range(6)]
    inputs = [loaded.preprocess(open_picture(path)) for path in paths]

    runs = []

    def refuse(model, images):
        runs.append(len(images[0]))
        if (images[0] == inputs[4]).flatten(1).all(1).any():
            raise RuntimeError("not this one\nand a long story")

    loaded.model.register_forward_pre_hook(refuse)
    explained = Explainer(loaded, {"tsm": TSM, "mtsm": MTSM}).explain(
        [Held(path.name, None) for path in paths], ReadBatch(inputs, [None] * 6)
    )
    assert isinstance(explained[4], RuntimeError)
    assert str(Failure("p004.png", explained[4])) == "p004.png: not this one"
    assert runs == [6, 1, 1, 1, 1, 1, 1]
    for index in (0, 1, 2, 3, 5):
        np.testing.assert_allclose(explained[index].maps["tsm"], expected_map(paths[index]), atol=1e-5)


def test_a_method_that_fails_on_one_picture_costs_neither_it_the_others_maps_nor_others_theirs(pictures, out):
    Image.new("RGB", (40, 30), (90, 120, 30)).save(pictures / "flat.png")
    options = (*MODEL, "--method", "tsm", "--method", "networks:FailsOnFlat", "--gallery", "--out", out)
    for already in (0, 11):
        result = run(pictures, *options)
        assert result.exit_code == 1
        assert result.stderr.count("flat.png, networks.FailsOnFlat: nothing to see") == 1
        assert f"12 pictures: {12 - already} explained, {already} there already, 0 failed" in result.output
    overlays = {path.name for path in out.glob("*.png")}
    assert {"flat_tsm.png", "p000_tsm.png", "p000_networks.FailsOnFlat.png"} < overlays
    assert "flat_networks.FailsOnFlat.png" not in overlays
    # Under the methods that it has, so that the other is missed.
    assert [path.parent.name for path in out.glob(".gallery/*/flat.json")] == ["tsm"]
    methods = {name: set(entry["methods"]) for name, entry in shown_in(out).items()}
    assert methods["flat"] == {"tsm"}
    assert methods["p000"] == {"tsm", "networks.FailsOnFlat"}
    # Where no method has a map, it is the picture that failed.
    alone = run(pictures, *MODEL, "--method", "networks:FailsOnFlat", "--format", "npy", "--out", out)
    assert "flat.png: nothing to see" in alone.stderr
    assert "12 pictures: 11 explained, 0 there already, 1 failed" in alone.output


def test_no_two_maps_have_one_file_whatever_pictures_and_methods_are_called(pictures, out):
    named = [
        (pictures / "p000.png").rename(pictures / "cat.png"),
        (pictures / "p001.png").rename(pictures / "cat_my.png"),
    ]
    assert not explain(named, MODEL[1], {"tsm": TSM, "my_tsm": MTSM}, out=out, formats="npy").failures
    for path in named:
        for name, method in {"tsm": TSM, "my-tsm": MTSM}.items():
            np.testing.assert_allclose(np.load(out / f"{path.stem}_{name}.npy"), expected_map(path, method), atol=1e-5)
    with pytest.raises(BadValueError, match="names of your own for methods of your own, got my-tsm"):
        explain(named, MODEL[1], {"my_tsm": MTSM, "my-tsm": TSM}, out=out)


def test_a_preprocessing_that_fails_on_one_picture_is_named_and_the_others_done(pictures, out):
    Image.new("RGB", (1, 1)).save(pictures / "tiny.png")
    result = run(pictures, "--model", "networks:picky_preprocessing", "--out", out)
    assert result.exit_code == 1
    assert "tiny.png: its preprocessing failed (ValueError: Requested crop size (20, 20)" in result.stderr
    assert "12 pictures: 11 explained, 0 there already, 1 failed" in result.output


def test_a_clip_is_explained_frame_by_frame_and_its_overlay_moves(tmp_path, out):
    frames = [Image.new("RGB", (30, 20), (0, index * 10, 0)) for index in range(20)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    arguments = (tmp_path / "clip.gif", "--model", "networks:tiny_video_network", "--out", out)
    result = run(*arguments, "--format", "npy", "--format", "overlay")
    assert result.exit_code == 0, result.output
    assert np.load(out / "clip_tsm.npy").shape == (4, 16, 24)
    with Image.open(out / "clip_tsm.png") as overlay:
        assert (overlay.n_frames, overlay.size) == (4, (24, 16))
    refused = run(*arguments, "--gallery")
    assert refused.exit_code == 2
    assert "expected a network for pictures with gallery" in refused.stderr


def test_a_gallery_shows_the_methods_and_pictures_of_all_runs(pictures, out):
    options = (*MODEL, "--gallery", "--out", out)
    assert f"gallery: {out / 'gallery.html'}" in run(pictures / "deeper", *options, "--method", "tsm").output
    assert shown_in(out).keys() == {"p000", "p001"}
    assert run(pictures, *options, "--method", "mtsm", "--method", "fem").exit_code == 0
    assert run(pictures / "p003.png", *options, "--method", "tsm").exit_code == 0
    methods = {name: set(entry["methods"]) for name, entry in shown_in(out).items()}
    # The names that the first run gave stay: the second p001 is another one.
    assert methods.keys() == {*(f"p{index:03}" for index in range(9)), "p000-2", "p001-2"}
    assert methods["p000"] == methods["p003"] == {"tsm", "mtsm", "fem"}
    assert methods["p000-2"] == methods["p004"] == {"mtsm", "fem"}


def test_a_gallery_links_the_overlays_that_are_there_and_of_its_runs(tmp_path, out):
    def files():
        methods = [entry["methods"]["tsm"] for entry in shown_in(out).values()]
        return {(method.get("colormap"), method.get("file")) for method in methods}

    options = (make_pictures(tmp_path / "some", 1), *MODEL, "--gallery", "--out", out)
    make_pictures(tmp_path / "some" / "a #1%", 1)
    (tmp_path / "some" / "p000.png").unlink()
    overlay = out / "a #1%" / "p000_tsm.png"
    overlay.parent.mkdir(parents=True)
    overlay.touch()
    assert run(*options, "--format", "npy").exit_code == 0
    assert files() == {(None, None)}
    overlay.unlink()
    assert run(*options, "--colormap", "viridis").exit_code == 0
    assert files() == {("viridis", "a%20%231%25/p000_tsm.png")}
    assert run(*options, "--layer", "0").exit_code == 0
    below = ("jet", "networks-tiny_loaded_model_0/a%20%231%25/p000_tsm.png")
    assert files() == {("viridis", "a%20%231%25/p000_tsm.png"), below}
    # Each method's overlay as it was drawn.
    assert run(*options, "--method", "mtsm").exit_code == 0
    assert files() == {("viridis", "a%20%231%25/p000_tsm.png"), below}
    overlay.unlink()
    assert run(*options, "--layer", "0").exit_code == 0
    assert files() == {(None, None), below}


@pytest.mark.cuda
def test_a_gpu_takes_larger_batches_and_gives_the_same_maps(pictures, tmp_path):
    on_gpu = Explainer(load_model("networks:tiny_loaded_model", device="cuda"), {"tsm": TSM})
    assert 1 <= on_gpu.batch_size <= 256
    inputs = [on_gpu.loaded.preprocess(open_picture(pictures / "p000.png"))]
    np.testing.assert_allclose(
        on_gpu.explain([Held("p000", inputs[0])], ReadBatch(inputs, [None]))[0].maps["tsm"],
        expected_map(pictures / "p000.png"),
        atol=1e-4,
    )


@pytest.mark.nightly
def test_a_run_that_is_killed_again_and_again_ends_with_every_picture_once_and_whole(tmp_path):
    make_pictures(tmp_path / "pictures", 120)
    arguments = ["explain", "pictures", *MODEL, "--format", "npy", "--format", "zarr", "--format", "overlay", "--out"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-m", "tucker_cam", *arguments]
    chance = random.Random(0)
    for _ in range(3):
        started = subprocess.Popen(
            [*command, "killed"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        # Killed at a random moment after the first map is there, or as the run begins.
        deadline = time.monotonic() + 60
        while not list((tmp_path / "killed").glob("*.npy")) and started.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(chance.random() * 0.3)
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    for out in ("killed", "whole"):
        done = subprocess.run(
            [*command, out], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert "0 failed" in done.stdout
    killed, whole = contents(tmp_path / "killed"), contents(tmp_path / "whole")
    assert killed.keys() == whole.keys()
    assert len([name for name in killed if name.endswith(".npy")]) == 120
    assert all(killed[name] == whole[name] for name in whole)


def test_what_is_no_manifest_is_one_clear_error(pictures, out):
    assert run(pictures, *MODEL, "--out", out).exit_code == 0
    whole = manifest_of(out)
    endless = {"a": {"name": "x", "modified": float("inf"), "size": 0}}
    twice = {"a": {"name": "x", "modified": 0, "size": 0}, "b": {"name": "x", "modified": 0, "size": 0}}
    entries = [[], None, {"a": 1}, {"a": {"name": "x"}}, endless, twice]
    edited = [{"pictures": each} for each in entries] + [{"layers": 5}, {"methods": [["a"]]}, {"methods": [1]}]
    for text in [json.dumps(whole | each) for each in edited] + ["", "[]", '{"name": "an app"}', "[" * 100_000]:
        (out / "manifest.json").write_text(text)
        result = run(pictures, *MODEL, "--out", out)
        assert result.exit_code == 2
        assert "expected manifest.json of an earlier run" in result.stderr


def test_a_run_that_failed_before_its_first_picture_does_not_hold_the_folder(pictures, out):
    assert run(pictures, *MODEL, "--out", out).exit_code == 0
    (out / "manifest.json").write_text(json.dumps(manifest_of(out) | {"pictures": {}, "layers": ["another"]}))
    for path in out.rglob("*.png"):
        path.unlink()
    assert "11 explained" in run(pictures, *MODEL, "--out", out).output
    assert not list(out.glob("*/manifest.json"))


class SizeFiles(MethodFiles):
    """A format of one's own: how large each map is."""

    suffix = ".txt"

    def save(self, path, explanation, saliency):
        path.write_text(f"{saliency.shape}")


def test_a_new_format_is_one_class_that_is_gone_on_with_and_removed(pictures, out, monkeypatch):
    monkeypatch.setitem(outputs.FORMATS, "size", SizeFiles)
    arguments = (pictures, *MODEL, "--format", "size", "--out", out)
    assert "11 explained, 0 there already" in run(*arguments).output
    assert (out / "p000_tsm.txt").read_text() == "(24, 24)"
    (out / "p001_tsm.txt").unlink()
    (out / "p000_tsm.txt").write_text("old")
    (out / "p002_tsm.txt").write_text("")
    Image.new("RGB", (50, 50)).save(pictures / "p000.png")
    assert "3 explained, 8 there already" in run(*arguments).output
    assert (out / "p000_tsm.txt").read_text() == "(24, 24)"
