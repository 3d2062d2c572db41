"""Files from strangers: nothing in them is run, leads out of the folder of results, or eats the memory."""

import ast
import io
import json
import socket
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from annotated import write_picture
from PIL import Image, UnidentifiedImageError
from repositories import RunsCode, make_repositories
from transformers import AutoConfig, AutoModel, BitImageProcessorPil, ViTConfig
from typer.testing import CliRunner

from tucker_cam.cli import app
from tucker_cam.explanations.outputs import FORMATS
from tucker_cam.pictures import files

ROOT = Path(__file__).parents[1]
MODEL = ("--model", "networks:tiny_loaded_model")
SOURCES = sorted(path for folder in ("tucker_cam", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def encoded(form="PNG", mode="RGB", size=(40, 30), **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, form, **options)
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path):
    return write_picture(tmp_path / "in" / "a.png").parent


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_is_made_from_text_and_no_pickle_is_read(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        assert name not in ("eval", "exec", "compile", "os.system", "yaml.load", "yaml.unsafe_load")
        assert not name.startswith(("pickle.", "marshal.", "dill.", "joblib.", "shelve."))
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name == "torch.load":
            assert options.get("weights_only") == "True"
        assert options.get("allow_pickle", "False") == "False"
        assert options.get("shell", "False") == "False"
        if name.startswith("Auto"):
            assert options.get("trust_remote_code") == "False"


def test_weights_with_code_in_them_are_refused_by_the_command_line_and_run_nothing(pictures, tmp_path):
    torch.save({"state_dict": RunsCode(tmp_path / "ran")}, tmp_path / "w.pth")
    for command in ("explain", "evaluate", "spectrum"):
        result = run(command, pictures, *MODEL, "--weights", tmp_path / "w.pth", "--out", tmp_path / f"{command}.png")
        assert result.exit_code == 2, result.output
        assert "nothing in it was run" in " ".join(result.output.split())
    assert not (tmp_path / "ran").exists()


HOSTILE = ["../../evil", "/evil", "a/../../../evil", "..\\..\\evil", "..", "", "\0evil", "~/evil", "x" * 400]
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)"


@pytest.mark.parametrize("form", FORMATS)
def test_no_name_leads_out_of_the_folder_of_results_and_in_the_gallery_it_is_text(tmp_path, form):
    out, names = tmp_path / "a" / "b" / "c" / "out", [*HOSTILE, MARKUP]
    out.parent.mkdir(parents=True)
    pq.write_table(pa.table({"image": [encoded()] * len(names), "name": names}), tmp_path / "names.parquet")
    before = set(tmp_path.rglob("*"))
    result = run("explain", tmp_path / "names.parquet", *MODEL, "--format", form, "--gallery", "--out", out)
    assert result.exit_code == 0, result.output
    new = set(tmp_path.rglob("*")) - before
    assert new
    assert all(path.is_relative_to(out) for path in new)
    assert not list(Path("/").glob("evil*"))
    page = (out / "gallery.html").read_text()
    assert "onerror=alert(1)" in page
    assert "<img src=x" not in page
    assert "<script>alert" not in page


def test_no_name_in_a_manifest_leads_out_of_the_folder_of_results(pictures, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim_tsm.npy"
    victim.write_text("mine")
    assert run("explain", pictures, *MODEL, "--format", "npy", "--out", out).exit_code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["pictures"][str(pictures / "a.png")] = {"name": "../victim", "modified": 0, "size": 0}
    (out / "manifest.json").write_text(json.dumps(manifest))
    # The picture changed since, says the manifest: what an earlier run wrote of it is removed.
    assert run("explain", pictures, *MODEL, "--format", "npy", "--out", out).exit_code == 0
    assert victim.read_text() == "mine"
    assert (out / "victim_tsm.npy").is_file()


@pytest.mark.parametrize("model", ["networks:tiny_loaded_model", "demo", "timm:resnet18", "torchvision:resnet18"])
def test_nothing_is_fetched_unless_published_weights_are_asked_for(model, pictures, tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise AssertionError(f"a connection was tried: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    weights = ["--no-pretrained"] if model.startswith(("timm", "torchvision")) else []
    for command in (["explain", pictures, "--model", model, "--out", tmp_path / "out"], ["layers", model]):
        result = run(*command, *weights)
        assert result.exit_code == 0, result.output


def huge_png():
    """Return a file of a few hundred bytes that says it is 60,000 x 60,000 pixels: 10 GiB as RGB."""
    small = encoded()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def jpeg_with_broken_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned, so that the data is written again
    exif[0x0100] = 8
    # The width's type becomes text.
    whole = encoded("JPEG", exif=exif)
    return whole.replace(b"\x01\x00\x00\x04", b"\x01\x00\x00\x02").replace(b"\x00\x01\x04\x00", b"\x00\x01\x02\x00")


def test_a_huge_or_odd_picture_is_refused_with_one_line_and_the_others_are_done(pictures, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments: started.append(arguments))
    bad = {
        "huge.png": (huge_png(), "sane size, found a huge one"),
        "large.png": (encoded(mode="1", size=(12_000, 9_000)), "sane size, found a huge one"),
        "odd.jpg": (jpeg_with_broken_exif(), "found a broken one"),
        "script.jpg": (encoded("EPS"), "found a file of another kind"),
    }
    for name, (content, _) in bad.items():
        (pictures / name).write_bytes(content)
    pq.write_table(pa.table({"image": [huge_png(), encoded()], "name": ["huge", "packed"]}), pictures / "t.parquet")
    result = run("explain", pictures, *MODEL, "--out", tmp_path / "out")
    assert result.exit_code == 1
    expected = {name: message for name, (_, message) in bad.items()} | {"row 0 of group 0": bad["huge.png"][1]}
    for line, (name, message) in zip(result.stderr.splitlines(), expected.items(), strict=True):
        assert f"{name}: expected a " in line
        assert message in line
    assert not started
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"a_tsm.png", "packed_tsm.png"}


def test_a_pillow_that_lacks_a_format_still_tells_what_is_no_picture(monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    with pytest.raises(UnidentifiedImageError):
        files.open_image(io.BytesIO(b"no picture"))


@pytest.mark.parametrize("family", ["timm", "torchvision"])
def test_no_pickle_is_run_in_published_weights(family, tmp_path, monkeypatch):
    weights = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    weights.parent.mkdir(parents=True)
    torch.save({"x": RunsCode(tmp_path / "ran")}, weights)
    # torchvision's cache; and an older timm, which asks for it.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("timm.create_model", lambda *_, **__: torch.load(weights, weights_only=False))
    result = run("layers", f"{family}:resnet18")
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


@pytest.mark.parametrize("place", ["model", "processor", "backbone"])
def test_no_code_of_a_repository_is_run_whatever_stands_on_standard_input(
    repository_with_code, place, tmp_path, monkeypatch
):
    model = f"hf:{repository_with_code}"
    if place == "processor":
        ViTConfig().save_pretrained(repository_with_code)
    if place == "backbone":
        monkeypatch.chdir(tmp_path)
        make_repositories()
        model = "hf:microsoft/resnet-50"
        # As transformers builds a model whose backbone is another repository.
        monkeypatch.setattr(AutoModel, "from_config", lambda *_, **__: AutoConfig.from_pretrained(repository_with_code))
    result = run("layers", model, "--no-pretrained", input="y\n" * 20)
    assert not (tmp_path / "ran").exists()
    assert result.exit_code == 2
    assert "needs code of a repository, and none is run" in result.stderr
    assert "MODULE:CALLABLE" in result.stderr


def test_nor_a_kernel_of_a_repository(tmp_path):
    ViTConfig(attn_implementation="nobody/kernel").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "nobody/kernel"}))
    BitImageProcessorPil().save_pretrained(tmp_path)
    result = run("layers", f"hf:{tmp_path}", "--no-pretrained")
    assert result.exit_code == 2
    assert "attention by nobody/kernel, and no code of a repository is run" in result.stderr
