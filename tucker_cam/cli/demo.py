"""One command, no arguments: a real network, a real photograph, one panel that compares the methods."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pytorch_grad_cam.utils.image import show_cam_on_image
from rich.table import Table
from threadpoolctl import threadpool_limits

from tucker_cam.cli.lines import say
from tucker_cam.console import PlainConsole
from tucker_cam.errors import MissingPackageError
from tucker_cam.extras import install
from tucker_cam.methods import METHODS
from tucker_cam.models import load_model
from tucker_cam.pictures.files import open_picture
from tucker_cam.writing import complete_or_absent

_SHOWN = ("eigencam", "tsm", "multivec-eigencam", "mtsm")


def run_demo(out: Path) -> None:
    """Write ``demo.png`` to `out` and print what each method cost beside the forward pass.

    Raises:
        ModuleNotFoundError: the demo's packages are missing; the message holds the command that installs them.
        OSError: `out` cannot be written.
    """
    photograph = _photograph()
    panel = out / "demo.png"
    out.mkdir(parents=True, exist_ok=True)
    with complete_or_absent(panel) as unfinished:
        # A folder that cannot be written to says so before the work.
        unfinished.touch()
        table = _compare(photograph, unfinished)
    PlainConsole().print(table)
    say(f"panel: {panel}")


def _compare(photograph: Path, panel: Path) -> Table:
    loaded = load_model("demo")
    network_input = loaded.preprocess(open_picture(photograph))
    images = network_input[None]
    (layer,) = loaded.layers

    maps, milliseconds = {}, {}
    # One thread for torch and BLAS alike: what several gain depends on what else the machine is doing.
    with threadpool_limits(1), torch.no_grad():
        forward = _milliseconds(lambda: loaded.model(images))
        for method in _SHOWN:
            with METHODS[method](loaded.model, loaded.target_layers) as cam:
                maps[method] = cam(images, targets=None)[0]
                features = cam.activations_and_grads.activations[0]
                # What the host hands on: its own methods get NumPy arrays, ours the tensors.
                handed_on = features.numpy() if method == "eigencam" else features
                milliseconds[method] = _milliseconds(
                    partial(cam.get_cam_image, images, layer.module, None, handed_on, None, False)
                )

    picture = loaded.picture(network_input)
    channels, height, width = features.shape[1:]
    with matplotlib.rc_context({"font.size": 13}):
        figure = _panel(picture, {METHODS[method].title: saliency for method, saliency in maps.items()})
        figure.suptitle(f"tf_efficientnet_lite0, layer {layer.name} ({channels} x {height} x {width}), no label given")
        figure.savefig(panel, dpi=100, format="png")

    table = Table(title=f"forward pass {forward:.1f} ms, one thread")
    table.add_column("method")
    table.add_column("decomposition [ms]", justify="right")
    table.add_column("share of the forward pass", justify="right")
    for method in _SHOWN:
        table.add_row(METHODS[method].title, f"{milliseconds[method]:.2f}", f"{milliseconds[method] / forward:.1%}")
    return table


def _photograph() -> Path:
    try:
        import skimage
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"the demo's photograph is in the package scikit-image: {install('demo')}", name=error.name
        ) from error
    return Path(skimage.__file__).parent / "data" / "coffee.png"


def _milliseconds(work: Callable[[], object], repetitions: int = 7) -> float:
    work()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * median(times)


def _panel(picture: NDArray[np.float32], maps: dict[str, NDArray[np.float32]]) -> Figure:
    figure = Figure(figsize=(3 * (1 + len(maps)), 3.6), layout="constrained")
    views = {"photograph": picture} | {t: show_cam_on_image(picture, m, use_rgb=True) for t, m in maps.items()}
    for axes, (title, view) in zip(figure.subplots(1, len(views)), views.items(), strict=True):
        axes.imshow(view)
        axes.set_title(title)
        axes.axis("off")
    return figure
