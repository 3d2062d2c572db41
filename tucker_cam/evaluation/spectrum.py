"""Measures the share that each singular value of a picture's features holds of the sum of all.

See Figures 2 and 3 of the paper (arXiv 2410.23072): if the first value holds nearly all, one vector says nearly all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from tucker_cam.activations import features
from tucker_cam.decomposition.modes import channel_modes
from tucker_cam.errors import Failure
from tucker_cam.evaluation.inputs import Data, Model, find_inputs, go_through, load_for_pictures
from tucker_cam.models import LoadedModel
from tucker_cam.models.loading import Loading
from tucker_cam.pictures.ahead import check_reading
from tucker_cam.text import counted, printable
from tucker_cam.writing import complete_or_absent, new_table

DECOMPOSITIONS = {"SVD, centred": True, "Tucker": False}
HEADER = ["picture", "decomposition", "index", "share"]
_VALUES = 10


def spectrum(
    data: Data,
    model: Model = "demo",
    *,
    limit: int | None = None,
    batch_size: int = 8,
    workers: int | None = 0,
    progress: bool = True,
    **loading: Unpack[Loading],
) -> Spectrum:
    """Decompose pictures' features by the SVD of $F_c$ and full-rank Tucker of F; arguments and errors: see `evaluate`.

    Example:
        >>> from torch import nn, rand
        >>> found = spectrum(rand(2, 3, 24, 24), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), layers=["0"])
        >>> found.shares["Tucker"].shape
        (2, 10)
    """
    check_reading(batch_size, workers)
    inputs = find_inputs(data, "none" if isinstance(data, (str, Path)) else None, limit)
    loaded = load_for_pictures(model, inputs.example, **loading)
    pictures: list[str] = []
    parts: list[dict[str, Tensor]] = []

    def decompose(names: Sequence[str], images: Tensor, masks: Tensor) -> None:
        (maps,) = features(loaded.model, loaded.target_layers, images, loaded.reshape_transform)
        shares = {}
        for name, center in DECOMPOSITIONS.items():
            values = channel_modes(maps, center=center).values.double().cpu()
            share = (values / values.sum(1, keepdim=True))[:, :_VALUES]
            shares[name] = pad(share, (0, _VALUES - share.shape[1]), value=torch.nan)
        parts.append(shares)
        pictures.extend(names)

    batches = inputs.read(loaded, batch_size, workers)
    failures, _ = go_through(batches, loaded, decompose, "decomposing", number=inputs.number, shown=progress)
    shares = {name: torch.cat([part[name] for part in parts]).numpy() for name in DECOMPOSITIONS}
    return Spectrum(pictures, shares, failures, loaded)


@dataclass(frozen=True, eq=False)
class Spectrum:
    r"""The share of each picture's first ten singular values in the sum of all, and the failures.

    `shares` are $s_i / \sum_j s_j$, by decomposition, pictures x 10, descending, in [0, 1]; NaN where there are fewer
    values, or only zeros.
    """

    names: list[str]
    shares: dict[str, NDArray[np.float64]]
    failures: list[Failure]
    loaded: LoadedModel

    def to_csv(self, path: str | Path) -> None:
        """Write a CSV of picture, decomposition, index from 1, and share, empty for NaN; OSError if that fails."""
        with new_table(Path(path), HEADER) as write_row:
            for name, share in self.shares.items():
                for (place, index), value in np.ndenumerate(share):
                    shown = "" if np.isnan(value) else f"{value:.6g}"
                    write_row([self.names[place], name, index + 1, shown])

    def plot(self, path: str | Path) -> None:
        """Write box plots of each value's share as PNG: quartiles, whiskers at 5 and 95 %; OSError if that fails."""
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        title = f"{self.loaded.name}, {self.loaded.layer_names[0]}, {counted(len(self.names))}"
        explained = "boxes: quartiles and median; whiskers: 5 and 95 %; points: pictures beyond"
        figure.suptitle(f"{printable(title)}\n{explained}", fontsize=11, parse_math=False, wrap=True)
        panels = figure.subplots(1, len(self.shares), sharey=True)
        for axes, (name, share) in zip(panels, self.shares.items(), strict=True):
            finite = [column[np.isfinite(column)] for column in share.T]
            axes.boxplot(finite, whis=(5, 95), flierprops={"markersize": 2})
            axes.set(title=name, xlabel="index of the singular value")
        # Last, since setting a limit ends the automatic scaling of both panels, which share an axis.
        panels[0].set(ylim=(0, None), ylabel="share of the sum of all")
        with complete_or_absent(Path(path)) as unfinished:
            figure.savefig(unfinished, dpi=120, format="png")
