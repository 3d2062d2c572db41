"""Makes the pictures of the README and the documentation from photographs in installed packages.

Run it as ``python docs/make_pictures.py``, in a checkout with the extra ``test``. It writes ``gallery/gallery.html``,
which the command line makes from 24 pictures; ``images/front.png``, with five photographs that a rule chooses;
``images/wide.png``, with three of them; and ``images/front.md``, which explains them and the rule. The same packages
give the same files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy: sums in another order are rounded differently

import matplotlib
import numpy as np
import skimage
import torch
from PIL import Image, ImageDraw, ImageFont
from timm.data import ImageNetInfo

from tucker_cam import evaluate, explain
from tucker_cam.methods import LABEL_DEPENDENT, METHODS
from tucker_cam.models import Network, load_model

ROOT = Path(__file__).parents[1]
SKIMAGE = Path(skimage.__file__).parent / "data"
MATPLOTLIB = Path(matplotlib.get_data_path())
# Photographs whose documentation says CC0 or public domain, and which are not smaller than the network's input. Others
# in scikit-image are left out: drawings, and those without a licence or with "no known copyright restrictions".
PHOTOGRAPHS = {
    "astronaut": (SKIMAGE / "astronaut.png", "NASA, public domain"),
    "brick": (SKIMAGE / "brick.png", "CC0Textures, CC0"),
    "camera": (SKIMAGE / "camera.png", "Lav Varshney, CC0"),
    "cell": (SKIMAGE / "cell.png", "Paul Müller and others, CC0"),
    "chelsea": (SKIMAGE / "chelsea.png", "Stefan van der Walt, CC0"),
    "clock": (SKIMAGE / "clock_motion.png", "Stefan van der Walt, public domain"),
    "coffee": (SKIMAGE / "coffee.png", "Rachel Michetti, CC0"),
    "grace-hopper": (MATPLOTLIB / "sample_data" / "grace_hopper.jpg", "United States Navy, public domain"),
    "grass": (SKIMAGE / "grass.png", "CC0Textures, CC0"),
    "gravel": (SKIMAGE / "gravel.png", "CC0Textures, CC0"),
    "hubble": (SKIMAGE / "hubble_deep_field.jpg", "NASA, public domain"),
    "retina": (SKIMAGE / "retina.jpg", "Mikael Häggström, CC0"),
    "rocket": (SKIMAGE / "rocket.jpg", "SpaceX, public domain"),
}
QUARTERS = ("top-left", "top-right", "bottom-left", "bottom-right")
PICTURES = 24
SMALLEST_SIDE = 224
SHOWN = ("eigencam", "tsm", "mtsm-energy")
ROWS = {
    "photograph": "photograph",
    "eigencam": "EigenCAM",
    "tsm": "TSM",
    "mtsm-energy": "MTSM, energy",
    "gradcam": "GradCAM",
}
DROP = "similarity_drop_area_matched"
CONTROL = "centre-gaussian"
WIDTH, GAP, TEXT_SIZE = 1360, 8, 22
# Equally far from white and from GitHub's dark page, #0d1117.
TEXT = (118, 124, 133)
TEXT_LEVELS = 16
# More colours make the file larger than half a megabyte. The palette is computed from a sample of the pixels.
COLOURS, SAMPLE_SIDE = 200, 150
RULE = f"""\
scikit-image and matplotlib contain {len(PHOTOGRAPHS)} photographs that are CC0 or in the public domain. The script
takes one after the other, each from those not yet taken: where the maps of EigenCAM and TSM agree most (the highest
Pearson correlation); where they agree least; where EigenCAM fails; where TSM fails; and the one closest to the median
correlation. A method "fails" where its area-matched drop of the embedding exceeds that of a centred Gaussian, which
knows nothing of the picture, by the most."""
GALLERY_RULE = f"""\
The [gallery](../gallery/gallery.html) has {PICTURES} pictures: all of these photographs, and as many of their quarters
as are needed. The top left quarters come first, in the order of the names, then the top right ones; quarters smaller
than the network's input are left out."""


class Column(NamedTuple):
    """A photograph of the front picture: why it is there, what the network predicts, and what was measured on it."""

    name: str
    reason: str
    predicted: str
    correlation: float
    drops: dict[str, float]


def gather(folder: Path, count: int) -> None:
    """Write `count` pictures by the gallery's rule."""
    whole = {name: Image.open(path).convert("RGB") for name, (path, _) in PHOTOGRAPHS.items()}
    quarters = (
        (f"{name}-{quarter}", picture.crop((right * width, low * height, (right + 1) * width, (low + 1) * height)))
        for place, quarter in enumerate(QUARTERS)
        for name, picture in whole.items()
        for width, height in [(picture.width // 2, picture.height // 2)]
        for low, right in [divmod(place, 2)]
        if min(width, height) >= SMALLEST_SIDE
    )
    for name, picture in [*whole.items(), *quarters][:count]:
        picture.save(folder / f"{name}.png")


def write_gallery(pictures: Path, page: Path) -> None:
    """Run the command line as a user would."""
    methods = [part for name in SHOWN for part in ("--method", name)]
    with TemporaryDirectory() as out:
        command = [sys.executable, "-m", "tucker_cam", "explain", str(pictures), *methods, "--gallery"]
        subprocess.run([*command, "--format", "npy", "--out", out], check=True, cwd=ROOT)  # noqa: S603
        page.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(out) / "gallery.html", page)


def choose(columns: Sequence[Column]) -> list[Column]:
    """Apply the rule."""

    def excess(method: str, column: Column) -> float:
        return column.drops[method] - column.drops[CONTROL]

    middle = median(column.correlation for column in columns)
    order = {
        "agree most": lambda column: column.correlation,
        "agree least": lambda column: -column.correlation,
        "EigenCAM fails": lambda column: excess("eigencam", column),
        "TSM fails": lambda column: excess("tsm", column),
        "median": lambda column: -abs(column.correlation - middle),
    }
    left, chosen = list(columns), {}
    for reason, key in islice(order.items(), len(columns)):
        best = max(left, key=key)
        left.remove(best)
        chosen[reason] = best._replace(reason=reason)
    shown = ("agree most", "median", "agree least", "EigenCAM fails", "TSM fails")
    return [chosen[reason] for reason in shown if reason in chosen]


def draw(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str], path: Path) -> None:
    """Write a grid of pictures with its rows' names on the left and its columns' above, transparent around."""
    font = ImageFont.truetype(MATPLOTLIB / "fonts" / "ttf" / "DejaVuSans-Bold.ttf", TEXT_SIZE)
    left, top = 40, 12 + 29 * (1 + max(name.count("\n") for name in columns))
    side = (WIDTH - left) // len(columns) - GAP
    height = top + len(rows) * (side + GAP)
    pictures, text = Image.new("RGB", (WIDTH, height)), Image.new("L", (WIDTH, height))
    there, pen = Image.new("1", text.size), ImageDraw.Draw(text)
    places = [left + index * (side + GAP) for index in range(len(columns))]
    for x, name in zip(places, columns, strict=True):
        pen.multiline_text((x + side // 2, top - 12), name, 255, font, anchor="md", align="center")
    for index, (name, cells) in enumerate(rows):
        y = top + index * (side + GAP)
        label = Image.new("L", (side, left))
        ImageDraw.Draw(label).multiline_text((side // 2, left - 10), name, 255, font, anchor="md", align="center")
        text.paste(label.rotate(90, expand=True), (0, y))
        for x, cell in zip(places, cells, strict=True):
            pictures.paste(cell.resize((side, side), Image.Resampling.BICUBIC), (x, y))
            there.paste(1, (x, y, x + side, y + side))
    # One palette: the pictures' colours, then the text's colour at several levels of opacity.
    sample = pictures.resize((SAMPLE_SIDE, SAMPLE_SIDE), Image.Resampling.NEAREST).quantize(COLOURS, kmeans=1)
    shown = pictures.quantize(palette=sample, dither=Image.Dither.NONE)
    levels = np.rint(np.asarray(text) / 255 * (TEXT_LEVELS - 1)).astype(np.uint8)
    image = Image.fromarray(np.where(there, np.asarray(shown), COLOURS + levels).astype(np.uint8), "P")
    palette = (shown.getpalette() or [])[: 3 * COLOURS]
    image.putpalette(palette + [0] * (3 * COLOURS - len(palette)) + [*TEXT] * TEXT_LEVELS)
    opacity = [255] * COLOURS + [255 * level // (TEXT_LEVELS - 1) for level in range(TEXT_LEVELS)]
    image.save(path, optimize=True, transparency=bytes(opacity))


def describe(chosen: Sequence[Column]) -> str:
    """Return alternative text, caption, rule, measures and credits as Markdown."""
    names = ", ".join(f"{column.name} ({column.reason})" for column in chosen)
    lines = [
        f"![{len(chosen)} photographs, {names}, and below each the heat maps of {', '.join(list(ROWS.values())[1:])}]"
        "(front.png)",
        "",
        "Photographs, and the maps of four methods for `tf_efficientnet_lite0`, layer `bn2`. EigenCAM, TSM and MTSM "
        "need no label; GradCAM, for reference, explains the class that the network predicts. Red is highest, blue "
        "lowest, each map on its own scale. Above each photograph: r, the correlation of EigenCAM's and TSM's maps.",
        "",
        f"{RULE} Written by `docs/make_pictures.py`.",
        "",
        "| photograph | why | predicted | r | drop: EigenCAM | TSM | MTSM, energy | GradCAM | centred Gaussian |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for column in chosen:
        drops = " | ".join(f"{column.drops[name]:.1f}" for name in [*list(ROWS)[1:], CONTROL])
        lines.append(f"| {column.name} | {column.reason} | {column.predicted} | {column.correlation:.2f} | {drops} |")
    credits = "; ".join(f"{column.name}: {PHOTOGRAPHS[column.name][1]}" for column in chosen)
    drop = "Drop: the area-matched drop of the embedding, in %; lower is better."
    return "\n".join([*lines, "", drop, "", f"{credits}.", "", GALLERY_RULE, ""])


def predicted(network: Network, path: Path) -> str:
    """Return the name of the class that the network predicts, without its synonyms."""
    with torch.inference_mode():
        logits = network.model(network.preprocess(Image.open(path))[None])
    name: str = ImageNetInfo().index_to_description(int(logits.argmax()))
    return name.partition(",")[0]


def write_front(pictures: Path, names: Sequence[str], folder: Path) -> None:
    """Measure the photographs, choose, draw and describe."""
    methods = {name: METHODS[name] for name in SHOWN} | {"gradcam": LABEL_DEPENDENT["gradcam"]}
    paths = [pictures / f"{name}.png" for name in names]
    network = load_model("demo")
    explanations = {Path(each.name).stem: each for each in explain(paths, network, methods)}
    with TemporaryDirectory() as whole:
        for path in paths:
            shutil.copy(path, whole)
        evaluation = evaluate(whole, methods=SHOWN, metrics="drop", progress=False)
    drops: dict[str, dict[str, float]] = {name: {} for name in names}
    for row in evaluation.rows:
        drops[Path(row.picture).stem][row.method] = row.values[DROP]
    chosen = choose(
        [
            Column(
                name,
                "",
                predicted(network, pictures / f"{name}.png"),
                np.corrcoef(each.maps["eigencam"].ravel(), each.maps["tsm"].ravel())[0, 1],
                drops[name],
            )
            for name, each in explanations.items()
        ]
    )

    def cells(column: Column) -> list[Image.Image]:
        found = explanations[column.name]
        photograph = Image.fromarray(np.uint8(np.rint(255 * found.seen)))
        return [photograph, *(found.overlay(name, view="network") for name in list(ROWS)[1:])]

    folder.mkdir(parents=True, exist_ok=True)
    titles = [f"{column.name}\n{column.reason}\nr = {column.correlation:.2f}" for column in chosen]
    kinds = list(zip(*map(cells, chosen), strict=True))
    draw(list(zip(ROWS.values(), kinds, strict=True)), titles, folder / "front.png")
    wide = [column for column in chosen if column.reason in ("agree most", "EigenCAM fails", "TSM fails")]
    draw([(column.reason, cells(column)) for column in wide], list(ROWS.values()), folder / "wide.png")
    (folder / "front.md").write_text(describe(chosen), encoding="utf-8")


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for what is written")
    parser.add_argument("--quick", action="store_true", help="two pictures, to see that it runs")
    arguments = parser.parse_args()
    count = 2 if arguments.quick else PICTURES
    with TemporaryDirectory() as pictures:
        gather(Path(pictures), count)
        write_front(Path(pictures), list(PHOTOGRAPHS)[:count], arguments.out / "images")
        write_gallery(Path(pictures), arguments.out / "gallery" / "gallery.html")


if __name__ == "__main__":
    main()
