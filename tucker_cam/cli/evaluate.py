"""`tucker-cam evaluate`: prints the results of an evaluation as a table."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from tucker_cam.console import PlainConsole
from tucker_cam.errors import BadValueError, Failure
from tucker_cam.evaluation.evaluate import check_output, evaluate
from tucker_cam.evaluation.metrics import Measure
from tucker_cam.evaluation.report import FORMATS
from tucker_cam.evaluation.summary import BASELINE, ENOUGH, HEADER, Summary, write_summary
from tucker_cam.text import counted, say

_SAY_MOST = (
    "best_cut_iou",
    "probability_drop_area_matched",
    "similarity_drop_area_matched",
    "probability_road",
    "similarity_road",
    "similarity_insertion",
    "similarity_deletion",
)


def evaluate_folder(
    data: Path, model: str, methods: Sequence[str] | None, out: Path, report: Path | None, **options: Any
) -> list[Failure]:
    """Print the table of an evaluation, and return its failures; see `evaluate`."""
    check_output(out, data=data)
    whole = out.with_name(f"{out.stem}-summary.csv")
    check_output(whole, header=HEADER)
    if report is not None:
        check_output(report, data=data, formats=FORMATS)
        if report.resolve() == out.resolve():
            raise BadValueError(f"{out}: expected different files for the outputs, got this one twice")
    evaluation = evaluate(data, model, methods, out=out, **options)
    summaries = evaluation.summary()
    print_table(summaries, evaluation.measures)
    write_summary(whole, summaries)
    for remark in evaluation.remarks:
        say(f"note: {remark}")
    skipped = sum(not failure.method for failure in evaluation.failures)
    say(f"{counted(evaluation.scored)} scored, {skipped} skipped; rows: {out}; all measures: {whole}")
    if report is not None:
        evaluation.report(report)
        say(f"report: {report}")
    return evaluation.failures


def print_table(summaries: Mapping[str, Mapping[str, Summary]], measures: Sequence[Measure]) -> None:
    """Print a table by method, 80 columns wide, of the three requested measures that say the most."""
    scored = [each for each in measures if any(each.name in of_method for of_method in summaries.values())]
    shown = sorted(scored, key=lambda each: [*_SAY_MOST, each.name].index(each.name))[:3]
    table = Table(Column("method", overflow="fold"), box=None, padding=(0, 1, 0, 0))
    for measure in shown:
        table.add_column(measure.heading, justify="right")
    for method, by_measure in summaries.items():
        table.add_row(method, *(_cell(measure, by_measure.get(measure.name)) for measure in shown))
    PlainConsole().print(
        table,
        f"Means over pictures with 95 % bootstrap intervals; + is better and - worse than {BASELINE}, by the interval "
        f"of the paired difference (no sign below {ENOUGH} pictures; of so many comparisons, a few differ by chance).",
    )


def _cell(measure: Measure, summary: Summary | None) -> str:
    if summary is None:
        return "- "
    mean, *ends = (f"{number:.3f}" if abs(number) < 10 else f"{number:.1f}" for number in summary.value)
    low, high = (re.sub(r"^(-?)0\.", r"\1.", end) for end in ends)
    shown = mean if math.isnan(summary.value.low) else f"{mean} [{low},{high}]"
    if summary.difference is None or summary.pairs < ENOUGH or not measure.better:
        return f"{shown} "
    higher, lower = ("+", "-") if measure.better == "higher" else ("-", "+")
    return shown + (higher if summary.difference.low > 0 else lower if summary.difference.high < 0 else " ")
