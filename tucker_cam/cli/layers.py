"""A model in, a table of the layers that can be explained out."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tucker_cam.models import LoadedModel


def print_layers(loaded: LoadedModel) -> None:
    """Print the layers with a spatial map in the order in which they run, the chosen ones marked."""
    layers = loaded.spatial_layers
    console = Console(soft_wrap=True)
    table = Table(title=loaded.name, title_justify="left")
    table.add_column("")
    table.add_column("index", justify="right")
    table.add_column("layer", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("output", no_wrap=True)
    for index, layer in enumerate(layers, start=-len(layers)):
        chosen = layer.name in loaded.layer_names
        kind, shape = type(layer.module).__name__, " x ".join(map(str, layer.shape[1:]))
        table.add_row("->" if chosen else "", str(index), layer.name, kind, shape, style="bold" if chosen else None)
    console.print(table)
    if transform := loaded.reshape_transform:
        console.print(f"its output becomes maps by {transform}")
