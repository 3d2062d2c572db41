"""What is imported when, seen from new processes: PyTorch and the host take seconds, and many names need neither."""

import subprocess
import sys

import pytest

import tucker_cam


def imported_by(program):
    """Return the packages that a program has imported when it ends."""
    listing = "\nimport sys; print('imported:', *{name.partition('.')[0] for name in sys.modules})"
    ended = subprocess.run([sys.executable, "-c", program + listing], check=True, capture_output=True, text=True)
    return set(ended.stdout.rpartition("imported:")[2].split())


def test_the_package_alone_imports_nothing():
    assert imported_by("import tucker_cam; dir(tucker_cam)").isdisjoint({"torch", "numpy", "pytorch_grad_cam"})


def test_the_mathematics_does_not_import_the_host():
    packages = imported_by("from tucker_cam import channel_modes")
    assert "torch" in packages
    assert packages.isdisjoint({"pytorch_grad_cam", "torchvision", "cv2", "sklearn"})


@pytest.mark.parametrize("name", tucker_cam.__all__)
def test_each_public_name_is_found_in_a_new_process(name):
    assert "torch" in imported_by(
        f"from tucker_cam import {name}; import tucker_cam; assert '{name}' in dir(tucker_cam)"
    )


def test_a_name_that_there_is_not_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'ECAM'"):
        tucker_cam.ECAM  # noqa: B018
