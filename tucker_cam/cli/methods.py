"""A method's name on the command line in, the class that computes it out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from difflib import get_close_matches
from functools import partial
from typing import TypeVar

import pytorch_grad_cam
from pytorch_grad_cam import FEM, KPCA_CAM, EigenCAM, GradCAM
from pytorch_grad_cam.base_cam import BaseCAM

from tucker_cam import MTSM, TSM, MultivecEigenCAM

Name = TypeVar("Name", bound=str)

METHODS: dict[str, Callable[..., BaseCAM]] = {
    "eigencam": EigenCAM,
    "tsm": TSM,
    "mtsm": MTSM,
    "mtsm-energy": partial(MTSM, combine="energy"),
    "multivec-eigencam": MultivecEigenCAM,
    "kpca-cam": KPCA_CAM,
    "fem": FEM,
}
"""The label-free methods, which say where the features are strong."""

LABEL_DEPENDENT: dict[str, Callable[..., BaseCAM]] = {"gradcam": GradCAM}
"""For reference: methods that ask for the evidence of a class, here the predicted one."""
# Newer versions of the host have it.
if hasattr(pytorch_grad_cam, "SegEigenCAM"):
    LABEL_DEPENDENT["seg-eigencam"] = pytorch_grad_cam.SegEigenCAM


def method_named(name: str) -> Callable[..., BaseCAM]:
    """Return the label-free method of this name.

    Raises:
        ValueError: there is none; the message holds the nearest names.
    """
    return METHODS[check_name("method", name, METHODS)]


def check_name(kind: str, name: str, known: Collection[Name]) -> Name:
    """Return the known name that was meant.

    Raises:
        ValueError: it is not; the message holds the nearest names.
    """
    for each in known:
        if each == name:
            return each
    near: list[str] = get_close_matches(name.lower().replace("_", "-"), known, n=2, cutoff=0.3) or list(known)
    raise ValueError(f"there is no {kind} {name!r}; near it: {', '.join(near)}")
