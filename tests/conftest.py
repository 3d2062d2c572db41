"""Every test is seeded and runs offline; the package is imported with its shape annotations checked."""

import os
import typing
from importlib.metadata import version

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported

import pytest
import pytorch_grad_cam  # noqa: F401 - imported, like all below, before TYPE_CHECKING is set
import shape_checks  # noqa: F401
import tensorly.decomposition  # noqa: F401
import torch
from jaxtyping import install_import_hook
from threadpoolctl import threadpool_limits

import tucker_cam

# jaxtyping is imported by the package for type checkers only, so that users need not have it.
typing.TYPE_CHECKING = True
try:
    with install_import_hook(
        [f"tucker_cam.decomposition.{name}" for name in ("rank", "gram", "leading", "hooi", "modes", "projection")],
        "shape_checks.check",
    ):
        import tucker_cam.decomposition.projection  # noqa: F401
finally:
    typing.TYPE_CHECKING = False


# Two threads are slower than one wherever the other core is busy: for torch below, and for NumPy's BLAS here.
threadpool_limits(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def pytest_report_header():
    return "with " + ", ".join(f"{name} {version(name)}" for name in ("grad-cam", "tensorly", "torch", "numpy"))


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
