"""Scores methods and controls on pictures by several metrics; the scores become rows, CSV and figures."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from torch import Tensor

from tucker_cam.errors import BadFileError, BadValueError, Failure
from tucker_cam.evaluation.comparison import Builder, compare, saliency_maps, score_names
from tucker_cam.evaluation.controls import CONTROLS
from tucker_cam.evaluation.inputs import Data, Inputs, Model, find_inputs, go_through, load_for_pictures
from tucker_cam.evaluation.metrics import Measure, choose_measures
from tucker_cam.evaluation.report import FORMATS, Example, pick_examples, write_report
from tucker_cam.evaluation.results import Results, Row
from tucker_cam.evaluation.summary import BASELINE, Summary, summarise
from tucker_cam.explanations.border import BorderCheck
from tucker_cam.explanations.maps import OnePass
from tucker_cam.methods import LABEL_DEPENDENT, METHODS, check_name, check_own_names, methods_named
from tucker_cam.models import LoadedModel
from tucker_cam.models.loading import Loading
from tucker_cam.pictures.ahead import check_reading
from tucker_cam.pictures.annotations import Annotations, network_view
from tucker_cam.text import counted, one_line
from tucker_cam.writing import only_run

logger = logging.getLogger("tucker_cam")
_RANKED_BY = ("best_threshold_iou", "probability_drop_area_matched", "similarity_drop_area_matched", "mean_saliency")


def evaluate(
    data: Data,
    model: Model = "demo",
    methods: str | Sequence[str] | Mapping[str, Builder] | None = None,
    *,
    metrics: str | Measure | Sequence[str | Measure] = ("localisation", "drop"),
    annotations: Annotations | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    batch_size: int = 8,
    workers: int | None = 0,
    progress: bool = True,
    **loading: Unpack[Loading],
) -> Evaluation:
    """Score methods on pictures, beside EigenCAM and controls that know nothing of the picture.

    If the network classifies, the host's GradCAM and SegEigenCAM for the predicted class are scored for reference.

    Args:
        data: a folder of pictures, see `find_samples`; or batches of network inputs, batch x channels x height x width,
            for example from a DataLoader, each alone or in a tuple with masks, bool, batch x height x width. The
            pictures of batches are named "000000" and so on.
        model: as for `explain`. A bare module is assumed not to classify: `Network(module, classifies=True)` says that
            it does.
        methods: as for `explain`; by default all label-free methods.
        metrics: any of "localisation", "drop", "curves" and "road", and your own `Measure` records.
        annotations: score only pictures of the folder that have these; see `find_samples`.
        limit: how many pictures to take: a random sample of the folder, or the first ones of the batches.
        out: a CSV file that gets each batch's rows as soon as they are known, and from which a stopped run is resumed.
            Rows that are already there stay, including those of pictures that have changed since.
        batch_size: how many pictures go through the network together.
        workers: see `explain`.
        progress: show a bar.
        loading: see `load_model`; only one layer can be scored.

    Raises:
        TypeError, ValueError: a method, metric, model, layer or device is unknown; there are no pictures, or none that
            can be scored; or `out` holds results of another run.
        ModuleNotFoundError: the model's package is missing.
        OSError: the model's weights could not be loaded, `data` cannot be read, or `out` cannot be written.

    Example:
        >>> from torch import nn, rand
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> evaluation = evaluate(rand(2, 3, 24, 24), network, "tsm", metrics="drop", layers=["0"])
        >>> [row.method for row in evaluation.rows if row.picture == "000001"]
        ['eigencam', 'tsm', 'random', 'uniform', 'centre-gaussian']
    """
    given = methods_named(METHODS if methods is None else methods)
    # The other methods are compared with EigenCAM.
    chosen: dict[str, Builder] = {BASELINE: METHODS[BASELINE], **given}
    check_own_names(given, CONTROLS)
    wanted = [metrics] if isinstance(metrics, (str, Measure)) else [*metrics]
    choose_measures(wanted, ())
    check_reading(batch_size, workers)
    path = None if out is None else Path(out)
    if path is not None:
        check_output(path)
    inputs = find_inputs(data, annotations, limit)
    for remark in inputs.remarks:
        logger.info(f"note: {remark}")
    if inputs.annotations == "none":
        if wanted == ["localisation"]:
            raise BadValueError(
                "expected masks or boxes for the metric localisation, found none: with batches, give tuples of images "
                "and masks, batch x height x width"
            )
        wanted = [each for each in wanted if each != "localisation"]
    with nullcontext() if path is None else only_run(path):
        loaded = load_for_pictures(model, inputs.example, **loading)
        if loaded.classifies:
            chosen |= {name: method for name, method in LABEL_DEPENDENT.items() if method.is_there}
        measures = choose_measures(wanted, score_names(loaded))
        run = {
            "data": inputs.where,
            "model": loaded.name if loaded.preprocessing is None else f"{loaded.name}, {loaded.preprocessing}",
            "weights": loaded.digest(),
            "layer": loaded.layer_names[0],
            "annotations": inputs.annotations,
        }
        results = Results(path, run, [measure.name for measure in measures])
        count = "batches" if inputs.number is None else counted(inputs.number)
        if inputs.samples is None and results.rows:
            raise BadValueError(
                f"{path}: expected a new file, as nothing tells the pictures of batches from those of an earlier run"
            )
        if others := {name for name, _ in results.rows} - (inputs.samples or {}).keys():
            raise BadValueError(
                f"{path}: expected results of the {count} of this run, found some of {min(others)}, which is not among "
                "them: give another file, or the limit it was written with"
            )
        logger.info(
            f"{count}, annotations: {inputs.annotations}; {loaded.description}; embedding: {loaded.last_layer.name}, "
            "pooled"
        )
        border = BorderCheck(loaded.layer_names[0])
        of_methods: list[Failure] = []

        def score(names: Sequence[str], images: Tensor, masks: Tensor) -> None:
            missing = [each for each in (*chosen, *CONTROLS) if any((name, each) not in results.rows for name in names)]
            if missing:
                these = {name: method for name, method in chosen.items() if name in missing}
                rows, failed = compare(images, masks, names, loaded, these, measures, border)
                results.append(rows)
                of_methods.extend(failed)

        batches = inputs.read(loaded, batch_size, workers)
        failures, remarks = go_through(batches, loaded, score, "scoring", number=inputs.number, shown=progress)
    failures += [failure for failure in of_methods if failure.method in given]
    for name in dict.fromkeys(failure.method for failure in of_methods if failure.method not in given):
        errors = [failure.error for failure in of_methods if failure.method == name]
        remarks.append(f"{name}, there for reference, failed on {counted(len(errors))}: {one_line(errors[0])}")
    remarks += [
        f"{row.picture}: {row.method} gave a map with NaN or Inf, so not scored"
        for row in results.rows.values()
        if math.isnan(row.values["mean_saliency"])
    ]
    return Evaluation(results, measures, failures, remarks, loaded, chosen, inputs)


def check_output(
    path: Path, *, data: Path | None = None, formats: Sequence[str] = (), header: Sequence[str] = ()
) -> None:
    """Refuse an output of the wrong kind, place, ending or header before hours of work; make its folder."""
    if formats and path.suffix.lower() not in formats:
        raise BadValueError(f"{path}: expected a file ending in {', '.join(formats)}")
    if data is not None and path.resolve().is_relative_to(data.resolve()):
        raise BadValueError(f"{path}: expected an output outside of the data, {data}")
    if re.match(r"\w{2,}:/", str(path)):
        raise BadValueError(f"{path}: expected a file of this machine, got a URL")
    if path.exists() and not path.is_file():
        raise BadFileError(f"{path}: expected a file to write, found a folder or a device")
    if header and path.exists() and not path.read_text("utf-8", "replace").startswith(",".join(header)):
        raise BadValueError(f"{path}: expected a table to write again, found something else: give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True, repr=False, eq=False)
class Evaluation:
    """The scores of each method on each picture.

    `failures` are the pictures that could not be read or scored, or on which one of the requested methods failed;
    `remarks` describe anything else that is odd.
    """

    _results: Results
    measures: list[Measure]
    failures: list[Failure]
    remarks: list[str]
    loaded: LoadedModel
    _methods: Mapping[str, Builder]
    _inputs: Inputs

    @property
    def rows(self) -> list[Row]:
        """One row for each picture and method: label-free methods, those for reference, your own, then the controls."""
        order = [*METHODS, *LABEL_DEPENDENT, *self._methods, *CONTROLS]
        return sorted(self._results.rows.values(), key=lambda row: [*order, row.method].index(row.method))

    def summary(self, *, baseline: str = BASELINE, seed: int = 0) -> dict[str, dict[str, Summary]]:
        """Return, by method and then by measure, the mean with its interval and the difference from the baseline.

        ValueError if there is no method of that name. If EigenCAM itself failed, there are no differences from it.
        """
        rows = self.rows
        check_name("method", baseline, dict.fromkeys([*(row.method for row in rows), BASELINE]))
        return summarise(rows, self.measures, baseline=baseline, seed=seed)

    def to_csv(self, path: str | Path) -> None:
        """Write the rows, as `out` does; OSError if they cannot be written."""
        self._results.to_csv(Path(path))

    def report(self, path: str | Path) -> None:
        """Draw a page of all means and, for a folder of pictures, each method's best, median and worst picture.

        Raises:
            ValueError, OSError: the path does not end in .png, .jpg, .pdf or .svg, or cannot be written; or a picture
                cannot be read any more.
        """
        check_output(Path(path), formats=FORMATS)
        summaries = self.summary()
        shown = {each.name: each for each in self.measures if any(each.name in found for found in summaries.values())}
        ranked_by = next(shown[name] for name in _RANKED_BY if name in shown)
        known = () if self._inputs.samples is None else (*self._methods, *CONTROLS)
        picked = [each for each in pick_examples(self.rows, ranked_by) if each[0] in known]
        examples = [self._example(*each) for each in picked]
        title = f"{self.loaded.name}, {self.loaded.layer_names[0]}: {counted(self.scored)}"
        write_report(Path(path), title, summaries, [*shown.values()], examples, ranked_by)

    def _example(self, method: str, picture: str, title: str) -> Example:
        samples = self._inputs.samples or {}
        view = network_view(samples[picture], self._inputs.annotations, self.loaded)
        wanted = {name: build for name, build in self._methods.items() if name == method}
        with OnePass(self.loaded, self.loaded.placed(view.network_input[None])) as one_pass:
            (saliency,) = next(maps for name, maps, _ in saliency_maps(one_pass, [picture], wanted) if name == method)
        return Example(title, self.loaded.picture(view.network_input), saliency.cpu().numpy(), view.mask.numpy())

    @property
    def run(self) -> Mapping[str, str]:
        """The values that are the same in every row: data, model, weights, layer and kind of annotations."""
        return self._results.run

    @property
    def scored(self) -> int:
        """How many pictures have rows."""
        return len({row.picture for row in self._results.rows.values()})

    def __repr__(self) -> str:
        return f"<Evaluation of {counted(self.scored)} by {', '.join(self._methods)}; {self.loaded.description}>"
