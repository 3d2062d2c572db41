"""How upright EigenCAM's maps are by other routes to the same singular vector, and how much the first value holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.reporting import table
from tucker_cam import features
from tucker_cam.decomposition.projection import leading_map
from tucker_cam.evaluation.spectrum import spectrum
from tucker_cam.models import LoadedModel, load_model
from tucker_cam.pictures.annotations import find_samples, network_view

# The last block's output, which has negative values, and what the head makes of it.
LAYERS = ("blocks.6", "bn2")
# Ways to the first right singular vector of a matrix; the first as the host's `get_2d_projection` asks for it.
BACKENDS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "NumPy": lambda matrix: np.linalg.svd(matrix)[2][0],
    "SciPy, gesdd": lambda matrix: scipy.linalg.svd(matrix, lapack_driver="gesdd")[2][0],
    "SciPy, gesvd": lambda matrix: scipy.linalg.svd(matrix, lapack_driver="gesvd")[2][0],
    "torch": lambda matrix: torch.linalg.svd(torch.from_numpy(matrix)).Vh[0].numpy(),
    # The left singular vectors of the transpose are the same directions.
    "NumPy, transposed": lambda matrix: np.linalg.svd(matrix.T)[0][:, 0],
    "torch, transposed": lambda matrix: torch.linalg.svd(torch.from_numpy(matrix).T).U[:, 0].numpy(),
}
LAYOUTS = {"column-major (the host's)": np.asfortranarray, "row-major": np.ascontiguousarray}


def measure_polarity(features: Tensor, masks: Tensor) -> dict[str, float]:
    """Return the share of pictures on which EigenCAM's projection is higher on the object than beside it.

    Args:
        features: batch x channels x height x width.
        masks: bool, batch x height x width, of the features' size.
    """
    upright: dict[str, list[bool]] = {}
    for image, mask in zip(features, masks.flatten(1).numpy(), strict=True):
        if mask.all() or not mask.any():
            continue
        unfolding = image.flatten(1).T.numpy()
        centred = unfolding - unfolding.mean(axis=0)
        projections = {
            f"EigenCAM, {name}, {layout}": centred @ leading(arrange(centred))
            for name, leading in BACKENDS.items()
            for layout, arrange in LAYOUTS.items()
        }
        projections["TSM"] = leading_map(image[None])[0].flatten().numpy()
        for name, projection in projections.items():
            upright.setdefault(name, []).append(bool(projection[mask].mean() > projection[~mask].mean()))
    return {name: float(np.mean(each)) for name, each in upright.items()}


def features_of(folder: Path, limit: int | None, loaded: LoadedModel) -> tuple[Tensor, Tensor]:
    """Return the layer's features, and the masks at their size."""
    samples, annotations, _ = find_samples(folder, limit=limit)
    views = []
    for sample in samples:
        try:
            views.append(network_view(sample, annotations, loaded))
        except (OSError, ValueError):
            continue
    images, masks = (torch.stack([view[place] for view in views]) for place in (0, 1))
    (maps,) = features(loaded.model, loaded.target_layers, images)
    size = tuple(maps.shape[-2:])
    return maps, torch.nn.functional.interpolate(masks[:, None].float(), size, mode="area")[:, 0] > 0.5


def median_and_quartiles(values: NDArray[np.float64]) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def polarity_tables(folder: Path, limit: int | None) -> list[str]:
    """Return both tables of the demo network on pictures with boxes or masks."""
    loaded = {layer: load_model("demo", layers=[layer]) for layer in LAYERS}
    polarity = {layer: measure_polarity(*features_of(folder, limit, loaded[layer])) for layer in LAYERS}
    shares = {layer: spectrum(folder, loaded[layer], limit=limit, progress=False).shares for layer in LAYERS}
    upright = {name: [f"{polarity[layer][name]:.1%}" for layer in LAYERS] for name in polarity["bn2"]}
    first = {name: [median_and_quartiles(shares[layer][name][:, 0]) for layer in LAYERS] for name in shares["bn2"]}
    return [
        "## Upright or upside down, EfficientNet-Lite0 on raccoons",
        table("pictures on which the map is upright", list(LAYERS), upright),
        table("share of the first singular value, median and quartiles", list(LAYERS), first),
    ]
