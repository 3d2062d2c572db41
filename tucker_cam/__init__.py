"""Tucker saliency maps for pytorch-grad-cam: where a convolutional network looks, without a label or a gradient."""

from tucker_cam.cams import MTSM, TSM, MultivecEigenCAM
from tucker_cam.decomposition import ChannelModes, channel_modes

__all__ = ["MTSM", "TSM", "ChannelModes", "MultivecEigenCAM", "channel_modes"]
__version__ = "0.1.0"
