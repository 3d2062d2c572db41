"""A model in, a table of the layers that can be explained out."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.table import Table

from tucker_cam.console import PlainConsole
from tucker_cam.models import NoLayerError, SpatialLayer, load_model
from tucker_cam.models.loading import Loading
from tucker_cam.text import say

_UNBOUNDED = 10_000
"""Of no terminal a line is a row, whatever its length."""


def print_layers(name: str, loading: Loading) -> None:
    """Print the layers with a spatial map in the order in which they run, the chosen ones marked."""
    console = PlainConsole()
    if not console.is_terminal:
        console.width = _UNBOUNDED
    try:
        loaded = load_model(name, **loading)
    except NoLayerError as error:
        if not error.layers:
            raise
        console.print(_table(name, error.layers, ()))
        say("none was chosen, as none of them is surely the last before the head: name one with --layer")
        return
    console.print(_table(loaded.name, loaded.spatial_layers, loaded.layer_names))
    if transform := loaded.reshape_transform:
        say(f"its output becomes maps by {getattr(transform, '__name__', transform)}")


def _table(title: str, layers: Sequence[SpatialLayer], chosen: Collection[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("index", justify="right", no_wrap=True)
    table.add_column("layer", overflow="fold")
    table.add_column("kind", overflow="fold")
    table.add_column("output", no_wrap=True)
    for index, layer in enumerate(layers, start=-len(layers)):
        mark, style = ("->", "bold") if layer.name in chosen else ("", None)
        kind, shape = type(layer.module).__name__, " x ".join(map(str, layer.shape[1:]))
        table.add_row(mark, str(index), layer.name, kind, shape, style=style)
    return table
