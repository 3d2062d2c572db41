"""The command line: what a user typed in, pictures on the disk and a line or a table on the screen out."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tucker_cam import __version__
from tucker_cam.errors import Failure, TuckerCamError
from tucker_cam.evaluation import GROUPS
from tucker_cam.explanations.outputs import FORMATS
from tucker_cam.extras import install
from tucker_cam.interrupts import INTERRUPTED, importing
from tucker_cam.methods import METHODS, check_name, method_named
from tucker_cam.models.families import FAMILIES
from tucker_cam.text import printable, say

# What a command needs is imported in it: PyTorch and the host take seconds, which help and a mistyped name need not.
if TYPE_CHECKING:
    from tucker_cam.models.loading import Loading

app = typer.Typer(
    help="Saliency maps that need no label: Tucker and multivector Tucker, beside EigenCAM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


OutputFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures; made if it is missing.")]
DataFolder = Annotated[Path, typer.Argument(help="Folder of pictures, at any depth.", show_default=False)]
_MODELS = ", ".join(family.usage for family in FAMILIES.values())
ModelName = Annotated[str, typer.Option("--model", "-m", help=f"{_MODELS}, the last one your own function.")]
_LAYER_HELP = (
    "Dotted name of the layer to explain, or its negative index in `tucker-cam layers`. "
    "(default: the last one with a spatial map)"
)
LayerName = Annotated[str | None, typer.Option(help=_LAYER_HELP)]
LayerNames = Annotated[list[str] | None, typer.Option(help=f"May be repeated: maps are averaged. {_LAYER_HELP}")]
Limit = Annotated[int | None, typer.Option(help="Take a random sample of so many pictures.", show_default=False)]
RandomWeights = Annotated[bool, typer.Option("--no-pretrained", help="Random weights; none are downloaded.")]
Weights = Annotated[
    Path | None,
    typer.Option(help="A checkpoint, of torch.save or .safetensors; the backbone is found in it.", show_default=False),
]
Size = Annotated[int | None, typer.Option(min=1, help="Side of the network's input. (default: the model's own)")]
NoCrop = Annotated[bool, typer.Option("--no-crop", help="Show the network the whole picture, not its middle.")]
Mean = Annotated[tuple[float, float, float] | None, typer.Option(help="What the input is normalised by, in [0, 1].")]
Std = Annotated[tuple[float, float, float] | None, typer.Option(help="See --mean.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps ... (default: cuda if there is one)")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", "-b", min=1, help="(default: 8, on a GPU what it holds)")
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", "-j", min=0, help="Processes that read pictures, or actors. (default: one core is left)"),
]
_DEBUG = ContextVar("debug", default=False)
_USER_ERROR = 2
_SOME_FAILED = 1
_EXTRAS = {"pyarrow": "ray", "ray": "ray", "zarr": "zarr"}


class _Say(logging.Handler):
    """Prints what the library tells of its work."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def _print_version(asked: bool) -> None:
    if asked:
        say(f"tucker-cam {__version__}")
        raise typer.Exit


@app.callback()
def _prepare(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised.")] = False,
) -> None:
    _DEBUG.set(debug)
    # The hub's retries without a network would bury the one line that says what to do.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # One line, without a path in a package and a line of its source.
    warnings.formatwarning = lambda message, *_, **__: f"{printable(f'warning: {message}')}\n"


@app.command()
def demo(out: OutputFolder = Path("tucker-cam-out")) -> None:
    """Explain a photograph with a real network; needs no download after the install."""
    with _user_errors():
        with importing():
            from tucker_cam.cli.demo import run_demo

        run_demo(out)


@app.command()
def explain(
    images: Annotated[
        list[str],
        typer.Argument(help="Pictures, folders, globs, Parquet files (column image), URLs.", show_default=False),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"May be repeated: {', '.join(METHODS)}, or your own MODULE:CLASS. (default: tsm)"),
    ] = None,
    model: ModelName = "demo",
    layer: LayerNames = None,
    out: Annotated[
        str, typer.Option("--out", "-o", help="Folder for what is written; a run that was stopped goes on in it.")
    ] = "tucker-cam-out",
    limit: Limit = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help=f"May be repeated: {', '.join(FORMATS)}. (default: overlay)"),
    ] = None,
    gallery: Annotated[
        bool, typer.Option("--gallery", help="Write one page with all pictures, to open alone.")
    ] = False,
    view: Annotated[
        Literal["picture", "network"], typer.Option(help="Draw on your whole picture, or on what the network saw.")
    ] = "picture",
    colormap: Annotated[str, typer.Option(help="Of OpenCV: jet, viridis, turbo, inferno ...")] = "jet",
    alpha: Annotated[float, typer.Option(min=0, max=1, help="The map's weight in an overlay.")] = 0.5,
    aug_smooth: Annotated[bool, typer.Option("--aug-smooth", help="Average over flips and brightness.")] = False,
    no_pretrained: RandomWeights = False,
    weights: Weights = None,
    size: Size = None,
    no_crop: NoCrop = False,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    engine: Annotated[
        Literal["torch", "ray"], typer.Option(help="torch: this machine. ray: a Ray cluster, which writes Parquet.")
    ] = "torch",
    batch_size: BatchSize = None,
    workers: Workers = None,
) -> None:
    """Write an overlay, or the map, for each picture and method."""
    with _user_errors("models", goes_on=True) as problems:
        for name in method or []:
            method_named(name)
        with importing():
            from tucker_cam.explanations.explain import explain as explain_pictures

        explanations = explain_pictures(
            images,
            model,
            method or ["tsm"],
            out=out,
            formats=formats or ["overlay"],
            gallery=gallery,
            view=view,
            colormap=colormap,
            alpha=alpha,
            aug_smooth=aug_smooth,
            limit=limit,
            batch_size=batch_size,
            workers=workers,
            engine=engine,
            **_loading(layer, no_pretrained, weights, device, size, no_crop, mean, std),
        )
        problems += explanations.failures


@app.command()
def layers(
    model: Annotated[str, typer.Argument(help="As for explain --model.", show_default=False)],
    pictures: Annotated[
        list[str] | None, typer.Argument(help="Compare the layers' maps on these, as for explain.", show_default=False)
    ] = None,
    layer: LayerNames = None,
    limit: Annotated[int, typer.Option(min=1, help="Take a random sample of so many pictures.")] = 50,
    no_pretrained: RandomWeights = False,
    weights: Weights = None,
    size: Size = None,
    no_crop: NoCrop = False,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 8,
) -> None:
    """List the layers that can be explained, in the order in which they run; or with pictures, what each shows."""
    with _user_errors("evaluation" if pictures else "demo") as problems:
        with importing():
            from tucker_cam.cli.layers import print_examined_layers, print_layers

        loading = _loading(layer, no_pretrained, weights, device, size, no_crop, mean, std)
        if pictures:
            problems += print_examined_layers(pictures, model, loading, limit=limit, batch_size=batch_size)
        else:
            print_layers(model, loading)


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
        list[str] | None,
        typer.Option(
            help=f"May be repeated: {', '.join(GROUPS)}; curves and road are slow. (default: localisation and drop)"
        ),
    ] = None,
    annotations: Annotated[
        Literal["boxes", "masks", "none"] | None,
        typer.Option(help="Score only pictures with these. (default: what there is)"),
    ] = None,
    limit: Limit = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The rows, as CSV; what is there stays, and a run that was stopped goes on."),
    ] = Path("tucker-cam-out/results.csv"),
    report: Annotated[
        Path | None, typer.Option(help="Write a figure page too: .png, .jpg, .pdf or .svg.", show_default=False)
    ] = None,
    no_pretrained: RandomWeights = False,
    weights: Weights = None,
    size: Size = None,
    no_crop: NoCrop = False,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 8,
    workers: Workers = None,
) -> None:
    """Score the methods and controls on a folder of pictures, with boxes, with masks or without."""
    with _user_errors("evaluation", goes_on=True) as problems:
        for name in method or []:
            method_named(name)
        groups = [check_name("metric", each, GROUPS) for each in metric or ["localisation", "drop"]]
        with importing():
            from tucker_cam.cli.evaluate import evaluate_folder

        problems += evaluate_folder(
            data,
            model,
            method,
            out,
            report,
            metrics=groups,
            annotations=annotations,
            limit=limit,
            batch_size=batch_size,
            workers=workers,
            **_loading([layer] if layer else [], no_pretrained, weights, device, size, no_crop, mean, std),
        )


@app.command()
def spectrum(
    data: DataFolder,
    model: ModelName = "demo",
    layer: LayerName = None,
    limit: Limit = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The box plots, as PNG; the numbers stand beside it as CSV.")
    ] = Path("tucker-cam-out/spectrum.png"),
    no_pretrained: RandomWeights = False,
    weights: Weights = None,
    device: Device = None,
) -> None:
    """Plot how much the first singular values hold of the sum of all, with and without centring."""
    with _user_errors("evaluation") as problems:
        with importing():
            from tucker_cam.cli.spectrum import write_spectrum

        loading = _loading([layer] if layer else [], no_pretrained, weights, device)
        problems += write_spectrum(data, model, out, limit=limit, workers=None, **loading)


def _loading(
    layers: list[str] | None,
    no_pretrained: bool,
    weights: Path | None,
    device: str | None = None,
    size: int | None = None,
    no_crop: bool = False,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Loading:
    """Return the arguments of `load_model`."""
    return {
        "layers": layers or [],
        "pretrained": not no_pretrained,
        "weights": weights,
        "device": device,
        "size": size,
        "crop": not no_crop,
        "mean": mean,
        "std": std,
    }


def _show_traceback() -> None:
    if _DEBUG.get():
        traceback.print_exc()


@contextmanager
def _user_errors(extra: str = "demo", *, goes_on: bool = False) -> Iterator[list[str | Failure]]:
    """Give a list of problems, printed at the end, with exit code 1: of pictures, while the others were done.

    An error that a user can mend is one line too, with exit code 2.
    """
    problems: list[str | Failure] = []
    code = _SOME_FAILED
    logger, handler = logging.getLogger("tucker_cam"), _Say()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield problems
    except ModuleNotFoundError as error:
        _show_traceback()
        ours = " " in str(error.msg) and "pip install" in str(error)
        extra = _EXTRAS.get((error.name or "").partition(".")[0], extra)
        missing = f"this needs the package {error.name}: {install(extra)}"
        problems.append(str(error) if ours else missing)
        code = _USER_ERROR
    except (TuckerCamError, ImportError, OSError) as error:
        _show_traceback()
        problems.append(str(error))
        code = _USER_ERROR
    except KeyboardInterrupt:
        say(f"stopped{'; the same command goes on where it was' if goes_on else ''}", error=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
    for problem in problems:
        if isinstance(problem, Failure) and _DEBUG.get():
            traceback.print_exception(problem.error)
        say(f"error: {problem}", error=True)
    if problems:
        raise typer.Exit(code)
