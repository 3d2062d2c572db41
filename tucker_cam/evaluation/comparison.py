"""Scores methods by measures on a batch of pictures: one row of values for each picture and method."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pytorch_grad_cam.base_cam import BaseCAM
from torch import Tensor
from torch.nn.functional import cosine_similarity

from tucker_cam.activations import output_and_features
from tucker_cam.errors import BadTypeError, BadValueError, Failure, TuckerCamError
from tucker_cam.evaluation.controls import CONTROLS, control_maps
from tucker_cam.evaluation.metrics import Judged, Measure, Score
from tucker_cam.evaluation.results import Row
from tucker_cam.explanations.border import BorderCheck
from tucker_cam.explanations.maps import OnePass
from tucker_cam.models import LoadedModel, Network
from tucker_cam.text import kind_and_line

Builder = Callable[..., BaseCAM]
"""A method's class, or a function that makes its object, called with the model, layers and a reshape_transform."""


def score_names(network: Network) -> tuple[str, ...]:
    return ("probability", "similarity") if network.classifies else ("similarity",)


def score_of(loaded: LoadedModel, one_pass: OnePass) -> Score:
    """Return a function that scores changed images by how the network sees them, compared with the whole images.

    In one forward pass, the function computes batch x `score_names`: if the network classifies, the softmax probability
    of the class predicted for the whole image, in [0, 1]; and, needing no label, the cosine similarity between the
    embedding and that of the whole image, in [-1, 1]. The embedding is the mean over positions of the last layer with a
    spatial map, whichever layer is explained, so that scores of different layers can be compared.
    """
    whole, layer = one_pass.images, loaded.last_layer

    def run(images: Tensor) -> tuple[Any, list[Tensor]]:
        # A float32 map makes an image in half precision float32 too.
        return output_and_features(loaded.model, [layer.module], images.to(whole.dtype), layer.reshape_transform)

    if layer.module is loaded.target_layers[0] and layer.reshape_transform == loaded.reshape_transform:
        output, (features,) = one_pass.output_and_features()
    else:
        output, (features,) = run(whole)
    classes = _logits(output).argmax(1, keepdim=True) if loaded.classifies else None

    def score(images: Tensor) -> Tensor:
        answer, (seen,) = (output, [features]) if images is whole else run(images)
        similarity = cosine_similarity(pooled(seen), pooled(features))[:, None]
        if classes is None:
            return similarity
        return torch.cat([_logits(answer).softmax(1).gather(1, classes), similarity], dim=1)

    return score


def pooled(features: Tensor) -> Tensor:
    """Return the embedding: the mean of feature maps over their positions, batch x channels."""
    return features.float().flatten(2).mean(2)


def _logits(output: object) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[1] < 2:
        raise BadTypeError(
            "expected logits of two classes or more from the model: if it does not classify, or has a single logit for "
            "two classes, set classifies=False in its Network"
        )
    return output.float()


def saliency_maps(
    one_pass: OnePass, names: Sequence[str], methods: Mapping[str, Builder]
) -> Iterator[tuple[str, Tensor, dict[int, Exception]]]:
    """Yield the name, maps and errors of each method, in order, and then of the controls.

    Maps are float32 in [0, 1], on the images' device. Errors are by the image's place, and a failed image's map is NaN.
    """
    images = one_pass.images
    for name, build in methods.items():
        maps, errors = one_pass.maps_or_errors(build)
        yield name, torch.as_tensor(maps, device=images.device), errors
    _, (features,) = one_pass.output_and_features()
    size, resolution = ((each.shape[-2], each.shape[-1]) for each in (images, features))
    for name in CONTROLS:
        yield name, control_maps(name, pictures=names, size=size, resolution=resolution).to(images.device), {}


def compare(
    images: Tensor,
    masks: Tensor,
    names: Sequence[str],
    loaded: LoadedModel,
    methods: Mapping[str, Builder],
    measures: Sequence[Measure],
    border: BorderCheck,
) -> tuple[list[Row], list[Failure]]:
    """Score the methods, then the controls, on pictures of one size; NaN where a map is not finite.

    A method that fails on a picture has no row for it.
    """
    rows: list[Row] = []
    failures: list[Failure] = []
    with OnePass(loaded, images) as one_pass:
        score = score_of(loaded, one_pass)
        whole = score(images)
        for method, maps, errors in saliency_maps(one_pass, names, methods):
            failures += [Failure(names[place], error, method) for place, error in errors.items()]
            if len(errors) == len(names):
                continue
            broken = ~maps.isfinite().flatten(1).all(1)
            maps = maps.masked_fill(broken[:, None, None], 0)
            judged = Judged(maps, masks, images, names, score, score_names(loaded), whole)
            # Measures that share a function, such as insertion of both scores, share its passes.
            functions = {measure.function: measure for measure in measures}
            found = {function: _numbers(measure, judged) for function, measure in functions.items()}
            values: dict[str, Tensor] = {}
            for measure in measures:
                of_scores = found[measure.function]
                one = of_scores[:, judged.score_names.index(measure.score)] if measure.score else of_scores
                values[measure.name] = one.masked_fill(broken.cpu(), torch.nan)
            # Rounded as in the CSV, so that a run that was resumed has the same summary.
            rows += [
                Row(picture, method, {name: float(f"{each[index]:.6g}") for name, each in values.items()})
                for index, picture in enumerate(names)
                if index not in errors
            ]
        border.warn_of(one_pass.output_and_features()[1][0])
    return rows, failures


def _numbers(measure: Measure, judged: Judged) -> Tensor:
    """Return a measure's numbers: one for each picture or, if the measure has a score, for each picture and score."""
    try:
        found = torch.as_tensor(measure.function(judged)).float().cpu()
    except TuckerCamError:
        raise
    except Exception as error:
        # From a user-defined measure.
        raise BadValueError(f"the measure {measure.name} failed ({kind_and_line(error)})") from error
    count = len(judged.names)
    wanted = (count, len(judged.score_names)) if measure.score else (count,)
    if found.shape != wanted:
        raise BadValueError(
            f"expected numbers of shape {wanted} from the measure {measure.name}, got {tuple(found.shape)}"
        )
    return found
