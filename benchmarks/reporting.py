"""What all benchmarks share: a description of the machine, and tables as Markdown."""

from __future__ import annotations

import gzip
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tucker_cam.evaluation.summary import Interval

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "grad-cam", "tensorly", "timm", "scikit-learn", "scikit-image")


def environment(seed: int) -> dict[str, object]:
    """Return versions, threads and the seed, for the JSON."""
    return {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "seed": seed,
    }


def write_samples(path: Path, results: object) -> None:
    """Write the results behind the tables as compressed JSON, the same bytes for the same results."""
    path.write_bytes(gzip.compress(json.dumps(results, separators=(",", ":")).encode(), mtime=0))


def read_samples(path: Path) -> Any:
    """Return what `write_samples` wrote."""
    return json.loads(gzip.decompress(path.read_bytes()))


def memory_mib(key: str) -> float:
    """Return a figure of this process's memory as Linux names it: VmRSS is resident now, VmHWM was at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key + ":"))) / 1024


def table(head: str, columns: list[str], rows: dict[str, list[str]]) -> str:
    """Return a Markdown table: a name and its cells a row."""
    lines = [f"| {head} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines)


def interval(value: Interval, sign: str = "", *, percent: bool = False) -> str:
    """Return a mean with its interval: to one decimal if the measure is given in %, otherwise to three."""
    digits = 1 if percent else 3
    mean, low, high = (f"{number:{sign}.{digits}f}" for number in value)
    return f"{mean} [{low}, {high}]"
