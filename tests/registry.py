"""Every method of this project, found by its record, beside its slow oracle, and features to compare them on.

All tests of methods take theirs here.
"""

from functools import partial

import pytest
import references
import torch

from tucker_cam.methods import METHODS

OURS = {name: method for name, method in METHODS.items() if method.module.startswith("tucker_cam.")}
ORACLES = {name: references.ORACLES[name] for name in OURS}
# The classes, and the oracle of each with its options left as they are.
CLASSES = {OURS[name].cam_class: ORACLES[name] for name in reversed(OURS)}
# The same with options that take other paths through the mathematics.
VARIANTS = {
    "multivec-eigencam, energy": (
        partial(OURS["multivec-eigencam"], combine="energy"),
        partial(references.multivec_eigencam, combine="energy"),
    ),
    "tsm, truncated": (partial(OURS["tsm"], rank=2), partial(references.tensorly_tsm, rank=(2, 2, 2))),
    "mtsm, truncated": (partial(OURS["mtsm"], rank=2), partial(references.tensorly_mtsm, rank=(2, 2, 2))),
}
CASES = {name: (OURS[name], ORACLES[name]) for name in OURS} | VARIANTS

every_method = pytest.mark.parametrize("method", [method for method, _ in CASES.values()], ids=CASES)
every_method_and_its_oracle = pytest.mark.parametrize(("method", "oracle"), CASES.values(), ids=CASES)
every_class = pytest.mark.parametrize("method", CLASSES)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def rectified(shape, dtype=torch.float32, batch=3):
    """Return features as after a ReLU: not negative, so that their mean stands out, as in a network."""
    return torch.relu(torch.randn(batch, *shape) + 0.3).to(dtype)
