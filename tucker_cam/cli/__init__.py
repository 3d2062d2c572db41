"""The command line: runs what a user types, writes files, and prints lines or a table on the screen."""

import logging
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, Literal

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

# Each command imports what it needs: PyTorch and the host take seconds, which help and a typo should not cost.
app = typer.Typer(
    help="Saliency maps that need no labels: Tucker and multivector Tucker, beside EigenCAM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


OutputFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder to write to; created if it is missing.")]
DataFolder = Annotated[Path, typer.Argument(help="Folder of pictures; subfolders are searched too.")]
_MODELS = " | ".join(family.usage for family in FAMILIES.values())
ModelName = Annotated[str, typer.Option("--model", "-m", help=f"{_MODELS}; the last is your own function.")]
Limit = Annotated[int | None, typer.Option(help="Take a random sample of this many pictures.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Pictures at once.")]
_WORKERS_HELP = "Processes that read pictures (default: all cores but one, at most 8); with Ray, actors (all but one)."
Workers = Annotated[int | None, typer.Option("--workers", "-j", min=0, help=_WORKERS_HELP)]
_LAYER_HELP = (
    "Dotted name of a layer, or its negative index in `tucker-cam layers`. For explain, may be repeated: the maps are "
    "averaged. (default: the last layer with a spatial map)"
)
_WEIGHTS_HELP = "Checkpoint file of torch.save or .safetensors; the backbone in it is used."
_MEAN_HELP = "Mean of each channel, in [0, 1], to normalise the input."
_LOADING = {
    "layers": (list[str] | None, typer.Option(None, "--layer", help=_LAYER_HELP)),
    "no_pretrained": (bool, typer.Option(False, "--no-pretrained", help="Use random weights; download none.")),
    "weights": (Path | None, typer.Option(None, help=_WEIGHTS_HELP)),
    "size": (int | None, typer.Option(None, min=1, help="Side of the network's input. (default: the model's own)")),
    "no_crop": (bool, typer.Option(False, "--no-crop", help="Show the network whole pictures, not just the centre.")),
    "mean": (tuple[float, float, float] | None, typer.Option(None, metavar="R G B", help=_MEAN_HELP)),
    "std": (tuple[float, float, float] | None, typer.Option(None, metavar="R G B", help="Std. dev. of each channel.")),
    "device": (str | None, typer.Option(None, help="cpu, cuda, mps, ... (default: cuda if available)")),
}
"""The options of every command that loads a model."""
_DEBUG = ContextVar("debug", default=False)
_EXTRAS = {"pyarrow": "ray", "ray": "ray", "zarr": "zarr"}


class _Say(logging.Handler):
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
    # Without a network, the hub's messages on retries would bury the one line that says what to do.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Such pictures are refused with a message of our own.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    # A single line, without the path and the source line that Python adds.
    warnings.formatwarning = lambda message, *_, **__: f"{printable(f'warning: {message}')}\n"


def _command(extra: str, *, goes_on: bool = False) -> Callable[[Callable[..., Sequence[Failure]]], Callable[..., None]]:
    """Make a command from a function that returns the pictures that failed; if there are any, the exit code is 1.

    The command also has the options of `_LOADING`; the function gets them as ``**loading``, `load_model`'s arguments.
    """

    def make(function: Callable[..., Sequence[Failure]]) -> Callable[..., None]:
        @wraps(function)
        def command(no_pretrained: bool, no_crop: bool, **options: Any) -> None:
            with _user_errors(extra, goes_on=goes_on):
                failures = function(pretrained=not no_pretrained, crop=not no_crop, **options)
            for failure in failures:
                if _DEBUG.get():
                    traceback.print_exception(failure.error)
                say(f"error: {failure}", error=True)
            if failures:
                raise typer.Exit(1)

        *own, _ = signature(function, eval_str=True).parameters.values()
        shared = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=option, annotation=kind)
            for name, (kind, option) in _LOADING.items()
        ]
        command.__signature__ = Signature([*own, *shared])  # type: ignore[attr-defined]
        return app.command()(command)

    return make


@app.command()
def demo(out: OutputFolder = Path("tucker-cam-out")) -> None:
    """Explain two photographs with a real network; needs no download once installed."""
    with _user_errors("demo"):
        with importing():
            from tucker_cam.cli.demo import run_demo
        run_demo(out)


@_command("models", goes_on=True)
def explain(
    images: Annotated[list[str], typer.Argument(help="Pictures, folders, globs, URLs, Parquet files (column image).")],
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"May be repeated: {', '.join(METHODS)}, or your own MODULE:CLASS. (default: tsm)"),
    ] = None,
    model: ModelName = "demo",
    out: Annotated[
        str, typer.Option("--out", "-o", help="Folder to write to; a stopped run is resumed.")
    ] = "tucker-cam-out",
    limit: Limit = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help=f"May be repeated: {', '.join(FORMATS)}. (default: overlay)")
    ] = None,
    gallery: Annotated[bool, typer.Option("--gallery", help="Write one page of all pictures, gallery.html.")] = False,
    view: Annotated[
        Literal["picture", "network"], typer.Option(help="Draw on your whole picture, or on what the network saw.")
    ] = "picture",
    colormap: Annotated[str, typer.Option(help="OpenCV colormap: jet, viridis, turbo, inferno, ...")] = "jet",
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Weight of the map in an overlay.")] = 0.5,
    aug_smooth: Annotated[bool, typer.Option("--aug-smooth", help="Average over flips and brightness.")] = False,
    engine: Annotated[
        Literal["torch", "ray"], typer.Option(help="torch: this machine. ray: a Ray cluster, which writes Parquet.")
    ] = "torch",
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", min=1, help="Pictures at once. (default: 8, or what fits a GPU)")
    ] = None,
    workers: Workers = None,
    **loading: Any,
) -> Sequence[Failure]:
    """Write an overlay or a map for each picture and method."""
    for name in method or []:
        method_named(name)
    with importing():
        from tucker_cam.explanations.explain import explain as explain_pictures
    return explain_pictures(
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
        **loading,
    ).failures


@_command("evaluation")
def layers(
    model: Annotated[str, typer.Argument(help="The model, as for explain --model.")],
    pictures: Annotated[
        list[str] | None, typer.Argument(help="Pictures to compare the layers on, as for explain.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Take a random sample of this many pictures.")] = 50,
    batch_size: BatchSize = 8,
    **loading: Any,
) -> Sequence[Failure]:
    """List the layers that can be explained, in the order in which they run; with pictures, compare their maps."""
    with importing():
        from tucker_cam.cli.layers import print_examined_layers, print_layers
    if pictures:
        return print_examined_layers(pictures, model, limit=limit, batch_size=batch_size, **loading)
    print_layers(model, **loading)
    return []


@_command("evaluation", goes_on=True)
def evaluate(
    data: DataFolder,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"May be repeated: {', '.join(METHODS)}, or your own MODULE:CLASS. (default: all) EigenCAM and the "
            "controls are always scored, and for a classifier also GradCAM and SegEigenCAM."
        ),
    ] = None,
    model: ModelName = "demo",
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help=f"May be repeated: {', '.join(GROUPS)}; curves and road are slow. (default: localisation and drop)"
        ),
    ] = None,
    annotations: Annotated[
        Literal["boxes", "masks", "none"] | None,
        typer.Option(help="Score only pictures that have these. (default: use what is found)"),
    ] = None,
    limit: Limit = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="CSV file for the rows; existing rows stay, and a stopped run is resumed."),
    ] = Path("tucker-cam-out/results.csv"),
    report: Annotated[Path | None, typer.Option(help="Also write a page of figures: .png, .jpg, .pdf or .svg.")] = None,
    batch_size: BatchSize = 8,
    workers: Workers = None,
    **loading: Any,
) -> Sequence[Failure]:
    """Score the methods and controls on a folder of pictures, with boxes, masks or neither."""
    for name in method or []:
        method_named(name)
    groups = [check_name("metric", each, GROUPS) for each in metric or ["localisation", "drop"]]
    with importing():
        from tucker_cam.cli.evaluate import evaluate_folder
    return evaluate_folder(
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
        **loading,
    )


@_command("evaluation")
def spectrum(
    data: DataFolder,
    model: ModelName = "demo",
    limit: Limit = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="PNG file for the box plots; the numbers go beside it as CSV.")
    ] = Path("tucker-cam-out/spectrum.png"),
    **loading: Any,
) -> Sequence[Failure]:
    """Plot the share of the first singular values in the sum of all, with and without centring."""
    with importing():
        from tucker_cam.cli.spectrum import write_spectrum
    return write_spectrum(data, model, out, limit=limit, workers=None, **loading)


@contextmanager
def _user_errors(extra: str, *, goes_on: bool = False) -> Iterator[None]:
    """Print the library's log messages, and an error that a user can mend as one line, with exit code 2."""
    logger, handler = logging.getLogger("tucker_cam"), _Say()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    except (TuckerCamError, ImportError, OSError) as error:
        if _DEBUG.get():
            traceback.print_exc()
        message = str(error)
        if isinstance(error, ModuleNotFoundError) and error.name and not isinstance(error, TuckerCamError):
            package = error.name.partition(".")[0]
            message = f"this needs the package {error.name}: {install(_EXTRAS.get(package, extra))}"
        say(f"error: {message}", error=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        say(f"stopped{'; the same command goes on where it was' if goes_on else ''}", error=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        logger.removeHandler(handler)
        level, logger.propagate = before
        logger.setLevel(level)
