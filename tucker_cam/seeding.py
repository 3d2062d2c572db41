"""Code that draws from PyTorch's global generator in, the same numbers every time out; what others draw stays."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch

_ONE_AT_A_TIME = RLock()


@contextmanager
def seeded() -> Iterator[None]:
    """Seed the generator, which all threads share, in this block, and put it back at its end."""
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        yield
