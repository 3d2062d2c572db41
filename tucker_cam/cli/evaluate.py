"""`tucker-cam evaluate`: what an evaluation found, as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tucker_cam.console import PlainConsole
from tucker_cam.errors import BadValueError, Failure
from tucker_cam.evaluation.evaluate import check_output, evaluate
from tucker_cam.evaluation.metrics import Measure
from tucker_cam.evaluation.report import FORMATS
from tucker_cam.evaluation.summary import BASELINE, Interval, Summary
from tucker_cam.text import counted, say

_TABLE_COLUMNS = 4
# Of fewer pictures a percentile bootstrap's interval leaves 0 out far too often.
_ENOUGH = 10
# Where the output is no terminal, a table need not be squeezed into 80 columns.
_PRINTED_WIDTH = 132


def evaluate_folder(
    data: Path, model: str, methods: Sequence[str] | None, out: Path, report: Path | None, **options: Any
) -> list[Failure]:
    """Print the tables of an evaluation, and return what was skipped; see `evaluate`."""
    check_output(out, data=data)
    if report is not None:
        check_output(report, data=data, formats=FORMATS)
        if report.resolve() == out.resolve():
            raise BadValueError(f"{out}: expected different files for the outputs, got it twice")
    evaluation = evaluate(data, model, methods, out=out, **options)
    print_tables(evaluation.summary(), evaluation.measures)
    for remark in evaluation.remarks:
        say(f"note: {remark}")
    say(f"{counted(evaluation.scored)} scored, {len(evaluation.failures)} skipped; rows: {out}")
    if report is not None:
        evaluation.report(report)
        say(f"report: {report}")
    return evaluation.failures


def print_tables(summaries: Mapping[str, Mapping[str, Summary]], measures: Sequence[Measure]) -> None:
    """Print a table by method for each few measures: the mean, and below it the difference from EigenCAM."""
    console = PlainConsole()
    if not console.is_terminal:
        console = PlainConsole(width=_PRINTED_WIDTH)
    shown = [each for each in measures if any(each.name in of_method for of_method in summaries.values())]
    for start in range(0, len(shown), _TABLE_COLUMNS):
        table = Table(show_lines=True)
        table.add_column("method", no_wrap=True)
        of_table = shown[start : start + _TABLE_COLUMNS]
        for measure in of_table:
            table.add_column(measure.heading, justify="right")
        for method, by_measure in summaries.items():
            table.add_row(method, *(_cell(by_measure.get(measure.name)) for measure in of_table))
        console.print(table)
    console.print(
        f"Means over pictures with 95 % bootstrap intervals; below, the paired difference from {BASELINE}, with * "
        f"where its interval excludes 0. The intervals of fewer than {_ENOUGH} pictures are too narrow: no *. With so "
        "many comparisons, a few * come by chance."
    )


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    lines = [_interval(summary.value, "")]
    if summary.difference is not None:
        low, high = summary.difference.low, summary.difference.high
        clear = summary.pictures >= _ENOUGH and (low > 0 or high < 0)
        lines.append(f"{'* ' if clear else ''}{_interval(summary.difference, '+')}")
    return "\n".join(lines)


def _interval(interval: Interval, sign: str) -> str:
    numbers = []
    for number in interval:
        form = ".3g" if abs(number) < 0.1 else ".3f" if abs(number) < 10 else ".1f"
        numbers.append(f"{number:{sign}{form}}")
    return numbers[0] if math.isnan(interval.low) else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"
