"""How often EigenCAM's maps are upright when the same vector is computed in other ways, and the first value's share.

    python -m benchmarks.polarity FOLDER_WITH_BOXES

It uses the demo network. Writes benchmarks/results/polarity.md. Needs the `test` extra.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import scipy.linalg
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.reporting import table
from tucker_cam import features
from tucker_cam.decomposition.projection import leading_map
from tucker_cam.evaluation.controls import control_maps
from tucker_cam.evaluation.spectrum import spectrum
from tucker_cam.models import LoadedModel, load_model
from tucker_cam.pictures.annotations import find_samples, network_view

# The last block's output, which has negative values, and the output of the head's first layers.
LAYERS = ("blocks.6", "bn2")
# Ways to compute the first right singular vector of a matrix; the first is that of the host's `get_2d_projection`.
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


def upright(features: Tensor, masks: Tensor) -> dict[str, list[bool]]:
    """Return whether EigenCAM's projection is higher on the object than beside it, of each picture that has both.

    Args:
        features: batch x channels x height x width.
        masks: bool, batch x height x width, of the features' size.
    """
    found: dict[str, list[bool]] = {}
    size = (features.shape[2], features.shape[3])
    gaussian = control_maps("centre-gaussian", pictures=["any"], size=size, resolution=size)[0].flatten().numpy()
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
        projections["centre-gaussian"] = gaussian
        for name, projection in projections.items():
            found.setdefault(name, []).append(bool(projection[mask].mean() > projection[~mask].mean()))
    return found


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


def main(
    folder: Annotated[Path, typer.Argument(help="Pictures with boxes or masks.")],
    limit: Annotated[int | None, typer.Option(help="So many pictures, drawn at random.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("benchmarks/results"),
) -> None:
    """Write both tables of the demo network."""
    torch.set_num_threads(1)
    loaded = {layer: load_model("demo", layers=[layer]) for layer in LAYERS}
    found = {layer: upright(*features_of(folder, limit, loaded[layer])) for layer in LAYERS}
    spectra = {layer: spectrum(folder, loaded[layer], limit=limit, progress=False).shares for layer in LAYERS}
    columns = [f"{layer}: upright, of {len(found[layer]['TSM'])} pictures" for layer in LAYERS]
    shares = {name: [f"{np.mean(found[layer][name]):.1%}" for layer in LAYERS] for name in found[LAYERS[0]]}
    first = {
        name: [median_and_quartiles(spectra[layer][name][:, 0]) for layer in LAYERS] for name in spectra[LAYERS[0]]
    }
    parts = [
        table("EfficientNet-Lite0", columns, shares),
        table("share of the first singular value, median and quartiles", list(LAYERS), first),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "polarity.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    typer.run(main)
