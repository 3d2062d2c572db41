"""Reads batches of items, such as pictures, in processes that work ahead of the network."""

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tucker_cam.errors import BadFileError, BadValueError

Item = TypeVar("Item")
Key = TypeVar("Key")
Read = TypeVar("Read")
Result = TypeVar("Result")
_MOST_WORKERS = 8
logger = logging.getLogger("tucker_cam")


def check_reading(batch_size: int, workers: int | None) -> None:
    """Raise ValueError unless `batch_size` is a whole number above 0, and `workers` is None or one of at least 0."""
    if not (isinstance(batch_size, Integral) and batch_size > 0):
        raise BadValueError(f"expected a batch_size of at least 1, got {batch_size}")
    if workers is not None and not (isinstance(workers, Integral) and workers >= 0):
        raise BadValueError(f"expected workers of at least 0, got {workers}")


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Cut the items into batches, the same ones in every run, so that no result depends on where a run was stopped."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def of_one_size(inputs: Mapping[Key, Tensor]) -> list[dict[Key, Tensor]]:
    """Split a batch by the inputs' shapes: only inputs of one shape can go through a network together."""
    by_size: dict[torch.Size, dict[Key, Tensor]] = {}
    for key, each in inputs.items():
        by_size.setdefault(each.shape, {})[key] = each
    return [*by_size.values()]


def together_or_alone(
    work: Callable[[list[Item]], Iterable[Result]], items: list[Item], *, through: tuple[type[Exception], ...] = ()
) -> list[Result | Exception]:
    """Do the work on all items together or, if that fails, on each alone; return each result or error in its place.

    One bad picture, or a batch too large for memory, costs no other its result. Errors in `through` are always raised.
    """
    try:
        return [*work(items)]
    except through:
        raise
    except Exception as error:
        if len(items) == 1:
            return [error]
    return [result for item in items for result in together_or_alone(work, [item], through=through)]


def _can_be_sent(read: object) -> bool:
    try:
        ForkingPickler.dumps(read)
    except Exception:
        # A lambda raises one kind of error, an object of a closure another, and a user-defined class any.
        return False
    return True


def read_ahead(
    batches: Sequence[Sequence[Item]], read: Callable[[Sequence[Item]], Read], workers: int | None
) -> Iterator[Read]:
    """Yield what `workers` processes read from each batch; OSError if a process was killed.

    None means one process fewer than there are cores, from 1 to 8, and no extra process for a single batch.
    """
    if workers is None:
        workers = 0 if len(batches) < 2 else min(max(cores() - 1, 1), _MOST_WORKERS)
    if workers and multiprocessing.get_start_method() != "fork" and not _can_be_sent(read):
        logger.warning(
            "note: the preprocessing cannot be pickled, so this process reads the pictures itself: workers=0"
        )
        workers = 0
    try:
        # Any sequence can be a data set, and the function that is meant to collate its items can also read them.
        dataset: Any = batches
        # With its own generator, the loader draws nothing from the caller's.
        own = torch.Generator("cpu")
        with torch.device("cpu"):  # the generator's device, also if the caller's default is another one
            found = iter(DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=read, generator=own))
        yield from found
    except RuntimeError as error:
        # An error that the reader itself raises also names its process, but not by its pid.
        if "DataLoader worker (pid" not in str(error):
            raise
        raise BadFileError("a process that read pictures was killed, perhaps for lack of memory: workers=0") from error
