"""`tucker-cam spectrum`: writes how much the first singular values hold, as box plots and a CSV."""

from pathlib import Path
from typing import Any

import numpy as np

from tucker_cam.errors import Failure
from tucker_cam.evaluation.evaluate import check_output
from tucker_cam.evaluation.spectrum import HEADER, spectrum
from tucker_cam.text import say


def write_spectrum(data: Path, model: str, out: Path, **options: Any) -> list[Failure]:
    """Write the box plots and the CSV, and return the failures; see `spectrum`."""
    table = out.with_suffix(".csv")
    check_output(out, data=data, formats=(".png",))
    check_output(table, header=HEADER)
    found = spectrum(data, model, **options)
    found.plot(out)
    found.to_csv(table)
    for name, share in found.shares.items():
        low, middle, high = np.nanpercentile(share[:, 0], [25, 50, 75])
        say(f"{name}: the first value holds {middle:.3f} of the sum [quartiles {low:.3f}, {high:.3f}]")
    say(f"plot: {out}\nnumbers: {table}")
    return found.failures
