"""What the programs and commands in README and docs need to run offline: pictures, checkpoints and stand-ins."""

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from networks import Wired
from PIL import Image
from repositories import dino, make_repositories, moco_v2, vicregl
from torch import nn

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(text, language):
    """Return the programs of a document, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text):
    """Return the lines of a document that begin with ``tucker-cam``."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("tucker-cam")]


def make_pictures():
    """Make what the documents explain, in the working directory: pictures, a clip, a table and the hubs' models."""
    generator = np.random.default_rng(0)
    for path in ("cat.jpg", "dog.png", "pictures/a.jpg", "more/deep/b.jpg"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (90, 120, 3), np.uint8)).save(path)
    frames = [Image.fromarray(generator.integers(0, 255, (40, 50, 3), np.uint8)) for _ in range(3)]
    frames[0].save("clip.gif", save_all=True, append_images=frames[1:])
    pq.write_table(pa.table({"image": [Path("cat.jpg").read_bytes()]}), "pictures.parquet")
    make_repositories()


def make_checkpoint(command):
    """Write the file that a command's ``--weights`` names, in the layout of its project."""
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


def offline(command):
    """Return the arguments of a command, with random weights; what they need is made."""
    if "--weights" in command:
        make_checkpoint(command)
    elif re.search("timm:|torchvision:", command) and "--no-pretrained" not in command:
        command += " --no-pretrained"
    # A Ray cluster takes longer to start than all else; its own tests are in test_cluster.py.
    command = command.replace(" --engine ray", "")
    if re.match("tucker-cam (evaluate|spectrum)", command):
        command = command.replace("timm:resnet50", "timm:resnet18")
    return shlex.split(command)[1:]


def offline_program(program):
    """Return a program with random weights in place of published ones."""
    return program.replace('model="timm:resnet50"', 'model="timm:resnet18", pretrained=False')


def detector():
    """Stand for Ultralytics' network: a list of layers, the last of which takes the maps of several others."""

    def run(self, x):
        first = self.model[0](x)
        second = self.model[1](first)
        return self.model[2](second).flatten(2), [first, second]

    convolutions = nn.Conv2d(3, 8, 3, 16, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 5, 1)
    return Wired(run, model=nn.ModuleList(convolutions))


def put_in_ultralytics(monkeypatch):
    """Put a stand-in for the package where programs import it from."""
    stand_in = ModuleType("ultralytics")
    stand_in.YOLO = lambda weights: type("YOLO", (), {"model": detector()})
    monkeypatch.setitem(sys.modules, "ultralytics", stand_in)
