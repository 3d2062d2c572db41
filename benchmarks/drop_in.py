"""How different a map looks when TSM, or another method of ours, replaces EigenCAM and nothing else changes.

    python -m benchmarks.drop_in

It uses the demo network at `bn2`, and the seven colour photographs in scikit-image. Writes
benchmarks/results/drop_in.md. Needs the `test` extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import skimage
import torch
import typer

from benchmarks.reporting import table
from tucker_cam.methods import METHODS
from tucker_cam.models import load_model
from tucker_cam.pictures.files import open_picture

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
SHOWN = ("eigencam", "tsm", "mtsm", "mtsm-energy", "multivec-eigencam")
# What many scripts consider "salient" in an 8-bit map.
THRESHOLD = 64 / 255


def main(out: Annotated[Path, typer.Option(help="Folder for what is written.")] = Path("benchmarks/results")) -> None:
    """Explain the photographs with each method, and write how its maps differ from EigenCAM's."""
    torch.set_num_threads(1)
    loaded = load_model("demo", layers=["bn2"])
    folder = Path(skimage.__file__).parent / "data"
    images = torch.stack([loaded.preprocess(open_picture(folder / name)) for name in PHOTOGRAPHS])
    maps = {}
    for method in SHOWN:
        with METHODS[method](loaded.model, loaded.target_layers) as cam:
            maps[method] = cam(images, targets=None).reshape(len(images), -1)
    eigencam = maps["eigencam"]
    rows = {}
    for method, saliency in maps.items():
        pairs = zip(saliency, eigencam, strict=True)
        rows[method] = [
            _range(saliency.mean(1)),
            _range((saliency > THRESHOLD).mean(1) / (eigencam > THRESHOLD).mean(1)),
            _range((saliency == 0).mean(1)),
            _range(np.array([np.corrcoef(one, other)[0, 1] for one, other in pairs])),
        ]
    columns = ["mean", "area above 64/255, of EigenCAM's", "share of zeros", "correlation with EigenCAM"]
    out.mkdir(parents=True, exist_ok=True)
    (out / "drop_in.md").write_text(table("least to most of seven photographs", columns, rows) + "\n", encoding="utf-8")


def _range(values: np.ndarray) -> str:
    return f"{values.min():.2f} to {values.max():.2f}"


if __name__ == "__main__":
    typer.run(main)
