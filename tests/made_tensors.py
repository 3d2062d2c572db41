"""The sizes of all tensors that some work makes on its way."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.sizes.extend(part.numel() for part in tree_leaves(result) if isinstance(part, torch.Tensor))
        return result


def sizes_made_by(work: Callable[[], object]) -> list[int]:
    """Return how many numbers each tensor holds that an operation of the work returned."""
    with _Watch() as watch:
        work()
    return watch.sizes
