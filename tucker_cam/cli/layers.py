"""`tucker-cam layers`: prints a table of the layers that can be explained."""

import math
from collections.abc import Collection, Sequence
from typing import Unpack

from rich.box import SIMPLE
from rich.table import Table

from tucker_cam.console import PlainConsole
from tucker_cam.errors import Failure
from tucker_cam.models import NoLayerError, SpatialLayer, load_model
from tucker_cam.models.loading import Loading
from tucker_cam.text import counted, say


def print_layers(name: str, **loading: Unpack[Loading]) -> None:
    """Print the layers with a spatial map, in the order in which they run, with the chosen ones marked."""
    console = PlainConsole()
    if not console.is_terminal:
        # Each row is one line, however long.
        console.width = 10_000
    try:
        loaded = load_model(name, **loading)
    except NoLayerError as error:
        if not error.layers:
            raise
        console.print(_table(name, error.layers, ()))
        say("none was chosen, as it is not clear which is the last before the head: name one with --layer")
        return
    console.print(_table(loaded.name, loaded.spatial_layers, loaded.layer_names))
    if transform := loaded.reshape_transform:
        say(f"its output becomes maps by {getattr(transform, '__name__', transform)}")


def print_examined_layers(
    pictures: Sequence[str], name: str, *, limit: int, batch_size: int, **loading: Unpack[Loading]
) -> list[Failure]:
    """Print what the layers' maps are like on pictures, with the recommended one marked; return the failures."""
    from tucker_cam.evaluation.layers import examine_layers
    from tucker_cam.evaluation.summary import ENOUGH

    found = examine_layers([*pictures], name, limit=limit, batch_size=batch_size, **loading)
    table = Table(
        title=f"{found.loaded.name}, {counted(found.pictures)}", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    table.add_column("", no_wrap=True)
    table.add_column("layer", overflow="fold")
    table.add_column("output", no_wrap=True)
    for title in ("max. at\nborder", "by\nchance", "border\nbrighter", "in top\n10 %", "embedding\nkept"):
        table.add_column(title, justify="right", no_wrap=True)
    for each in found.reports:
        shares = (each.maximum_on_border, each.chance, each.border_brighter, each.energy_in_top)
        table.add_row(
            "->" if each.recommended else "!!" if each.is_border_artefact else "",
            each.layer.name,
            "x".join(map(str, each.layer.shape[1:])),
            *("-" if math.isnan(share) else f"{share:.0%}" for share in shares),
            f"{each.embedding_kept:.3f}",
            style="bold" if each.recommended else None,
        )
    PlainConsole().print(
        table,
        "TSM's maps: how often the largest value lies on the outermost cells, how often these are brighter than those "
        "inside, how much of the energy the highest tenth holds, and how much of the embedding's direction the "
        "area-matched map keeps. -> is recommended: it keeps the most; !! shows where the pictures end, not what is in "
        "them.",
    )
    if found.pictures < ENOUGH:
        say(f"fewer than {ENOUGH} pictures: with more, another layer may be recommended")
    return found.failures


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
