"""A folder of pictures and a model in, the scores of all methods and controls out: as CSV, as tables, as a figure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import typer
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from tucker_cam.cli.explain import device_named
from tucker_cam.cli.methods import LABEL_DEPENDENT, METHODS, method_named
from tucker_cam.evaluation.comparison import Group, Measure, Subject, measures, saliency_maps
from tucker_cam.evaluation.controls import CONTROLS
from tucker_cam.evaluation.datasets import Annotations, Sample, find_samples, see
from tucker_cam.evaluation.folder import Method, compare_on_folder, on_device
from tucker_cam.evaluation.report import Example, caption, check_format, pick_examples, write_report
from tucker_cam.evaluation.results import ResultsFile, Row
from tucker_cam.evaluation.summary import BASELINE, Interval, Summary, summarise
from tucker_cam.files import printable
from tucker_cam.models import LoadedModel, find_target_layer, layer_named, load_model

_TABLE_COLUMNS = 4
# Of fewer pictures a percentile bootstrap's interval leaves 0 out far too often.
_ENOUGH = 10
_RANKED_BY = ("best_threshold_iou", "probability_drop_area_matched", "similarity_drop_area_matched", "mean_saliency")
# Where the output is no terminal, a table need not be squeezed into 80 columns.
_PRINTED_WIDTH = 132


def evaluate_folder(
    data: Path,
    *,
    model_name: str,
    methods: Sequence[str],
    groups: Collection[Group],
    layer: str | None,
    annotations: Annotations | None,
    limit: int | None,
    out: Path,
    report: Path | None,
    pretrained: bool,
    weights: Path | None,
    device: str,
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
    chosen: dict[str, Method] = {name: method_named(name) for name in dict.fromkeys((BASELINE, *methods))}
    samples, kind = find_samples(data, annotations=annotations, limit=limit)
    # Random weights are the same when a run is gone on with.
    torch.manual_seed(0)
    loaded = load_model(model_name, pretrained=pretrained, weights=weights, device=device_named(device))
    layer_name, embedding_name, subject = subject_of(loaded, samples, layer)
    if subject.classifies:
        chosen |= LABEL_DEPENDENT
    columns = measures(
        groups if kind != "none" else [group for group in groups if group != "localisation"], subject.score_names
    )
    run = {
        "data": str(data.resolve()),
        "model": loaded.name,
        "weights": _digest(loaded.model),
        "layer": layer_name,
        "annotations": kind,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with _only_run(out):
        results = ResultsFile(out, run=run, columns=[column.column for column in columns])
        others = {picture for picture, _ in results.rows} - {sample.name for sample in samples}
        if others:
            raise ValueError(
                f"{out}: expected results of the {len(samples)} pictures of this run, found some of {min(others)}, "
                "which is not among them: give another file, or the --limit it was written with"
            )
        typer.echo(
            f"{len(samples)} pictures, annotations: {kind}, model: {loaded.name}, layer: {layer_name}, "
            f"embedding: {embedding_name}, pooled"
        )
        with _progress(len(samples)) as advance:
            skipped, remarks = compare_on_folder(
                samples, kind, loaded, subject, chosen, columns, results, advance=advance
            )
    order = {name: index for index, name in enumerate([*METHODS, *LABEL_DEPENDENT, *CONTROLS])}
    rows = sorted(results.rows.values(), key=lambda row: order.get(row["method"], len(order)))
    summaries = summarise(rows, columns)
    print_tables(summaries, columns)
    for remark in remarks:
        typer.echo(printable(f"note: {remark}"))
    typer.echo(f"{len(samples) - len(skipped)} pictures scored, {len(skipped)} skipped; rows: {out}")
    if report is not None and rows:
        ranked_by, examples = _examples(rows, columns, samples, kind, loaded, subject, chosen)
        count = len(samples) - len(skipped)
        title = f"{loaded.name}, {layer_name}: {count} pictures; bars are means, lines their 95 % intervals"
        report.parent.mkdir(parents=True, exist_ok=True)
        write_report(report, title, summaries, columns, examples, ranked_by)
        typer.echo(f"report: {report}")
    return skipped


def subject_of(loaded: LoadedModel, samples: Sequence[Sample], layer: str | None) -> tuple[str, str, Subject]:
    """Return the names of the target layer and of the embedding's, and with them what is explained.

    A dry run on the first picture finds the last layer with a spatial map. It is the target layer unless another is
    asked for, and in any case the one whose pooled maps are the embedding, so that the scores of two layers compare.

    Raises:
        ValueError: there is no such layer, none can be found, or no picture can be read.
    """
    device = next(loaded.model.parameters(), torch.empty(0)).device
    asked_for = None if layer is None else layer_named(loaded.model, layer)
    for sample in samples:
        try:
            example = see(sample, "none", loaded).network_input[None].to(device)
            break
        except (OSError, ValueError):
            continue
    else:
        raise ValueError(f"none of the {len(samples)} pictures could be read, {samples[0].picture} among them")
    try:
        last_name, last = find_target_layer(loaded.model, example)
    except ValueError:
        if layer is None or asked_for is None:
            raise
        last_name, last = layer, asked_for
    subject = Subject(loaded.model, asked_for or last, last, loaded.classifies)
    return layer or last_name, last_name, subject


def check_outputs(data: Path, outputs: Sequence[Path]) -> None:
    """Refuse outputs that would overwrite each other, or become pictures of the data.

    Raises:
        ValueError: they would.
    """
    resolved = [output.resolve() for output in outputs]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"{outputs[0]}: expected different files for the outputs, got it twice")
    for output, path in zip(outputs, resolved, strict=True):
        if path.is_relative_to(data.resolve()):
            raise ValueError(f"{output}: expected an output outside of the data, {data}")
        if path.is_dir():
            raise ValueError(f"{output}: expected a file for the output, found a folder")


@contextmanager
def _only_run(out: Path) -> Iterator[None]:
    """Refuse to start while another run writes to `out`; a run that was killed holds nothing."""
    lock = out.with_name(f".{out.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            yield
            lock.unlink(missing_ok=True)
    except Timeout as error:
        raise ValueError(f"{out}: another run is writing to it: wait for its end, or give another file") from error


def _digest(model: nn.Module) -> str:
    """Return a short hash of the weights: rows of other weights of the same name are another run's."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def print_tables(summaries: Mapping[str, Mapping[str, Summary]], columns: Sequence[Measure]) -> None:
    """Print a table by method for each few measures: the mean, and below it the difference from EigenCAM."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PRINTED_WIDTH)
    shown = [column for column in columns if any(column.column in of_method for of_method in summaries.values())]
    for start in range(0, len(shown), _TABLE_COLUMNS):
        table = Table(show_lines=True)
        table.add_column("method", no_wrap=True)
        for column in shown[start : start + _TABLE_COLUMNS]:
            table.add_column(f"{column.title}\n{_ARROWS[column.better]}", justify="right")
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
    return numbers[0] if math.isnan(interval.low) else f"{numbers[0]} \\[{numbers[1]}, {numbers[2]}]"


def _examples(
    rows: Sequence[Row],
    columns: Sequence[Measure],
    samples: Sequence[Sample],
    annotations: Annotations,
    loaded: LoadedModel,
    subject: Subject,
    methods: Mapping[str, Method],
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
                seen = see(by_name[picture], annotations, loaded)
            except (OSError, ValueError):
                # It was whole when it was scored.
                continue
            images, _ = on_device([seen], subject)
            wanted = {method: methods[method]} if method in methods else {}
            # Lazily: the controls come last, and are not made for a method's example.
            saliency = next(
                maps[0] for name, maps in saliency_maps(images, [picture], subject, wanted) if name == method
            )
            examples[method][place] = Example(
                loaded.picture(seen.network_input), saliency.cpu().numpy(), seen.mask.numpy(), caption(picture, value)
            )
    return ranked_by, examples


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    bar = Progress(
        *Progress.get_default_columns()[:-1],
        MofNCompleteColumn(),
        TextColumn("pictures, time left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task("scoring", total=total)
        yield lambda done: bar.advance(task, done)


_ARROWS = {"higher": "higher is better", "lower": "lower is better", "": "neither is better"}
