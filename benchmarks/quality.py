"""How good the maps of the demo network are, with controls, at two layers; and how upright EigenCAM's are.

    python -m benchmarks.quality FOLDER                          # pictures with boxes or masks
    python -m benchmarks.quality FOLDER --photographs FOLDER     # and others, for Average Drop alone

Layers: the last block's output (320x7x7, which has negative values) and what the head makes of it (1280x7x7). Writes
benchmarks/results/quality.{json.gz,md} and spectrum.png. Needs the `test` extra.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import scipy.linalg
import torch
import typer
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.reporting import environment, interval, table, write_samples
from tucker_cam import evaluate, features
from tucker_cam.decomposition.projection import leading_map
from tucker_cam.evaluation.metrics import MEASURES
from tucker_cam.evaluation.spectrum import spectrum
from tucker_cam.evaluation.summary import Summary
from tucker_cam.models import LoadedModel, load_model
from tucker_cam.pictures.annotations import find_samples, network_view

SEED = 0
LAYERS = {"blocks.6": "the last block's output, 320x7x7", "bn2": "after the head, 1280x7x7"}
LOCALISATION = ("energy_in_mask", "pointing_game", "best_threshold_iou", "best_cut_iou", "otsu_iou")
DROP = (
    "probability_drop",
    "probability_drop_area_matched",
    "similarity_drop",
    "similarity_drop_area_matched",
    "mean_saliency",
)
MEASURE = {measure.name: measure for measure in MEASURES}
OURS = ("tsm", "mtsm", "mtsm-energy", "multivec-eigencam")
_ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}
CURVES = ("probability_insertion", "probability_deletion", "similarity_insertion", "similarity_deletion")


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


def scores_table(head: str, summaries: dict[str, dict[str, Summary]], shown: tuple[str, ...]) -> str:
    present = [MEASURE[column] for column in shown if column in summaries["tsm"]]
    rows = {
        method: [interval(by_column[each.name].value, percent="%" in each.title) for each in present]
        for method, by_column in summaries.items()
    }
    return table(head, [each.title + _ARROWS[each.better] for each in present], rows)


def differences_table(head: str, summaries: dict[str, dict[str, Summary]], shown: tuple[str, ...]) -> str:
    """Return the paired differences of this project's methods from EigenCAM."""
    present = [MEASURE[column] for column in shown if column in summaries["tsm"]]
    rows: dict[str, list[str]] = {method: [] for method in OURS}
    for method, cells in rows.items():
        for each in present:
            difference = summaries[method][each.name].difference
            assert difference is not None
            cells.append(interval(difference, "+", percent="%" in each.title))
    return table(head, [each.title + _ARROWS[each.better] for each in present], rows)


def median_and_quartiles(values: NDArray[np.float64]) -> str:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def as_json(summaries: dict[str, dict[str, Summary]]) -> dict[str, object]:
    return {
        method: {
            column: {"pictures": each.pictures, "value": each.value, "difference_from_eigencam": each.difference}
            for column, each in by_column.items()
        }
        for method, by_column in summaries.items()
    }


def main(
    folder: Annotated[Path, typer.Argument(help="Pictures with boxes or masks.")],
    photographs: Annotated[Path | None, typer.Option(help="Pictures for Average Drop.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few pictures, to see that the script works.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("benchmarks/results"),
) -> None:
    """Score every method at both layers, and write quality.{json.gz,md} and spectrum.png."""
    limit = 3 if quick else None
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    out.mkdir(parents=True, exist_ok=True)
    loaded = {layer: load_model("demo", layers=[layer]) for layer in LAYERS}
    parts, layers = [], {}
    with threadpool_limits(1):
        for layer, words in LAYERS.items():
            start = time.perf_counter()
            evaluation = evaluate(folder, loaded[layer], metrics=("localisation", "drop", "curves"), limit=limit)
            count, annotations, found = evaluation.scored, evaluation.run["annotations"], evaluation.summary(seed=SEED)
            seconds = time.perf_counter() - start
            ratio = found["tsm"]["best_threshold_iou"].value.mean / found["eigencam"]["best_threshold_iou"].value.mean
            cut_ratio = found["tsm"]["best_cut_iou"].value.mean / found["eigencam"]["best_cut_iou"].value.mean
            layers[layer] = {
                "pictures": count,
                "seconds": seconds,
                "summaries": as_json(found),
                "tsm_over_eigencam": {"best_threshold_iou": ratio, "best_cut_iou": cut_ratio},
            }
            head = f"{layer}, {count} pictures with {annotations}"
            parts += [scores_table(head, found, LOCALISATION), scores_table(head, found, DROP)]
            parts += [scores_table(head, found, CURVES)]
            parts += [differences_table(f"{layer}, difference from EigenCAM", found, LOCALISATION)]
            parts += [differences_table(f"{layer}, difference from EigenCAM", found, DROP)]
            parts += [
                f"At `{layer}` ({words}) TSM's IoU at the best threshold is {ratio:.2f} times EigenCAM's, at the best "
                f"cut {cut_ratio:.2f} times."
            ]
        results: dict[str, Any] = {"environment": environment(SEED), "layers": layers}
        if photographs is not None:
            results["photographs"] = {}
            for layer in LAYERS:
                evaluation = evaluate(photographs, loaded[layer], metrics="drop", limit=limit)
                count, found = evaluation.scored, evaluation.summary(seed=SEED)
                results["photographs"][layer] = {"pictures": count, "summaries": as_json(found)}
                parts += [scores_table(f"{layer}, {count} photographs", found, DROP)]
                parts += [differences_table(f"{layer}, photographs, difference from EigenCAM", found, DROP)]
        polarity = {layer: measure_polarity(*features_of(folder, limit, loaded[layer])) for layer in LAYERS}
        spectra = {layer: spectrum(folder, loaded[layer], limit=limit) for layer in LAYERS}
    results["upright"] = polarity
    results["first_value"] = {
        layer: {name: np.percentile(share[:, 0], [25, 50, 75]).tolist() for name, share in each.shares.items()}
        for layer, each in spectra.items()
    }
    rows = {name: [f"{polarity[layer][name]:.1%}" for layer in LAYERS] for name in polarity["bn2"]}
    parts.append(table("pictures on which the map is upright", list(LAYERS), rows))
    rows = {
        name: [median_and_quartiles(spectra[layer].shares[name][:, 0]) for layer in LAYERS]
        for name in spectra["bn2"].shares
    }
    parts.append(table("share of the first singular value, median and quartiles", list(LAYERS), rows))
    spectra["bn2"].plot(out / "spectrum.png")
    write_samples(out / "quality.json.gz", results)
    (out / "quality.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    typer.run(main)
