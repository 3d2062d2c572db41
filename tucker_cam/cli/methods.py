"""A method's name on the command line in, the class that computes it out."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from pytorch_grad_cam import EigenCAM
from pytorch_grad_cam.base_cam import BaseCAM

from tucker_cam import MTSM, TSM, MultivecEigenCAM

METHODS: dict[str, Callable[..., BaseCAM]] = {
    "eigencam": EigenCAM,
    "tsm": TSM,
    "multivec-eigencam": MultivecEigenCAM,
    "mtsm": MTSM,
    "mtsm-energy": partial(MTSM, combine="energy"),
}


def method_named(name: str) -> Callable[..., BaseCAM]:
    """Return the method of this name.

    Raises:
        ValueError: there is none; the message holds the nearest names.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=2, cutoff=0.3) or list(METHODS)
        raise ValueError(f"there is no method {name!r}; near it: {', '.join(near)}")
    return METHODS[name]
