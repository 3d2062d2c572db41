"""A folder of pictures and a model in, the scores of all methods and controls out: as CSV, as tables, as a figure."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from tucker_cam.cli.lines import say
from tucker_cam.console import PlainConsole
from tucker_cam.errors import BadValueError
from tucker_cam.evaluation.comparison import Group, Measure, Subject, measures, saliency_maps
from tucker_cam.evaluation.controls import CONTROLS
from tucker_cam.evaluation.folder import Builder, compare_on_folder, on_device
from tucker_cam.evaluation.report import Example, caption, check_format, pick_examples, write_report
from tucker_cam.evaluation.results import ResultsFile, Row
from tucker_cam.evaluation.summary import BASELINE, Interval, Summary, summarise
from tucker_cam.methods import LABEL_DEPENDENT, METHODS, method_named
from tucker_cam.models import LoadedModel
from tucker_cam.pictures.annotations import Annotations, Sample, find_samples, network_view
from tucker_cam.progress import progress
from tucker_cam.text import counted
from tucker_cam.writing import only_run

_TABLE_COLUMNS = 4
# Of fewer pictures a percentile bootstrap's interval leaves 0 out far too often.
_ENOUGH = 10
_RANKED_BY = ("best_threshold_iou", "probability_drop_area_matched", "similarity_drop_area_matched", "mean_saliency")
# Where the output is no terminal, a table need not be squeezed into 80 columns.
_PRINTED_WIDTH = 132


def evaluate_folder(
    data: Path,
    *,
    load: Callable[[], LoadedModel],
    methods: Sequence[str],
    groups: Collection[Group],
    annotations: Annotations | None,
    limit: int | None,
    out: Path,
    report: Path | None,
) -> list[str]:
    """Score the methods on the pictures, go on with what `out` holds already, and print the tables.

    Returns:
        One line for each picture that was skipped; all others are done.

    Raises:
        ValueError: an unknown method, model, layer or device, no pictures, or results of another run in `out`.
        ModuleNotFoundError: the model's package is missing.
        OSError: its weights could not be had, `data` cannot be read, or `out` or `report` cannot be written.
    """
    if report is not None:
        check_format(report)
    check_outputs(data, [out] if report is None else [out, report])
    # EigenCAM is what the others are compared with.
    chosen = {name: method_named(name) for name in dict.fromkeys((BASELINE, *methods))}
    samples, kind, overlooked = find_samples(data, annotations=annotations, limit=limit)
    for remark in overlooked:
        say(f"note: {remark}")
    loaded = load()
    subject = subject_of(loaded)
    check_readable(samples, loaded)
    if subject.classifies:
        chosen |= {name: method for name, method in LABEL_DEPENDENT.items() if method.is_there}
    columns = measures(
        groups if kind != "none" else [group for group in groups if group != "localisation"], subject.score_names
    )
    run = {
        "data": str(data.resolve()),
        "model": loaded.name,
        "weights": loaded.digest(),
        "layer": loaded.layer_names[0],
        "annotations": kind,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with only_run(out):
        results = ResultsFile(out, run=run, columns=[column.column for column in columns])
        others = {picture for picture, _ in results.rows} - {sample.name for sample in samples}
        if others:
            raise BadValueError(
                f"{out}: expected results of the {counted(len(samples))} of this run, found some of {min(others)}, "
                "which is not among them: give another file, or the --limit it was written with"
            )
        said = f"{counted(len(samples))}, annotations: {kind}; {loaded.description}"
        say(f"{said}; embedding: {loaded.last_layer.name}, pooled")
        with progress("scoring", len(samples)) as advance:
            skipped, remarks = compare_on_folder(
                samples, kind, loaded, subject, chosen, columns, results, advance=advance
            )
    order = {name: index for index, name in enumerate([*METHODS, *LABEL_DEPENDENT, *CONTROLS])}
    rows = sorted(results.rows.values(), key=lambda row: order.get(row["method"], len(order)))
    summaries = summarise(rows, columns)
    print_tables(summaries, columns)
    for remark in remarks:
        say(f"note: {remark}")
    scored = counted(len(samples) - len(skipped))
    say(f"{scored} scored, {len(skipped)} skipped; rows: {out}")
    if report is not None and rows:
        ranked_by, examples = _examples(rows, columns, samples, kind, loaded, subject, chosen)
        title = f"{loaded.name}, {loaded.layer_names[0]}: {scored}"
        report.parent.mkdir(parents=True, exist_ok=True)
        write_report(report, title, summaries, columns, examples, ranked_by)
        say(f"report: {report}")
    return skipped


def subject_of(loaded: LoadedModel) -> Subject:
    """Return what is explained.

    The embedding is of the last layer with a spatial map, whatever layer is explained, so that the scores of two
    layers compare.

    Raises:
        ValueError: it is a video network, or several layers were asked for.
    """
    if loaded.frames is not None:
        raise BadValueError(f"expected a network for pictures, and {loaded.name} takes clips")
    if len(loaded.layers) > 1:
        raise BadValueError(f"expected one layer to score, got {', '.join(loaded.layer_names)}")
    (layer,) = loaded.layers
    return Subject(
        loaded.model,
        layer.module,
        loaded.last_layer.module,
        loaded.classifies,
        layer.reshape_transform,
        loaded.last_layer.reshape_transform,
    )


def check_readable(samples: Sequence[Sample], loaded: LoadedModel) -> None:
    """Raise ValueError unless one picture at least can be read."""
    errors: list[str] = []
    for sample in samples:
        try:
            network_view(sample, "none", loaded)
        except (OSError, ValueError) as error:
            errors.append(str(error))
            continue
        return
    raise BadValueError(f"found {counted(len(samples))}, and none could be read: {errors[0]}")


def check_outputs(data: Path, outputs: Sequence[Path]) -> None:
    """Refuse outputs that would overwrite each other, become pictures of the data, or cannot be written.

    Raises:
        ValueError: they would, or are no regular files, or the folder they would be in takes no files.
    """
    resolved = [output.resolve() for output in outputs]
    if len(set(resolved)) < len(resolved):
        raise BadValueError(f"{outputs[0]}: expected different files for the outputs, got it twice")
    for output, path in zip(outputs, resolved, strict=True):
        if path.is_relative_to(data.resolve()):
            raise BadValueError(f"{output}: expected an output outside of the data, {data}")
        if path.is_dir():
            raise BadValueError(f"{output}: expected a file for the output, found a folder")
        # A device or a pipe, or the file to which standard output goes: a run reads what is there, and replaces it.
        if output.exists() and (not output.is_file() or _is_open_as(output, 1) or _is_open_as(output, 2)):
            raise BadValueError(f"{output}: expected a regular file for the output, found a device, a pipe or a stream")
        try:
            # The nearest folder that is there: what is missing below it can be made if this can.
            tempfile.TemporaryDirectory(dir=next(folder for folder in path.parents if folder.exists())).cleanup()
        except OSError as error:
            raise BadValueError(
                f"{output}: expected a place that can be written to, found none ({error.strerror})"
            ) from error


def _is_open_as(path: Path, descriptor: int) -> bool:
    return os.path.samestat(path.stat(), os.fstat(descriptor))


def print_tables(summaries: Mapping[str, Mapping[str, Summary]], columns: Sequence[Measure]) -> None:
    """Print a table by method for each few measures: the mean, and below it the difference from EigenCAM."""
    console = PlainConsole()
    if not console.is_terminal:
        console = PlainConsole(width=_PRINTED_WIDTH)
    shown = [column for column in columns if any(column.column in of_method for of_method in summaries.values())]
    for start in range(0, len(shown), _TABLE_COLUMNS):
        table = Table(show_lines=True)
        table.add_column("method", no_wrap=True)
        for column in shown[start : start + _TABLE_COLUMNS]:
            table.add_column(column.heading, justify="right")
        for method, by_column in summaries.items():
            table.add_row(
                method, *(_cell(by_column.get(each.column)) for each in shown[start : start + _TABLE_COLUMNS])
            )
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
    numbers = [
        f"{number:{sign}.3g}"
        if abs(number) < 0.1
        else f"{number:{sign}.3f}"
        if abs(number) < 10
        else f"{number:{sign}.1f}"
        for number in interval
    ]
    return numbers[0] if math.isnan(interval.low) else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def _examples(
    rows: Sequence[Row],
    columns: Sequence[Measure],
    samples: Sequence[Sample],
    annotations: Annotations,
    loaded: LoadedModel,
    subject: Subject,
    methods: Mapping[str, Builder],
) -> tuple[Measure, dict[str, dict[str, Example]]]:
    """Explain again the pictures that the report shows."""
    scored = {column.column: column for column in columns if any(row[column.column] for row in rows)}
    ranked_by = next(scored[name] for name in _RANKED_BY if name in scored)
    by_name = {sample.name: sample for sample in samples}
    examples: dict[str, dict[str, Example]] = {}
    for method, by_place in pick_examples(rows, ranked_by).items():
        examples[method] = {}
        for place, (picture, value) in by_place.items():
            try:
                seen = network_view(by_name[picture], annotations, loaded)
            except (OSError, ValueError):
                # It was whole when it was scored.
                continue
            images, _ = on_device([seen], loaded)
            wanted = {method: methods[method]} if method in methods else {}
            # Lazily: the controls come last, and are not made for a method's example.
            with subject.one_pass(images) as one_pass:
                saliency = next(maps[0] for name, maps in saliency_maps(one_pass, [picture], wanted) if name == method)
            examples[method][place] = Example(
                loaded.picture(seen.network_input), saliency.cpu().numpy(), seen.mask.numpy(), caption(picture, value)
            )
    return ranked_by, examples
