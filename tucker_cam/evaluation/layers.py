"""Compares a model's layers by the maps that they give on pictures without labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate

from tucker_cam.activations import FeatureRecorder
from tucker_cam.cams import scaled
from tucker_cam.decomposition.projection import leading_map
from tucker_cam.errors import Failure
from tucker_cam.evaluation.comparison import pooled
from tucker_cam.evaluation.inputs import Model, go_through, load_for_pictures, read_pictures
from tucker_cam.evaluation.metrics import area_matched, energy_in_top
from tucker_cam.explanations.border import BorderCheck
from tucker_cam.explanations.explainer import CPU_BATCH
from tucker_cam.models import LoadedModel, SpatialLayer
from tucker_cam.models.layers import common_transform
from tucker_cam.models.loading import Loading
from tucker_cam.pictures.held import Pictures, collect


@dataclass(frozen=True)
class LayerReport:
    """What TSM's maps of a layer are like; the numbers are means over pictures, in [0, 1] unless stated.

    Attributes:
        layer: the layer.
        maximum_on_border: how often the largest value lies on the outermost cells.
        chance: how often that would happen by chance.
        border_brighter: how often the outermost cells are brighter on average than those inside.
        energy_in_top: the sharpness; see `energy_in_top` of the metrics.
        embedding_kept: the cosine similarity, in [-1, 1], between the last layer's pooled embedding of the whole
            picture and that of the picture times its area-matched map.
        is_border_artefact: whether the maps show where the pictures end; see `BorderCheck`.
        recommended: whether, of the layers that are not border artefacts, this one keeps most of the embedding.
    """

    layer: SpatialLayer
    maximum_on_border: float
    chance: float
    border_brighter: float
    energy_in_top: float
    embedding_kept: float
    is_border_artefact: bool
    recommended: bool = False


@dataclass(frozen=True)
class LayersReport:
    """A report on each layer, in the order in which the layers run, and the pictures that failed."""

    loaded: LoadedModel
    reports: list[LayerReport]
    pictures: int
    failures: list[Failure]


def examine_layers(
    pictures: Pictures,
    model: Model = "demo",
    *,
    limit: int | None = 50,
    batch_size: int = CPU_BATCH,
    progress: bool = True,
    **loading: Unpack[Loading],
) -> LayersReport:
    """Compare the layers of a model by what TSM's maps of them show on pictures, which need no labels.

    Looks at the last layer of each stage, that is, of each shape of feature maps, and at the layers that `layers` asks
    for. Each picture takes one forward pass for all layers, and one more for each layer, of the picture times its map.

    Args:
        pictures: as for `explain`.
        model: as for `explain`.
        limit: as for `explain`; None for all pictures.
        batch_size: how many pictures go through the network together.
        progress: show a bar.
        loading: see `load_model`.

    Raises:
        TypeError, ValueError, OSError: as for `explain`; ValueError if none of the pictures could be used.
    """
    collection = collect(pictures, limit=limit)
    loaded = load_for_pictures(model, collection.example, one_layer=False, **loading)
    found = [_Found(layer, BorderCheck(layer.name), [], []) for layer in candidate_layers(loaded)]
    layers = [*(each.layer for each in found), loaded.last_layer]

    def look_at(names: Sequence[str], images: Tensor, masks: Tensor) -> None:
        for each, (maps, sharpness, kept) in zip(found, _seen(images, recorder), strict=True):
            each.border.look_at(maps)
            each.sharpness.extend(sharpness)
            each.kept.extend(kept)

    batches = read_pictures(collection, loaded, batch_size)
    with FeatureRecorder(loaded.model, [layer.module for layer in layers], common_transform(layers)) as recorder:
        failures, _ = go_through(batches, loaded, look_at, "examining", number=collection.number, shown=progress)
    reports = [each.report() for each in found]
    fit = (each for each in reports if not each.is_border_artefact)
    best = max(fit, key=lambda each: each.embedding_kept, default=None)
    reports = [replace(each, recommended=each is best) for each in reports]
    return LayersReport(loaded, reports, len(found[0].kept), collection.failures + failures)


def candidate_layers(loaded: LoadedModel) -> list[SpatialLayer]:
    """Return the last layer of each stage, that is, of each shape of maps, and the target layers.

    Parts of blocks are left out; an `nn.Sequential` does not count as a block. Except for the target layers, only
    layers that become maps in the same way as the last layer are considered.
    """
    names = {layer.name for layer in loaded.spatial_layers}
    blocks = {name for name in names if not isinstance(loaded.model.get_submodule(name), nn.Sequential)}
    stages: dict[tuple[int, ...], SpatialLayer] = {}
    for layer in loaded.spatial_layers:
        parents = {layer.name[:end] for end, letter in enumerate(layer.name) if letter == "."}
        if not parents & blocks and layer.reshape_transform == loaded.last_layer.reshape_transform:
            stages[layer.shape] = layer
    chosen = {layer.module for layer in (*stages.values(), *loaded.layers)}
    return [layer for layer in loaded.spatial_layers if layer.module in chosen]


class _Found(NamedTuple):
    """What was found about a layer so far: where its maps are strong, how sharp each one is, and what it keeps."""

    layer: SpatialLayer
    border: BorderCheck
    sharpness: list[float]
    kept: list[float]

    def report(self) -> LayerReport:
        border = self.border.statistics
        return LayerReport(
            self.layer,
            _mean([share for of_batch in border for share in of_batch.maximum.tolist()]),
            _mean([of_batch.chance for of_batch in border]),
            _mean([brighter for of_batch in border for brighter in of_batch.brighter.tolist()]),
            _mean(self.sharpness),
            _mean(self.kept),
            self.border.is_artefact,
        )


def _seen(images: Tensor, recorder: FeatureRecorder) -> list[tuple[Tensor, list[float], list[float]]]:
    """Return TSM's maps, their sharpness and what they keep, for each layer but the last, which gives the embedding.

    All layers are done before any result is recorded, since a batch that fails is repeated picture by picture.
    """
    with torch.no_grad():
        recorder(images)
        *features, last = recorder.activations
        seen = []
        for maps in map(leading_map, features):
            shown = scaled(maps.double()).float()
            whole_size = interpolate(shown[:, None], images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
            # A float32 map makes an image in half precision float32 too.
            recorder((images * area_matched(whole_size)[:, None]).to(images.dtype))
            kept = cosine_similarity(pooled(recorder.activations[-1]), pooled(last))
            seen.append((maps, energy_in_top(shown).tolist(), kept.tolist()))
    return seen


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
