"""Draws the page of an evaluation: bars with intervals, and each method at its best, median and worst."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
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
_COLOURS = {BASELINE: "tab:orange"} | dict.fromkeys(CONTROLS, "tab:gray")
_MEANINGS = {
    "tab:orange": f"mean of {BASELINE}",
    "tab:blue": "mean of another method",
    "tab:gray": "mean of a control, which knows nothing of the picture",
}
_COLUMNS = 4
# Two methods side by side, which keeps the page short.
_EXAMPLES = 6
# The longest name that fits above an overlay.
_NAME_LENGTH = 22


class Example(NamedTuple):
    """A title, what the network saw, height x width x 3 in [0, 1], the map, and the object's mask."""

    title: str
    picture: NDArray[np.float32]
    saliency: NDArray[np.float32]
    mask: NDArray[np.bool_]


def pick_examples(rows: Sequence[Row], measure: Measure) -> Iterator[tuple[str, str, str]]:
    """Yield each method with its best, median and worst picture by a measure, and the title to write above each."""
    for method in dict.fromkeys(row.method for row in rows):
        values = ((row.values[measure.name], row.picture) for row in rows if row.method == method)
        ranked = sorted((each for each in values if not np.isnan(each[0])), reverse=measure.better == "higher")
        if ranked:
            for place, chosen in ("best", 0), ("median", (len(ranked) - 1) // 2), ("worst", -1):
                value, picture = ranked[chosen]
                shown = printable(picture)
                short = shown if len(shown) <= _NAME_LENGTH else f"...{shown[-_NAME_LENGTH + 3 :]}"
                yield method, picture, f"{printable(method)}, {place}: {value:.3g}\n{short}"


def write_report(
    path: Path,
    title: str,
    summaries: Mapping[str, Mapping[str, Summary]],
    measures: Sequence[Measure],
    examples: Sequence[Example],
    ranked_by: Measure,
) -> None:
    """Draw the page and write it, in the format that the path's ending names."""
    bars_height = -(-len(measures) // _COLUMNS) * (1.2 + 0.24 * len(summaries))
    sheet_height = 2.6 * -(-len(examples) // _EXAMPLES) + 0.6 if examples else 0.01
    # File names may contain dollar signs, which do not mark formulas.
    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(15, bars_height + sheet_height + 0.9), layout="constrained")
        figure.suptitle(printable(title), wrap=True)
        (bars,), (sheet,) = figure.subfigures(2, 1, squeeze=False, height_ratios=[bars_height, sheet_height])
        _draw_bars(bars, summaries, measures)
        if examples:
            _draw_examples(sheet, examples, ranked_by)
        with complete_or_absent(path) as unfinished:
            figure.savefig(unfinished, dpi=100)


def _draw_bars(figure: SubFigure, summaries: Mapping[str, Mapping[str, Summary]], measures: Sequence[Measure]) -> None:
    places = range(len(summaries))
    colours = [_COLOURS.get(method, "tab:blue") for method in summaries]
    grid = figure.subplots(-(-len(measures) // _COLUMNS), _COLUMNS, squeeze=False, sharey=True).flatten()
    for axes, measure in zip(grid, measures, strict=False):
        found = [of_method.get(measure.name) for of_method in summaries.values()]
        means, lows, highs = np.transpose([(np.nan,) * 3 if each is None else each.value for each in found])
        axes.barh(places, means, color=colours)
        axes.hlines(places, lows, highs, color="black", linewidth=1.2)
        for place in np.flatnonzero(np.isnan(means)):
            # A bar of length 0 would look the same.
            axes.text(0, place, " not scored", fontsize=7, color="gray", verticalalignment="center")
        axes.set_title(measure.heading, fontsize=9)
        axes.set_yticks(places, [printable(method) for method in summaries])
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(measures) :]:
        axes.axis("off")
    grid[0].invert_yaxis()
    handles: list[Artist] = [Patch(color=each, label=_MEANINGS[each]) for each in dict.fromkeys(colours)]
    handles.append(Line2D([], [], color="black", linewidth=1.2, label="95 % bootstrap interval"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def _draw_examples(figure: SubFigure, examples: Sequence[Example], ranked_by: Measure) -> None:
    title = f"each method's best, median and worst picture by {ranked_by.title}; white: the object's outline, if any"
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(-(-len(examples) // _EXAMPLES), _EXAMPLES, squeeze=False).flatten()
    for axes in grid:
        axes.axis("off")
    for axes, example in zip(grid, examples, strict=False):
        axes.set_title(example.title, fontsize=8)
        axes.imshow(show_cam_on_image(example.picture, example.saliency, use_rgb=True))
        if example.mask.any() and not example.mask.all():
            axes.contour(example.mask, levels=[0.5], colors="white", linewidths=1.5)
