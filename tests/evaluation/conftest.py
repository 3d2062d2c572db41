"""A folder of pictures with boxes, and the figures that are drawn."""

import numpy as np
import pytest
from annotated import write_boxes
from matplotlib.figure import Figure
from PIL import Image


@pytest.fixture
def data(tmp_path):
    """Five pictures with a box each."""
    for index in range(5):
        rng = np.random.default_rng(index)
        pixels = rng.integers(0, 90, (30, 40, 3), np.uint8)
        left, top = rng.integers(4, 16, 2)
        pixels[top : top + 12, left : left + 14] = rng.integers(120, 255, 3)
        (tmp_path / "data" / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{index}.png")
        box = (left + 1, top + 1, left + 14, top + 12)
        write_boxes(tmp_path / "data" / "annotations" / f"{index}.xml", box, size=(40, 30))
    return tmp_path / "data"


@pytest.fixture
def drawn(monkeypatch):
    """Return a list of the figures that are written from now on."""
    figures, savefig = [], Figure.savefig

    def saved(figure, *arguments, **options):
        figures.append(figure)
        return savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return figures
