"""What a forward hook saw in, finite float feature maps out: batch x channels x spatial, on the device they were made.

A label-free method needs nothing else from the model: no gradient, no output, no copy on the CPU.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from threading import Lock, local
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tucker_cam.decomposition.modes import check_kind
from tucker_cam.errors import BadTypeError, BadValueError

ReshapeTransform = Callable[[Any], Tensor]


# How PyTorch's own errors speak of what is wrong with the images.
_OF_SHAPE = re.compile(r"channel|shape|size|dimension|elements", re.IGNORECASE)
_OF_DTYPE = re.compile(r"type|not implemented for", re.IGNORECASE)


class _Running(local):
    """This thread's forward pass.

    Attributes:
        recorded: what it has recorded so far; None while there is none.
        reached: whether it came as far as a target layer.
    """

    recorded: dict[nn.Module, Tensor] | None = None
    reached: bool = False

    def __reduce__(self) -> tuple[type[_Running], tuple[()]]:
        return _Running, ()


class _Uncompiled:
    """Runs models as they were written: what `torch.compile` made of them skips hooks.

    The compiler's stance is one for all threads, so the last to leave sets it back.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._stance = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            # Where the compiler is not loaded nothing is compiled, and to load it takes seconds.
            if "torch._dynamo" in sys.modules:
                # It keeps its stance where the caller is being compiled as well, and then it sees the hooks.
                with suppress(RuntimeError):
                    self._stance.enter_context(torch.compiler.set_stance("force_eager"))

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._stance.close()


_UNCOMPILED = _Uncompiled()


class FeatureRecorder:
    """Records what each target layer puts out while the model runs.

    It stands where the host's `ActivationsAndGradients` stood, under the same names, and differs from it in three
    ways. The recorded maps are copies, so that a module that works in place after the target layer cannot rewrite
    them; they stay on the model's device; and they come in the order of `target_layers`, the first call of each, where
    the host's come in the order of execution.

    Attributes:
        activations: after a call, the feature maps of each target layer.
        gradients: always empty; the host reads it.
        detach: the host's flag, off: tensors are handed on as they are, without moving them to the CPU.
    """

    detach = False

    def __init__(
        self, model: nn.Module, target_layers: Sequence[nn.Module], reshape_transform: ReshapeTransform | None
    ) -> None:
        self.model = model
        self.target_layers = list(target_layers)
        self.reshape_transform = reshape_transform
        self.activations: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self._running = _Running()
        self._sources = {layer: source_of(model, layer, reshape_transform) for layer in self.target_layers}
        self.handles: list[RemovableHandle] = [
            layer.register_forward_hook(self.save_activation) for layer in self._sources
        ]

    def __call__(self, images: Any) -> Any:
        self.clear()
        recorded: dict[nn.Module, Tensor] = {}
        self._running.recorded, self._running.reached = recorded, False
        try:
            with _UNCOMPILED:
                outputs = self.model(images)
        except RuntimeError as error:
            if not self._running.reached:
                _explain(error, self.model, images)
            raise
        finally:
            self._running.recorded = None
        for layer in self.target_layers:
            if layer not in recorded:
                raise BadValueError(
                    f"expected the forward pass to reach the target layer {source_of(self.model, layer)}, but its hook "
                    "never fired in this thread: choose a layer that the model calls, of the very object that is "
                    "passed as model, and one of those in it where it is a container that the model loops over; and "
                    "call the CAM inside its `with` block, which takes the hooks off at its end"
                )
        self.activations = [recorded[layer] for layer in self.target_layers]
        return outputs

    def clear(self) -> None:
        """Let go of the recorded feature maps."""
        self.activations = []

    def release(self) -> None:
        """Let go of the recorded feature maps and take the hooks off the model."""
        self.clear()
        while self.handles:
            self.handles.pop().remove()

    def save_activation(self, layer: nn.Module, inputs: object, output: object) -> None:
        """Record what a layer put out; the hook."""
        # It also fires when somebody else runs the model, as SESS or another thread does: not ours to record.
        recorded = self._running.recorded
        if recorded is not None and layer not in recorded:
            self._running.reached = True
            features = output if self.reshape_transform is None else self.reshape_transform(output)
            source = self._sources.get(layer) or source_of(self.model, layer, self.reshape_transform)
            recorded[layer] = feature_maps(features, source)

    def save_gradient(self, layer: nn.Module, inputs: object, output: object) -> None:
        """Do nothing: there are no gradients. The host's method records them."""


def _explain(error: RuntimeError, model: nn.Module, images: object) -> None:
    """Raise an error that names the images, where they are what the model's own error is about."""
    if isinstance(error, torch.OutOfMemoryError) or not isinstance(images, Tensor):
        return
    shape, parameter = tuple(images.shape), next(iter(model.parameters()), images)
    if len(shape) > 3 and shape[-1] <= 4 < shape[1] and _OF_SHAPE.search(str(error)):
        raise BadValueError(
            f"expected images with their channels second, got {shape}, on which the model failed: "
            "if their channels are last, pass images.movedim(-1, 1)"
        ) from error
    if images.dtype != parameter.dtype and _OF_DTYPE.search(str(error)):
        raise BadTypeError(
            f"expected images of the model's {parameter.dtype}, got {images.dtype}, on which the model failed: "
            f"pass images.to({parameter.dtype}), scaled as in training"
        ) from error


def features(
    model: nn.Module,
    layers: Sequence[nn.Module],
    images: Tensor,
    reshape_transform: ReshapeTransform | None = None,
) -> list[Tensor]:
    """Run the model once, without gradients, and return what its layers put out; no hook stays behind.

    Args:
        model: in the mode in which it is.
        layers: modules that the model calls.
        images: batch x channels x spatial, on the model's device.
        reshape_transform: turns a layer's output into batch x channels x spatial, as for the CAM classes.

    Returns:
        For each layer batch x channels x spatial, a copy on the model's device, at least float32. Non-finite numbers
        count as zero, with a warning.

    Raises:
        TypeError, ValueError: a layer puts out no feature maps, or is not reached.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> (maps,) = features(model, [model[1]], torch.zeros(2, 3, 6, 7))
        >>> maps.shape
        torch.Size([2, 8, 4, 5])
    """
    _, found = _record(model, layers, images, reshape_transform)
    return found


def record(
    model: nn.Module, layer: nn.Module, images: Tensor, reshape_transform: ReshapeTransform | None = None
) -> tuple[Any, Tensor]:
    """Run the model once, without gradients, and return its output and a layer's feature maps; no hook stays behind.

    Raises:
        TypeError, ValueError: see `feature_maps`; ValueError also if the forward pass does not reach the layer.
    """
    output, (found,) = _record(model, [layer], images, reshape_transform)
    return output, found


def _record(
    model: nn.Module, layers: Sequence[nn.Module], images: Tensor, reshape_transform: ReshapeTransform | None
) -> tuple[Any, list[Tensor]]:
    recorder = FeatureRecorder(model, layers, reshape_transform)
    try:
        with torch.no_grad():
            output = recorder(images)
        return output, recorder.activations
    finally:
        recorder.release()


def source_of(model: object, layer: object, reshape_transform: ReshapeTransform | None = None) -> str:
    """Return in words where feature maps come from, for messages."""
    named = model.named_modules() if isinstance(model, nn.Module) else ()
    name = next((name for name, module in named if module is layer), "") or type(layer).__name__
    return f"`{name}`" if reshape_transform is None else f"the reshape_transform after `{name}`"


def feature_maps(features: object, source: str) -> Tensor:
    """Return what a layer, or the reshape_transform after it, put out as feature maps of their own memory.

    Args:
        features: what came.
        source: where from, as of `source_of`.

    Returns:
        batch x channels x spatial (one axis or more); detached, at least float32. Non-finite numbers count as zero.

    Warns:
        RuntimeWarning: some images had non-finite numbers; it names them.

    Raises:
        TypeError: what came is no floating point tensor, or none of the usual kind.
        ValueError: it has no spatial axes, or an empty one.

    Example:
        >>> feature_maps(torch.ones(1, 2, 3, 4, dtype=torch.float16), "`conv`").dtype
        torch.float32
    """
    if not isinstance(features, Tensor):
        raise BadTypeError(
            f"expected one tensor of feature maps from {source}, got {type(features).__name__}: "
            "choose a layer inside it, or pick the tensor in a reshape_transform"
        )
    check_kind(features, f"feature maps from {source}")
    if not features.is_floating_point():
        raise BadTypeError(f"expected floating point feature maps from {source}, got {features.dtype}")
    shape = tuple(features.shape)
    if len(shape) < 3:
        raise _without_space(shape, source)
    if 0 in shape:
        raise BadValueError(f"expected feature maps without an empty axis from {source}, got {shape}")
    features = features.detach().to(torch.promote_types(features.dtype, torch.float32), copy=True)
    # One sum tells almost always that all is well; it can also overflow, so the numbers themselves decide.
    if not features.sum().isfinite():
        finite = features.isfinite()
        images = (~finite).flatten(1).any(1).nonzero().flatten().tolist()
        if images:
            warnings.warn(
                f"{source} put out NaN or Inf for image {', '.join(map(str, images))} of the batch; "
                "these numbers count as zero",
                RuntimeWarning,
                stacklevel=2,
            )
            features.masked_fill_(~finite, 0)
    return features


def check_maps_of(features: Tensor, images: Tensor, source: Callable[[], str]) -> None:
    """Raise ValueError unless these are one set of feature maps for each image, with the images' spatial axes.

    Args:
        features: as of `feature_maps`.
        images: batch x channels x height x width, or batch x channels x depth x height x width.
        source: gives what `source_of` does, for which all modules of a model are gone through.
    """
    shape = tuple(features.shape)
    if len(shape) not in (4, 5):
        raise _without_space(shape, source())
    if len(shape) != images.dim():
        raise BadValueError(
            f"expected feature maps with the images' spatial axes, got {shape} for images {tuple(images.shape)}: "
            "fold or drop the other axes in a reshape_transform"
        )
    if len(features) != len(images):
        raise BadValueError(
            f"expected one set of feature maps for each of {len(images)} images from {source()}, got {len(features)}: "
            "choose a layer outside the part of the model that cuts images into windows or regions, or merge them in a "
            "reshape_transform"
        )


def _without_space(shape: tuple[int, ...], source: str) -> ValueError:
    return BadValueError(
        f"expected feature maps with spatial axes (B, C, H, W) or (B, C, D, H, W) from {source}, got {shape}: "
        "choose a layer before the spatial axes are pooled, or for tokens pass a reshape_transform"
    )
