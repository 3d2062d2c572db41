"""A name in, a method out: of the list, or a class of the user's own."""

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
    ("name", "message"),
    [
        ("gradcam", "gradcam needs a class, and this takes label-free methods: use pytorch_grad_cam.GradCAM"),
        ("tms", "there is no method 'tms'; near it: tsm"),
        ("not_there:Mine", "no module 'not_there'"),
        ("networks:NotThere", "networks has no function or class 'NotThere'"),
        ("networks:sys", "networks has no function or class 'sys'"),
        (":Mine", "could not be imported"),
        ("broken:Mine", r"broken could not be imported \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_a_method_that_there_is_not_is_one_clear_error(name, message, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ValueError, match=message):
        method_named(name)


def test_a_class_in_the_place_of_a_name_is_one_clear_error():
    with pytest.raises(TypeError, match=r"expected a method's name, got .*TSM.*: give classes of your own as a dict"):
        method_named(TSM)


def test_a_package_that_a_module_of_ones_own_needs_is_named(tmp_path):
    (tmp_path / "needy.py").write_text("import not_installed")
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        method_named("needy:Mine")


def test_a_class_of_ones_own_is_a_method_under_the_name_of_both_module_and_class(tmp_path):
    source = (
        "from tucker_cam.cams import LabelFreeCAM\n\n\nclass Mean(LabelFreeCAM):\n    def saliency(self, features):\n"
    )
    (tmp_path / "of_mine.py").write_text(f"{source}        return features.mean(1).abs()\n")
    model, method = networks.small_cnn(), method_named("of_mine:Mean")
    assert (method.name, method.title) == ("of_mine.Mean", "Mean")
    assert method(model, [model[2]])(torch.rand(2, 3, 32, 32)).shape == (2, 32, 32)
