"""Code that draws from PyTorch's global generator in, the same numbers every time out."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock

import torch

_ONE_AT_A_TIME = RLock()


@contextmanager
def seeded(*, alone: bool = True) -> Iterator[None]:
    """Seed the generator, which all threads share, in this block, and put it back at its end.

    One thread at a time is in such a block, unless it need not be `alone`: what waits in it for other threads.
    """
    with _ONE_AT_A_TIME if alone else nullcontext(), torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        yield
