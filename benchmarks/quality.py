"""How good the maps are: five networks, three sets of pictures, all methods and controls, with intervals.

    python -m benchmarks.quality --ecssd FOLDER --raccoons FOLDER --photographs FOLDER --augnet imgsim/model.pth

Networks: EfficientNet-Lite0, Lite1 and Lite2 at `bn2`, supervised on ImageNet; and AugNet, a ResNet-50 trained on
ImageNet without labels, at its last and its last but one stage. Pictures: ECSSD with pixel masks, raccoons with boxes,
and ImageNet photographs without either. Sets that are not given are left out. Rows are written to `--rows` as soon as
they are known, so the same command resumes a run that was stopped. Writes benchmarks/results/quality.{csv.gz,md,png},
scores.md and quality-examples.png. Needs the `benchmarks` extra.
"""

from __future__ import annotations

import csv
import gzip
import io
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.reporting import environment, interval, table
from tucker_cam.cams import LabelFreeCAM
from tucker_cam.decomposition.modes import channel_modes
from tucker_cam.decomposition.projection import leading_map
from tucker_cam.evaluation.comparison import saliency_maps
from tucker_cam.evaluation.controls import CONTROLS
from tucker_cam.evaluation.evaluate import evaluate
from tucker_cam.evaluation.metrics import MEASURES
from tucker_cam.evaluation.report import pick_examples
from tucker_cam.evaluation.summary import Summary
from tucker_cam.explanations.maps import OnePass
from tucker_cam.methods import LABEL_DEPENDENT, METHODS
from tucker_cam.models import LoadedModel, load_model
from tucker_cam.models.families import efficientnet_lite
from tucker_cam.pictures.annotations import find_samples, network_view

SEED = 0
LOCALISATION, DROP, BOTH = ("localisation",), ("drop",), ("localisation", "drop")


class Pictures(NamedTuple):
    """A set of pictures: the option that names its folder, what is measured on it, and on how many random pictures."""

    title: str
    option: str
    metrics: tuple[str, ...]
    limit: int | None = None


SETS = {
    "ecssd": Pictures("ECSSD", "ecssd", LOCALISATION),
    # This takes two forward passes for each method and picture, so only a fifth of the pictures is used.
    "ecssd-drop": Pictures("ECSSD", "ecssd", DROP, 200),
    "raccoons": Pictures("raccoons", "raccoons", BOTH),
    "photographs": Pictures("ImageNet photographs", "photographs", DROP),
}
SHOWN = (
    "best_cut_iou",
    "max_f_beta",
    "pointing_game",
    "energy_in_mask",
    "best_threshold_iou",
    "otsu_iou",
    "probability_drop",
    "probability_drop_area_matched",
    "similarity_drop",
    "similarity_drop_area_matched",
    "mean_saliency",
)
COMPARED = ("best_cut_iou", "max_f_beta", "probability_drop_area_matched", "similarity_drop_area_matched")
MEASURE = {measure.name: measure for measure in MEASURES}
ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}
Summaries = dict[str, dict[str, Summary]]


class CentredTSM(LabelFreeCAM):
    r"""$|u_1^\top F_c|$: TSM with centring, to see what leaving it out does."""

    def saliency(self, features: Tensor) -> Tensor:
        features = features.double()
        return leading_map(features - features.mean(tuple(range(2, features.dim())), keepdim=True))


class SignedEigenCAM(LabelFreeCAM):
    r"""$\max(0, \pm u_1^\top F_c)$, brighter where the features are strong: EigenCAM, to see what a sign rule does."""

    def saliency(self, features: Tensor) -> Tensor:
        projection = channel_modes(features.double(), center=True).maps[:, 0]
        energy = features.double().square().sum(1)
        agreement = (projection * energy).flatten(1).sum(1)  # a projection of centred features has no mean
        return (projection * agreement.sign()[:, None, None]).clamp_min(0)


CHOSEN: dict[str, Any] = {**METHODS, "tsm-centred": CentredTSM, "eigencam-signed": SignedEigenCAM}


class NetworkAtLayer(NamedTuple):
    """A network and the layer at which it is explained."""

    title: str
    load: Callable[[Path | None], LoadedModel]


def _augnet(layer: str) -> Callable[[Path | None], LoadedModel]:
    return lambda weights: load_model("torchvision:resnet50", weights=weights, layers=[layer])


def _lite(number: int) -> Callable[[Path | None], LoadedModel]:
    return lambda _: load_model(efficientnet_lite(number), layers=["bn2"])


# The slowest first.
NETWORKS = {
    "augnet-layer4": NetworkAtLayer("AugNet, layer4", _augnet("layer4")),
    "augnet-layer3": NetworkAtLayer("AugNet, layer3", _augnet("layer3")),
    "lite2": NetworkAtLayer("EfficientNet-Lite2, bn2", _lite(2)),
    "lite1": NetworkAtLayer("EfficientNet-Lite1, bn2", _lite(1)),
    "lite0": NetworkAtLayer("EfficientNet-Lite0, bn2", _lite(0)),
}
DEMO = "lite0"


def score(cell: tuple[str, str, Path], weights: Path | None, rows: Path, limit: int | None) -> tuple[Any, ...]:
    """Score a network on a set of pictures; return rows, number of pictures, annotations, and summaries by baseline."""
    network, data, folder = cell
    torch.set_num_threads(1)
    with threadpool_limits(1):
        evaluation = evaluate(
            folder,
            NETWORKS[network].load(weights),
            CHOSEN,
            metrics=SETS[data].metrics,
            out=rows / f"{network}-{data}.csv",
            limit=limit or SETS[data].limit,
            progress=False,
        )
    summaries = {baseline: evaluation.summary(baseline=baseline, seed=SEED) for baseline in ("eigencam", "tsm")}
    return evaluation.rows, evaluation.scored, evaluation.run["annotations"], summaries


def milliseconds(network: str, folder: Path, weights: Path | None) -> dict[str, float]:
    """Return the CPU time of each method and of the forward pass, in ms for a picture, in a batch of eight."""
    torch.set_num_threads(1)
    loaded = NETWORKS[network].load(weights)
    samples, annotations, _ = find_samples(folder, limit=8)
    images = torch.stack([network_view(sample, annotations, loaded).network_input for sample in samples])

    def timed(work: Callable[[], object]) -> float:
        work()
        samples = []
        for _ in range(5):
            start = time.process_time()
            work()
            samples.append(time.process_time() - start)
        return 1e3 * median(samples) / len(images)

    with threadpool_limits(1), torch.no_grad(), OnePass(loaded, images) as one_pass:
        one_pass.output_and_features()
        found = {"forward pass": timed(lambda: loaded.model(images))}
        return found | {name: timed(partial(one_pass.maps, method)) for name, method in CHOSEN.items()}


def heading(name: str) -> str:
    return MEASURE[name].title + ARROWS[MEASURE[name].better]


def values_table(head: str, found: Summaries) -> str:
    names = [name for name in SHOWN if name in found["tsm"]]
    rows = {
        method: [interval(of_method[name].value, percent="%" in heading(name)) for name in names]
        for method, of_method in found.items()
    }
    return table(head, [heading(name) for name in names], rows)


def differences_table(head: str, by_baseline: Mapping[str, Summaries]) -> str:
    """Return the paired differences of each method from EigenCAM and from TSM, bold if the interval excludes 0."""
    names = [name for name in COMPARED if name in by_baseline["tsm"]["tsm"]]
    columns = [(name, baseline) for name in names for baseline in by_baseline]
    rows: dict[str, list[str]] = {}
    for method in by_baseline["tsm"]:
        for name, baseline in columns:
            difference = by_baseline[baseline][method][name].difference
            text = "" if difference is None else interval(difference, "+", percent="%" in heading(name))
            clear = difference is not None and (difference.low > 0 or difference.high < 0)
            rows.setdefault(method, []).append(f"**{text}**" if clear else text)
    return table(head, [f"{heading(name)}, minus {baseline}" for name, baseline in columns], rows)


GLANCE = {
    "Lite0: IoU ↑": ("lite0", "ecssd", "best_cut_iou"),
    "Lite0: probability drop, % ↓": ("lite0", "ecssd-drop", "probability_drop_area_matched"),
    "AugNet layer4: IoU ↑": ("augnet-layer4", "ecssd", "best_cut_iou"),
    "AugNet layer4: embedding drop, % ↓": ("augnet-layer4", "ecssd-drop", "similarity_drop_area_matched"),
    "AugNet layer3: IoU ↑": ("augnet-layer3", "ecssd", "best_cut_iou"),
}


def glance_table(found: Mapping[tuple[str, str], Summaries]) -> str:
    """Return one table of ECSSD: IoU at the best cut and area-matched drops, of a supervised network and of AugNet."""
    # EigenCAM by another sign is left to scores.md: in the README a table has at most 15 rows.
    shown = [method for method in found[DEMO, "ecssd"] if method != "eigencam-signed"]
    methods = sorted(shown, key=lambda method: method in CONTROLS)
    rows = {
        method: [
            interval(of_method[name].value, percent="drop" in name)
            if (of_method := found[cell, data].get(method))
            else ""
            for cell, data, name in GLANCE.values()
        ]
        for method in methods
    }
    return table("ECSSD", list(GLANCE), rows)


def write_rows(path: Path, cells: Mapping[tuple[str, str], Any]) -> None:
    """Write each row of each cell to three digits, compressed; the same bytes for the same rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["network", "pictures", "picture", "method", *SHOWN])
    for (network, data), (rows, *_) in cells.items():
        for row in rows:
            numbers = [f"{row.values[name]:.3g}" if name in row.values else "" for name in SHOWN]
            writer.writerow([network, data, row.picture, row.method, *numbers])
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def draw_all(path: Path, found: Mapping[tuple[str, str], Summaries]) -> None:
    """Draw a panel for each measure that is compared, on ECSSD: a row for each method, a colour for each network."""
    networks = [network for network, data in found if data == "ecssd"]
    panels = {name: "ecssd-drop" if "drop" in name else "ecssd" for name in COMPARED if name != "max_f_beta"}
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    for axes, (name, data) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        methods = [*dict.fromkeys(method for network in networks for method in found[network, data])]
        # Methods first, then the controls.
        methods.sort(key=lambda method: method in CONTROLS)
        for index, network in enumerate(networks):
            values = [found[network, data].get(method, {}).get(name) for method in methods]
            places = [place + 0.13 * (index - (len(networks) - 1) / 2) for place in range(len(methods))]
            points = [(place, each.value) for place, each in zip(places, values, strict=True) if each is not None]
            axes.errorbar(
                [value.mean for _, value in points],
                [place for place, _ in points],
                xerr=list(zip(*[(v.mean - v.low, v.high - v.mean) for _, v in points], strict=True)) or None,
                fmt="o",
                markersize=4,
                label=NETWORKS[network].title,
            )
        for place in range(len(methods) - 1):
            axes.axhline(place + 0.5, color="0.9", linewidth=0.6)
        axes.set_yticks(range(len(methods)), methods)
        axes.set_title(f"{MEASURE[name].title}\n{MEASURE[name].better} is better", fontsize=10)
    axes.invert_yaxis()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle("ECSSD, means with 95 % bootstrap intervals over pictures")
    figure.savefig(path, dpi=100)


def draw_examples(path: Path, rows: Sequence[Any], folder: Path) -> None:
    """Draw the demo network's maps of the best, the median and the worst picture of TSM by its best cut.

    The photographs are not ours to publish, so the maps are drawn without them, with the object's outline.
    """
    loaded = NETWORKS[DEMO].load(None)
    samples, annotations, _ = find_samples(folder)
    shown = ("eigencam", "tsm", "mtsm", "mtsm-energy", "lafam", "gradcam")
    chosen = [each for each in pick_examples(rows, MEASURE["best_cut_iou"]) if each[0] == "tsm"]
    figure = Figure(figsize=(2.2 * len(shown), 2.5 * len(chosen) + 0.4), layout="constrained")
    grid = figure.subplots(len(chosen), len(shown), squeeze=False)
    for of_picture, (_, name, title) in zip(grid, chosen, strict=True):
        view = network_view(next(each for each in samples if each.name == name), annotations, loaded)
        with OnePass(loaded, view.network_input[None]) as one_pass:
            wanted = {each: (CHOSEN | LABEL_DEPENDENT)[each] for each in shown}
            maps = {each: found for each, found, _ in saliency_maps(one_pass, [name], wanted)}
        for axes, method in zip(of_picture, shown, strict=True):
            axes.imshow(maps[method][0], cmap="jet", vmin=0, vmax=1)
            axes.contour(view.mask, levels=[0.5], colors="white", linewidths=1.5)
            axes.set_title(title if method == "tsm" else method, fontsize=8)
            axes.axis("off")
    figure.suptitle("ECSSD: TSM at its best, median and worst; white: the object's outline", fontsize=10)
    figure.savefig(path, dpi=80)


def main(
    ecssd: Annotated[Path | None, typer.Option(help="ECSSD's pictures, with a folder masks.")] = None,
    raccoons: Annotated[Path | None, typer.Option(help="Pictures with boxes.")] = None,
    photographs: Annotated[Path | None, typer.Option(help="ImageNet photographs.")] = None,
    augnet: Annotated[Path | None, typer.Option(help="AugNet's checkpoint.")] = None,
    network: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(NETWORKS)}; may be repeated.")] = None,
    rows: Annotated[Path, typer.Option(help="Folder for the rows, from which a stopped run goes on.")] = Path("rows"),
    limit: Annotated[int | None, typer.Option(help="So many pictures of each set.")] = None,
    processes: int = 2,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("benchmarks/results"),
) -> None:
    """Score every method with every network on every set of pictures; write quality.{csv.gz,md,png} and scores.md."""
    given = {"ecssd": ecssd, "raccoons": raccoons, "photographs": photographs}
    folders = {data: folder for data, each in SETS.items() if (folder := given[each.option]) is not None}
    chosen = network or [name for name in NETWORKS if augnet is not None or not name.startswith("augnet")]
    for folder in (rows, out):
        folder.mkdir(parents=True, exist_ok=True)
    cells = [(name, data, folder) for data, folder in folders.items() for name in chosen]
    # Of this project's own processes each has one thread; fork would copy what torch has started.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        scored = pool.map(partial(score, weights=augnet, rows=rows, limit=limit), cells)
        found = {(name, data): result for (name, data, _), result in zip(cells, scored, strict=True)}
        some = next(iter(folders.values()))
        times = dict(zip(chosen, pool.map(partial(milliseconds, folder=some, weights=augnet), chosen), strict=True))
    about = environment(SEED)
    how = (
        "Means with 95 % bootstrap intervals over pictures; ↑ higher is better, ↓ lower is better. "
        f"Each of {processes} processes with one thread of {about['machine']} ({about['instructions']}), "
        f"torch {about['torch']}."
    )
    parts, scores = [how], [f"{how} Differences are paired, bold where the interval excludes 0."]
    summaries = {cell: by_baseline["eigencam"] for cell, (*_, by_baseline) in found.items()}
    if {(network, data) for network, data, _ in GLANCE.values()} <= summaries.keys():
        parts += ["## At a glance", glance_table(summaries)]
    for (name, data), (_, count, kind, by_baseline) in found.items():
        head = f"{NETWORKS[name].title}; {SETS[data].title}, {count} pictures"
        scores.append(f"## {head}" + (f" with {kind}" if kind != "none" else ""))
        scores += [values_table(head, by_baseline["eigencam"]), differences_table("difference", by_baseline)]
    parts.append("## Time beside the forward pass, CPU ms a picture in a batch of 8")
    cost = {each: [f"{times[name][each]:.2f}" for name in chosen] for each in times[chosen[0]]}
    parts.append(table("method", [NETWORKS[name].title for name in chosen], cost))
    write_rows(out / "quality.csv.gz", found)
    if ecssd is not None:
        draw_all(out / "quality.png", summaries)
        if (DEMO, "ecssd") in found:
            draw_examples(out / "quality-examples.png", found[DEMO, "ecssd"][0], ecssd)
    for name, written in (("quality.md", parts), ("scores.md", scores)):
        (out / name).write_text("\n\n".join(written) + "\n")


if __name__ == "__main__":
    typer.run(main)
