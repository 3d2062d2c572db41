"""Tucker saliency maps for pytorch-grad-cam: where a convolutional network looks, without a label or a gradient."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tucker_cam.activations import features
    from tucker_cam.cams import MTSM, TSM, MultivecEigenCAM
    from tucker_cam.decomposition.modes import ChannelModes, channel_modes
    from tucker_cam.errors import Failure, TuckerCamError
    from tucker_cam.evaluation.evaluate import Evaluation, evaluate
    from tucker_cam.explanations.explain import Explanations, explain
    from tucker_cam.explanations.explanation import Explanation

__all__ = [
    "MTSM",
    "TSM",
    "ChannelModes",
    "Evaluation",
    "Explanation",
    "Explanations",
    "Failure",
    "MultivecEigenCAM",
    "TuckerCamError",
    "channel_modes",
    "evaluate",
    "explain",
    "features",
]
__version__ = "0.2.0"

_HOMES = {
    "MTSM": "cams",
    "TSM": "cams",
    "MultivecEigenCAM": "cams",
    "ChannelModes": "decomposition.modes",
    "Evaluation": "evaluation.evaluate",
    "Explanation": "explanations.explanation",
    "Explanations": "explanations.explain",
    "Failure": "errors",
    "TuckerCamError": "errors",
    "channel_modes": "decomposition.modes",
    "evaluate": "evaluation.evaluate",
    "explain": "explanations.explain",
    "features": "activations",
}


def __getattr__(name: str) -> object:
    """Import a public name on first access, because importing PyTorch and the host takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    try:
        value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as error:
        if not home.startswith("evaluation"):
            raise
        from tucker_cam.errors import MissingPackageError
        from tucker_cam.extras import install

        package = str(error.name).partition(".")[0]
        raise MissingPackageError(
            f"{name} needs the package {package}: {install('evaluation')}", name=package
        ) from error
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
