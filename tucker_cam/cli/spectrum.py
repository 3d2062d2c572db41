"""A folder of pictures and a model in, box plots and a CSV of the features' singular values out."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tucker_cam.cli.evaluate import check_outputs, check_readable, subject_of
from tucker_cam.cli.lines import say
from tucker_cam.errors import BadValueError
from tucker_cam.evaluation.spectrum import DECOMPOSITIONS, draw_spectrum, rows_of_spectrum, spectrum
from tucker_cam.models import LoadedModel
from tucker_cam.pictures.annotations import find_samples, network_view
from tucker_cam.progress import progress
from tucker_cam.text import counted, one_line
from tucker_cam.writing import complete_or_absent

_VALUES = 10
_HEADER = ("picture", "decomposition", "index", "share")


def write_spectrum(
    data: Path,
    *,
    load: Callable[[], LoadedModel],
    limit: int | None,
    out: Path,
) -> list[str]:
    """Write the share of the first ten values as box plots to `out`, and as CSV beside it.

    Returns:
        One line for each picture that was skipped; all others are done.

    Raises:
        ValueError, ModuleNotFoundError, OSError: as for `evaluate_folder`.
    """
    if out.suffix.lower() != ".png":
        raise BadValueError(f"{out}: expected a file ending in .png")
    table = out.with_suffix(".csv")
    check_outputs(data, [out, table])
    if table.exists() and not table.read_text(encoding="utf-8", errors="replace").startswith(",".join(_HEADER)):
        raise BadValueError(f"{table}: expected a spectrum to overwrite, found something else: give another --out")
    samples = find_samples(data, limit=limit).samples
    loaded = load()
    subject = subject_of(loaded)
    check_readable(samples, loaded)
    layer_name = loaded.layer_names[0]
    skipped, names, parts = [], [], []
    with progress("decomposing", len(samples)) as advance:
        for sample in samples:
            try:
                image = network_view(sample, "none", loaded).network_input[None].to(loaded.device)
            except (OSError, ValueError) as error:
                skipped.append(str(error))
            else:
                try:
                    parts.append(spectrum(loaded.model, subject.layer, image, _VALUES, subject.reshape_transform))
                    names.append(sample.name)
                except Exception as error:
                    # Networks fail in their own ways on some pictures.
                    skipped.append(f"{sample.picture}: {one_line(error)}")
            advance(1)
    if not parts:
        raise BadValueError(f"found {counted(len(samples))}, and none could be decomposed: {skipped[0]}")
    shares = {name: np.concatenate([part[name] for part in parts]) for name in DECOMPOSITIONS}
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_spectrum(out, f"{loaded.name}, {layer_name}, {counted(len(names))}", shares)
    with (
        complete_or_absent(table) as unfinished,
        unfinished.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_HEADER)
        writer.writerows(rows_of_spectrum(names, shares))
    for name, share in shares.items():
        if np.isnan(share[:, 0]).all():
            raise BadValueError(f"expected features of {layer_name} with singular values, found only zeros")
        low, middle, high = np.nanpercentile(share[:, 0], [25, 50, 75])
        say(f"{name}: the first value holds {middle:.3f} of the sum [quartiles {low:.3f}, {high:.3f}]")
    say(f"plot: {out}\nnumbers: {table}")
    return skipped
