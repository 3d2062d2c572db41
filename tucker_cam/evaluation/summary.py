"""Summarises rows: for each method and measure, the mean, its interval and the difference from a baseline."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from tucker_cam.evaluation.metrics import Measure
from tucker_cam.evaluation.results import Row
from tucker_cam.writing import new_table

BASELINE = "eigencam"
# With fewer pictures, a percentile bootstrap's interval excludes 0 far too often.
ENOUGH = 10
_RESAMPLES = 2000
HEADER = ("method", "measure", "pictures", "mean", "low", "high", "difference", "difference_low", "difference_high")


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval, which is NaN if fewer than two pictures were scored."""

    mean: float
    low: float
    high: float


class Summary(NamedTuple):
    """The summary of one method by one measure, over `pictures` scored pictures.

    `difference` is that from the baseline, over the `pairs` pictures on which both were scored; None if there are none,
    and for the baseline itself.
    """

    pictures: int
    value: Interval
    difference: Interval | None
    pairs: int


def summarise(
    rows: Sequence[Row], measures: Sequence[Measure], *, baseline: str = BASELINE, seed: int = 0
) -> dict[str, dict[str, Summary]]:
    """Summarise rows by method, in the order of the rows, and then by the measure's name.

    Intervals are percentile bootstraps over pictures, with 2,000 resamples; differences are taken picture by picture. A
    measure is left out for a method that has no value of it.
    """
    summaries: dict[str, dict[str, Summary]] = {row.method: {} for row in rows}
    scores: dict[tuple[str, str], dict[str, float]] = {}
    # Sorted, so that the order of the rows does not matter: the resampling draws by position.
    for row in sorted(rows, key=lambda row: row.picture):
        for name in (measure.name for measure in measures if not math.isnan(row.values[measure.name])):
            scores.setdefault((row.method, name), {})[row.picture] = row.values[name]
    for (method, name), by_picture in scores.items():
        others = scores.get((baseline, name), {})
        paired = [number - others[picture] for picture, number in by_picture.items() if picture in others]
        summaries[method][name] = Summary(
            len(by_picture),
            mean_interval(np.array([*by_picture.values()]), seed),
            mean_interval(np.array(paired), seed) if paired and method != baseline else None,
            len(paired),
        )
    return summaries


def write_summary(path: Path, summaries: Mapping[str, Mapping[str, Summary]]) -> None:
    """Write a row for each method and measure: the mean and the difference, each with its interval."""
    with new_table(path, HEADER) as write_row:
        for method, by_measure in summaries.items():
            for name, found in by_measure.items():
                numbers = [f"{number:.6g}" for number in (*found.value, *(found.difference or ()))]
                write_row([method, name, found.pictures, *numbers, *[""] * (6 - len(numbers))])


def mean_interval(values: NDArray[np.float64], seed: int) -> Interval:
    """Return the mean of the values with its interval, a percentile bootstrap of 2,000 resamples."""
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, np.nan, np.nan)
    # batch: how many resamples are drawn at a time; all those of a million pictures would not fit into memory.
    resampled = bootstrap(
        (values,),
        np.mean,
        n_resamples=_RESAMPLES,
        method="percentile",
        batch=max(1, 10_000_000 // len(values)),
        rng=np.random.default_rng(seed),
    )
    return Interval(mean, float(resampled.confidence_interval.low), float(resampled.confidence_interval.high))
