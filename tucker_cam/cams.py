"""The methods as classes for users of pytorch-grad-cam, which take the place of `EigenCAM`.

Each class projects the feature maps. The host then scales the map to [0, 1] and to the picture's size, averages target
layers and smooths by test-time augmentation. No other module subclasses the host's `BaseCAM`.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_grad_cam.base_cam import BaseCAM
from torch import Tensor, nn
from ttach import Compose

from tucker_cam.activations import FeatureRecorder, ReshapeTransform, Source, check_maps_of, feature_maps
from tucker_cam.arguments import all_finite, check_choice, check_kind, check_parameters, list_of_layers
from tucker_cam.decomposition.gram import rescale_extremes
from tucker_cam.decomposition.modes import ChannelModes, Engine, channel_modes
from tucker_cam.decomposition.projection import Combine, combined_map, leading_map
from tucker_cam.decomposition.rank import Rank, check_rank
from tucker_cam.errors import BadTypeError, BadValueError

# The error that a map may have, as a share of its largest value: less than this is no contrast.
_MAP_TOLERANCE = 1e-5
_SIZE_OF_THE_IMAGES = BaseCAM.get_target_width_height


class LabelFreeCAM(BaseCAM, ABC):
    """A saliency method that reads only feature maps: no label, no gradient, no model output.

    Subclasses turn feature maps into one map in `saliency`. The object keeps only the features and the output of its
    last call, so it can be used again on other images, and beside other objects on the same model.

    A call returns float32 NumPy, batch x height x width (or batch x depth x height x width for volumes), in [0, 1].
    `targets` and `eigen_smooth` are accepted and ignored; `aug_smooth` works as in the host. The model's output is kept
    in `outputs`, is never read, and can be anything. A call raises TypeError or ValueError for images or feature maps
    that it cannot make maps of. Errors that the model itself raises come through unchanged.

    The maps are scaled to the images' size, so there must be one set of feature maps for each image. If a subclass or a
    user replaces `get_target_width_height`, the images can be anything that the model takes, and each set of feature
    maps becomes a map.
    """

    rank: Rank = None
    engine: Engine = "torch"
    center: bool = False

    def __init__(
        self,
        model: nn.Module,
        target_layers: Iterable[nn.Module],
        reshape_transform: ReshapeTransform | None = None,
        *,
        tta_transforms: Any = None,
    ) -> None:
        own_constructor = type(self).__init__ is not LabelFreeCAM.__init__
        layers = _listed(target_layers, stacklevel=4 if own_constructor else 3)
        _check_construction(model, reshape_transform, tta_transforms)
        # The host's own recorder gets no layers, because ours replaces it.
        super().__init__(
            model, [], reshape_transform, uses_gradients=False, tta_transforms=tta_transforms, detach=False
        )
        self.target_layers = layers
        self.activations_and_grads: FeatureRecorder = FeatureRecorder(model, layers, reshape_transform)

    @abstractmethod
    def saliency(self, features: Tensor) -> Tensor:
        """Turn features, batch x channels x spatial, into maps, batch x spatial: finite, not negative, of any scale."""

    def modes(self, input_tensor: Tensor) -> list[ChannelModes]:
        """Return the channel modes behind the map, one for each target layer, with the method's own rank and centring.

        Args:
            input_tensor: images, as for a call; the errors are those of a call too.
        """
        self._check_images(input_tensor)
        self._warn_of_training()
        with torch.no_grad():
            self.outputs = self.activations_and_grads(input_tensor.to(self.device))
            self._check_feature_maps(input_tensor)
            return [
                channel_modes(features, rank=self.rank, center=self.center, engine=self.engine)
                for features in self.activations_and_grads.activations
            ]

    def forward(
        self, input_tensor: Tensor, targets: list[Any] | None = None, eigen_smooth: bool = False
    ) -> NDArray[np.float32]:
        self._check_images(input_tensor)
        self._warn_of_training()
        with torch.no_grad():
            # An empty list: given None, the host reads the model's output to choose targets.
            targets = [] if targets is None else targets
            maps: NDArray[np.float32] = super().forward(input_tensor, targets, eigen_smooth)
        return maps

    def forward_augmentation_smoothing(
        self, input_tensor: Tensor, targets: list[Any] | None = None, eigen_smooth: bool = False
    ) -> NDArray[np.float32]:
        self._check_images(input_tensor)  # before they are transformed: forward sees them only afterwards
        maps: NDArray[np.float32] = super().forward_augmentation_smoothing(input_tensor, targets, eigen_smooth)
        return maps

    def compute_cam_per_layer(
        self, input_tensor: Tensor, targets: list[Any] | None, eigen_smooth: bool
    ) -> list[NDArray[np.float32]]:
        self._check_feature_maps(input_tensor)
        # If the host's `detach` is set, get_cam_image gets NumPy arrays, which subclasses that override it expect.
        self.detach = getattr(self.get_cam_image, "__func__", None) is not LabelFreeCAM.get_cam_image
        maps: list[NDArray[np.float32]] = super().compute_cam_per_layer(input_tensor, targets, eigen_smooth)
        return maps

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: list[Any] | None,
        activations: Tensor | NDArray[np.floating[Any]],
        grads: object,
        eigen_smooth: bool = False,
    ) -> NDArray[np.float32]:
        features = self._recorded(activations, target_layer)
        # The caller's autocast is meant for the network: here it would round products to half precision.
        with torch.autocast(features.device.type, enabled=False):
            maps = self.saliency(features)
        shape = tuple(maps.shape) if isinstance(maps, Tensor) else None
        one_each = shape is not None and len(shape) == features.dim() - 1 and shape[0] == len(features)
        if shape is None or (self._size_is_the_images and not one_each):
            raise BadTypeError(
                f"expected maps as a tensor, batch x spatial, from {type(self).__name__}.saliency for features "
                f"{tuple(features.shape)}, got {shape or type(maps).__name__}"
            )
        maps = maps.cpu().double()
        if not all_finite(maps):
            raise BadValueError(f"expected finite maps from {type(self).__name__}.saliency, got NaN or Inf")
        finished: NDArray[np.float32] = scaled(maps.clamp_min(0)).float().numpy()
        return finished

    def _recorded(self, activations: Tensor | NDArray[np.floating[Any]], layer: nn.Module) -> Tensor:
        """Return feature maps that `saliency` can take: those of our own recorder as they are, others made finite."""
        recorder = self.activations_and_grads
        if not isinstance(activations, Tensor):
            activations = torch.from_numpy(np.ascontiguousarray(activations))
        elif isinstance(recorder, FeatureRecorder) and any(activations is ours for ours in recorder.activations):
            return activations
        return feature_maps(activations, Source(self.model, layer, self.reshape_transform))

    def aggregate_multi_layers(self, cam_per_target_layer: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        if len(cam_per_target_layer) > 1:
            # The mean of several layers' maps may be flat: the host would scale its rounding errors up.
            stacked = torch.from_numpy(np.concatenate(cam_per_target_layer, axis=1))
            cam_per_target_layer = [scaled(stacked.mean(1, keepdim=True)).numpy()]
        maps: NDArray[np.float32] = super().aggregate_multi_layers(cam_per_target_layer)
        return maps

    def __call__(
        self,
        input_tensor: Tensor,
        targets: list[Any] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> NDArray[np.float32]:
        maps: NDArray[np.float32] = super().__call__(input_tensor, targets, aug_smooth, eigen_smooth)
        return maps

    def _warn_of_training(self) -> None:
        if getattr(self.model, "training", False):
            warnings.warn(
                f"{type(self.model).__name__} was put into training mode after the CAM object was made: maps vary with "
                "the batch, and running statistics change; call model.eval() first",
                stacklevel=2,
            )

    def _check_images(self, images: object) -> None:
        if not self._size_is_the_images:
            return
        if not isinstance(images, Tensor):
            raise BadTypeError(
                f"expected images as a torch.Tensor, batch x channels x height x width, got {type(images).__name__}: "
                "put each picture through the model's preprocessing, and the tensors through torch.stack"
            )
        check_kind(images, "images")
        if images.dim() not in (4, 5) or 0 in images.shape:
            raise BadValueError(
                "expected images as batch x channels x height x width (or batch x channels x depth x height x width), "
                f"none of them empty, got {tuple(images.shape)}: a single picture needs images[None]"
            )

    def _check_feature_maps(self, images: Tensor) -> None:
        if self._size_is_the_images:
            for layer, features in zip(self.target_layers, self.activations_and_grads.activations, strict=False):
                check_maps_of(features, images, Source(self.model, layer, self.reshape_transform))

    @property
    def _size_is_the_images(self) -> bool:
        """Whether maps are scaled to the images' size: not if `get_target_width_height` was replaced."""
        return getattr(self.get_target_width_height, "__func__", None) is _SIZE_OF_THE_IMAGES

    def __repr__(self) -> str:
        layers = ", ".join(Source(self.model, layer).name for layer in self.target_layers)
        return f"<{type(self).__name__} of {type(self.model).__name__} at {layers}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks. Unlike the host's, this `__exit__` does not swallow an IndexError raised in the block."""
        self.activations_and_grads.release()

    def __del__(self) -> None:
        # An object whose construction failed has nothing to release.
        if hasattr(self, "activations_and_grads"):
            self.activations_and_grads.release()


# BaseCAM is named again among the bases of each method, so that BaseCAM.__subclasses__(), from which some programs make
# their lists of methods, contains them.
class TSM(LabelFreeCAM, BaseCAM):
    r"""Tucker Saliency Map (arXiv 2410.23072): $|a_1^\top F_{(1)}|$, F not centred.

    Args:
        model: the network. It is put into eval mode, as by every CAM class of the host.
        target_layers: a list of the layers to explain; their maps are averaged.
        reshape_transform: turns a layer's output into batch x channels x height x width, e.g. for ViT tokens.
        rank: multilinear rank of the Tucker decomposition, see `channel_modes`; None is full rank, as in the paper.
        engine: "torch", or "tensorly" for TensorLy's own decomposition, one image at a time: slow, with the same map.
        tta_transforms: a `ttach.Compose` for `aug_smooth=True`; None for the host's own.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message says what was expected.

    Warns:
        UserWarning: `target_layers` is not a list but a container of several layers, whose maps are averaged.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> with TSM(model, [model[1]]) as cam:
        ...     cam(torch.rand(2, 3, 32, 32)).shape
        (2, 32, 32)
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Iterable[nn.Module],
        reshape_transform: ReshapeTransform | None = None,
        *,
        rank: Rank = None,
        engine: Engine = "torch",
        tta_transforms: Any = None,
    ) -> None:
        check_rank(rank)
        check_choice("engine", engine, Engine)
        super().__init__(model, target_layers, reshape_transform, tta_transforms=tta_transforms)
        self.rank, self.engine = rank, engine

    def saliency(self, features: Tensor) -> Tensor:
        return leading_map(features, rank=self.rank, engine=self.engine)


class MTSM(LabelFreeCAM, BaseCAM):
    r"""Multivector Tucker Saliency Map (arXiv 2410.23072): $|\sum_i s_i\, a_i^\top F_{(1)}|$, F not centred.

    Args:
        combine: "signed" is the paper's sum, whose vectors need a sign rule (TensorLy's, see `ChannelModes`). "energy"
            is $\sqrt{\sum_i (s_i\, a_i^\top F_{(1)})^2}$, which needs no sign rule and is steadier under noise.

    The other arguments are those of `TSM`.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Iterable[nn.Module],
        reshape_transform: ReshapeTransform | None = None,
        *,
        rank: Rank = None,
        combine: Combine = "signed",
        engine: Engine = "torch",
        tta_transforms: Any = None,
    ) -> None:
        check_rank(rank)
        check_choice("engine", engine, Engine)
        check_choice("combine", combine, Combine)
        super().__init__(model, target_layers, reshape_transform, tta_transforms=tta_transforms)
        self.rank, self.engine, self.combine = rank, engine, combine

    def saliency(self, features: Tensor) -> Tensor:
        return combined_map(features, combine=self.combine, rank=self.rank, engine=self.engine)


class MultivecEigenCAM(LabelFreeCAM, BaseCAM):
    r"""Multivec-EigenCAM (arXiv 2410.23072): $|\sum_i s_i\, u_i^\top F_c|$ from the SVD of the centred unfolding $F_c$.

    For `combine` and the errors see `MTSM`.
    """

    center = True

    def __init__(
        self,
        model: nn.Module,
        target_layers: Iterable[nn.Module],
        reshape_transform: ReshapeTransform | None = None,
        *,
        combine: Combine = "signed",
        tta_transforms: Any = None,
    ) -> None:
        check_choice("combine", combine, Combine)
        super().__init__(model, target_layers, reshape_transform, tta_transforms=tta_transforms)
        self.combine = combine

    def saliency(self, features: Tensor) -> Tensor:
        return combined_map(features, combine=self.combine, center=True)


class LaFAM(LabelFreeCAM, BaseCAM):
    """LaFAM (Karjauv and Albayrak 2024, arXiv 2407.06059): the mean of the channels, minus its minimum; a peer."""

    def saliency(self, features: Tensor) -> Tensor:
        return _above_minimum(rescale_extremes(features.double())[0].mean(1))


class GAPWeighted(LabelFreeCAM, BaseCAM):
    r"""$|\sum_c \bar F_c F_c|$, each channel weighted by its mean over the positions (global average pooling).

    This is exactly one step of power iteration on the positions' Gram matrix, from the uniform vector towards TSM's
    map. It is here for comparison: it shows what TSM's decomposition adds.
    """

    def saliency(self, features: Tensor) -> Tensor:
        unfolding = rescale_extremes(features.double())[0].flatten(2)
        return (unfolding.mean(2, keepdim=True).mT @ unfolding).abs().view_as(features[:, 0])


def scaled(maps: Tensor) -> Tensor:
    """Scale each map to [0, 1]; a map whose contrast is only rounding errors becomes zeros.

    The host's scale_cam_image rounds to float32 before it subtracts the minimum, and divides by the range plus 1e-7.
    That would show the rounding errors of a map of low contrast, and flatten the maps of weak features.
    """
    above = _above_minimum(maps)
    peaks = above.amax(tuple(range(1, maps.dim())), keepdim=True)
    return above / torch.where(peaks > 0, peaks, 1)


def _above_minimum(maps: Tensor) -> Tensor:
    """Return each map minus its minimum; zeros if its contrast is only rounding errors."""
    axes = tuple(range(1, maps.dim()))
    lows, peaks = maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)
    return torch.where(peaks - lows > _MAP_TOLERANCE * torch.maximum(peaks, -lows), maps - lows, 0)


def _listed(target_layers: Iterable[nn.Module], stacklevel: int) -> list[nn.Module]:
    """Return the layers in a list; like the host, accept anything that can be iterated over."""
    layers = list_of_layers(target_layers, "target_layers")
    if len(layers) > 1 and not isinstance(target_layers, (list, tuple)):
        warnings.warn(
            f"target_layers is a {type(target_layers).__name__} of {len(layers)} layers, whose maps are averaged: "
            "put the layers that you mean in brackets, [layer]",
            stacklevel=stacklevel,
        )
    return layers


def _check_construction(model: nn.Module, reshape_transform: object, tta_transforms: object) -> None:
    if isinstance(model, type) or not all(callable(getattr(model, name, None)) for name in ("eval", "parameters")):
        raise BadTypeError(
            f"expected model as a torch.nn.Module, or a callable with eval and parameters, got {model!r}"
        )
    check_parameters(model)
    if reshape_transform is not None and not callable(reshape_transform):
        raise BadTypeError(f"expected reshape_transform as a callable or None, got {type(reshape_transform).__name__}")
    if tta_transforms is not None and not isinstance(tta_transforms, Compose):
        raise BadTypeError(f"expected tta_transforms as a ttach.Compose or None, got {type(tta_transforms).__name__}")
