"""Images and a layer in, how much each singular value holds of their sum: centred SVD against Tucker.

The paper's Figures 2 and 3 (arXiv 2410.23072): where the first value holds nearly all, one vector says nearly all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn

from tucker_cam.activations import ReshapeTransform
from tucker_cam.cams import TSM
from tucker_cam.decomposition.modes import channel_modes
from tucker_cam.text import printable
from tucker_cam.writing import complete_or_absent

DECOMPOSITIONS = ("SVD, centred", "Tucker")


def spectrum(
    model: nn.Module,
    layer: nn.Module,
    images: Tensor,
    count: int,
    reshape_transform: ReshapeTransform | None = None,
) -> dict[str, NDArray[np.float64]]:
    r"""Return $s_i / \sum_j s_j$ of the layer's features, of the SVD of $F_c$ and of the full-rank Tucker of F.

    Args:
        model: the network.
        layer: whose feature maps are decomposed.
        images: the network's input, batch x channels x height x width.
        count: of leading values that are wanted.
        reshape_transform: as of the CAM classes.

    Returns:
        By decomposition, batch x `count`, descending, in [0, 1]; NaN where there are fewer values, or only zeros.
    """
    with TSM(model, [layer], reshape_transform) as cam:
        (tucker,) = cam.modes(images)
        svd = channel_modes(cam.activations_and_grads.activations[0], center=True)
    shares = {}
    for name, modes in zip(DECOMPOSITIONS, (svd, tucker), strict=True):
        values = modes.values.double().cpu()
        share = torch.full((len(values), count), torch.nan, dtype=torch.float64)
        leading = values[:, :count]
        share[:, : leading.shape[1]] = leading / values.sum(1, keepdim=True)
        shares[name] = share.numpy()
    return shares


def draw_spectrum(path: Path, title: str, shares: dict[str, NDArray[np.float64]]) -> None:
    """Write box plots of each value's share, a panel for each decomposition: quartiles, whiskers at 5 and 95 %.

    Args:
        path: of the PNG.
        title: above it.
        shares: by decomposition, pictures x values.

    Raises:
        OSError: it cannot be written.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    explained = "boxes: quartiles and median; whiskers: 5 and 95 %; points: pictures beyond"
    figure.suptitle(f"{printable(title)}\n{explained}", fontsize=11, parse_math=False, wrap=True)
    for axes, (name, share) in zip(figure.subplots(1, len(shares), sharey=True), shares.items(), strict=True):
        finite = [column[np.isfinite(column)] for column in share.T]
        axes.boxplot(finite, whis=(5, 95), flierprops={"markersize": 2})
        axes.set_title(name)
        axes.set_xlabel("index of the singular value")
    # Last: a limit that is set ends the scaling of both panels, which share their axis.
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].set_ylabel("share of the sum of all")
    with complete_or_absent(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")


def rows_of_spectrum(
    pictures: Sequence[str], shares: dict[str, NDArray[np.float64]]
) -> Iterable[tuple[str, str, int, str]]:
    """Yield picture, decomposition, index from 1 and share, for a CSV; NaN as nothing."""
    for name, share in shares.items():
        for picture, of_picture in zip(pictures, share, strict=True):
            for index, value in enumerate(of_picture, start=1):
                yield picture, name, index, "" if np.isnan(value) else f"{value:.6g}"
