import os
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
from PIL import Image
from rich.table import Table
from typer.testing import CliRunner

from tucker_cam import TSM, __version__
from tucker_cam.__main__ import main
from tucker_cam.cli import app
from tucker_cam.cli.lines import say
from tucker_cam.console import PlainConsole
from tucker_cam.models import load_model
from tucker_cam.pictures.files import open_picture
from tucker_cam.progress import progress
from tucker_cam.writing import complete_or_absent


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


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
    assert panel.std() > 30
    assert [path.name for path in out.iterdir()] == ["demo.png"]


def test_a_folder_that_the_demo_cannot_write_to_is_found_before_the_work(tmp_path, monkeypatch):
    def work(*_):
        raise AssertionError("the work began")

    monkeypatch.setattr(sys.modules["tucker_cam.cli.demo"], "load_model", work)
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


def test_an_overlay_and_a_map_are_written_for_each_picture_and_method(photograph, tmp_path):
    out = tmp_path / "out"
    result = run(
        "explain",
        photograph,
        "--method",
        "tsm",
        "--method",
        "mtsm-energy",
        "--format",
        "overlay",
        "--format",
        "npy",
        "--out",
        out,
    )
    assert result.exit_code == 0, result.output
    assert "layer: bn2" in result.output
    assert {path.name for path in out.iterdir()} == {"manifest.json"} | {
        f"coffee_{method}.{ending}" for method in ("tsm", "mtsm-energy") for ending in ("png", "npy")
    }
    demo = load_model("demo")
    with TSM(demo.model, [demo.model.bn2]) as cam:
        expected = cam(demo.preprocess(open_picture(photograph))[None])[0]
    np.testing.assert_array_equal(np.load(out / "coffee_tsm.npy"), expected)
    with Image.open(out / "coffee_tsm.png") as overlay:
        assert overlay.size == (600, 400)


def test_a_layer_and_smoothing_can_be_asked_for(photograph, tmp_path):
    maps = []
    choices = [(), ("--layer", "blocks.5"), ("--aug-smooth",), ("--layer", "-6"), ("--layer", "bn2", "--layer", "-6")]
    for index, arguments in enumerate(choices):
        out = tmp_path / str(index)
        assert run("explain", photograph, "--format", "npy", "--out", out, *arguments).exit_code == 0
        maps.append(np.load(out / "coffee_tsm.npy"))
    # Index -6 is blocks.6, with 320 channels; of several layers the maps are averaged.
    for index in (1, 2, 3, 4):
        assert np.abs(maps[0] - maps[index]).max() > 0.01
    mean = (maps[0] + maps[3]) / 2
    np.testing.assert_allclose(maps[4], (mean - mean.min()) / (mean.max() - mean.min()), atol=1e-2)


def test_bad_pictures_are_named_and_the_others_done(photograph, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "half.png").write_bytes(photograph.read_bytes()[:20000])
    out = tmp_path / "out"
    result = run(
        "explain",
        tmp_path / "none.png",
        tmp_path / "text.jpg",
        tmp_path / "half.png",
        photograph,
        "--out",
        out,
    )
    assert result.exit_code == 1
    assert "3 pictures: 1 explained, 0 there already, 2 failed" in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 3
    for line, words in zip(
        errors,
        ["none.png: .*no such file", "text.jpg: .*another kind", "half.png: .*broken"],
        strict=True,
    ):
        assert line.startswith("error: ")
        assert all(word in line for word in words.split(".*"))
    assert sorted(path.name for path in out.iterdir()) == ["coffee_tsm.png", "manifest.json"]


def test_a_map_that_cannot_be_written_is_named_and_the_others_done(photograph, tmp_path):
    other = tmp_path / "other.png"
    other.write_bytes(photograph.read_bytes())
    out = tmp_path / "out"
    assert run("explain", other, photograph, "--out", out).exit_code == 0
    (out / "other_tsm.png").unlink()
    (out / "other_tsm.png").mkdir()
    result = run("explain", other, photograph, "--out", out)
    assert result.exit_code == 1
    assert f"{other}: could not be written" in result.stderr
    assert "2 pictures: 0 explained, 1 there already, 1 failed" in result.output


def test_a_name_that_is_too_long_for_a_file_is_shortened(photograph, tmp_path):
    for ending in "ab":
        (tmp_path / f"{'n' * 240}{ending}.png").write_bytes(photograph.read_bytes())
    pictures = sorted(tmp_path.glob("n*.png"))
    assert run("explain", *pictures, "--format", "npy", "--out", tmp_path / "out").exit_code == 0
    first, second = (tmp_path / "out").glob("*.npy")
    assert first.name[:170] == second.name[:170] == "n" * 170


def test_pictures_of_the_same_name_do_not_overwrite_each_other(photograph, tmp_path):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "coffee.jpg"
    Image.fromarray(skimage.data.chelsea()).save(other)
    assert run("explain", photograph, other, "--out", tmp_path / "out").exit_code == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"coffee_tsm.png", "coffee-2_tsm.png", "manifest.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "tms"], "no method 'tms'; near it: tsm"),
        (["--method", "TSM"], "no method 'TSM'; near it: tsm"),
        (["--method", "MTSM_energy"], "no method 'MTSM_energy'; near it: mtsm-energy"),
        (["--model", "resnet50"], "did you mean timm:resnet50 or torchvision:resnet50?"),
        (["--model", "timm:resnet1"], "near it: resnet18"),
        (["--layer", "bn3"], "no layer 'bn3'; near it: bn2"),
        (["--layer", "classifier"], "expected a layer with a spatial map, and `classifier` has none"),
        (["--layer", "-400"], "index from -"),
        (["--layer", "bn2", "--method", "eigencam", "--layer", "classifier"], "`classifier` has none"),
        (["--device", "abacus"], "no device 'abacus' here"),
        (["--device", "meta"], "no device 'meta' here"),
        (["--engine", "ray", "--gallery"], "no gallery with Ray"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(photograph, tmp_path, arguments, message):
    result = run("explain", photograph, "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("name", ["localization", "Localisation"])
def test_a_metric_in_another_spelling_is_answered_with_the_right_one(tmp_path, name):
    result = run("evaluate", tmp_path, "--metric", name)
    assert (result.exit_code, result.stderr) == (2, f"error: there is no metric {name!r}; near it: localisation\n")


def test_a_turned_picture_is_turned_back_and_any_mode_becomes_rgb(tmp_path):
    picture = Image.new("L", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif)
    opened = open_picture(tmp_path / "turned.jpg")
    assert (opened.mode, opened.size) == ("RGB", (20, 40))


def test_a_16_bit_picture_keeps_its_greys(tmp_path):
    greys = np.linspace(0, 65535, 256).reshape(16, 16)
    Image.fromarray(greys.astype(np.uint16)).save(tmp_path / "deep.png")
    opened = np.asarray(open_picture(tmp_path / "deep.png"))
    np.testing.assert_allclose(opened[..., 0], greys / 257, atol=1)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted():
        with complete_or_absent(tmp_path / "x.png") as unfinished:
            unfinished.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_picture_of_insane_size_is_named_and_refused(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(OSError, match=r"huge\.png: expected a picture of sane size"):
        open_picture(tmp_path / "huge.png")


def test_a_link_stays_a_link_and_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with complete_or_absent(tmp_path / "link.txt") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="expected a file to write"), complete_or_absent(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_an_interrupted_command_that_does_not_go_on_does_not_say_so(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("tucker_cam.cli.demo.run_demo", interrupted)
    result = run("demo")
    assert result.exit_code == 130
    assert result.stderr == "stopped\n"


def test_without_the_extra_the_command_that_installs_it_is_named():
    # A finder that hides typer, as if it were not installed.
    code = "import sys; sys.modules['typer'] = None; from tucker_cam.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == (
        "the command line needs the package typer: pip install '.[demo]' in a checkout of tucker_cam\n"
    )


def test_the_module_runs_as_the_command_does():
    result = subprocess.run([sys.executable, "-m", "tucker_cam", "--help"], capture_output=True, text=True, check=True)
    assert "explain" in result.stdout
    assert "demo" in result.stdout


def test_the_work_is_done_to_its_end_when_nobody_reads_what_it_prints(monkeypatch, photograph, tmp_path):
    command = ["tucker-cam", "explain", photograph, "--model", "networks:tiny_loaded_model", "--out", tmp_path / "out"]
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    with open(writer, "w") as pipe:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, pipe)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0
    assert (tmp_path / "out" / "coffee_tsm.png").is_file()


@pytest.mark.parametrize("library", ["typer", "numpy", "torch"])
def test_an_interrupt_while_python_imports_is_one_word(library, tmp_path):
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
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (130, "stopped\n")


def test_a_redirected_run_says_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr("tucker_cam.progress._SECONDS_BETWEEN_LINES", 0)
    with progress("explaining", 30) as advance:
        advance(10)
        advance(20)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert {"explaining: 10 of 30", "explaining: 30 of 30"} <= {line.partition(",")[0] for line in lines}
    monkeypatch.undo()
    with progress("explaining", 30) as advance:
        advance(30)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("shown", [True, False])
def test_a_terminal_shows_a_bar_unless_it_shall_not(capsys, monkeypatch, shown):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("explaining", 20, shown=shown) as advance:
        advance(20)
    assert ("20/20" in capsys.readouterr().err) is shown


def test_the_version_is_printed():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"tucker-cam {__version__}\n")


def test_an_error_shows_where_it_was_raised_only_if_that_is_asked_for(tmp_path):
    arguments = ("explain", tmp_path / "none.png", "-o", tmp_path / "out")
    assert "Traceback" not in run(*arguments).stderr
    shown = run("--debug", *arguments)
    assert shown.exit_code == 2
    assert "Traceback" in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith("error: ")


def test_short_options_and_a_sample_that_is_the_same_again(tmp_path):
    for index in range(9):
        Image.new("RGB", (30, 30), (index, 0, 0)).save(tmp_path / f"{index}.png")
    chosen = []
    for limit, out in ((3, "a"), (3, "b"), (5, "c")):
        options = ("-m", "networks:tiny_loaded_model", "-b", 2, "-j", 0, "--limit", limit, "-o", tmp_path / out)
        result = run("explain", *(tmp_path / f"{index}.png" for index in range(9)), *options)
        assert result.exit_code == 0, result.output
        chosen.append({path.name for path in (tmp_path / out).glob("*_tsm.png")})
    assert chosen[0] == chosen[1] < chosen[2]
    assert [len(each) for each in chosen] == [3, 3, 5]
    assert run("explain", tmp_path / "0.png", "--limit", 0, "-o", tmp_path / "d").exit_code == 2
