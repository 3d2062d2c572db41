"""What a user types in a terminal, and what it answers."""

import logging
import os
import signal
import subprocess
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
from PIL import Image
from rich.table import Table
from typer.testing import CliRunner

from tucker_cam import explain
from tucker_cam.__main__ import main
from tucker_cam.cli import app
from tucker_cam.console import PlainConsole
from tucker_cam.models import load_model
from tucker_cam.pictures.files import open_picture
from tucker_cam.text import say

# By an import they would be the commands, which are called the same.
DEMO, LAYERS = import_module("tucker_cam.cli.demo"), import_module("tucker_cam.cli.layers")
TINY = ("-m", "networks:tiny_loaded_model")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_code(code):
    """Return the exit code and what stands on standard error of a new process."""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return ended.returncode, ended.stderr


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "coffee.png"
    Image.fromarray(skimage.data.coffee()).save(path)
    return path


def test_the_demo_writes_its_panel_and_prints_its_table(tmp_path):
    out = tmp_path / "new" / "folder[/x]"  # not markup
    result = run("demo", "--out", out)
    assert result.exit_code == 0, result.output
    for word in ("EigenCAM", "TSM", "Multivec-EigenCAM", "MTSM", "decomposition [ms]", "one thread", "demo.png"):
        assert word in result.output
    panel = np.asarray(open_picture(out / "demo.png"))
    assert panel.shape[1] > 1000
    for row in (panel[100:330], panel[370:]):
        photograph, *overlays = np.array_split(row[:, : row.shape[1] // 5 * 5].astype(float), 5, axis=1)
        assert photograph.std() > 30
        assert all(np.abs(overlay - photograph).mean() > 20 for overlay in overlays)
    assert [path.name for path in out.iterdir()] == ["demo.png"]


def test_a_folder_that_the_demo_cannot_write_to_is_found_before_the_work(tmp_path, monkeypatch):
    def work(*_):
        raise AssertionError("the work began")

    monkeypatch.setattr(DEMO, "load_model", work)
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "demo.png").mkdir(parents=True)
    for out in (tmp_path / "file" / "below", tmp_path / "taken"):
        result = run("demo", "--out", out)
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1


def test_names_in_tables_and_lines_are_neither_markup_nor_commands_to_the_terminal(capsys):
    name = "run[red].pth [/x] :cat: \x1b[31m \u202e"
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    PlainConsole(width=60).print(table)
    PlainConsole(width=60).print(name)
    say(name)
    shown = name.replace("\x1b", r"\x1b").replace("\u202e", r"\x202e")
    assert capsys.readouterr().out.count(shown) == 5


def test_the_options_of_a_model_are_the_arguments_of_load_model(monkeypatch):
    given = {}
    monkeypatch.setattr(LAYERS, "print_layers", lambda model, **loading: given.update(loading))
    flags = ("--no-pretrained", "--no-crop", "--weights", "w.pth", "--size", 64, "--device", "cpu")
    numbers = ("--mean", 0, 0.5, 1, "--std", 1, 2, 3)
    assert run("layers", "demo", *flags, *numbers, "--layer", "a", "--layer", "-1").exit_code == 0
    expected = {"pretrained": False, "crop": False, "weights": Path("w.pth"), "size": 64, "device": "cpu"}
    assert given == expected | {"mean": (0, 0.5, 1), "std": (1, 2, 3), "layers": ["a", "-1"]}
    assert given.keys() == signature(load_model).parameters.keys() - {"model"}


def test_the_options_of_explain_are_its_arguments(monkeypatch):
    given = {}

    def stand_in(pictures, model, methods, **options):
        given.update(options, pictures=pictures, model=model, methods=methods)
        return SimpleNamespace(failures=[])

    monkeypatch.setattr("tucker_cam.explanations.explain.explain", stand_in)
    short = ("-m", "demo", "-o", "x", "-b", 2, "-j", 0)
    long = ("--gallery", "--aug-smooth", "--view", "network", "--alpha", 0.3, "--limit", 3, "--engine", "ray")
    repeated = ("--method", "tsm", "--method", "fem", "--format", "npy", "--format", "zarr")
    assert run("explain", "a.png", "b.png", *short, *long, *repeated, "--colormap", "turbo").exit_code == 0
    expected = {"pictures": ["a.png", "b.png"], "model": "demo", "out": "x", "batch_size": 2, "workers": 0}
    expected |= {"gallery": True, "aug_smooth": True, "view": "network", "alpha": 0.3, "limit": 3, "engine": "ray"}
    expected |= {"methods": ["tsm", "fem"], "formats": ["npy", "zarr"], "colormap": "turbo"}
    assert {name: given[name] for name in expected} == expected
    assert given.keys() == signature(explain).parameters.keys() - {"components", "progress"}


def test_a_map_that_cannot_be_written_is_named_and_the_others_are(photograph, tmp_path):
    in_the_way = tmp_path / "out" / "other_tsm.png"
    (tmp_path / "other.png").write_bytes(photograph.read_bytes())
    assert run("explain", tmp_path / "other.png", *TINY, "--out", tmp_path / "out").exit_code == 0
    in_the_way.unlink()
    in_the_way.mkdir()
    result = run("explain", tmp_path / "other.png", photograph, *TINY, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "2 pictures: 1 explained, 0 there already, 1 failed" in result.output
    assert f"error: {tmp_path / 'other.png'}: could not be written" in result.stderr
    assert (tmp_path / "out" / "coffee_tsm.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "TSM"], "no method 'TSM'; near it: tsm"),
        (["--method", "MTSM_energy"], "no method 'MTSM_energy'; near it: mtsm-energy"),
        (["--layer", "bn3"], "no layer 'bn3' with a spatial map; near it: bn2"),
        (["--layer", "bn2", "--method", "eigencam", "--layer", "classifier"], "no layer 'classifier'"),
        (["--device", "abacus"], "cannot run on 'abacus'"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(photograph, tmp_path, arguments, message):
    result = run("explain", photograph, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "out").glob("*"))


def test_an_interrupted_command_that_does_not_go_on_does_not_say_so(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(DEMO, "run_demo", interrupted)
    result = run("demo")
    assert (result.exit_code, result.stderr) == (130, "stopped\n")


@pytest.mark.parametrize(
    ("package", "code", "said"),
    [("typer", 1, "the command line needs the package typer"), ("skimage", 2, "error: this needs the package skimage")],
)
def test_without_the_extra_the_command_that_installs_it_is_named(package, code, said):
    # A finder that hides a package, as if it were not installed.
    hidden = f"import sys; sys.modules['{package}'] = None; sys.argv = ['tucker-cam', 'demo']"
    install = "pip install '.[demo]' in a checkout of tucker_cam"
    assert run_code(f"{hidden}; from tucker_cam.__main__ import main; main()") == (code, f"{said}: {install}\n")


def test_the_work_is_done_to_its_end_when_nobody_reads_what_it_prints(monkeypatch, photograph, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", ["tucker-cam", "explain", str(photograph), *TINY, "-o", str(tmp_path / "out")])
    with open(writer, "w") as pipe:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, pipe)
        with pytest.raises(SystemExit) as ended:
            main()
        # As Python does when it ends: the streams of `main` do so when they are collected, and the pipe is closed then.
        sys.stdout.flush()
        sys.stderr.flush()
    assert ended.value.code == 0
    assert (tmp_path / "out" / "coffee_tsm.png").is_file()


@pytest.mark.parametrize("library", ["typer", "numpy", "torch"])
def test_an_interrupt_while_python_imports_ends_the_program_without_a_traceback(library, tmp_path):
    # A library that is interrupted while it is imported may raise anything: NumPy, a RecursionError.
    code = f"""
import os, signal, sys
sys.argv = ["tucker-cam", "explain", {str(tmp_path)!r}, "--out", {str(tmp_path / "out")!r}]
from tucker_cam.__main__ import main
assert "torch" not in sys.modules
class Interrupted:
    def find_spec(name, *_):
        if name == "{library}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupted)
main()
"""
    # Shells show it as 130.
    assert run_code(code) == (-signal.SIGINT, "")


def test_an_error_shows_where_it_was_raised_only_if_that_is_asked_for(tmp_path):
    arguments = ("explain", tmp_path / "none.png", "-o", tmp_path / "out")
    assert "Traceback" not in run(*arguments).stderr
    shown = run("--debug", *arguments)
    assert shown.exit_code == 2
    assert "Traceback" in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith("error: ")
    (tmp_path / "broken.png").write_text("no picture")
    shown = run("--debug", "explain", tmp_path / "broken.png", "-m", "networks:tiny_loaded_model", "-o", tmp_path / "o")
    assert shown.exit_code == 1
    assert "UnidentifiedImageError" in shown.stderr


def test_help_is_shown_in_an_encoding_that_has_not_all_of_its_signs():
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "COLUMNS": "80"}
    command = [sys.executable, "-m", "tucker_cam", "explain", "--help"]
    ended = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert ended.returncode == 0
    assert b"--model" in ended.stdout


def test_a_command_leaves_the_logger_as_it_was(monkeypatch):
    logger = logging.getLogger("tucker_cam")
    monkeypatch.setattr(logger, "propagate", False)
    level, handlers = logger.level, [*logger.handlers]
    assert CliRunner().invoke(app, ["layers", "nowhere"]).exit_code == 2
    assert (logger.level, logger.propagate, logger.handlers) == (level, False, handlers)
