"""Tucker saliency maps for pytorch-grad-cam: where a convolutional network looks, without a label or a gradient.

The public names are imported when they are asked for: torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # with a __getattr__ below, a type checker would take any name for a public one
    from tucker_cam.cams import MTSM, TSM, MultivecEigenCAM
    from tucker_cam.decomposition import ChannelModes, channel_modes
else:
    _MODULES = {
        "MTSM": "cams",
        "TSM": "cams",
        "MultivecEigenCAM": "cams",
        "ChannelModes": "decomposition",
        "channel_modes": "decomposition",
    }

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = ["MTSM", "TSM", "ChannelModes", "MultivecEigenCAM", "channel_modes"]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return [*globals(), *__all__]
