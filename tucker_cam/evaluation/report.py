"""Summaries and overlays in, one figure page out: bars with intervals, and each method at its best and worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray
from pytorch_grad_cam.utils.image import show_cam_on_image

from tucker_cam.evaluation.controls import CONTROLS
from tucker_cam.evaluation.metrics import Measure
from tucker_cam.evaluation.results import Row
from tucker_cam.evaluation.summary import BASELINE, Summary
from tucker_cam.text import printable
from tucker_cam.writing import complete_or_absent

FORMATS = (".png", ".jpg", ".pdf", ".svg")
PLACES = ("best", "median", "worst")
_COLUMNS = 4
_NAME_LENGTH = 22


class Example(NamedTuple):
    """An overlay to be shown.

    Attributes:
        picture: what the network saw, height x width x 3 in [0, 1].
        saliency: the map, height x width in [0, 1].
        mask: bool, height x width; its outline is drawn, inside the picture.
        caption: the picture's score, and below it its name.
    """

    picture: NDArray[np.float32]
    saliency: NDArray[np.float32]
    mask: NDArray[np.bool_]
    caption: str


def pick_examples(rows: Sequence[Row], measure: Measure) -> dict[str, dict[str, tuple[str, float]]]:
    """Choose for each method the best, the median and the worst picture by a measure.

    Returns:
        By method, then by place, the picture's name and its value.
    """
    picked: dict[str, dict[str, tuple[str, float]]] = {}
    for method in dict.fromkeys(row.method for row in rows):
        values = {row.picture: row.values[measure.name] for row in rows if row.method == method}
        scored = [(picture, value) for picture, value in values.items() if not np.isnan(value)]
        ranked = sorted(scored, key=lambda pair: (pair[1], pair[0]), reverse=measure.better == "higher")
        if ranked:
            picked[method] = dict(zip(PLACES, (ranked[0], ranked[(len(ranked) - 1) // 2], ranked[-1]), strict=True))
    return picked


def caption(picture: str, value: float) -> str:
    """Return a picture's value, and below it its name, cut to what fits above an overlay."""
    shown = printable(picture)
    short = shown if len(shown) <= _NAME_LENGTH else f"...{shown[-_NAME_LENGTH + 3 :]}"
    return f"{value:.3g}\n{short}"


def write_report(
    path: Path,
    title: str,
    summaries: Mapping[str, Mapping[str, Summary]],
    measures: Sequence[Measure],
    examples: Mapping[str, Mapping[str, Example]],
    ranked_by: Measure,
) -> None:
    """Draw the page and write it, in the format of the path's ending; `ranked_by` is what the examples were chosen by.

    Measures without values are left out, and the sheet of examples where there are none.
    """
    shown = [each for each in measures if any(each.name in of_method for of_method in summaries.values())]
    bar_rows = -(-len(shown) // _COLUMNS)
    bar_height = 1.2 + 0.24 * len(summaries)
    sheet_height = 2.6 * -(-len(examples) // 2) + 0.6 if examples else 0.01
    # File names may hold dollar signs, which are no formulas.
    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(15, bar_rows * bar_height + sheet_height + 0.9), layout="constrained")
        figure.suptitle(printable(title), wrap=True)
        halves = figure.add_gridspec(2, 1, height_ratios=[bar_rows * bar_height, sheet_height])
        bars, sheet = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
        _draw_bars(bars, summaries, shown, bar_rows)
        if examples:
            _draw_examples(sheet, examples, ranked_by)
        with complete_or_absent(path) as unfinished:
            figure.savefig(unfinished, dpi=100, format=path.suffix.removeprefix(".").lower())


def _draw_bars(
    figure: SubFigure, summaries: Mapping[str, Mapping[str, Summary]], shown: Sequence[Measure], rows: int
) -> None:
    methods = list(summaries)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False, sharey=True).flatten()
    for axes, measure in zip(grid, shown, strict=False):
        for position, method in enumerate(methods):
            summary = summaries[method].get(measure.name)
            if summary is None:
                # A bar of length 0 would look the same.
                axes.text(0, position, " not scored", fontsize=7, color="gray", verticalalignment="center")
                continue
            mean, low, high = summary.value
            axes.barh(position, mean, color=_COLOURS[_kind(method)])
            if not np.isnan(low):
                axes.plot([low, high], [position, position], color="black", linewidth=1.2)
        axes.set_title(measure.heading, fontsize=9)
        axes.set_yticks(range(len(methods)), [printable(method) for method in methods])
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(shown) :]:
        axes.axis("off")
    grid[0].invert_yaxis()
    kinds = dict.fromkeys(_kind(method) for method in methods)
    handles: list[Artist] = [Patch(color=_COLOURS[kind], label=f"mean of {kind}") for kind in kinds]
    if any(not np.isnan(each.value.low) for of_method in summaries.values() for each in of_method.values()):
        handles.append(Line2D([], [], color="black", linewidth=1.2, label="95 % bootstrap interval"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def _draw_examples(figure: SubFigure, examples: Mapping[str, Mapping[str, Example]], ranked_by: Measure) -> None:
    any_mask = any(example.mask.any() for by_place in examples.values() for example in by_place.values())
    outlined = "; white: the object's outline" if any_mask else ""
    title = f"each method's best, median and worst picture by {ranked_by.title}{outlined}"
    figure.suptitle(title, fontsize=10)
    # Two methods side by side: a page that is not endless.
    grid = figure.subplots(-(-len(examples) // 2), 2 * len(PLACES), squeeze=False)
    for axes in grid.flatten():
        axes.axis("off")
    slots = grid.reshape(-1, len(PLACES))
    for slot, (method, by_place) in zip(slots, examples.items(), strict=False):
        for axes, (place, example) in zip(slot, by_place.items(), strict=False):
            _draw_example(axes, f"{printable(method)}, {place}: {example.caption}", example)


def _draw_example(axes: Axes, title: str, example: Example) -> None:
    axes.imshow(show_cam_on_image(example.picture, example.saliency, use_rgb=True))
    # Without the outermost pixels, or the outline would be open where the object reaches the picture's edge.
    inner = np.zeros_like(example.mask)
    inner[1:-1, 1:-1] = example.mask[1:-1, 1:-1]
    if inner.any():
        axes.contour(inner, levels=[0.5], colors="white", linewidths=1.5)
    axes.set_title(title, fontsize=8)


def _kind(method: str) -> str:
    if method in CONTROLS:
        return "a control, which knows nothing of the picture"
    return BASELINE if method == BASELINE else "another method"


_COLOURS = {
    BASELINE: "tab:orange",
    "another method": "tab:blue",
    "a control, which knows nothing of the picture": "tab:gray",
}
