"""Turns what a forward hook saw into finite float feature maps, batch x channels x spatial, on the same device.

A label-free method needs nothing else from the model: no gradient, no output, no copy.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from threading import Lock, local
from typing import Any, NamedTuple, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tucker_cam.arguments import all_finite, check_features, list_of_layers
from tucker_cam.errors import BadValueError

ReshapeTransform = Callable[[Any], Tensor]


class Source(NamedTuple):
    """Where feature maps come from. Finding the name visits all modules, so it is done only when a message needs it."""

    model: object
    layer: object
    reshape_transform: ReshapeTransform | None = None

    @property
    def name(self) -> str:
        named = self.model.named_modules() if isinstance(self.model, nn.Module) else ()
        name = next((name for name, module in named if module is self.layer), "") or type(self.layer).__name__
        return f"`{name}`" if self.reshape_transform is None else f"the reshape_transform after `{name}`"

    def __str__(self) -> str:
        return f"feature maps from {self.name}"


class _Recorded(NamedTuple):
    """A layer's output, and how often it had been written to when it was recorded; None for a copy."""

    features: Tensor
    version: int | None

    @property
    def is_rewritten(self) -> bool:
        return self.version is not None and self.features._version != self.version


class _Running(local):  # the compiler understands this, but not the number of a thread
    """The images of this thread's forward pass and what was recorded so far; None if no pass is running."""

    images: _Recorded | None = None
    recorded: dict[nn.Module, _Recorded] | None = None

    def __reduce__(self) -> tuple[type[_Running], tuple[()]]:
        return _Running, ()


class _Uncompiled:
    """Runs models uncompiled, because what `torch.compile` makes of them skips hooks.

    All threads share the compiler's stance, so the last one to leave resets it.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._stance = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            # If the compiler is not loaded, nothing is compiled; loading it takes seconds.
            if "torch._dynamo" in sys.modules:
                # If the caller itself is being compiled, the stance cannot change, but then hooks are seen.
                with suppress(RuntimeError):
                    self._stance.enter_context(torch.compiler.set_stance("force_eager"))

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._stance.close()


UNCOMPILED = _Uncompiled()
# Layers whose output was found to be rewritten by a later module.
_REWRITTEN: WeakSet[nn.Module] = WeakSet()


class FeatureRecorder:
    """Records the output of each target layer while the model runs.

    It replaces the host's `ActivationsAndGradients`, with the same attribute names, and differs from it in three ways.
    The recorded maps are the layer's own output, even if a later module works in place. They stay on the model's
    device. And they are in the order of `target_layers`, with the first call of each layer; the host's are in the order
    of execution.

    An output is copied only if it is rewritten later, which PyTorch's count of writes to a tensor shows. In that case
    the model runs once more, and from then on every recorder copies that layer's output. It is copied from the start if
    the count or a second run could not tell: under `inference_mode`, in training mode, and for images that are not a
    tensor or that the model itself rewrites.

    Attributes:
        activations: after a call, the feature maps of each target layer.
        gradients: always empty; the host reads it.
    """

    def __init__(
        self, model: nn.Module, target_layers: Sequence[nn.Module], reshape_transform: ReshapeTransform | None
    ) -> None:
        self.model = model
        self.target_layers = list(target_layers)
        self.reshape_transform = reshape_transform
        self.activations: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self._running = _Running()
        self.handles: list[RemovableHandle] = []
        try:
            for layer in dict.fromkeys(self.target_layers):
                self.handles.append(layer.register_forward_hook(self.save_activation))
        except Exception:  # a scripted module accepts no hooks
            self.release()
            raise

    def __call__(self, images: Any) -> Any:
        self.activations = []
        outputs, recorded = self._run(images)
        while rewritten := {layer for layer, found in recorded.items() if found.is_rewritten}:
            _REWRITTEN.update(rewritten)
            del outputs, recorded
            outputs, recorded = self._run(images)
        for layer in self.target_layers:
            if layer not in recorded:
                raise BadValueError(
                    f"expected the forward pass to reach the target layer {Source(self.model, layer).name}, but its "
                    "hook never fired in this thread: choose a layer that the model calls, of the very object that is "
                    "passed as model (not a DataParallel around it), or a part of it where it is a container that the "
                    "model loops over; and call the CAM inside its `with` block, which takes the hooks off at its end"
                )
        found = {layer: _finite(recorded[layer].features, self._source(layer)) for layer in recorded}
        self.activations = [found[layer] for layer in self.target_layers]
        return outputs

    def _run(self, images: Any) -> tuple[Any, dict[nn.Module, _Recorded]]:
        recorded: dict[nn.Module, _Recorded] = {}
        traced = isinstance(images, Tensor) and not images.is_inference() and not getattr(self.model, "training", True)
        self._running.images = _Recorded(images, images._version) if traced else None
        self._running.recorded = recorded
        try:
            with UNCOMPILED:
                return self.model(images), recorded
        finally:
            self._running.images = self._running.recorded = None

    def _source(self, layer: nn.Module) -> Source:
        return Source(self.model, layer, self.reshape_transform)

    def release(self) -> None:
        """Drop the recorded feature maps and remove the hooks from the model."""
        self.activations = []
        while self.handles:
            self.handles.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def save_activation(self, layer: nn.Module, inputs: object, output: object) -> None:
        """Record a layer's output; this is the hook."""
        # The hook also fires when SESS or another thread runs the model; that is not recorded.
        recorded = self._running.recorded
        if recorded is not None and layer not in recorded:
            features = output if self.reshape_transform is None else self.reshape_transform(output)
            features = check_features(features, self._source(layer)).detach()
            if layer in _REWRITTEN or not self._may_be_kept(features):
                recorded[layer] = _Recorded(features.clone(), None)
            else:
                recorded[layer] = _Recorded(features, features._version)

    def _may_be_kept(self, features: Tensor) -> bool:
        """Return whether a later write to these features would show, and the images allow a second run then."""
        images = self._running.images
        if images is None or images.is_rewritten or features.is_inference():
            return False
        return features.untyped_storage().data_ptr() != images.features.untyped_storage().data_ptr()


def features(
    model: nn.Module,
    layers: Sequence[nn.Module],
    images: Tensor,
    reshape_transform: ReshapeTransform | None = None,
) -> list[Tensor]:
    """Run the model once, without gradients, and return the outputs of some of its layers; no hook stays behind.

    Args:
        model: it stays in the mode that it is in.
        layers: modules that the model calls.
        images: batch x channels x spatial, on the model's device.
        reshape_transform: turns a layer's output into batch x channels x spatial, as for the CAM classes.

    Returns:
        For each layer its output as the layer put it out, batch x channels x spatial, on the model's device, at least
        float32; a copy only if the recorder needs one. Non-finite numbers become zero, with a warning.

    Raises:
        TypeError, ValueError: a layer's output is not feature maps, or the layer is not reached.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> (maps,) = features(model, [model[1]], torch.zeros(2, 3, 6, 7))
        >>> maps.shape
        torch.Size([2, 8, 4, 5])
    """
    return output_and_features(model, list_of_layers(layers, "layers"), images, reshape_transform)[1]


def output_and_features(
    model: nn.Module, layers: Sequence[nn.Module], images: Tensor, reshape_transform: ReshapeTransform | None
) -> tuple[Any, list[Tensor]]:
    """Do the same as `features`, but also return the model's output."""
    with FeatureRecorder(model, layers, reshape_transform) as recorder, torch.no_grad():
        return recorder(images), recorder.activations


def feature_maps(features: object, source: Source) -> Tensor:
    """Return features from a source as feature maps: detached, finite, at least float32.

    Non-finite numbers become zero, with a warning that names the images. If the features are not feature maps, the
    errors are those of `check_features`.
    """
    return _finite(check_features(features, source).detach(), source)


def _finite(features: Tensor, source: Source) -> Tensor:
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if not all_finite(features):
        bad = ~features.isfinite()
        images = bad.flatten(1).any(1).nonzero().flatten().tolist()
        warnings.warn(
            f"{source.name} put out NaN or Inf for image {', '.join(map(str, images))} of the batch; "
            "these numbers count as zero",
            RuntimeWarning,
            stacklevel=3,
        )
        features = features.masked_fill(bad, 0)
    return features


def check_maps_of(features: Tensor, images: Tensor, source: Source) -> None:
    """Raise ValueError unless there is one set of feature maps for each image, with the images' spatial axes."""
    if features.dim() != images.dim():
        raise BadValueError(
            f"expected {source}, with the spatial axes of the images {tuple(images.shape)}, got "
            f"{tuple(features.shape)}: choose a layer before they are pooled, and for tokens, or to fold other axes, "
            "pass a reshape_transform"
        )
    # Tokens are laid out for pictures of one aspect ratio.
    aspect, (height, width) = getattr(source.reshape_transform, "aspect", None), images.shape[-2:]
    if aspect is not None and aspect != height / width:
        raise BadValueError(
            f"expected images {aspect:g} times as high as wide, for which {source.name} was made, got {height} x "
            f"{width}: find the layer with a batch of these, as explain does with a torch.nn.Module"
        )
    if len(features) != len(images):
        raise BadValueError(
            f"expected {source}, one set for each of {len(images)} images, got {len(features)}: choose a layer outside "
            "the part of the model that cuts images into windows or regions, or merge them in a reshape_transform"
        )
