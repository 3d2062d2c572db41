"""`tucker-cam demo`: compares the methods on two real photographs with a real network, in one panel."""

import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import skimage
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pytorch_grad_cam.utils.image import show_cam_on_image
from rich.table import Table
from threadpoolctl import threadpool_limits

from tucker_cam.console import PlainConsole
from tucker_cam.methods import METHODS
from tucker_cam.models import load_model
from tucker_cam.pictures.files import open_picture
from tucker_cam.text import say
from tucker_cam.writing import complete_or_absent

_SHOWN = [METHODS[name] for name in ("eigencam", "tsm", "multivec-eigencam", "mtsm")]
# The methods agree on the cup; on the cat they differ the most of all pictures in docs/make_pictures.py.
_PHOTOGRAPHS = [Path(skimage.__file__).parent / "data" / name for name in ("coffee.png", "chelsea.png")]


def run_demo(out: Path) -> None:
    """Write ``demo.png`` to `out`, and print what each method costs compared with the forward pass."""
    panel = out / "demo.png"
    out.mkdir(parents=True, exist_ok=True)
    with complete_or_absent(panel) as unfinished:
        # A folder that cannot be written to fails here, before the work.
        unfinished.touch()
        table = _compare(unfinished)
    PlainConsole().print(table)
    say(f"panel: {panel}")


def _compare(panel: Path) -> Table:
    loaded = load_model("demo")
    images = torch.stack([loaded.preprocess(open_picture(path)) for path in _PHOTOGRAPHS])
    first = images[:1]
    (layer,) = loaded.layers
    pictures = [loaded.picture(image) for image in images]
    views, milliseconds = {"photograph": pictures}, {}
    # One thread for both torch and BLAS: what more threads gain depends on what else the machine is doing.
    with threadpool_limits(1), torch.no_grad():
        forward = _milliseconds(lambda: loaded.model(first))
        for method in _SHOWN:
            with method(loaded.model, loaded.target_layers) as cam:
                maps = cam(images, targets=None)
                views[method.title] = [
                    show_cam_on_image(*each, use_rgb=True) for each in zip(pictures, maps, strict=True)
                ]
                features = cam.activations_and_grads.activations[0][:1]
                # What the host passes to a method: NumPy arrays to its own, tensors to ours.
                handed_on = features.numpy() if method.name == "eigencam" else features
                milliseconds[method.title] = _milliseconds(
                    partial(cam.get_cam_image, first, layer.module, None, handed_on, None, False)
                )
    _draw(views, f"tf_efficientnet_lite0, layer {layer.name} ({' x '.join(map(str, features.shape[1:]))})", panel)
    table = Table("method", title=f"forward pass {forward:.1f} ms, one thread")
    table.add_column("decomposition [ms]", justify="right")
    table.add_column("share of the forward pass", justify="right")
    for title, cost in milliseconds.items():
        table.add_row(title, f"{cost:.2f}", f"{cost / forward:.1%}")
    return table


def _milliseconds(work: Callable[[], object]) -> float:
    # The first call is left out, as its time differs from that of the others.
    return 1e3 * median(timeit.repeat(work, number=1, repeat=8)[1:])


def _draw(views: dict[str, list[NDArray[np.float32]]], title: str, panel: Path) -> None:
    figure = Figure(figsize=(3 * len(views), 6.6), layout="constrained")
    grid = figure.subplots(len(_PHOTOGRAPHS), len(views))
    for column, (name, shown) in zip(grid.T, views.items(), strict=True):
        column[0].set_title(name, fontsize=15.6)
        for axes, view in zip(column, shown, strict=True):
            axes.imshow(view)
            axes.axis("off")
    figure.suptitle(f"{title}, no label given", fontsize=15.6)
    figure.savefig(panel, dpi=100)
