"""The methods as pytorch-grad-cam's users know them: classes that stand where `EigenCAM` stood.

Each is one projection of the feature maps; the host scales the map to [0, 1] and to the picture's size, averages
target layers and smooths by test-time augmentation. No other module subclasses it.
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

# What a map may be off, as a share of its largest value: less than this is no contrast.
_MAP_TOLERANCE = 1e-5
_SIZE_OF_THE_IMAGES = BaseCAM.get_target_width_height


class LabelFreeCAM(BaseCAM, ABC):
    """A saliency method that reads feature maps only: no label, no gradient, no model output.

    Subclasses say how feature maps become one map in `saliency`. The object keeps nothing but the features and the
    output of its last call: it may be used again on other images, and beside others on the same model.

    A call returns float32 NumPy, batch x height x width (or batch x depth x height x width for volumes), in [0, 1].
    `targets` and `eigen_smooth` are accepted and play no part; `aug_smooth` works as the host's. The model's output is
    kept in `outputs`, never read, and may be anything. A call raises TypeError or ValueError for images and feature
    maps that have no map; what the model itself raises comes through as it is.

    The maps are brought to the images' size, so there must be one set of feature maps for each image. Where
    `get_target_width_height` is replaced, by a subclass or on the object, the images may be whatever the model takes,
    and each set of feature maps becomes a map.
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
        # No layers for the host's own recorder, in whose place ours stands.
        super().__init__(
            model, [], reshape_transform, uses_gradients=False, tta_transforms=tta_transforms, detach=False
        )
        self.target_layers = layers
        self.activations_and_grads: FeatureRecorder = FeatureRecorder(model, layers, reshape_transform)

    @abstractmethod
    def saliency(self, features: Tensor) -> Tensor:
        """Turn features, batch x channels x spatial, into maps, batch x spatial: finite, not negative, of any scale."""

    def modes(self, input_tensor: Tensor) -> list[ChannelModes]:
        """Return each target layer's channel modes, of the method's own rank and centring: what is behind the map.

        Args:
            input_tensor: images, as for a call, which raises the same errors.
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
            # An empty list, since the host reads the model's output to choose targets where it is given None.
            targets = [] if targets is None else targets
            maps: NDArray[np.float32] = super().forward(input_tensor, targets, eigen_smooth)
        return maps

    def forward_augmentation_smoothing(
        self, input_tensor: Tensor, targets: list[Any] | None = None, eigen_smooth: bool = False
    ) -> NDArray[np.float32]:
        self._check_images(input_tensor)  # which are transformed before forward sees them
        maps: NDArray[np.float32] = super().forward_augmentation_smoothing(input_tensor, targets, eigen_smooth)
        return maps

    def compute_cam_per_layer(
        self, input_tensor: Tensor, targets: list[Any] | None, eigen_smooth: bool
    ) -> list[NDArray[np.float32]]:
        self._check_feature_maps(input_tensor)
        # The host's switch: with it get_cam_image is handed NumPy arrays, which is what those who override it expect.
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
        # Autocast, if the caller has it on, is for the network: here it would round the products to half precision.
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
        """Return feature maps that are fit for `saliency`: our own recorder's are, and another's are made so."""
        recorder = self.activations_and_grads
        if not isinstance(activations, Tensor):
            activations = torch.from_numpy(np.ascontiguousarray(activations))
        elif isinstance(recorder, FeatureRecorder) and any(activations is ours for ours in recorder.activations):
            return activations
        return feature_maps(activations, Source(self.model, layer, self.reshape_transform))

    def aggregate_multi_layers(self, cam_per_target_layer: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        if len(cam_per_target_layer) > 1:
            # Maps of different layers may have a flat mean, of which the host would scale the rounding errors.
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
        """Whether maps are brought to the images' size; not where a user put in a `get_target_width_height`."""
        return getattr(self.get_target_width_height, "__func__", None) is _SIZE_OF_THE_IMAGES

    def __repr__(self) -> str:
        layers = ", ".join(Source(self.model, layer).name for layer in self.target_layers)
        return f"<{type(self).__name__} of {type(self.model).__name__} at {layers}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the hooks off the model. The host's swallows an IndexError raised in the block; this one does not."""
        self.activations_and_grads.release()

    def __del__(self) -> None:
        # An object whose construction failed has nothing to release.
        if hasattr(self, "activations_and_grads"):
            self.activations_and_grads.release()


# BaseCAM is named again in the bases of each method, so that BaseCAM.__subclasses__(), of which some make their lists
# of methods, has them.
class TSM(LabelFreeCAM, BaseCAM):
    r"""Tucker Saliency Map (arXiv 2410.23072): $|a_1^\top F_{(1)}|$, F not centred.

    Args:
        model: the network; it is put into eval mode, as by every CAM class of the host.
        target_layers: a list of the layers whose feature maps are explained; their maps are averaged.
        reshape_transform: turns a layer's output into batch x channels x height x width, e.g. for ViT tokens.
        rank: multilinear rank of the Tucker decomposition, see `channel_modes`; None is full rank, as in the paper.
        engine: "torch", or "tensorly" for TensorLy's own decomposition, one image at a time: slow, the same map.
        tta_transforms: a `ttach.Compose` for `aug_smooth=True`; None for the host's own.

    Raises:
        TypeError, ValueError: an argument cannot be used; the message says what was expected.

    Warns:
        UserWarning: `target_layers` is no list but a container of several layers, whose maps are averaged.

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
        combine: "signed" is the paper's sum, whose vectors need a sign rule (TensorLy's, see `ChannelModes`);
            "energy" is $\sqrt{\sum_i (s_i\, a_i^\top F_{(1)})^2}$, which needs none and is steadier under noise.

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

    `combine` is that of `MTSM`, and so are the errors.
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
    """LaFAM (Karjauv and Albayrak 2024, arXiv 2407.06059): the mean of the channels above its minimum, a peer."""

    def saliency(self, features: Tensor) -> Tensor:
        return _above_minimum(rescale_extremes(features.double())[0].mean(1))


class GAPWeighted(LabelFreeCAM, BaseCAM):
    r"""$|\sum_c \bar F_c F_c|$, each channel weighted by its mean over the positions (global average pooling).

    Exactly one step of power iteration on the positions' Gram matrix from the uniform vector towards TSM's map: a peer
    that tells what TSM's decomposition adds.
    """

    def saliency(self, features: Tensor) -> Tensor:
        unfolding = rescale_extremes(features.double())[0].flatten(2)
        return (unfolding.mean(2, keepdim=True).mT @ unfolding).abs().view_as(features[:, 0])


def scaled(maps: Tensor) -> Tensor:
    """Scale each map to [0, 1]; one whose contrast is rounding errors becomes zeros.

    The host's scale_cam_image rounds to float32 before it subtracts the minimum, and divides by the range plus 1e-7:
    that would show the rounding errors of a map of low contrast, and flatten the maps of weak features.
    """
    above = _above_minimum(maps)
    peaks = above.amax(tuple(range(1, maps.dim())), keepdim=True)
    return above / torch.where(peaks > 0, peaks, 1)


def _above_minimum(maps: Tensor) -> Tensor:
    """Return each map less its minimum; zeros where its contrast is rounding errors."""
    axes = tuple(range(1, maps.dim()))
    lows, peaks = maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)
    return torch.where(peaks - lows > _MAP_TOLERANCE * torch.maximum(peaks, -lows), maps - lows, 0)


def _listed(target_layers: Iterable[nn.Module], stacklevel: int) -> list[nn.Module]:
    """Return the layers in a list, as the host iterates over whatever it is given."""
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
