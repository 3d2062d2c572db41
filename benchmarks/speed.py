"""What a saliency map costs: each method beside its peers, paired in one run on one thread.

    python -m benchmarks.speed            # minutes; writes benchmarks/results/speed.{json.gz,md,png}; --quick: seconds

Every round times each method once, in turn, so that a slow spell of the machine affects all of them. Fast methods are
called repeatedly, as timeit does, so that the call before does not affect them. On the CPU, this process's CPU time is
measured. If a batch would take seconds, methods that loop over the images in Python (the host's and TensorLy's) are
timed on one image and scaled. Peak memory is what Linux reports. Needs the `test` extra.
"""

from __future__ import annotations

import ctypes
import gc
import re
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

from benchmarks.reporting import environment, memory_mib, table, write_samples
from tucker_cam import MTSM, TSM, features
from tucker_cam.decomposition.gram import gram_matrix
from tucker_cam.decomposition.projection import combined_map, leading_map
from tucker_cam.models import load_model

SEED = 0
# For one method on one case, one round at least; what takes little is called as often as fits into a moment.
PATIENCE_MS, LONG_PATIENCE_MS, LITTLE_MS, MOMENT_MS = 1_500.0, 12_000.0, 50.0, 10.0
_M_MMAP_THRESHOLD = -3
TRUNCATED = {3: (8, 4, 4), 4: (8, 2, 4, 4)}
FLOOR, TRUNCATED_TSM, TRUNCATED_PEER = "Gram product (floor)", "TSM, truncated", "TensorLy, truncated"
REAL, GAUSSIAN, PARTS = "EfficientNet 1280x7x7, real", "1280x7x7, Gaussian", "1280x7x7, parts"
# Which method over which, in the cases of which the name has this in it.
RATIOS = [("TSM", FLOOR, "16 x|1 x 2048x7x7"), (TRUNCATED_PEER, TRUNCATED_TSM, "real|parts"), ("MTSM", "eigh", "")]
RATIOS += [(name, "TSM", "16 x 2048x7x7") for name in ("MTSM", "MTSM, energy", "EigenCAM", "TensorLy, full rank")]
RATIOS += [("TSM", "plain forward", "")]


@dataclass
class Timed:
    """One method's work on a number of images, with the milliseconds that all images took in each round."""

    work: Callable[[int], object]
    images: int
    one_by_one: bool = False
    samples: list[float] = field(default_factory=list)
    spent: float = 0.0
    patience_ms: float = PATIENCE_MS

    def run(self) -> None:
        """Add a sample, unless the patience with this method is used up."""
        if self.spent > self.patience_ms and self.samples:
            return
        images = 1 if self.one_by_one and (not self.samples or median(self.samples) > PATIENCE_MS / 8) else self.images
        taken = self._milliseconds(images)
        self.spent += taken
        if taken < LITTLE_MS:
            calls = 1 + int(MOMENT_MS / taken)
            taken = self._milliseconds(images, calls)
            self.spent += calls * taken
        self.samples.append(taken * self.images / images)

    def _milliseconds(self, images: int, calls: int = 1) -> float:
        clock = time.perf_counter if torch.cuda.is_initialized() else time.process_time
        start = clock()
        for _ in range(calls):
            self.work(images)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return 1e3 * (clock() - start) / calls

    @property
    def summary(self) -> dict[str, object]:
        low, _, high = quantiles(self.samples, n=4) if len(self.samples) > 1 else self.samples * 3
        samples = [float(f"{sample:.4g}") for sample in self.samples]
        return {"median_ms": median(self.samples), "quartiles_ms": [low, high], "samples_ms": samples}


def in_rounds(methods: dict[str, Timed], rounds: int) -> dict[str, Timed]:
    """Time every method once a round, after one round to warm up whatever is not too slow for that."""
    for turn in range(rounds + 1):
        for timed in methods.values():
            timed.run()
            if turn == 0 and timed.spent < PATIENCE_MS:
                timed.samples.clear()
    return methods


def decomposition_methods(maps: Tensor) -> dict[str, Timed]:
    """Return each method's work from given features to maps, before any scaling to the picture's size."""
    images, shape = len(maps), tuple(maps.shape[1:])
    unfolding = maps.flatten(2)
    tall = unfolding if unfolding.shape[1] >= unfolding.shape[2] else unfolding.mT
    arrays, rank = maps.cpu().numpy(), TRUNCATED[len(shape)]
    model = nn.Sequential(nn.Conv2d(3, 1, 1))

    def by_host(method: type[BaseCAM]) -> Timed:
        cam = method(model, [model[0]])
        return Timed(lambda n: cam.get_cam_image(None, None, None, arrays[:n], None, False), images, True)

    return {
        FLOOR: Timed(lambda _: tall.mT @ tall, images),
        "TSM": Timed(lambda _: leading_map(maps), images),
        "MTSM": Timed(lambda _: combined_map(maps), images),
        "MTSM, energy": Timed(lambda _: combined_map(maps, combine="energy"), images),
        "Multivec-EigenCAM": Timed(lambda _: combined_map(maps, center=True), images),
        TRUNCATED_TSM: Timed(lambda _: leading_map(maps, rank=rank), images),
        "torch.linalg.svd": Timed(lambda _: torch.linalg.svd(unfolding, full_matrices=False), images),
        **{method.__name__: by_host(method) for method in (EigenCAM, KPCA_CAM, FEM)},
        TRUNCATED_PEER: Timed(lambda n: [tucker(array, rank=rank) for array in arrays[:n]], images, True),
        "TensorLy, full rank": Timed(lambda n: [tucker(array, rank=shape) for array in arrays[:n]], images, True),
    }


def rectified_noise(*shape: int) -> Tensor:
    return torch.relu(torch.randn(*shape) + 0.2)


def photographs(size: int, count: int) -> Tensor:
    """Return crops of scikit-image's photographs, count x 3 x size x size, in [-1, 1]."""
    crops = []
    for i in range(count):
        picture = Image.fromarray(getattr(skimage.data, ("coffee", "chelsea", "astronaut")[i % 3])())
        crop = picture.crop((10 * i, 5 * i, 10 * i + 256, 5 * i + 256)).resize((size, size))
        crops.append(torch.from_numpy(np.asarray(crop, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(crops)


def end_to_end_methods(model: nn.Module, layer: nn.Module, batch: Tensor) -> dict[str, Timed]:
    """Return whole calls, from pictures to maps of the pictures' size, beside a plain forward pass."""
    cams = {"TSM": TSM(model, [layer]), "MTSM": MTSM(model, [layer]), "EigenCAM": EigenCAM(model, [layer])}
    works = {name: partial(cam, targets=None) for name, cam in cams.items()}
    works = {"plain forward": torch.no_grad()(model.forward)} | works
    return {n: Timed(lambda _, work=w: work(batch), len(batch), patience_ms=LONG_PATIENCE_MS) for n, w in works.items()}


def measure_memory(quick: bool) -> dict[str, list[float]]:
    """Return each method's peak memory, in MiB; in a process of its own nothing hides in what earlier work left."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 16)  # what is freed goes back to the system at once
    model = (torchvision.models.resnet18 if quick else torchvision.models.resnet50)(weights=None).eval()
    batch = torch.randn(2, 3, 64, 64) if quick else torch.randn(8, 3, 224, 224)
    peaks: dict[str, list[float]] = {}
    for _ in range(4):
        peaks.setdefault("plain forward", []).append(_peak(torch.no_grad()(model.forward), batch))
        for build, layer in ((TSM, "layer4"), (MTSM, "layer4"), (TSM, "layer1"), (EigenCAM, "layer4")):
            with build(model, [getattr(model, layer)]) as cam:
                peaks.setdefault(f"{build.__name__}, {layer}", []).append(_peak(partial(cam, targets=None), batch))
    return {name: samples[1:] for name, samples in peaks.items()}  # the first round warms up


def _peak(work: Callable[[Tensor], object], batch: Tensor) -> float:
    """Return how many MiB the process grew by, at most, while it worked."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_mib("VmRSS")
    work(batch)
    return memory_mib("VmHWM") - before


def plot_growth(growth: dict[str, list[dict[str, object]]], path: Path) -> None:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (axis, points) in zip(figure.subplots(1, 3), growth.items(), strict=True):
        for name in ("TSM", "MTSM"):
            milliseconds = [point[name]["median_ms"] for point in points]
            axes.loglog([point[axis] for point in points], milliseconds, marker="o", label=name)
        axes.set(xlabel=axis, ylabel="ms", title="one thread")
        axes.legend()
    figure.savefig(path, dpi=110)


def figure_of(timed: Timed) -> str:
    low, high = timed.summary["quartiles_ms"]
    digits = 2 if median(timed.samples) < 100 else 0
    return f"{median(timed.samples):,.{digits}f} ± {(high - low) / 2:,.{digits}f}"


def report(
    about: dict[str, object], memory: dict[str, list[float]], cases: dict, end_to_end: dict, ratios: dict
) -> str:
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "numpy", "grad-cam", "tensorly"))
    parts = [
        f"One thread of {about['machine']} ({about['instructions']}), {versions}. Milliseconds for the whole batch, "
        "median ± half the distance between the quartiles."
    ]
    for batch in dict.fromkeys(case.partition(" x ")[0] for case in cases):
        columns = {
            case.partition(" x ")[2]: methods for case, methods in cases.items() if case.startswith(f"{batch} x")
        }
        rows = {m: [figure_of(methods[m]) for methods in columns.values()] for m in next(iter(columns.values()))}
        parts.append(table(f"decomposition alone, batch of {batch}", list(columns), rows))
    rows = {case: [figure_of(timed) for timed in methods.values()] for case, methods in end_to_end.items()}
    parts.append(table("end to end", ["plain forward", "TSM", "MTSM", "EigenCAM"], rows))
    rows = {name: [f"{value:,.3g}" if value < 1 else f"{value:,.2f}"] for name, value in ratios.items()}
    parts.append(table("ratio", ["of medians"], rows))
    peaks = {name: median(samples) for name, samples in memory.items()}
    rows = {name: [f"{peak:,.0f}", f"{peak / peaks['plain forward']:.2f}"] for name, peak in peaks.items()}
    parts.append(table("peak memory, ResNet-50, batch of 8", ["MiB", "of a plain forward"], rows))
    return "\n\n".join(parts) + "\n"


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes, in seconds.")] = False,
    device: Annotated[str, typer.Option(help="Where features and networks are; no GPU has been tried.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path(__file__).parent / "results",
) -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Trying to compute SVD with n_eigenvecs")  # TensorLy at full rank
    rounds = 2 if quick else 15
    demo = load_model("demo").model.to(device)
    resnet = (torchvision.models.resnet18 if quick else torchvision.models.resnet50)(weights=None).eval().to(device)
    shapes = {"2048x7x7": (2048, 7, 7), "768x7x7": (768, 7, 7), "2048x14x14": (2048, 14, 14)}
    shapes |= {"256x56x56": (256, 56, 56), "1024x32x32": (1024, 32, 32), "video 512x8x14x14": (512, 8, 14, 14)}
    shapes = {"60x4x4": (60, 4, 4), "20x6x6": (20, 6, 6), "24x4x4x4": (24, 4, 4, 4)} if quick else shapes
    inputs = {}
    for batch in (2, 1) if quick else (16, 1):
        inputs |= {f"{batch} x {name}": rectified_noise(batch, *shape) for name, shape in shapes.items()}
        inputs[f"{batch} x {REAL}"] = features(demo, [demo.bn2], photographs(224, batch).to(device))[0]
        inputs[f"{batch} x {GAUSSIAN}"] = torch.randn(batch, 1280, 7, 7)
    parts = torch.randn(8, 1280, 7, 7).relu() + 2 * torch.rand(8, 1280, 1, 1) * torch.rand(8, 1, 7, 7)
    (large,) = features(demo, [demo.bn2], photographs(224 if quick else 1024, 2).to(device))
    matrix = gram_matrix(large.flatten(2))

    with threadpool_limits(1):
        cases, end_to_end = {}, {}
        for case, maps in inputs.items():
            typer.echo(case)
            cases[case] = in_rounds(decomposition_methods(maps.to(device)), rounds)
        every = decomposition_methods(parts.to(device))
        eigh = Timed(lambda _: torch.linalg.eigh(matrix), 2)
        others = {
            f"8 x {PARTS}": {name: every[name] for name in (TRUNCATED_TSM, TRUNCATED_PEER)},
            "2 x 1280x32x32, real": {"MTSM": Timed(lambda _: combined_map(large), 2), "eigh": eigh},
        }
        for methods in others.values():
            in_rounds(methods, rounds)
        for name, model, layer in (("ResNet", resnet, resnet.layer4), ("EfficientNet-Lite0", demo, demo.bn2)):
            for batch in (2,) if quick else (1, 8, 16):
                typer.echo(f"end to end: {batch} x {name}")
                pictures = photographs(64 if quick else 224, batch).to(device)
                end_to_end[f"{batch} x {name}"] = in_rounds(end_to_end_methods(model, layer, pictures), rounds)
        typer.echo("growth")
        doubled, long = [2**n for n in range(3 if quick else 7)], 64 if quick else 2048
        points = [("batch", n, long, 7) for n in doubled] + [("channels", 4, 32 * n, 7) for n in doubled]
        points += [("positions", 2, long // 4, n) for n in (4, 7, 10, 14, 20, 28, 40)[: len(doubled)]]
        growth: dict[str, list[dict[str, object]]] = {}
        for axis, *shape, side in points:
            every = decomposition_methods(rectified_noise(*shape, side, side).to(device))
            timed = in_rounds({name: every[name] for name in ("TSM", "MTSM")}, rounds)
            point = {"batch": shape[0], "channels": shape[1], "positions": side**2, "side": side}
            growth.setdefault(axis, []).append(point | {name: t.summary for name, t in timed.items()})
        typer.echo("memory")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            memory = process.submit(measure_memory, quick).result()

    ratios = {
        f"{over} / {under}, {case}": median(methods[over].samples) / median(methods[under].samples)
        for over, under, named in RATIOS
        for case, methods in (cases | others | end_to_end).items()
        if {over, under} <= methods.keys() and re.search(named, case)
    }
    about = environment(SEED) | {"device": device}
    results = {"environment": about, "growth": growth, "memory": memory, "ratios": ratios}
    for key, timed_cases in (("decomposition", cases), ("others", others), ("end_to_end", end_to_end)):
        results[key] = {case: {m: t.summary for m, t in methods.items()} for case, methods in timed_cases.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_samples(out / "speed.json.gz", results)
    (out / "speed.md").write_text(report(about, memory, cases, end_to_end, ratios))
    plot_growth(growth, out / "speed.png")
    typer.echo((out / "speed.md").read_text())


if __name__ == "__main__":
    typer.run(main)
