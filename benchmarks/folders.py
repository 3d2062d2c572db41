"""What explaining a folder costs compared with running the network over it, and whether a killed run loses anything.

    python -m benchmarks.folders            # some minutes; writes benchmarks/results/folders.{json,md}
    python -m benchmarks.folders --quick    # seconds; few pictures, to see that the script works

4,000 small pictures, maps only, one thread and one process that reads. They are divided into rounds. In each round a
plain loop of a DataLoader and the network's forward pass, and `explain`, take the same pictures; which comes first
alternates. The forward pass is the same in both, and on a busy machine it varies by more than everything else, so it
is also timed separately. Then the command runs on all pictures, is killed again and again, and ends.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.reporting import environment, memory_mib, table
from tucker_cam import explain
from tucker_cam.explanations.explainer import CPU_BATCH
from tucker_cam.models import LoadedModel, load_model
from tucker_cam.pictures.files import open_picture

SEED = 0


class Plain(Dataset[torch.Tensor]):
    """The pictures, preprocessed, and nothing else."""

    def __init__(self, paths: list[Path], loaded: LoadedModel) -> None:
        self.paths, self.loaded = paths, loaded

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.loaded.preprocess(open_picture(self.paths[index]))


def make_pictures(folder: Path, count: int) -> list[Path]:
    """Write small photographs-like JPEGs: smooth random colours."""
    generator = np.random.default_rng(SEED)
    paths = []
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 255, (6, 8, 3), np.uint8))
        paths.append(folder / f"{index:05}.jpg")
        coarse.resize((128, 96), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def plain_loop(paths: list[Path], loaded: LoadedModel) -> None:
    with torch.no_grad():
        for images in DataLoader(Plain(paths, loaded), batch_size=CPU_BATCH, num_workers=1):
            loaded.model(images)


def write_maps(paths: list[Path], loaded: LoadedModel, out: Path) -> None:
    options = {"formats": ["npy"], "batch_size": CPU_BATCH, "workers": 1, "progress": False}
    assert not explain([str(path) for path in paths], loaded, out=out, **options).failures


class Stopwatch:
    """Times work as a whole, and what it spends beside the network's forward pass."""

    def __init__(self, network: nn.Module) -> None:
        self.started = self.forward = 0.0
        network.register_forward_pre_hook(self._start)
        network.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self.started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.forward += time.perf_counter() - self.started

    def seconds(self, work: Callable[[], None]) -> tuple[float, float]:
        self.forward, start = 0.0, time.perf_counter()
        work()
        whole = time.perf_counter() - start
        return whole, whole - self.forward


def kill_and_go_on(folder: Path, out: Path, times: int, longest: float) -> int:
    """Start the command, kill it at random moments, let it end; return how many kills met it running."""
    command = [sys.executable, "-m", "tucker_cam", "explain", str(folder), "--format", "npy", "--out", str(out)]
    command += ["--workers", "1"]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    chance, met = random.Random(SEED), 0  # noqa: S311
    for _ in range(times):
        run = subprocess.Popen(command, **options)  # noqa: S603
        try:
            run.wait(timeout=chance.uniform(1, longest))
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            met += 1
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    return met


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("benchmarks/results"),
    quick: Annotated[bool, typer.Option("--quick", help="Few pictures.")] = False,
) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    count, rounds, kills = (24, 3, 1) if quick else (4000, 20, 10)
    loaded = load_model("demo", device="cpu")
    stopwatch = Stopwatch(loaded.model)
    times: dict[str, list[float]] = {"plain": [], "explain": []}
    beside: dict[str, list[float]] = {"plain": [], "explain": []}
    memory = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        folder.mkdir()
        paths = make_pictures(folder, count)
        plain_loop(paths[:CPU_BATCH], loaded)
        write_maps(paths[:CPU_BATCH], loaded, Path(temporary) / "warm")
        for index in range(rounds):
            these = paths[index * count // rounds : (index + 1) * count // rounds]
            works = {
                "plain": lambda these=these: plain_loop(these, loaded),
                "explain": lambda these=these, index=index: write_maps(these, loaded, Path(temporary) / f"out{index}"),
            }
            for name in sorted(works, reverse=bool(index % 2)):
                for figures, taken in zip((times, beside), stopwatch.seconds(works[name]), strict=True):
                    figures[name].append(taken / len(these))
            memory.append(memory_mib("VmRSS"))
        killed = Path(temporary) / "killed"
        met = kill_and_go_on(folder, killed, kills, longest=8 if quick else 12)
        done = {path.name: np.load(path) for path in killed.glob("*.npy")}
        expected = {f"{path.stem}_tsm.npy" for path in paths}
        half = sum(saliency.shape != (224, 224) or not np.isfinite(saliency).all() for saliency in done.values())
        litter = [path.name for path in killed.iterdir() if path.name not in expected | {"manifest.json"}]

    ratios = [plain / ours for plain, ours in zip(times["plain"], times["explain"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    aside = {name: 1e3 * median(each) for name, each in beside.items()}
    results = {
        "environment": environment(SEED),
        "pictures": count,
        "seconds_per_picture": times,
        "seconds_beside_the_forward_pass": beside,
        "speed_of_a_plain_loop": {"median": median(ratios), "quartiles": [low, high], "rounds": ratios},
        "resident_mib": memory,
        "killed": {
            "kills": met,
            "missing": len(expected - done.keys()),
            "unexpected": len(done.keys() - expected),
            "half_written": half,
            "litter": litter,
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "folders.json").write_text(json.dumps(results, indent=1) + "\n")
    rows = {
        "pictures a second, DataLoader and forward pass": [f"{1 / median(times['plain']):.1f}"],
        "pictures a second, `tucker-cam explain`": [f"{1 / median(times['explain']):.1f}"],
        "ratio in a round, median [quartiles]": [f"{median(ratios):.3f} [{low:.3f}, {high:.3f}]"],
        "milliseconds a picture beside the forward pass, of a loop and of `explain`": [
            f"{aside['plain']:.1f}, {aside['explain']:.1f}"
        ],
        "resident memory after the second and the last round, MiB": [f"{memory[1]:.0f}, {memory[-1]:.0f}"],
        f"after {met} kills: missing, unexpected, half-written, left over": [
            f"{len(expected - done.keys())}, {len(done.keys() - expected)}, {half}, {len(litter)}"
        ],
    }
    text = table(f"{count:,} pictures, EfficientNet-Lite0, batches of {CPU_BATCH}, one thread", [""], rows) + "\n"
    (out / "folders.md").write_text(text)
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
