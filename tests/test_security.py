"""Files from strangers: nothing in them is run, leads out of the folder of results, or eats the memory."""

import ast
import io
import json
import re
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from repositories import make_repositories
from transformers import AutoConfig, AutoModel, BitImageProcessorPil, ViTConfig
from typer.testing import CliRunner

from tucker_cam.cli import app
from tucker_cam.pictures.files import _known_formats, open_image

ROOT = Path(__file__).parents[1]
MODEL = ("--model", "networks:tiny_loaded_model")
SOURCES = sorted(path for folder in ("tucker_cam", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def encoded_picture():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_is_made_from_text_and_no_pickle_is_read(path):
    for name, call in calls(path):
        assert name not in ("eval", "exec", "compile", "os.system", "yaml.load", "yaml.unsafe_load")
        assert not name.startswith(("pickle.", "marshal.", "dill.", "joblib.", "shelve."))
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            assert options.get("weights_only") == "True"
        assert options.get("allow_pickle", "False") == "False"
        assert options.get("shell", "False") == "False"
        if name.startswith("Auto"):
            assert options.get("trust_remote_code") == "False"


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_with_code_in_them_are_refused_by_the_command_line_and_run_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "p.png").write_bytes(encoded_picture())
    torch.save({"state_dict": RunsCode(tmp_path / "ran")}, tmp_path / "w.pth")
    for command, *out in (("explain", "--out", "out"), ("evaluate", "--out", "rows.csv"), ("spectrum",)):
        out = [*out[:1], *(tmp_path / name for name in out[1:])]
        result = run(command, tmp_path / "in", *MODEL, "--weights", tmp_path / "w.pth", *out)
        assert result.exit_code == 2, result.output
        assert "nothing in it was run" in " ".join(result.output.split())
    assert not (tmp_path / "ran").exists()


HOSTILE = [
    "../../evil",
    "/evil",
    "a/../../../evil",
    "..\\..\\evil",
    "..",
    "",
    "\0evil",
    "~/evil",
    "x" * 400,
    "y/" * 3000,
    "%2e%2e/evil",
]


@pytest.mark.parametrize("form", ["overlay", "npy", "zarr"])
def test_no_name_leads_out_of_the_folder_of_results(tmp_path, form):
    out = tmp_path / "a" / "b" / "c" / "out"
    out.parent.mkdir(parents=True)
    picture = encoded_picture()
    pq.write_table(pa.table({"image": [picture] * len(HOSTILE), "name": HOSTILE}), tmp_path / "names.parquet")
    before = set(tmp_path.rglob("*"))
    result = run("explain", tmp_path / "names.parquet", *MODEL, "--format", form, "--gallery", "--out", out)
    assert result.exit_code == 0, result.output
    new = set(tmp_path.rglob("*")) - before
    assert new
    assert all(path.is_relative_to(out) for path in new)
    assert not list(Path("/").glob("evil*"))


def test_no_name_in_a_manifest_leads_out_of_the_folder_of_results(tmp_path):
    out, picture = tmp_path / "out", tmp_path / "p.png"
    picture.write_bytes(encoded_picture())
    victim = tmp_path / "victim_tsm.npy"
    victim.write_text("mine")
    assert run("explain", picture, *MODEL, "--format", "npy", "--out", out).exit_code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["pictures"][str(picture)] = {"name": "../victim", "modified": 0}
    (out / "manifest.json").write_text(json.dumps(manifest))
    # The picture changed since, says the manifest: what an earlier run wrote of it is removed.
    assert run("explain", picture, *MODEL, "--format", "npy", "--out", out).exit_code == 0
    assert victim.read_text() == "mine"
    assert (out / "victim_tsm.npy").is_file()


def test_names_and_models_are_text_in_the_gallery(tmp_path):
    name = "<img src=x onerror=alert(1)><script>alert(2)"
    (tmp_path / f"{name}.png").write_bytes(encoded_picture())
    assert run("explain", tmp_path / f"{name}.png", *MODEL, "--gallery", "--out", tmp_path / "out").exit_code == 0
    page = (tmp_path / "out" / "gallery.html").read_text()
    assert "<img src=x" not in page
    assert "<script>alert" not in page
    assert "onerror=alert(1)" in page


def huge_png():
    """Return a file of a few hundred bytes that says it is 60,000 x 60,000 pixels: 10 GiB as RGB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("packed", [False, True], ids=["file", "Parquet"])
def test_a_huge_picture_is_refused_with_one_line_and_the_others_are_done(tmp_path, packed):
    pictures = {"huge": huge_png(), "plain": encoded_picture()}
    (tmp_path / "in").mkdir()
    if packed:
        table = pa.table({"image": list(pictures.values()), "name": list(pictures)})
        pq.write_table(table, tmp_path / "in" / "both.parquet")
    else:
        for name, picture in pictures.items():
            (tmp_path / "in" / f"{name}.png").write_bytes(picture)
    result = run("explain", tmp_path / "in", *MODEL, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "expected a picture of sane size, found a huge one" in " ".join(result.output.split())
    assert (tmp_path / "out" / "plain_tsm.png").is_file()


@pytest.mark.parametrize("model", ["networks:tiny_loaded_model", "demo", "timm:resnet18", "torchvision:resnet18"])
def test_nothing_is_fetched_unless_published_weights_are_asked_for(model, tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "p.png").write_bytes(encoded_picture())
    weights = ["--no-pretrained"] if model.startswith(("timm", "torchvision")) else []
    for command, *options in (("explain", "--out", tmp_path / "out"), ("layers",)):
        source = model if command == "layers" else tmp_path / "in"
        chosen = [] if command == "layers" else ["--model", model]
        result = run(command, source, *chosen, *weights, *options)
        assert result.exit_code == 0, result.output


def postscript():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    return file.getvalue()


def large_png():
    file = io.BytesIO()
    Image.new("1", (12_000, 9_000)).save(file, "PNG")
    return file.getvalue()


def jpeg_with_broken_exif():
    picture, exif, file = Image.new("RGB", (8, 8)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be turned, so that the data is written again
    exif[0x0100] = 8
    picture.save(file, "JPEG", exif=exif)
    # The width's type becomes text.
    return (
        file.getvalue()
        .replace(b"\x01\x00\x00\x04", b"\x01\x00\x00\x02")
        .replace(b"\x00\x01\x04\x00", b"\x00\x01\x02\x00")
    )


@pytest.mark.parametrize("make", [postscript, large_png, jpeg_with_broken_exif])
def test_whatever_pillow_makes_of_a_picture_the_others_are_done_and_no_program_is_started(make, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments: started.append(arguments))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "odd.jpg").write_bytes(make())
    (tmp_path / "in" / "plain.png").write_bytes(encoded_picture())
    result = run("explain", tmp_path / "in", *MODEL, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "odd.jpg: expected a" in " ".join(result.output.split())
    assert not started
    assert (tmp_path / "out" / "plain_tsm.png").is_file()


def test_a_pillow_that_lacks_a_format_opens_the_others(monkeypatch):
    Image.init()
    known = {name: plugin for name, plugin in Image.OPEN.items() if name != "AVIF"}
    monkeypatch.setattr(Image, "OPEN", known)
    _known_formats.cache_clear()
    try:
        assert open_image(io.BytesIO(encoded_picture())).size == (40, 30)
        with pytest.raises(UnidentifiedImageError):
            open_image(io.BytesIO(b"no picture"))
    finally:
        _known_formats.cache_clear()


def test_no_pickle_is_run_where_an_older_timm_asks_for_it(tmp_path, monkeypatch):
    torch.save({"x": RunsCode(tmp_path / "ran")}, tmp_path / "w.pth")
    monkeypatch.setattr("timm.create_model", lambda *_, **__: torch.load(tmp_path / "w.pth", weights_only=False))
    result = run("layers", "timm:resnet18")
    assert result.exit_code == 2
    assert "could not be had" in " ".join(result.output.split())
    assert not (tmp_path / "ran").exists()


def test_no_pickle_in_torchvisions_cache_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save({"x": RunsCode(tmp_path / "ran")}, tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    result = run("layers", "torchvision:resnet18")
    assert result.exit_code == 2
    assert "could not be had" in " ".join(result.output.split())
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def repository_with_code(tmp_path):
    """Return a folder of transformers' kind whose configuration and processor are classes of its own file."""
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own:\n    pass\n")
    automatic = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor"), "own.Own")
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": automatic}))
    processor = {"image_processor_type": "Own", "auto_map": automatic}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_no_code_of_a_repository_is_run_whatever_stands_on_standard_input(repository_with_code, tmp_path):
    command = [sys.executable, "-m", "tucker_cam", "layers", f"hf:{repository_with_code}", "--no-pretrained"]
    result = subprocess.run(command, input="y\n" * 20, capture_output=True, text=True, check=False)
    assert not (tmp_path / "ran").exists()
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch("error: hf:.* needs code of a repository, and none is run: .*MODULE:CALLABLE\n", result.stderr)


def test_nor_that_of_a_processor_alone(repository_with_code, tmp_path):
    ViTConfig().save_pretrained(repository_with_code)
    command = ["layers", f"hf:{repository_with_code}", "--no-pretrained"]
    result = CliRunner().invoke(app, command, input="y\n" * 20)
    assert not (tmp_path / "ran").exists()
    assert result.exit_code == 2
    assert "needs code of a repository, and none is run" in result.stderr


def test_nor_where_one_repository_names_another(repository_with_code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def build(_, **__):
        # As transformers builds a model whose backbone is another repository.
        return AutoConfig.from_pretrained(repository_with_code)

    make_repositories()
    monkeypatch.setattr(AutoModel, "from_config", build)
    result = CliRunner().invoke(app, ["layers", "hf:microsoft/resnet-50", "--no-pretrained"], input="y\n" * 20)
    assert not (tmp_path / "ran").exists()
    assert result.exit_code == 2
    assert "needs code of a repository, and none is run" in result.stderr


def test_nor_a_kernel_of_a_repository(tmp_path):
    ViTConfig(attn_implementation="nobody/kernel").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "nobody/kernel"}))
    BitImageProcessorPil().save_pretrained(tmp_path)
    result = run("layers", f"hf:{tmp_path}", "--no-pretrained")
    assert result.exit_code == 2
    assert "attention by nobody/kernel, and no code of a repository is run" in result.stderr
