"""A network in, scores of images out: what faithfulness is measured by, with a label or without one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from tucker_cam.activations import ReshapeTransform, record
from tucker_cam.errors import BadTypeError
from tucker_cam.evaluation.metrics import Score


def class_probability(model: nn.Module, classes: Tensor) -> Score:
    """Score images by the softmax probability of a class each, in [0, 1].

    Args:
        model: a classifier, in eval mode, that returns logits, batch x classes.
        classes: of each image, batch; e.g. the ones predicted for the whole images.

    Returns:
        A score, batch.

    Raises:
        TypeError: the model returns no logits.
    """

    def score(images: Tensor) -> Tensor:
        with torch.no_grad():
            return _probability(model(images), classes)

    return score


def embedding_similarity(
    model: nn.Module,
    images: Tensor,
    layer: nn.Module | None = None,
    reshape_transform: ReshapeTransform | None = None,
    *,
    known: tuple[object, object] | None = None,
) -> Score:
    """Score images by the cosine similarity of their embedding with that of the whole `images`, in [-1, 1].

    It needs no label, so it also stands for self-supervised networks.

    Args:
        model: a network in eval mode.
        images: whole, batch x channels x height x width.
        layer: whose feature maps, averaged over their positions, are the embedding; None for the model's output,
            batch x features or batch x channels x spatial.
        reshape_transform: as of the CAM classes, for the layer's tokens.
        known: the model's output for `images` and the layer's feature maps, where a forward pass has been made.

    Returns:
        A score, batch; 1 for `images` themselves.

    Raises:
        TypeError: without a layer, the model returns no such tensor.
    """

    def embedding(these: Tensor) -> Tensor:
        with torch.no_grad():
            if layer is None:
                return _pooled(model(these))
            return _pooled(record(model, layer, these, reshape_transform)[1])

    whole = embedding(images) if known is None else _pooled(known[1])
    return lambda these: cosine_similarity(whole if these is images else embedding(these), whole)


def probability_and_similarity(
    model: nn.Module,
    images: Tensor,
    layer: nn.Module,
    reshape_transform: ReshapeTransform | None = None,
    *,
    known: tuple[object, object] | None = None,
) -> Score:
    """Give both scores, of the classes predicted for `images` and of the layer's embedding, from one forward pass.

    Args:
        model: see `class_probability`.
        images: see `embedding_similarity`.
        layer: see `embedding_similarity`.
        reshape_transform: see `embedding_similarity`.
        known: see `embedding_similarity`.

    Returns:
        A score, batch x 2: the probability and the similarity.

    Raises:
        TypeError: see `class_probability`.
    """
    of_images: tuple[object, object] = known or record(model, layer, images, reshape_transform)
    classes, whole = _logits(of_images[0]).argmax(1), _pooled(of_images[1])

    def score(these: Tensor) -> Tensor:
        output, features = of_images if these is images else record(model, layer, these, reshape_transform)
        return torch.stack([_probability(output, classes), cosine_similarity(_pooled(features), whole)], dim=1)

    return score


def _pooled(features: object) -> Tensor:
    if not isinstance(features, Tensor) or features.dim() not in (2, 4, 5):
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise BadTypeError(
            f"expected an embedding, batch x features or batch x channels x spatial, got {found}: name the layer, and "
            "for tokens a reshape_transform"
        )
    return features.float() if features.dim() == 2 else features.float().flatten(2).mean(2)


def _probability(logits: object, classes: Tensor) -> Tensor:
    return _logits(logits).softmax(1).gather(1, classes[:, None]).squeeze(1)


def _logits(output: object) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BadTypeError(
            f"expected logits, batch x classes, of two classes at least from the model, got {found}: for a model that "
            "does not classify use embedding_similarity, or classifies=False in its Network"
        )
    return output.float()
