"""The command line: what a user typed in, pictures on the disk and a line or a table on the screen out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tucker_cam.cli.demo import run_demo
from tucker_cam.cli.explain import explain_pictures
from tucker_cam.cli.methods import METHODS

app = typer.Typer(
    help="Saliency maps that need no label: Tucker and multivector Tucker, beside EigenCAM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

OutputFolder = Annotated[Path, typer.Option("--out", help="Folder for the pictures; made if it is missing.")]
_USER_ERROR = 2


@app.callback()
def _quiet_libraries() -> None:
    # Its retries without a network would bury the one line that says what to do.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


@app.command()
def demo(out: OutputFolder = Path("tucker-cam-out")) -> None:
    """Explain a photograph with a real network; needs no download after the install."""
    try:
        run_demo(out)
    except (ModuleNotFoundError, OSError) as error:
        _fail([str(error)])


@app.command()
def explain(
    images: Annotated[list[Path], typer.Argument(help="Picture files.", show_default=False)],
    method: Annotated[
        list[str] | None, typer.Option(help=f"May be repeated: {', '.join(METHODS)}. (default: tsm)")
    ] = None,
    model: Annotated[str, typer.Option(help="demo, timm:NAME or torchvision:NAME.")] = "demo",
    layer: Annotated[
        str | None,
        typer.Option(help="Dotted name of the target layer. (default: the last one with a spatial map)"),
    ] = None,
    out: OutputFolder = Path("tucker-cam-out"),
    aug_smooth: Annotated[bool, typer.Option("--aug-smooth", help="Average over flips and brightness.")] = False,
    save_map: Annotated[bool, typer.Option("--save-map", help="Write the map itself too, as .npy.")] = False,
    no_pretrained: Annotated[bool, typer.Option("--no-pretrained", help="Random weights; no download.")] = False,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, mps ...")] = "cpu",
) -> None:
    """Write an overlay for each picture and method."""
    try:
        problems = explain_pictures(
            images,
            methods=method or ["tsm"],
            model_name=model,
            layer=layer,
            out=out,
            aug_smooth=aug_smooth,
            save_map=save_map,
            pretrained=not no_pretrained,
            device=device,
        )
    except (ModuleNotFoundError, OSError, TypeError, ValueError) as error:
        problems = [str(error)]
    if problems:
        _fail(problems)


def _fail(problems: list[str]) -> None:
    for problem in problems:
        typer.echo(f"error: {problem}", err=True)
    raise typer.Exit(_USER_ERROR)
