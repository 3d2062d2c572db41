"""What a saliency map costs: each method beside its peers, paired in one run on one thread.

    python -m benchmarks.speed            # some minutes; writes benchmarks/results/speed.{json,md,png}
    python -m benchmarks.speed --quick    # seconds; small shapes, to see that the script works

Every round times each method once, in turn, so that a slow spell of the machine meets all of them; ratios are medians
of the ratios within rounds. Methods that loop over the images in Python (the host's and TensorLy's) are timed on one
image, and scaled, where a batch would take many seconds. Peak memory is read as Linux tells it. Needs the `test` extra.
"""

from __future__ import annotations

import ctypes
import gc
import json
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import numpy as np
import skimage.data
import torch
import torchvision
import typer
from matplotlib.figure import Figure
from PIL import Image
from pytorch_grad_cam import FEM, KPCA_CAM, EigenCAM
from pytorch_grad_cam.base_cam import BaseCAM
from tensorly.decomposition import tucker
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from benchmarks.reporting import environment, memory_mib, table
from tucker_cam import MTSM, TSM
from tucker_cam.decomposition.projection import combined_map, leading_map
from tucker_cam.models import load_model

SEED = 0
# For one method on one case; it gets one round at least.
PATIENCE_MS, PATIENCE_END_TO_END_MS = 2_000.0, 15_000.0
_M_MMAP_THRESHOLD = -3
TRUNCATED = {3: (8, 4, 4), 4: (8, 2, 4, 4)}


@dataclass
class Timed:
    """One method's work on a number of images, with the milliseconds that all images took in each round."""

    work: Callable[[int], object]
    images: int
    one_by_one: bool = False
    patience: float = PATIENCE_MS
    samples: list[float] = field(default_factory=list)
    spent: float = 0.0

    def run(self) -> None:
        """Add a sample, unless the patience with this method is used up; the very first run is a warm-up."""
        if self.spent > self.patience and self.samples:
            return
        images = 1 if self.one_by_one and self.spent > self.patience / 15 else self.images
        if not self.spent:
            self.spent = self._milliseconds(1 if self.one_by_one else images)
            if self.spent > self.patience:
                self.samples.append(self.spent * self.images / (1 if self.one_by_one else images))
            return
        taken = self._milliseconds(images)
        self.spent += taken
        self.samples.append(taken * self.images / images)

    def _milliseconds(self, images: int) -> float:
        start = time.perf_counter()
        self.work(images)
        return 1e3 * (time.perf_counter() - start)

    @property
    def summary(self) -> dict[str, object]:
        low, _, high = quantiles(self.samples, n=4) if len(self.samples) > 1 else self.samples * 3
        return {"median_ms": median(self.samples), "quartiles_ms": [low, high], "samples_ms": self.samples}


def in_rounds(methods: dict[str, Timed], rounds: int) -> dict[str, Timed]:
    """Time every method once a round, after one round to warm up."""
    for _ in range(rounds + 1):
        for timed in methods.values():
            timed.run()
    return methods


def ratio(methods: dict[str, Timed], over: str, under: str) -> float:
    """Return the median of the ratios within rounds."""
    pairs = zip(methods[over].samples, methods[under].samples, strict=False)
    return median(a / b for a, b in pairs)


def decomposition_methods(features: Tensor) -> dict[str, Timed]:
    """Return each method's work from given features to maps, before any scaling to the picture's size."""
    images, shape = len(features), tuple(features.shape[1:])
    unfolding = features.flatten(2)
    tall = unfolding if unfolding.shape[1] >= unfolding.shape[2] else unfolding.mT
    arrays = features.numpy()
    model = nn.Sequential(nn.Conv2d(3, 1, 1))
    host = {
        name: method(model, [model[0]])
        for name, method in (("EigenCAM", EigenCAM), ("KPCA_CAM", KPCA_CAM), ("FEM", FEM))
    }
    rank = TRUNCATED[len(shape)]

    def by_host(name: str) -> Timed:
        return Timed(lambda n: host[name].get_cam_image(None, None, None, arrays[:n], None, False), images, True)

    def by_tensorly(rank: tuple[int, ...]) -> Timed:
        return Timed(lambda n: [tucker(array, rank=rank) for array in arrays[:n]], images, True)

    return {
        "Gram product (floor)": Timed(lambda n: tall.mT @ tall, images),
        "TSM": Timed(lambda n: leading_map(features), images),
        "MTSM": Timed(lambda n: combined_map(features), images),
        "MTSM, energy": Timed(lambda n: combined_map(features, combine="energy"), images),
        "Multivec-EigenCAM": Timed(lambda n: combined_map(features, center=True), images),
        "TSM, truncated": Timed(lambda n: leading_map(features, rank=rank), images),
        "torch.linalg.svd": Timed(lambda n: torch.linalg.svd(unfolding, full_matrices=False), images),
        "EigenCAM": by_host("EigenCAM"),
        "KPCA_CAM": by_host("KPCA_CAM"),
        "FEM": by_host("FEM"),
        "TensorLy, truncated": by_tensorly(rank),
        "TensorLy, full rank": by_tensorly(shape),
    }


def rectified_noise(*shape: int) -> Tensor:
    """Return what stands for feature maps of a shape for which there is no real network here."""
    return torch.relu(torch.randn(*shape) + 0.2)


def photographs(size: int, count: int) -> Tensor:
    """Return crops of scikit-image's photographs, count x 3 x size x size, in [-1, 1]."""
    names = ("coffee", "chelsea", "astronaut")
    crops = []
    for i in range(count):
        picture = Image.fromarray(getattr(skimage.data, names[i % len(names)])())
        left, top = 10 * i, 5 * i
        crop = picture.crop((left, top, left + 256, top + 256)).resize((size, size))
        crops.append(torch.from_numpy(np.asarray(crop, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(crops)


def demo_features(count: int) -> Tensor:
    """Return the demo network's real features, 1280x7x7."""
    demo = load_model("demo")
    with TSM(demo.model, [demo.model.bn2]) as cam:
        cam(photographs(224, count))
        return cam.activations_and_grads.activations[0]


def end_to_end_methods(model: nn.Module, layer: nn.Module, batch: Tensor) -> dict[str, Timed]:
    """Return whole calls, from pictures to maps of the pictures' size, beside a plain forward pass."""

    def plain(_: int) -> None:
        with torch.no_grad():
            model(batch)

    cams = {"TSM": TSM(model, [layer]), "MTSM": MTSM(model, [layer]), "EigenCAM": EigenCAM(model, [layer])}
    works = {"plain forward": plain} | {name: partial(_call, cam, batch) for name, cam in cams.items()}
    return {name: Timed(work, len(batch), patience=PATIENCE_END_TO_END_MS) for name, work in works.items()}


def _call(cam: BaseCAM, batch: Tensor, _: int) -> None:
    cam(batch, targets=None)


def measure_memory(quick: bool) -> dict[str, object]:
    """Return each method's peak memory, and how much the process grew over many calls of TSM.

    To be run in a process of its own, so that nothing hides in what earlier work left behind.
    """
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    # Whatever is freed goes back to the system at once.
    ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    model = (torchvision.models.resnet18 if quick else torchvision.models.resnet50)(weights=None).eval()
    batch = torch.randn(2, 3, 64, 64) if quick else torch.randn(8, 3, 224, 224)

    def plain(batch: Tensor) -> None:
        with torch.no_grad():
            model(batch)

    peaks: dict[str, list[float]] = {}
    for _ in range(4):
        peaks.setdefault("plain forward", []).append(_peak(plain, batch))
        for build, layer in ((TSM, "layer4"), (MTSM, "layer4"), (TSM, "layer1"), (EigenCAM, "layer4")):
            with build(model, [getattr(model, layer)]) as cam:
                work = partial(cam, targets=None)
                peaks.setdefault(f"{build.__name__}, {layer}", []).append(_peak(work, batch))
    small, resident = torchvision.models.resnet18(weights=None), []
    for _ in range(20 if quick else 1100):
        TSM(small, [small.layer4])(torch.randn(2, 3, 64, 64))
        resident.append(memory_mib("VmRSS"))
    # The first round and the first hundred calls warm up.
    counted = resident[-1000:]
    return {
        "peak_mib": {name: samples[1:] for name, samples in peaks.items()},
        "calls": len(counted),
        "growth_mib": median(counted[-50:]) - median(counted[:50]),
    }


def _peak(work: Callable[[Tensor], object], batch: Tensor) -> float:
    """Return how many MiB the process grew by, at most, while it worked."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mib("VmRSS")
    work(batch)
    return memory_mib("VmHWM") - before


def measure_growth(sizes: dict[str, list[tuple[int, ...]]], rounds: int) -> dict[str, list[dict[str, object]]]:
    """Return TSM's and MTSM's time as the batch, the channels and the positions grow."""
    growth = {}
    for axis, shapes in sizes.items():
        points = {}
        for shape in shapes:
            features = rectified_noise(*shape)
            points[shape] = {
                "TSM": Timed(lambda n, f=features: leading_map(f), shape[0]),
                "MTSM": Timed(lambda n, f=features: combined_map(f), shape[0]),
            }
        for methods in points.values():
            in_rounds(methods, rounds)
        growth[axis] = [
            {"shape": shape, **{name: timed.summary for name, timed in methods.items()}}
            for shape, methods in points.items()
        ]
    return growth


def plot_growth(growth: dict[str, list[dict[str, object]]], path: Path) -> None:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    lengths = {"batch": lambda s: s[0], "channels": lambda s: s[1], "positions": lambda s: int(np.prod(s[2:]))}
    for axes, (axis, points) in zip(figure.subplots(1, 3), growth.items(), strict=True):
        x = [lengths[axis](point["shape"]) for point in points]
        for name in ("TSM", "MTSM"):
            axes.loglog(x, [point[name]["median_ms"] for point in points], marker="o", label=name)
        fixed = "x".join(str(n) for n in points[0]["shape"])
        axes.set(xlabel=axis, ylabel="ms", title=f"from {fixed}, one thread")
        axes.legend()
    figure.savefig(path, dpi=110)


def figure_of(timed: Timed) -> str:
    """Return the median and, behind it, half the distance between the quartiles."""
    low, high = timed.summary["quartiles_ms"]
    digits = 2 if median(timed.samples) < 100 else 0
    return f"{median(timed.samples):,.{digits}f} ± {(high - low) / 2:,.{digits}f}"


def report(results: dict[str, object], decompositions: dict, end_to_end: dict, ratios: dict[str, float]) -> str:
    about = results["environment"]
    parts = [
        f"One thread of {about['machine']} ({about['instructions']}), torch {about['torch']}, numpy {about['numpy']}, "
        f"grad-cam {about['grad-cam']}, tensorly {about['tensorly']}. Milliseconds for the whole batch, median ± half "
        "the distance between the quartiles.",
    ]
    for batch in sorted({batch for _, batch in decompositions}, reverse=True):
        cases = {name: methods for (name, b), methods in decompositions.items() if b == batch}
        rows = {m: [figure_of(methods[m]) for methods in cases.values()] for m in next(iter(cases.values()))}
        parts.append(table(f"decomposition alone, batch of {batch}", list(cases), rows))
    rows = {
        f"{name}, batch of {batch}": [figure_of(timed) for timed in methods.values()]
        for (name, batch), methods in end_to_end.items()
    }
    parts.append(table("end to end", list(next(iter(end_to_end.values()))), rows))
    parts.append(
        table(
            "ratio",
            ["median"],
            {name: [f"{value:,.3g}" if value < 1 else f"{value:,.2f}"] for name, value in ratios.items()},
        )
    )
    memory = results["memory"]
    peaks = {name: median(samples) for name, samples in memory["peak_mib"].items()}
    rows = {name: [f"{peak:,.0f}", f"{peak / peaks['plain forward']:.2f}"] for name, peak in peaks.items()}
    parts.append(table("peak memory, ResNet-50, batch of 8", ["MiB", "of a plain forward"], rows))
    parts.append(f"Over {memory['calls']:,} calls of TSM the process grew by {memory['growth_mib']:.1f} MiB.")
    return "\n\n".join(parts) + "\n"


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes, in seconds.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path(__file__).parent / "results",
) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Trying to compute SVD with n_eigenvecs")  # TensorLy at full rank
    rounds = 2 if quick else 15
    batches = (2,) if quick else (16, 1)
    shapes = {
        "ResNet-50 2048x7x7": (2048, 7, 7),
        "ConvNeXt 768x7x7": (768, 7, 7),
        "2048x14x14": (2048, 14, 14),
        "256x56x56": (256, 56, 56),
        "1024x32x32": (1024, 32, 32),
        "video 512x8x14x14": (512, 8, 14, 14),
    }
    if quick:
        shapes = {"tall 60x4x4": (60, 4, 4), "wide 20x6x6": (20, 6, 6), "video 24x4x4x4": (24, 4, 4, 4)}
    resnet = torchvision.models.resnet18(weights=None) if quick else torchvision.models.resnet50(weights=None)
    size = 64 if quick else 224

    with threadpool_limits(1):
        decompositions = {}
        for batch in batches:
            cases = {name: rectified_noise(batch, *shape) for name, shape in shapes.items()}
            cases["EfficientNet 1280x7x7, real"] = demo_features(batch)
            cases["1280x7x7, Gaussian"] = torch.randn(batch, 1280, 7, 7)
            for name, features in cases.items():
                typer.echo(f"decomposition: {batch} x {name}")
                decompositions[name, batch] = in_rounds(decomposition_methods(features), rounds)

        networks = {"ResNet-18" if quick else "ResNet-50": (resnet, resnet.layer4)}
        demo = load_model("demo").model
        networks["EfficientNet-Lite0"] = (demo, demo.bn2)
        end_to_end = {}
        for name, (model, layer) in networks.items():
            for batch in (2,) if quick else (1, 8, 16):
                typer.echo(f"end to end: {name}, batch of {batch}")
                methods = end_to_end_methods(model.eval(), layer, photographs(size, batch))
                end_to_end[name, batch] = in_rounds(methods, rounds)

        typer.echo("growth")
        doubling = (1, 2, 4) if quick else (1, 2, 4, 8, 16, 32, 64)
        sides = (2, 4, 8) if quick else (4, 7, 10, 14, 20, 28, 40, 56)
        growth = measure_growth(
            {
                "batch": [(n, 64 if quick else 2048, 7, 7) for n in doubling],
                "channels": [(4, 32 * n, 7, 7) for n in doubling],
                "positions": [(2, 64 if quick else 512, n, n) for n in sides],
            },
            rounds,
        )
        typer.echo("memory")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            memory = process.submit(measure_memory, quick).result()

    first, largest = next(iter(decompositions)), max(batches)
    main_case = decompositions[first]
    ratios = {
        f"{over} / {under}, {largest} x {first[0]}": ratio(main_case, over, under)
        for over, under in [
            ("EigenCAM", "TSM"),
            ("TensorLy, full rank", "TSM"),
            ("TSM", "Gram product (floor)"),
            ("MTSM", "TSM"),
            ("MTSM, energy", "TSM"),
            ("Multivec-EigenCAM", "TSM"),
        ]
    }
    for name in ("EfficientNet 1280x7x7, real", "1280x7x7, Gaussian"):
        methods = decompositions[name, largest]
        ratios[f"TensorLy / TSM, both truncated, {largest} x {name}"] = ratio(
            methods, "TensorLy, truncated", "TSM, truncated"
        )
    for (name, batch), methods in decompositions.items():
        if name in ("256x56x56", "1024x32x32"):
            ratios[f"TSM / torch.linalg.svd, {batch} x {name}"] = ratio(methods, "TSM", "torch.linalg.svd")
    for (name, batch), methods in end_to_end.items():
        for method in ("TSM", "EigenCAM"):
            ratios[f"{method} / plain forward, {name}, batch of {batch}"] = ratio(methods, method, "plain forward")
    one, many = growth["batch"][0], growth["batch"][-1]
    ratios[f"TSM: an image in a batch of {many['shape'][0]} / one alone"] = (
        many["TSM"]["median_ms"] / many["shape"][0] / one["TSM"]["median_ms"]
    )

    results = {
        "environment": environment(SEED),
        "decomposition": {
            f"{batch} x {name}": {method: timed.summary for method, timed in methods.items()}
            for (name, batch), methods in decompositions.items()
        },
        "end_to_end": {
            f"{name}, batch of {batch}": {method: timed.summary for method, timed in methods.items()}
            for (name, batch), methods in end_to_end.items()
        },
        "growth": growth,
        "memory": memory,
        "ratios": ratios,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    text = report(results, decompositions, end_to_end, ratios)
    (out / "speed.md").write_text(text)
    plot_growth(growth, out / "speed.png")
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
