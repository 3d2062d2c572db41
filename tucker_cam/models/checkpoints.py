"""A checkpoint as self-supervised projects publish it in, its backbone's weights in the model out.

Such a file wraps the backbone: in a dictionary beside the optimiser, in a student and a teacher, in the prefixes of
DistributedDataParallel, Lightning and the method's own class, with projection heads beside it. So the backbone is
looked for: it is where the names and shapes of the model's own state dict are found whole.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from tucker_cam.errors import BadFileError, BadValueError

_DEEPEST_PREFIX = 6
_SHOWN = 8
# What checkpoints hold beside tensors and is inert: the command line's arguments, NumPy's numbers.
_INERT: list[Any] = [
    argparse.Namespace,
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]

# Of several whole backbones the averaged one is published, by timm, and by DINO whose teacher it is; a copy that
# another one is trained against is not.
_AVERAGED = frozenset(["ema", "swa"])
_COPIES = frozenset(["student", "momentum", "target", "k"])
# Words for what repeats the names and shapes of parameters, and is none.
_SHADOWS = frozenset(["adam", "buffer", "exp", "grad", "grads", "opt", "optim", "optimizer", "optimizers"])

State = Mapping[str, Tensor]


class Report(NamedTuple):
    """What became of a checkpoint.

    Attributes:
        place: where in the file the backbone was, such as ``state_dict/module.encoder_q.``; empty for the top.
        loaded: names in the model.
        left_out: names in the file.
        missing: names in the model that the file has not: parts of the head.
    """

    place: str
    loaded: list[str]
    left_out: list[str]
    missing: list[str]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} entries" + (f" from {self.place}*" if self.place else "")]
        if self.left_out:
            parts.append(f"left out {_some(self.left_out, 3)}")
        if self.missing:
            parts.append(f"missing, so random, {_some(self.missing, 3)}")
        return "; ".join(parts)


def load_checkpoint(model: nn.Module, file: Path, backbone: Collection[str]) -> Report:
    """Load the backbone's weights, and as much of the head as is there.

    Args:
        model: changed in place, and only if the whole backbone is found.
        file: of ``torch.save`` or, named ``.safetensors``, of safetensors. Only tensors, numbers and text are read
            from it; no code in it is run.
        backbone: names of the modules whose weights must be there, see `DryRun.upstream`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no weights, others, or less than the whole backbone; the message lists the names.
    """
    own = model.state_dict()
    needed = {name for name in own if name.rpartition(".")[0] in backbone and not _is_counter(name)}
    states = list(_states(_read(file)))
    if not states:
        raise BadValueError(f"{file}: expected a state dict, found no tensors with names in it")
    found: dict[str, dict[str, Tensor]] = {}
    for container, state in states:
        for prefix, renamed in _candidates(model, state, at_least=len(needed) // 2):
            fitting = {name: value for name, value in renamed.items() if name in own and _fits(value, own[name])}
            _without_layer_scale(own, needed, fitting, renamed)
            place = container + prefix
            if len(needed & fitting.keys()) > len(needed & found.get(place, {}).keys()):
                found[place] = fitting
    place, fitting = _best(file, found, needed)
    if missing := sorted(needed - fitting.keys()):
        raise BadValueError(
            f"{file}: expected the whole backbone of {type(model).__name__}, found "
            f"{len(needed) - len(missing)} of its {len(needed)} entries; missing or of another shape: "
            f"{_some(missing, _SHOWN)}; the file has {_some(sorted(states[0][1]), _SHOWN)}"
        )
    if broken := sorted(name for name in needed if not fitting[name].isfinite().all()):
        raise BadValueError(f"{file}: expected finite weights, found NaN or Inf in {_some(broken, _SHOWN)}")
    model.load_state_dict(fitting, strict=False)
    taken = {value.data_ptr() for value in fitting.values()}
    return Report(
        place,
        loaded=list(fitting),
        left_out=[
            f"{container}{name}"
            for container, state in states
            for name, value in state.items()
            if value.data_ptr() not in taken and not _is_counter(name)
        ],
        missing=[name for name in own if name not in fitting and not _is_counter(name)],
    )


def _best(file: Path, found: Mapping[str, dict[str, Tensor]], needed: Collection[str]) -> tuple[str, dict[str, Tensor]]:
    """Return the fullest of what was found; of several whole backbones the one that is published."""
    most = max((len(needed & fitting.keys()) for fitting in found.values()), default=0)
    fullest = {place: fitting for place, fitting in found.items() if len(needed & fitting.keys()) == most}
    if most < len(needed):
        return next(iter(fullest.items()), ("", {}))
    words = {place: _words(place) for place in fullest}
    averaged = _AVERAGED | {"teacher"} if any("student" in each for each in words.values()) else _AVERAGED
    ranks = {place: 0 if each & averaged else 2 if each & _COPIES else 1 for place, each in words.items()}
    chosen = [place for place, rank in ranks.items() if rank == min(ranks.values())]
    if len({frozenset(fullest[place][name].data_ptr() for name in needed) for place in chosen}) > 1:
        raise BadValueError(
            f"{file}: expected one backbone, found several, in {', '.join(f'{place}*' for place in chosen)}: save the "
            "one that is meant by itself"
        )
    return chosen[0], fullest[chosen[0]]


def _read(file: Path) -> object:
    if file.exists() and not file.is_file():
        # Reading a pipe could wait for ever.
        raise BadFileError(f"{file}: expected a file of weights, found a folder, a pipe or a device")
    try:
        with file.open("rb") as opened:
            start = opened.read(256).lstrip()
    except OSError as error:
        raise BadFileError(f"{file}: expected a file of weights, found none that can be read ({error})") from error
    if start.startswith((b"<!", b"<html", b"<HTML", b"<?xml")):
        raise BadValueError(f"{file}: expected weights, found a web page: the download went wrong")
    if start.startswith(b"version https://git-lfs"):
        raise BadValueError(f"{file}: expected weights, found a pointer of Git LFS: git lfs pull fetches them")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        with safe_globals(_INERT):
            return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:
        # A broken file makes both fail in many ways.
        foreign = str(error).partition("Unsupported global: GLOBAL ")[2].split(" ")[0]
        what = f"an object of {foreign}" if foreign else "something else, or a broken file"
        raise BadValueError(
            f"{file}: expected tensors, found {what}; nothing in it was run. If you trust the file, save the weights "
            "by themselves: torch.save(model.state_dict(), file)"
        ) from error


def _states(content: object, place: str = "") -> Iterator[tuple[str, State]]:
    """Yield every dictionary of named tensors in a checkpoint, and where it is."""
    if not isinstance(content, Mapping):
        return
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and _is_plain(value)}
    if tensors:
        yield place, tensors
    for name, value in content.items():
        # These repeat the parameters' names and shapes.
        if isinstance(value, Mapping) and not _words(str(name)) & _SHADOWS:
            yield from _states(value, f"{place}{name}/")


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested and not value.is_meta


def _candidates(model: nn.Module, state: State, *, at_least: int) -> Iterator[tuple[str, State]]:
    """Yield what lies under each prefix, as it is, in the names timm gives it, and with numbered children named.

    Where there are fewer than `at_least` entries there is no backbone.
    """
    under: dict[str, dict[str, Tensor]] = {"": dict(state)}
    for name, value in state.items():
        prefix, rest = "", name
        while "." in rest and prefix.count(".") < _DEEPEST_PREFIX:
            part, dot, rest = rest.partition(".")
            prefix += part + dot
            under.setdefault(prefix, {})[rest] = value
    children = [name for name, _ in model.named_children()]
    module = sys.modules[type(model).__module__]
    remap = getattr(module, "checkpoint_filter_fn", None) if module.__name__.startswith("timm.") else None
    for prefix, inside in under.items():
        if len(inside) < at_least:
            continue
        yield prefix, inside
        # nn.Sequential(*backbone.children()) has numbers where the backbone had names.
        yield prefix, {_named(name, children): value for name, value in inside.items()}
        if remap is not None:
            try:
                renamed = remap(dict(inside), model)
            except Exception:  # noqa: S112 - timm's, on weights that may be of anything
                continue
            # New names are taken, new numbers are not: it would also resize the weights of another patch size.
            same = {value.data_ptr() for value in inside.values()}
            yield prefix, {name: value for name, value in renamed.items() if value.data_ptr() in same}


def _named(name: str, children: list[str]) -> str:
    number, dot, rest = name.partition(".")
    if number.isdecimal() and int(number) < len(children):
        return f"{children[int(number)]}{dot}{rest}"
    return name


def _without_layer_scale(own: State, needed: Collection[str], fitting: dict[str, Tensor], state: State) -> None:
    """Put ones where a ConvNeXt's layer scale is and the file has none at all: VICRegL trains without it."""
    scales = {name for name in needed if name.rpartition(".")[2] in ("gamma", "layer_scale", "layer_scale_parameter")}
    # A file that has anything else may have it under another name.
    if needed - fitting.keys() == scales and state.keys() <= fitting.keys():
        fitting.update({name: torch.ones_like(own[name]) for name in scales})


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def _fits(value: Tensor, own: Tensor) -> bool:
    return value.shape == own.shape and value.is_floating_point() == own.is_floating_point()


def _is_counter(name: str) -> bool:
    """Tell whether this is batch normalisation's count of batches, which old checkpoints lack and nothing reads."""
    return name.endswith("num_batches_tracked")


def _some(names: list[str], count: int) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
