"""Summaries and overlays in, one figure page out: bars with intervals, and each method at its best and worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from pytorch_grad_cam.utils.image import show_cam_on_image

from tucker_cam.evaluation.comparison import Measure
from tucker_cam.evaluation.controls import CONTROLS
from tucker_cam.evaluation.results import Row
from tucker_cam.evaluation.summary import BASELINE, Summary
from tucker_cam.files import complete_or_absent, printable

_FORMATS = (".png", ".jpg", ".pdf", ".svg")
PLACES = ("best", "median", "worst")
_COLUMNS = 4
_NAME_LENGTH = 24


class Example(NamedTuple):
    """An overlay to be shown.

    Attributes:
        picture: what the network saw, height x width x 3 in [0, 1].
        saliency: the map, height x width in [0, 1].
        mask: bool, height x width; its outline is drawn.
        caption: the picture's name and its score.
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
    for method in dict.fromkeys(row["method"] for row in rows):
        scored = [
            (row["picture"], float(row[measure.column]))
            for row in rows
            if row["method"] == method and row[measure.column]
        ]
        ranked = sorted(scored, key=lambda pair: (pair[1], pair[0]), reverse=measure.better == "higher")
        if ranked:
            picked[method] = dict(zip(PLACES, (ranked[0], ranked[(len(ranked) - 1) // 2], ranked[-1]), strict=True))
    return picked


def caption(picture: str, value: float) -> str:
    """Return a picture's name, cut to what fits above an overlay, and its value."""
    short = printable(picture if len(picture) <= _NAME_LENGTH else f"...{picture[-_NAME_LENGTH + 3 :]}")
    return f"{short}: {value:.3g}"


def check_format(path: Path) -> None:
    """Refuse a path whose ending names no format.

    Raises:
        ValueError: it names none; the message holds those that can be written.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"{path}: expected a figure's file, ending in {', '.join(_FORMATS)}")


def write_report(
    path: Path,
    title: str,
    summaries: Mapping[str, Mapping[str, Summary]],
    columns: Sequence[Measure],
    examples: Mapping[str, Mapping[str, Example]],
    ranked_by: Measure,
) -> None:
    """Draw the page and write it, in the format of the path's ending (PNG, PDF, SVG ...).

    Args:
        path: the file.
        title: above the page.
        summaries: as of `summarise`.
        columns: the measures, in order; those without values are left out.
        examples: by method, then by place.
        ranked_by: the measure by which the examples were chosen.

    Raises:
        ValueError: see `check_format`.
        OSError: the file cannot be written.
    """
    check_format(path)
    shown = [column for column in columns if any(column.column in of_method for of_method in summaries.values())]
    bar_rows = -(-len(shown) // _COLUMNS)
    bar_height = 1.0 + 0.24 * len(summaries)
    sheet_height = 2.6 * -(-len(examples) // 2) + 0.6
    # File names may hold dollar signs, which are no formulas.
    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(15, bar_rows * bar_height + sheet_height + 0.5), layout="constrained")
        figure.suptitle(printable(title))
        halves = figure.add_gridspec(2, 1, height_ratios=[bar_rows * bar_height, sheet_height])
        bars, sheet = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
        _draw_bars(bars, summaries, shown, bar_rows)
        _draw_examples(sheet, examples, ranked_by)
        with complete_or_absent(path) as unfinished:
            figure.savefig(unfinished, dpi=100, format=path.suffix.removeprefix(".").lower())


def _draw_bars(
    figure: SubFigure, summaries: Mapping[str, Mapping[str, Summary]], shown: Sequence[Measure], rows: int
) -> None:
    methods = list(summaries)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False, sharey=True).flatten()
    for axes, column in zip(grid, shown, strict=False):
        for position, method in enumerate(methods):
            summary = summaries[method].get(column.column)
            if summary is None:
                continue
            mean, low, high = summary.value
            axes.barh(position, mean, color=_colour(method))
            if not np.isnan(low):
                axes.plot([low, high], [position, position], color="black", linewidth=1.2)
        axes.set_title(f"{column.title}{_ARROWS[column.better]}", fontsize=9)
        axes.set_yticks(range(len(methods)), methods)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(shown) :]:
        axes.axis("off")
    grid[0].invert_yaxis()


def _draw_examples(figure: SubFigure, examples: Mapping[str, Mapping[str, Example]], ranked_by: Measure) -> None:
    figure.suptitle(f"each method's best, median and worst picture by {ranked_by.title}", fontsize=10)
    # Two methods side by side: a page that is not endless.
    grid = figure.subplots(-(-len(examples) // 2), 2 * len(PLACES), squeeze=False)
    slots = grid.reshape(-1, len(PLACES))
    for slot, (method, by_place) in zip(slots, examples.items(), strict=False):
        for axes, (place, example) in zip(slot, by_place.items(), strict=False):
            _draw_example(axes, f"{method}, {place}\n{example.caption}", example)
    for axes in slots[len(examples) :].flatten():
        axes.axis("off")


def _draw_example(axes: Axes, title: str, example: Example) -> None:
    axes.imshow(show_cam_on_image(example.picture, example.saliency, use_rgb=True))
    if example.mask.any():
        axes.contour(example.mask, levels=[0.5], colors="white", linewidths=1)
    axes.set_title(title, fontsize=8)
    axes.axis("off")


def _colour(method: str) -> str:
    if method in CONTROLS:
        return "tab:gray"
    return "tab:orange" if method == BASELINE else "tab:blue"


_ARROWS = {"higher": " (higher is better)", "lower": " (lower is better)", "": ""}
