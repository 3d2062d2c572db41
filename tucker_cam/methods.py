"""Turns a method's name into the class that computes it; every list of methods is made from the records here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from tucker_cam.errors import BadTypeError, BadValueError
from tucker_cam.own_code import from_own_module

if TYPE_CHECKING:
    from pytorch_grad_cam.base_cam import BaseCAM

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Method:
    """A saliency method. Call it as you would call its class, and it returns the CAM object.

    Attributes:
        name: the name that users type, and that is written into files and rows.
        title: the name in figures.
        module: the module of the class. It is imported on first use, as importing the host takes seconds.
        kind: the name of the class.
        options: what the class is given besides the model and its layers.
        label_free: whether it shows where the features are strong, and not what speaks for a class.
    """

    name: str
    title: str
    module: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    label_free: bool = True

    @property
    def cam_class(self) -> type[BaseCAM]:
        """The class itself."""
        found: type[BaseCAM] = getattr(import_module(self.module), self.kind)
        return found

    def __call__(self, *arguments: Any, **options: Any) -> BaseCAM:
        return self.cam_class(*arguments, **self.options, **options)

    @property
    def is_there(self) -> bool:
        """Whether the installed version of the host has the class."""
        return hasattr(import_module(self.module), self.kind)


_ALL = (
    Method("eigencam", "EigenCAM", "pytorch_grad_cam", "EigenCAM"),
    Method("tsm", "TSM", "tucker_cam.cams", "TSM"),
    Method("mtsm", "MTSM", "tucker_cam.cams", "MTSM"),
    Method("mtsm-energy", "MTSM, energy", "tucker_cam.cams", "MTSM", {"combine": "energy"}),
    Method("multivec-eigencam", "Multivec-EigenCAM", "tucker_cam.cams", "MultivecEigenCAM"),
    Method("lafam", "LaFAM", "tucker_cam.cams", "LaFAM"),
    Method("gap-weighted", "GAP-weighted", "tucker_cam.cams", "GAPWeighted"),
    Method("kpca-cam", "KPCA-CAM", "pytorch_grad_cam", "KPCA_CAM"),
    Method("fem", "FEM", "pytorch_grad_cam", "FEM"),
    Method("gradcam", "GradCAM", "pytorch_grad_cam", "GradCAM", label_free=False),
    Method("seg-eigencam", "Seg-EigenCAM", "pytorch_grad_cam", "SegEigenCAM", label_free=False),
)
METHODS = {method.name: method for method in _ALL if method.label_free}
"""The label-free methods."""
LABEL_DEPENDENT = {method.name: method for method in _ALL if not method.label_free}
"""For reference: methods that show the evidence for a class, here the predicted one."""


def methods_named(
    methods: str | Iterable[str] | Mapping[str, Callable[..., BaseCAM]],
) -> dict[str, Callable[..., BaseCAM]]:
    """Return methods by name: those that are named, see `method_named`, or user-defined classes as they are given.

    Raises:
        TypeError, ValueError: a named method does not exist, or what is given as a class is not one.
    """
    named = [methods] if isinstance(methods, str) else methods
    if not isinstance(named, Iterable):
        raise BadTypeError(f"expected methods as names, or as a dict of your own classes by name, got {methods!r}")
    if not isinstance(named, Mapping):
        return {each.name: each for each in map(method_named, named)}
    for name, kind in named.items():
        _check_class(name, kind)
    return dict(named)


def method_named(name: str) -> Method:
    """Return the label-free method of this name, or one for your own class MODULE:CLASS, under the name MODULE.CLASS.

    Raises:
        TypeError, ValueError: it does not exist; the message holds the nearest, or says what is wrong with the module.
    """
    if not isinstance(name, str):
        raise BadTypeError(f"expected a method's name, got {name!r}: give classes of your own as a dict, by name")
    module, colon, kind = name.partition(":")
    if name in LABEL_DEPENDENT:
        known = LABEL_DEPENDENT[name]
        raise BadValueError(f"{name} needs a class, and this takes label-free methods: use {known.module}.{known.kind}")
    if not colon:
        return METHODS[check_name("method", name, METHODS)]
    _check_class(name, from_own_module(name))
    return Method(f"{module}.{kind}", kind, module, kind)


def _check_class(name: str, kind: object) -> None:
    """Raise TypeError unless `name` is a string and `kind` a class of CAM objects or a function that makes them."""
    if not isinstance(name, str):
        raise BadTypeError(f"expected a method's name, got {name!r}")
    if not callable(kind) or (isinstance(kind, type) and not hasattr(kind, "get_cam_image")):
        raise BadTypeError(f"{name}: expected a subclass of the host's BaseCAM or of LabelFreeCAM, got {kind!r}")


def name_in_files(method: str) -> str:
    """Return a method's name as it is used in file names: without ``_``, which separates it from the picture's name."""
    return method.replace("_", "-")


def check_own_names(methods: Mapping[str, Callable[..., BaseCAM]], reserved: Collection[str] = ()) -> None:
    """Raise ValueError if a user's method has another one's name: its files or rows would be taken for the other's."""
    known = {**METHODS, **LABEL_DEPENDENT}
    taken = {*known, *reserved}
    for name, build in methods.items():
        ours = known.get(name)
        same = ours is not None and (build == ours or (not ours.options and build is ours.cam_class))
        if name_in_files(name) in taken and not same:
            raise BadValueError(f"expected names of your own for methods of your own, got {name} (_ counts as -)")
        taken.add(name_in_files(name))


def check_name(kind: str, name: str, known: Collection[Name]) -> Name:
    """Return the known name that equals `name`; if there is none, raise a ValueError with the nearest names."""
    if not isinstance(name, str):
        raise BadTypeError(f"expected a {kind}'s name, got {name!r}")
    for each in known:
        if each == name:
            return each
    near: list[str] = get_close_matches(name.lower().replace("_", "-"), known, n=2, cutoff=0.3) or list(known)
    raise BadValueError(f"there is no {kind} {name!r}; near it: {', '.join(near)}")
