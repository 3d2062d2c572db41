"""The command line: what a user typed in, pictures on the disk and a line or a table on the screen out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tucker_cam.cli.demo import run_demo
from tucker_cam.cli.explain import explain_pictures
from tucker_cam.cli.methods import METHODS
from tucker_cam.files import printable

app = typer.Typer(
    help="Saliency maps that need no label: Tucker and multivector Tucker, beside EigenCAM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class MetricGroup(StrEnum):
    """The metrics that can be asked for."""

    LOCALISATION = "localisation"
    DROP = "drop"
    CURVES = "curves"
    ROAD = "road"


class AnnotationKind(StrEnum):
    """The annotations that can be asked for."""

    BOXES = "boxes"
    MASKS = "masks"
    NONE = "none"


OutputFolder = Annotated[Path, typer.Option("--out", help="Folder for the pictures; made if it is missing.")]
DataFolder = Annotated[Path, typer.Argument(help="Folder of pictures, at any depth.", show_default=False)]
MethodNames = Annotated[list[str] | None, typer.Option(help=f"May be repeated: {', '.join(METHODS)}. (default: tsm)")]
ModelName = Annotated[str, typer.Option(help="demo, timm:NAME, torchvision:NAME or your own MODULE:CALLABLE.")]
LayerName = Annotated[
    str | None, typer.Option(help="Dotted name of the target layer. (default: the last one with a spatial map)")
]
Limit = Annotated[int | None, typer.Option(help="Take a random sample of so many pictures.", show_default=False)]
RandomWeights = Annotated[bool, typer.Option("--no-pretrained", help="Random weights; no download.")]
Weights = Annotated[Path | None, typer.Option(help="The model's state dict, a file of torch.save.", show_default=False)]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, mps ...")]
_USER_ERROR = 2
_INTERRUPTED = 130


@app.callback()
def _quiet_libraries() -> None:
    # Its retries without a network would bury the one line that says what to do.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")


@app.command()
def demo(out: OutputFolder = Path("tucker-cam-out")) -> None:
    """Explain a photograph with a real network; needs no download after the install."""
    with _user_errors():
        run_demo(out)


@app.command()
def explain(
    images: Annotated[list[Path], typer.Argument(help="Picture files.", show_default=False)],
    method: MethodNames = None,
    model: ModelName = "demo",
    layer: LayerName = None,
    out: OutputFolder = Path("tucker-cam-out"),
    aug_smooth: Annotated[bool, typer.Option("--aug-smooth", help="Average over flips and brightness.")] = False,
    save_map: Annotated[bool, typer.Option("--save-map", help="Write the map itself too, as .npy.")] = False,
    no_pretrained: RandomWeights = False,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Write an overlay for each picture and method."""
    with _user_errors() as problems:
        problems += explain_pictures(
            images,
            methods=method or ["tsm"],
            model_name=model,
            layer=layer,
            out=out,
            aug_smooth=aug_smooth,
            save_map=save_map,
            pretrained=not no_pretrained,
            weights=weights,
            device=device,
        )


@app.command()
def evaluate(
    data: DataFolder,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"May be repeated: {', '.join(METHODS)}. (default: all) EigenCAM, the controls and, for a classifier, "
            "GradCAM and SegEigenCAM are always scored."
        ),
    ] = None,
    model: ModelName = "demo",
    layer: LayerName = None,
    metric: Annotated[
        list[MetricGroup] | None,
        typer.Option(help="May be repeated; curves and road are slow. (default: localisation and drop)"),
    ] = None,
    annotations: Annotated[
        AnnotationKind | None, typer.Option(help="Score only pictures with these. (default: what there is)")
    ] = None,
    limit: Limit = None,
    out: Annotated[Path, typer.Option(help="The rows, as CSV; a run that was interrupted goes on.")] = Path(
        "tucker-cam-out/results.csv"
    ),
    report: Annotated[
        Path | None, typer.Option(help="Write a figure page too: .png, .jpg, .pdf or .svg.", show_default=False)
    ] = None,
    no_pretrained: RandomWeights = False,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Score the methods and controls on a folder of pictures, with boxes, with masks or without."""
    with _user_errors("tucker-cam[evaluation]", goes_on=True) as problems:
        from tucker_cam.cli.evaluate import evaluate_folder

        problems += evaluate_folder(
            data,
            model_name=model,
            methods=method or list(METHODS),
            groups=[each.value for each in metric] if metric else ["localisation", "drop"],
            layer=layer,
            annotations=annotations.value if annotations else None,
            limit=limit,
            out=out,
            report=report,
            pretrained=not no_pretrained,
            weights=weights,
            device=device,
        )


@app.command()
def spectrum(
    data: DataFolder,
    model: ModelName = "demo",
    layer: LayerName = None,
    limit: Limit = None,
    out: Annotated[Path, typer.Option(help="The box plots, as PNG; the numbers stand beside it as CSV.")] = Path(
        "tucker-cam-out/spectrum.png"
    ),
    no_pretrained: RandomWeights = False,
    weights: Weights = None,
    device: Device = "cpu",
) -> None:
    """Plot how much the first singular values hold of the sum of all, with and without centring."""
    with _user_errors("tucker-cam[evaluation]") as problems:
        from tucker_cam.cli.spectrum import write_spectrum

        problems += write_spectrum(
            data,
            model_name=model,
            layer=layer,
            limit=limit,
            out=out,
            pretrained=not no_pretrained,
            weights=weights,
            device=device,
        )


@contextmanager
def _user_errors(extra: str = "tucker-cam[demo]", *, goes_on: bool = False) -> Iterator[list[str]]:
    """Give a list of problems; they and the errors that a user can mend are printed, a line each, with exit code 2."""
    problems: list[str] = []
    try:
        yield problems
    except ModuleNotFoundError as error:
        ours = " " in str(error.msg) and "pip install" in str(error)
        problems.append(str(error) if ours else f"this needs the package {error.name}: pip install '{extra}'")
    except (OSError, TypeError, ValueError) as error:
        problems.append(str(error))
    except KeyboardInterrupt:
        typer.echo(f"stopped{'; the same command goes on where it was' if goes_on else ''}", err=True)
        raise typer.Exit(_INTERRUPTED) from None
    if problems:
        for problem in problems:
            typer.echo(printable(f"error: {problem}"), err=True)
        raise typer.Exit(_USER_ERROR)
