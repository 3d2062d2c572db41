"""Images, a model and methods in, one row of scores for each image and method out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from pytorch_grad_cam.base_cam import BaseCAM
from torch import Tensor, nn

from tucker_cam.activations import ReshapeTransform, record
from tucker_cam.evaluation import metrics
from tucker_cam.evaluation.controls import CONTROLS, control_maps
from tucker_cam.evaluation.metrics import Score
from tucker_cam.evaluation.scores import embedding_similarity, probability_and_similarity
from tucker_cam.explanations.maps import OnePass

Group = Literal["localisation", "drop", "curves", "road", "statistics"]


class Measure(NamedTuple):
    """A column of the results.

    Attributes:
        column: its name.
        group: the metrics it belongs to.
        title: for people.
        better: "higher", "lower", or "" where it is neither.
        of: from maps and masks, batch x height x width, to its value for each image; None for what takes the model's
            scores, which several measures share.
    """

    column: str
    group: Group
    title: str
    better: Literal["higher", "lower", ""]
    of: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def heading(self) -> str:
        """Its title, and below it which of two numbers is better."""
        return f"{self.title}\n{self.better or 'neither'} is better"


MEASURES = (
    Measure("energy_in_mask", "localisation", "energy in the object", "higher", metrics.energy_in_mask),
    Measure("pointing_game", "localisation", "pointing game", "higher", metrics.pointing_game),
    Measure("best_threshold_iou", "localisation", "IoU, best threshold", "higher", metrics.best_threshold_iou),
    Measure("best_cut_iou", "localisation", "IoU, best cut (area-matched)", "higher", metrics.best_cut_iou),
    Measure("otsu_iou", "localisation", "IoU, Otsu's threshold", "higher", metrics.otsu_iou),
    Measure("probability_drop", "drop", "probability: drop, %", "lower"),
    Measure("probability_increase", "drop", "probability: increase, %", "higher"),
    Measure("probability_gain", "drop", "probability: gain, %", "higher"),
    Measure("probability_drop_area_matched", "drop", "probability: drop, %, area-matched", "lower"),
    Measure("probability_increase_area_matched", "drop", "probability: increase, %, area-matched", "higher"),
    Measure("probability_gain_area_matched", "drop", "probability: gain, %, area-matched", "higher"),
    # An image's similarity with itself is 1 already: it can neither increase nor gain.
    Measure("similarity_drop", "drop", "embedding: drop, %", "lower"),
    Measure("similarity_drop_area_matched", "drop", "embedding: drop, %, area-matched", "lower"),
    Measure("probability_insertion", "curves", "probability: insertion", "higher"),
    Measure("probability_deletion", "curves", "probability: deletion", "lower"),
    Measure("similarity_insertion", "curves", "embedding: insertion", "higher"),
    Measure("similarity_deletion", "curves", "embedding: deletion", "lower"),
    Measure("probability_road", "road", "probability: ROAD", "higher"),
    Measure("similarity_road", "road", "embedding: ROAD", "higher"),
    Measure("mean_saliency", "statistics", "mean of the map", "", lambda maps, _: metrics.mean_saliency(maps)),
    Measure("energy_in_top", "statistics", "energy in its top 10 %", "", lambda maps, _: metrics.energy_in_top(maps)),
)


@dataclass(frozen=True)
class Subject:
    """What is explained, and by what its explanations are judged.

    Attributes:
        model: in eval mode.
        layer: the target layer.
        embedding_layer: whose pooled maps are compared in the label-free scores.
        classifies: whether the model returns logits, batch x classes.
        reshape_transform: turns the target layer's output into maps, as for the CAM classes.
        embedding_transform: the same for the embedding layer's.
    """

    model: nn.Module
    layer: nn.Module
    embedding_layer: nn.Module
    classifies: bool
    reshape_transform: ReshapeTransform | None = None
    embedding_transform: ReshapeTransform | None = None

    @property
    def score_names(self) -> tuple[str, ...]:
        return ("probability", "similarity") if self.classifies else ("similarity",)

    def one_pass(self, images: Tensor) -> OnePass:
        """Return the forward pass of these images that all methods share."""
        return OnePass(self.model, [self.layer], self.reshape_transform, images)

    def score(self, one_pass: OnePass) -> Score:
        """Return the score by which maps of a pass's images are judged, batch x `score_names`."""
        images, layer, transform = one_pass.images, self.embedding_layer, self.embedding_transform
        if layer is self.layer and transform == self.reshape_transform:
            output, (features,) = one_pass.output_and_features()
        else:
            output, features = record(self.model, layer, images, transform)
        if self.classifies:
            return probability_and_similarity(self.model, images, layer, transform, known=(output, features))
        similarity = embedding_similarity(self.model, images, layer, transform, known=(output, features))
        return lambda these: similarity(these)[:, None]


def measures(groups: Collection[Group], score_names: Sequence[str]) -> list[Measure]:
    """Return the columns of these groups of metrics; the map's statistics always stand among them."""
    unknown = tuple(f"{name}_" for name in ("probability", "similarity") if name not in score_names)
    return [
        measure
        for measure in MEASURES
        if measure.group in (*groups, "statistics") and not measure.column.startswith(unknown)
    ]


def saliency_maps(
    one_pass: OnePass, names: Sequence[str], methods: Mapping[str, Callable[..., BaseCAM]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the maps of each method, in order, then those of the controls; float32 in [0, 1], on the images' device.

    A method that fails on these features, since its decomposition does not converge, gives NaN.
    """
    images = one_pass.images
    for name, build in methods.items():
        try:
            maps = torch.as_tensor(one_pass.maps(build), device=images.device)
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            maps = torch.full_like(images[:, 0], torch.nan)
        yield name, maps
    _, (features,) = one_pass.output_and_features()
    height, width = features.shape[-2:]
    size = (images.shape[-2], images.shape[-1])
    for name in CONTROLS:
        maps = control_maps(name, pictures=names, size=size, resolution=(height, width))
        yield name, maps.to(images.device)


def compare(
    images: Tensor,
    masks: Tensor,
    names: Sequence[str],
    subject: Subject,
    methods: Mapping[str, Callable[..., BaseCAM]],
    columns: Sequence[Measure],
) -> Iterator[tuple[str, Tensor, dict[str, list[float]]]]:
    """Yield for each method, then for each control, its maps and the values of the columns, one for each image.

    Args:
        images: the network's input, batch x channels x height x width.
        masks: bool, batch x height x width; where one is empty, its localisation is NaN.
        names: of the images.
        subject: what is explained.
        methods: classes of the host's kind, by name.
        columns: as of `measures`; NaN for a map with values that are not finite.
    """
    with subject.one_pass(images) as one_pass:
        score = subject.score(one_pass)
        whole = score(images)
        for name, maps in saliency_maps(one_pass, names, methods):
            yield name, maps, _values(maps, images, masks, score, whole, subject.score_names, columns)


def _values(
    maps: Tensor,
    images: Tensor,
    masks: Tensor,
    score: Score,
    whole: Tensor,
    score_names: Sequence[str],
    columns: Sequence[Measure],
) -> dict[str, list[float]]:
    broken = ~maps.flatten(1).isfinite().all(1)
    maps = maps.masked_fill(broken[:, None, None], 0)
    values = {column.column: column.of(maps, masks) for column in columns if column.of is not None}
    groups = {column.group for column in columns}
    scored: dict[str, Tensor] = {}
    if "drop" in groups:
        change = None
        for suffix, shown in (("", maps), ("_area_matched", metrics.area_matched(maps))):
            # The uniform map is its own area-matched one.
            if change is None or not torch.equal(shown, maps):
                change = metrics.confidence_change(images, shown, score, whole=whole)
            scored |= {f"{kind}{suffix}": each for kind, each in change._asdict().items()}
    if "curves" in groups:
        scored["insertion"] = metrics.insertion_auc(images, maps, score, baseline=metrics.blurred(images))
        scored["deletion"] = metrics.deletion_auc(images, maps, score, baseline=metrics.mean_colour(images))
    if "road" in groups:
        scored["road"] = metrics.road(images, maps, score)
    for kind, by_score in scored.items():
        values |= {f"{name}_{kind}": by_score[:, index] for index, name in enumerate(score_names)}
    return {column.column: values[column.column].masked_fill(broken, torch.nan).tolist() for column in columns}
