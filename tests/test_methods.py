import sys

import networks
import pytest
import torch

from tucker_cam import TSM
from tucker_cam.methods import method_named


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "gradcam",
            ValueError,
            "gradcam needs a class, and this takes label-free methods: use pytorch_grad_cam.GradCAM",
        ),
        ("tms", ValueError, "there is no method 'tms'; near it: tsm"),
        ("networks:sys", ValueError, "networks has no function or class 'sys'"),
        (":Mine", ValueError, "could not be imported"),
        ("needy:Mine", ValueError, "needy could not be imported .*not_installed"),
        (TSM, TypeError, r"expected a method's name, got .*TSM.*: give classes of your own as a dict"),
    ],
)
def test_a_method_that_there_is_not_is_one_clear_error(name, error, message, tmp_path):
    (tmp_path / "needy.py").write_text("import not_installed")
    with pytest.raises(error, match=message):
        method_named(name)


def test_a_class_of_ones_own_is_a_method_under_the_name_of_both_module_and_class(tmp_path):
    source = (
        "from tucker_cam.cams import LabelFreeCAM\n\n\nclass Mean(LabelFreeCAM):\n    def saliency(self, features):\n"
    )
    (tmp_path / "of_mine.py").write_text(f"{source}        return features.mean(1).abs()\n")
    model, method = networks.small_cnn(), method_named("of_mine:Mean")
    assert (method.name, method.title) == ("of_mine.Mean", "Mean")
    assert method(model, [model[2]])(torch.rand(2, 3, 32, 32)).shape == (2, 32, 32)
