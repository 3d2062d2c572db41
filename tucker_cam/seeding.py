"""Makes code that draws from PyTorch's global generator draw the same numbers every time."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock

import torch

_ONE_AT_A_TIME = RLock()


@contextmanager
def seeded(*, alone: bool = True) -> Iterator[None]:
    """Seed the global generator, which all threads share, for this block, and restore it at the end.

    Only one thread at a time runs such a block. Pass ``alone=False`` for code that waits in it for other threads.
    """
    with _ONE_AT_A_TIME if alone else nullcontext(), torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        yield
