"""The command line: what a user typed in, pictures on the disk and a line or a table on the screen out."""

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

# What a command needs is imported in it: PyTorch and the host take seconds, which help and a mistyped name need not.
app = typer.Typer(
    help="Saliency maps that need no label: Tucker and multivector Tucker, beside EigenCAM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


OutputFolder = Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures; made if it is missing.")]
DataFolder = Annotated[Path, typer.Argument(help="Folder of pictures, at any depth.")]
_MODELS = ", ".join(family.usage for family in FAMILIES.values())
ModelName = Annotated[str, typer.Option("--model", "-m", help=f"{_MODELS}, the last one your own function.")]
Limit = Annotated[int | None, typer.Option(help="Take a random sample of so many pictures.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1)]
_WORKERS_HELP = "Processes that read pictures, with Ray the actors. (default: one core is left)"
Workers = Annotated[int | None, typer.Option("--workers", "-j", min=0, help=_WORKERS_HELP)]
_LAYER_HELP = (
    "Dotted name of the layer, or its negative index in `tucker-cam layers`; explain takes several, and averages their "
    "maps. (default: the last one with a spatial map)"
)
_WEIGHTS_HELP = "A checkpoint, of torch.save or .safetensors; the backbone is found in it."
_MEAN_HELP = "What the input is normalised by, in [0, 1]."
_LOADING = {
    "layers": (list[str] | None, typer.Option(None, "--layer", help=_LAYER_HELP)),
    "no_pretrained": (bool, typer.Option(False, "--no-pretrained", help="Random weights; none are downloaded.")),
    "weights": (Path | None, typer.Option(None, help=_WEIGHTS_HELP)),
    "size": (int | None, typer.Option(None, min=1, help="Side of the network's input. (default: the model's own)")),
    "no_crop": (bool, typer.Option(False, "--no-crop", help="Show the network the whole picture, not its middle.")),
    "mean": (tuple[float, float, float] | None, typer.Option(None, metavar="R G B", help=_MEAN_HELP)),
    "std": (tuple[float, float, float] | None, typer.Option(None, metavar="R G B", help="See --mean.")),
    "device": (str | None, typer.Option(None, help="cpu, cuda, mps ... (default: cuda if there is one)")),
}
"""The options of every command that loads a model."""
_DEBUG = ContextVar("debug", default=False)
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
    # Pictures of such sizes are refused in a line of ours.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    # One line, without a path in a package and a line of its source.
    warnings.formatwarning = lambda message, *_, **__: f"{printable(f'warning: {message}')}\n"


def _command(extra: str, *, goes_on: bool = False) -> Callable[[Callable[..., Sequence[Failure]]], Callable[..., None]]:
    """Make a command of a function that returns the pictures that failed while the others were done: exit code 1.

    It has the options of `_LOADING` too; the function gets them as ``**loading``, the arguments of `load_model`.
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
    """Explain a photograph with a real network; needs no download after the install."""
    with _user_errors("demo"):
        with importing():
            from tucker_cam.cli.demo import run_demo
        run_demo(out)


@_command("models", goes_on=True)
def explain(
    images: Annotated[list[str], typer.Argument(help="Pictures, folders, globs, Parquet files (column image), URLs.")],
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"May be repeated: {', '.join(METHODS)}, or your own MODULE:CLASS. (default: tsm)"),
    ] = None,
    model: ModelName = "demo",
    out: Annotated[
        str, typer.Option("--out", "-o", help="Folder for what is written; a run that was stopped goes on in it.")
    ] = "tucker-cam-out",
    limit: Limit = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help=f"May be repeated: {', '.join(FORMATS)}. (default: overlay)")
    ] = None,
    gallery: Annotated[bool, typer.Option("--gallery", help="One page with all pictures, to open alone.")] = False,
    view: Annotated[
        Literal["picture", "network"], typer.Option(help="Draw on your whole picture, or on what the network saw.")
    ] = "picture",
    colormap: Annotated[str, typer.Option(help="Of OpenCV: jet, viridis, turbo, inferno ...")] = "jet",
    alpha: Annotated[float, typer.Option(min=0, max=1, help="The map's weight in an overlay.")] = 0.5,
    aug_smooth: Annotated[bool, typer.Option("--aug-smooth", help="Average over flips and brightness.")] = False,
    engine: Annotated[
        Literal["torch", "ray"], typer.Option(help="torch: this machine. ray: a Ray cluster, which writes Parquet.")
    ] = "torch",
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", min=1, help="(default: 8, on a GPU what it holds)")
    ] = None,
    workers: Workers = None,
    **loading: Any,
) -> Sequence[Failure]:
    """Write an overlay, or the map, for each picture and method."""
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
    model: Annotated[str, typer.Argument(help="As for explain --model.")],
    pictures: Annotated[
        list[str] | None, typer.Argument(help="Compare the layers' maps on these, as for explain.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Take a random sample of so many pictures.")] = 50,
    batch_size: BatchSize = 8,
    **loading: Any,
) -> Sequence[Failure]:
    """List the layers that can be explained, in the order in which they run; or with pictures, what each shows."""
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
            help=f"May be repeated: {', '.join(METHODS)}, or your own MODULE:CLASS. (default: all) EigenCAM, the "
            "controls and, for a classifier, GradCAM and SegEigenCAM are always scored."
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
        typer.Option(help="Score only pictures with these. (default: what there is)"),
    ] = None,
    limit: Limit = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The rows, as CSV; what is there stays, and a run that was stopped goes on."),
    ] = Path("tucker-cam-out/results.csv"),
    report: Annotated[Path | None, typer.Option(help="Write a figure page too: .png, .jpg, .pdf or .svg.")] = None,
    batch_size: BatchSize = 8,
    workers: Workers = None,
    **loading: Any,
) -> Sequence[Failure]:
    """Score the methods and controls on a folder of pictures, with boxes, with masks or without."""
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
        Path, typer.Option("--out", "-o", help="The box plots, as PNG; the numbers stand beside it as CSV.")
    ] = Path("tucker-cam-out/spectrum.png"),
    **loading: Any,
) -> Sequence[Failure]:
    """Plot how much the first singular values hold of the sum of all, with and without centring."""
    with importing():
        from tucker_cam.cli.spectrum import write_spectrum
    return write_spectrum(data, model, out, limit=limit, workers=None, **loading)


@contextmanager
def _user_errors(extra: str, *, goes_on: bool = False) -> Iterator[None]:
    """Print what the library tells of its work, and an error that a user can mend as one line, with exit code 2."""
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
