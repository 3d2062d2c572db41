"""What is imported when, seen from new processes: PyTorch and the host take seconds, and many names need neither."""

import os
import subprocess
import sys

import pytest

import tucker_cam

LISTING = "\nimport sys; print('imported:', *{name.partition('.')[0] for name in sys.modules})"
ENVIRONMENT = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}


def imported_by(program):
    """Return the packages that a program has imported when it ends."""
    ended = subprocess.run([sys.executable, "-c", program + LISTING], check=True, capture_output=True, text=True)
    return set(ended.stdout.rpartition("imported:")[2].split())


def test_the_package_alone_imports_nothing():
    assert imported_by("import tucker_cam; dir(tucker_cam)").isdisjoint({"torch", "numpy", "pytorch_grad_cam"})


def test_the_mathematics_does_not_import_the_host():
    packages = imported_by("from tucker_cam import channel_modes")
    assert "torch" in packages
    assert packages.isdisjoint({"pytorch_grad_cam", "torchvision", "cv2", "sklearn"})


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "explain"),
        (["--version"], 0, f"tucker-cam {tucker_cam.__version__}\n"),
        (["explain", "--help"], 0, "multivec-eigencam"),
        (["evaluate", "--help"], 0, "localisation"),
        (["explian"], 2, "explian"),
        (["explain", "cat.jpg", "--metod", "tsm"], 2, "--metod"),
        (["explain", "cat.jpg", "--method", "tms"], 2, "near it: tsm"),
        (["evaluate", "pictures", "--metric", "drops"], 2, "near it: drop"),
    ],
)
def test_help_and_mistyped_names_are_answered_without_pytorch_and_numpy(arguments, code, said):
    program = f"import sys; from tucker_cam.cli import app\ntry:\n    app({arguments!r})\n"
    program += "except SystemExit as error:\n    print('code:', error.code)"
    ended = subprocess.run(
        [sys.executable, "-c", f"{program}{LISTING}"], check=True, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert f"code: {code}" in ended.stdout
    assert said in ended.stdout + ended.stderr
    packages = set(ended.stdout.rpartition("imported:")[2].split())
    assert packages.isdisjoint({"torch", "numpy", "PIL", "pytorch_grad_cam", "matplotlib"})


def test_each_public_name_is_found_in_a_new_process():
    assert "torch" in imported_by("import tucker_cam; assert all(getattr(tucker_cam, n) for n in tucker_cam.__all__)")


def test_where_a_package_of_an_extra_is_missing_its_install_command_is_said():
    program = "import sys; sys.modules['skimage'] = None; from tucker_cam import evaluate"
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert "evaluate needs the package skimage: pip install '.[evaluation]'" in ended.stderr.splitlines()[-1]


def test_a_name_that_there_is_not_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'ECAM'"):
        tucker_cam.ECAM  # noqa: B018
