"""Every command and every program of the README's pages for users runs: offline, with random weights."""

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from repositories import dino, make_repositories, moco_v2, vicregl
from torch import nn
from typer.testing import CliRunner

from tucker_cam.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language, start, end):
    part = README[README.index(f"\n{start}\n") : README.index(f"\n{end}\n")]
    return re.findall(rf"```{language}\n(.*?)```", part, flags=re.DOTALL)


COMMANDS = [
    line
    for block in blocks("sh", "## On the command line", "### You have a cluster")
    for line in block.splitlines()
    if line.startswith("tucker-cam")
]


@pytest.fixture
def working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for path in ("cat.jpg", "dog.png", "pictures/a.jpg", "more/deep/b.jpg"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (90, 120, 3), np.uint8)).save(path)
    frames = [Image.fromarray(generator.integers(0, 255, (40, 50, 3), np.uint8)) for _ in range(3)]
    frames[0].save("clip.gif", save_all=True, append_images=frames[1:])


@pytest.fixture
def repositories(working_directory):
    make_repositories()


def make_checkpoint(command):
    arguments = shlex.split(command)
    file = arguments[arguments.index("--weights") + 1]
    model = timm.create_model(arguments[arguments.index("--model") + 1].removeprefix("timm:"))
    body = {name: value for name, value in model.state_dict().items() if not name.startswith(("fc.", "head."))}
    if "moco" in file:
        torch.save(moco_v2(body, {}), file)
    elif "dino" in file:
        torch.save(dino(body, {}), file)
    else:
        torch.save(vicregl(model, layer_scale=False), file)


@pytest.mark.usefixtures("repositories")
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_runs(command):
    if "--weights" in command:
        make_checkpoint(command)
    elif re.search("timm:|torchvision:", command):
        command += " --no-pretrained"
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    out = re.search(r"--out (\S+)", command)
    if out:
        written = {path.name for path in Path(out[1]).iterdir()}
        assert "manifest.json" in written
        assert len(written) > 1
        assert ("gallery.html" in written) == ("--gallery" in command)


class Detector(nn.Module):
    """Stands for Ultralytics' class: a list of layers, the last of which takes the maps of several others."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleList(
            [nn.Conv2d(3, 8, 3, stride=16, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 5, 1)]
        )

    def forward(self, x):
        first = self.model[0](x)
        second = self.model[1](first)
        return self.model[2](second).flatten(2), [first, second]


def test_the_programs_run(working_directory, monkeypatch):
    stand_in = ModuleType("ultralytics")
    stand_in.YOLO = lambda weights: type("YOLO", (), {"model": Detector()})
    monkeypatch.setitem(sys.modules, "ultralytics", stand_in)
    from tucker_cam import TSM

    names = {"TSM": TSM, "images": torch.rand(1, 3, 224, 224)}
    (from_python,) = blocks("python", "## From Python", "## Use it where EigenCAM stood")
    exec(from_python.replace('"timm:resnet50"', '"timm:resnet50", pretrained=False'), names)  # noqa: S102
    with Image.open("a.png") as overlay:
        assert overlay.size == (120, 90)
    (evaluating,) = blocks("python", "## Check it on your own pictures", "## The methods")
    exec(evaluating.replace('"timm:resnet50"', '"timm:resnet18", pretrained=False'), names)  # noqa: S102
    assert Path("report.png").is_file()
    from_loader, yolo = blocks("python", "## On the command line", "### You have a folder of pictures")
    for program, size in ((from_loader, 224), (yolo, 640)):
        exec(program, names)  # noqa: S102
        assert names["saliency"].shape == (1, size, size)


def test_each_promise_stands_beside_a_test_that_is_there():
    start = README.index("\n## What you can rely on\n")
    promises = [line for line in README[start : README.index("\n## ", start + 1)].splitlines() if "::test_" in line]
    assert len(promises) == 25
    for line in promises:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", line)
        assert len(named) == line.count("::") > 0
        for file, test in named:
            assert f"def {test}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")
