"""Loads the backbone's weights into a model, from a checkpoint as self-supervised projects publish it.

Such a file wraps the backbone: in a dictionary next to the optimiser, in a student and a teacher, in the prefixes of
DistributedDataParallel, Lightning and the method's own class, with projection heads next to it. So the backbone is
searched for: it is where all of its names and shapes in the model's own state dict are found.
"""

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

from tucker_cam.errors import BadFileError, BadValueError, MissingPackageError
from tucker_cam.extras import install

_SHOWN = 5
# Harmless objects that checkpoints hold besides tensors: command-line arguments and NumPy's numbers.
_SCALAR = np.float64(0).__reduce__()[0]
_INERT: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
]

# When a file holds several whole backbones, the averaged one is the published one (in timm, and in DINO, where it is
# the teacher). Copies that only serve to train another backbone are not.
_AVERAGED = frozenset(["ema", "swa"])
_COPIES = frozenset(["student", "momentum", "target", "k"])

State = Mapping[str, Tensor]


class Report(NamedTuple):
    """Which entries of a checkpoint were loaded or left out, and which were missing."""

    # Where the backbone was in the file, such as state_dict/module.encoder_q.; empty for the top level.
    place: str
    # Names in the model.
    loaded: list[str]
    # Names in the file.
    left_out: list[str]
    # Names in the model that the file lacks: parts of the head.
    missing: list[str]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} entries" + (f" from {self.place}*" if self.place else "")]
        if self.left_out:
            parts.append(f"left out {_some(self.left_out)}")
        if self.missing:
            parts.append(f"missing, so random, {_some(self.missing)}")
        return "; ".join(parts)


def load_checkpoint(model: nn.Module, file: Path, backbone: Collection[str]) -> Report:
    """Load the backbone's weights, and as much of the head as the file holds.

    Args:
        model: changed in place, and only if the file holds the whole backbone.
        file: written by ``torch.save``, or by safetensors if its name ends in ``.safetensors``. No code in it is run.
        backbone: names of the modules whose weights must be in the file, see `DryRun.upstream`.

    Raises:
        OSError: the file does not exist.
        ValueError: it holds no weights, another model's, several backbones or part of one; the message lists the names.
    """
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    needed = {name for name in own if name.rpartition(".")[0] in backbone and not _is_counter(name)}
    tensors = dict(_tensors(_read(file)))
    if not tensors:
        raise BadValueError(f"{file}: expected a state dict, found no tensors with names in it")
    found: dict[str, dict[str, Tensor]] = {}
    inside: dict[str, State] = {}
    for place, renamed in _candidates(model, tensors, at_least=len(needed) // 2):
        fitting = {name: value for name, value in renamed.items() if name in own and value.shape == own[name].shape}
        fitting |= _missing_layer_scale(own, needed, fitting, renamed)
        if len(needed & fitting.keys()) > len(needed & found.get(place, {}).keys()):
            found[place], inside[place] = fitting, renamed
    places = _best(found, needed)
    fitting = found[places[0]] if places else {}
    if missing := sorted(needed - fitting.keys()):
        count = len(needed)
        some = f"{count - len(missing)} of its {count} entries; missing or of another shape: {_some(missing)}"
        found_instead = some if fitting else f"another one (entries: {len(tensors)}, needed: {count})"
        raise BadValueError(
            f"{file}: expected the whole backbone of {type(model).__name__}, found {found_instead}; the file has "
            f"{_some(sorted(tensors))}"
        )
    if len({frozenset(found[place][name].data_ptr() for name in needed) for place in places}) > 1:
        raise BadValueError(
            f"{file}: expected one backbone, found several, in {', '.join(f'{place}*' for place in places)}: save the "
            "one that you mean in a file of its own"
        )
    if deeper := _further_parts(inside[places[0]], needed, own):
        raise BadValueError(
            f"{file}: expected the backbone of {type(model).__name__}, found a deeper one, with {_some(deeper)}: "
            "take the model that the file belongs to"
        )
    model.load_state_dict(fitting, strict=False)
    taken = {value.data_ptr() for value in fitting.values()}
    return Report(
        places[0],
        loaded=list(fitting),
        left_out=[name for name, value in tensors.items() if value.data_ptr() not in taken and not _is_counter(name)],
        missing=[name for name in own if name not in fitting and not _is_counter(name)],
    )


def _best(found: Mapping[str, State], needed: Collection[str]) -> list[str]:
    """Return where the fullest backbone is: among equals the averaged one, and preferably not a copy."""
    words = {place: set(re.split(r"[^a-z0-9]+", place.lower())) for place in found}
    averaged = _AVERAGED | {"teacher"} if any("student" in each for each in words.values()) else _AVERAGED
    worth = {
        place: (len(state.keys() & needed), bool(words[place] & averaged), not words[place] & _COPIES)
        for place, state in found.items()
    }
    return [place for place in found if worth[place] == max(worth.values())]


def _further_parts(state: State, needed: Collection[str], own: State) -> list[str]:
    """Return the numbered parts in a state, such as layer3.6, that the model lacks although its backbone has others."""
    numbered = {part.rpartition(".")[0] for name in needed for part in _numbered_parts(name)}
    known = {part for name in own for part in _numbered_parts(name)}
    parts = dict.fromkeys(part for name in state for part in _numbered_parts(name))
    return [part for part in parts if part not in known and part.rpartition(".")[0] in numbered]


def _numbered_parts(name: str) -> list[str]:
    return [name[: mark.end()] for mark in re.finditer(r"\.\d+(?=\.)", name)]


def _read(file: Path) -> object:
    # Reading from a pipe could block forever.
    if not file.is_file():
        raise BadFileError(f"{file}: expected a file of weights, found none")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        with safe_globals(_INERT):
            return torch.load(file, weights_only=True, map_location="cpu")
    except ImportError as error:
        raise MissingPackageError(f"{file}: it needs the package safetensors: {install('models')}") from error
    except Exception as error:
        # Both loaders fail in many ways on a broken file.
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        what = f"an object of {foreign[1]}" if foreign else "a broken file, a web page or a pointer of Git LFS"
        raise BadValueError(
            f"{file}: expected tensors, found {what}; nothing in it was run. If you trust the file, save the weights "
            "alone: torch.save(model.state_dict(), file)"
        ) from error


def _tensors(content: object, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor in a checkpoint with its name, prefixed by the names of the dictionaries that contain it."""
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Tensor):
            if value.layout is torch.strided and not value.is_meta:
                yield f"{place}{name}", value
        # An optimiser's state repeats the parameters' shapes, and may repeat their names.
        elif not str(name).startswith("opt"):
            yield from _tensors(value, f"{place}{name}/")


def _candidates(model: nn.Module, tensors: State, *, at_least: int) -> Iterator[tuple[str, State]]:
    """Yield the entries under each prefix: with their own names, with numbered children named, and renamed by timm.

    A prefix with fewer than `at_least` entries is skipped, as it holds no backbone.
    """
    under: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        for start in (0, *(mark.end() for mark in re.finditer("[./]", name))):
            under.setdefault(name[:start], {})[name[start:]] = value
    numbered = {str(number): name for number, (name, _) in enumerate(model.named_children())}
    module = sys.modules[type(model).__module__]
    remap = getattr(module, "checkpoint_filter_fn", None) if module.__name__.startswith("timm.") else None
    for place, inside in under.items():
        if len(inside) < at_least:
            continue
        yield place, inside
        # nn.Sequential(*backbone.children()) has numbers where the backbone had names.
        named = {
            re.sub(r"^\d+", lambda number: numbered.get(number[0], number[0]), name): value
            for name, value in inside.items()
        }
        yield place, named
        if remap is not None:
            try:
                renamed = remap(dict(inside), model)
            except Exception:  # noqa: S112 - timm's code, on weights that may belong to any model
                continue
            # New names are accepted, new values are not: timm would also resize the weights of another patch size.
            same = {value.data_ptr() for value in inside.values()}
            yield place, {name: value for name, value in renamed.items() if value.data_ptr() in same}


def _missing_layer_scale(own: State, needed: Collection[str], fitting: State, state: State) -> State:
    """Return ones for a ConvNeXt's layer scale if the file lacks only that and has no more: VICRegL trains without."""
    scales = {name for name in needed if name.endswith(".gamma")}
    if needed - fitting.keys() == scales and state.keys() <= fitting.keys():
        return {name: torch.ones_like(own[name]) for name in scales}
    return {}


def _is_counter(name: str) -> bool:
    """Return whether this is batch normalisation's batch count, which old checkpoints lack and nothing reads."""
    return name.endswith("num_batches_tracked")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
