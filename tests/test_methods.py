import pytest

from tucker_cam import TSM
from tucker_cam.methods import method_named


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gradcam", ValueError, "gradcam needs a class, .*: use pytorch_grad_cam.GradCAM"),
        ("tms", ValueError, "there is no method 'tms'; near it: tsm"),
        ("networks:sys", ValueError, "networks has no function or class 'sys'"),
        (TSM, TypeError, r"expected a method's name, got .*TSM.*: give classes of your own as a dict"),
    ],
)
def test_a_method_that_there_is_not_is_one_clear_error(name, error, message):
    with pytest.raises(error, match=message):
        method_named(name)
