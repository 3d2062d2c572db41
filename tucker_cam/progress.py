"""Shows how many pictures are done, how fast, and how long the rest will take: as a bar, or lines if nobody watches."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

_SECONDS_BETWEEN_LINES = 30
_LINE = "{desc}: {n_fmt} of {total_fmt}, {rate_noinv_fmt}, time left {remaining}\n"


@contextmanager
def progress(title: str, total: int | None, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of pictures done since the last call; `total` is None if unknown."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    rare = {"bar_format": _LINE, "mininterval": _SECONDS_BETWEEN_LINES, "delay": _SECONDS_BETWEEN_LINES}
    options = {} if watched else rare
    with tqdm(total=total, desc=title, unit=" pictures", disable=not shown, **options) as bar:
        yield lambda done: bar.update(done) and None
