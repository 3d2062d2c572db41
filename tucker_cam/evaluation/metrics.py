r"""Metrics of saliency maps: does a map lie on the object, and does the network need what the map shows?

Every metric takes a batch of maps $m$, finite, in [0, 1], batch x height x width, and returns one float32 value for
each map. Localisation compares the maps with the object's masks, bool, of the same shape, and gives NaN if a mask is
empty. Faithfulness compares the `Score` of the network's inputs, batch x channels x height x width, with that of
changed inputs, and gives one value for each score. Maps, masks or images of another kind or shape raise a TypeError or
a ValueError.

Maps that keep more of the picture have an advantage in some metrics (Average Drop) and a drawback in others (energy in
the mask); `area_matched` removes both. `MEASURES`, at the end, has a `Measure` for each column of an evaluation. A new
column is a function and a record.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Literal, NamedTuple

import numpy as np
import torch
from pytorch_grad_cam.metrics.road import ROADCombined
from skimage.filters import threshold_otsu
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.functional import gaussian_blur

from tucker_cam.arguments import check_choice
from tucker_cam.errors import BadTypeError, BadValueError
from tucker_cam.evaluation import GROUPS
from tucker_cam.methods import check_name
from tucker_cam.seeding import seeded

Score = Callable[[Tensor], Tensor]
"""Scores images, batch x channels x height x width: returns batch or batch x scores; image i is always sample i."""
Better = Literal["higher", "lower", ""]
"""Which of two numbers of a measure is better; neither if it is empty."""

_ROUNDING = 1e-4
# A probability of nearly 1 has no room to gain: float32 rounding there must not count as a gain of 100 %.
_LEAST_ROOM = 1e-6


class ConfidenceChange(NamedTuple):
    """How masking an image by its map changes a score, in %; see `confidence_change`."""

    drop: Tensor
    increase: Tensor
    gain: Tensor


def energy_in_mask(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Return the share of the map's energy that lies on the object, $\sum_{p \in M} m_p / \sum_p m_p$.

    The Energy-Based Pointing Game of Score-CAM (Wang et al. 2020, arXiv 1910.01279). In [0, 1], higher is better; a map
    that marks little scores high more easily. A map of zeros scores 0.

    Example:
        >>> energy_in_mask(torch.tensor([[[0.2, 0.6]]]), torch.tensor([[[False, True]]]))
        tensor([0.7500])
    """
    maps = _checked(maps, masks)
    return _undefined_without_object(_energy_share(maps * masks, maps), masks)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Return whether the map's maximum lies on the object (Zhang et al. 2018, arXiv 1608.00507).

    1 or 0, higher is better. If several pixels share the maximum, the value is the share of them that lies on the
    object, so a uniform map scores the object's area. Unlike the source, it allows no tolerance of 15 pixels around the
    object.
    """
    maps = _checked(maps, masks)
    maxima = (maps == maps.amax((1, 2), keepdim=True)).float()
    return _undefined_without_object(_energy_share(maxima * masks, maxima), masks)


def best_threshold_iou(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Return $\max_t\, |\{m \ge t\} \cap M| / |\{m \ge t\} \cup M|$ for each map, over t = 0.1, 0.2 ... 0.9.

    It tells how well the object could be cut out of the map (after Choe et al. 2020, arXiv 2001.07437, who choose one
    threshold for all maps, and put a box around the selected pixels). In [0, 1], higher is better; a uniform map scores
    the object's area. The lowest threshold matters: near 0 it selects nearly the whole picture, which is right for
    large objects.
    """
    maps = _checked(maps, masks)
    best = torch.stack([_iou(maps >= tenth / 10, masks) for tenth in range(1, 10)]).amax(0)
    return _undefined_without_object(best, masks)


def best_cut_iou(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Return the highest intersection over union of the object and the map's k highest pixels, over all k.

    This is `best_threshold_iou` over every possible threshold, down to 0. Only the order of the pixels counts, so it is
    the area-matched form of that metric. In [0, 1], higher is better; a uniform map scores the object's area, since
    pixels of equal value cannot be separated.
    """
    hits, selected, size = _cuts(maps, masks)
    return _undefined_without_object((hits / (selected + size - hits)).amax(1), masks)


def max_f_beta(maps: Tensor, masks: Tensor, beta_squared: float = 0.3) -> Tensor:
    r"""Return $\max_k\, (1 + \beta^2)\, P_k R_k / (\beta^2 P_k + R_k)$, precision and recall of the k highest pixels.

    The usual metric of salient object detection, with $\beta^2 = 0.3$ (Achanta et al. 2009, *Frequency-tuned Salient
    Region Detection*). In [0, 1], higher is better; only the order of the pixels counts. Unlike in the literature, the
    best cut is chosen for each picture, not as the best of 256 thresholds for a whole data set, so the values are
    higher than those in papers.
    """
    hits, selected, size = _cuts(maps, masks)
    # The weighted harmonic mean of hits / selected and hits / size.
    scores = (1 + beta_squared) * hits / (beta_squared * size + selected)
    return _undefined_without_object(scores.amax(1), masks)


def otsu_iou(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Return the intersection over union of the object and the pixels above the map's own Otsu threshold.

    It tells how well the object is cut out without knowing it (Otsu 1979, scikit-image's `threshold_otsu`). In [0, 1],
    higher is better; a uniform map, which has no pixels above the threshold, scores 0.
    """
    maps = _checked(maps, masks)
    thresholds = torch.tensor([threshold_otsu(each) for each in maps.cpu().numpy()], device=maps.device)
    return _undefined_without_object(_iou(maps > thresholds[:, None, None], masks), masks)


def mean_saliency(maps: Tensor) -> Tensor:
    """Return the map's mean: how much of the picture it keeps, in [0, 1]; neither high nor low is better."""
    return _checked(maps).flatten(1).mean(1)


def energy_in_top(maps: Tensor, share: float = 0.1) -> Tensor:
    """Return the part of a map's energy in its highest `share` of pixels: 1 for a single spot, `share` if uniform.

    In [`share`, 1]; neither high nor low is better. A map of zeros has no energy and gives 0.
    """
    maps = _checked(maps)
    first, last = _ranks(maps)
    return _energy_share(maps * _shown(first, last, share), maps)


def area_matched(maps: Tensor) -> Tensor:
    """Replace a map's values with their ranks, so that every map keeps the same share of the picture: half of it.

    Without ties, the ranks are uniform on (0, 1). Equal values get their mean rank, so a uniform map is 0.5 everywhere.

    Example:
        >>> area_matched(torch.tensor([[[0.0, 0.9], [0.1, 0.1]]]))
        tensor([[[0.1250, 0.8750],
                 [0.5000, 0.5000]]])
    """
    maps = _checked(maps)
    first, last = _ranks(maps)
    matched: Tensor = 1 - (first + last) / (2 * maps[0].numel())
    return matched


def confidence_change(images: Tensor, maps: Tensor, score: Score, *, whole: Tensor | None = None) -> ConfidenceChange:
    r"""Return Average Drop, Average Increase and Average Gain of each image, before averaging.

    Let Y be the score of the whole image and O the score of the image times its map. Drop is $100\,[Y - O]_+ / Y$ and
    increase $100\,[O > Y]$ (Grad-CAM++, Chattopadhay et al. 2018, arXiv 1710.11063); gain is $100\,[O - Y]_+ / (1 - Y)$
    (Opti-CAM, Zhang et al. 2024, arXiv 2301.07002). As in the host's `CamMultImageConfidenceChange`, the map multiplies
    the normalised input: where the map is 0, the image has the preprocessing's mean colour.

    All are in %. Drop is in [0, 100] for a score that is never negative, and NaN if the whole image scores 0; lower is
    better. Increase is 0 or 100, gain in [0, 100]; higher is better. All reward maps that keep more of the picture: see
    `area_matched`. A `score` is at most 1; `whole` is the score of the whole images, computed if it is not given.
    """
    maps = _checked(maps, images=images)
    whole = score(images) if whole is None else whole
    masked = score(images * maps[:, None])
    # A score of 0, such as that of an embedding of zeros, cannot drop: NaN, not the perfect score.
    drop = torch.where(whole > 0, (whole - masked).clamp_min(0) / whole, torch.nan)
    gain = (masked - whole).clamp_min(0) / (1 - whole).clamp_min(_LEAST_ROOM)
    return ConfidenceChange(100 * drop, 100 * (masked > whole).to(whole.dtype), 100 * gain)


def insertion_auc(
    images: Tensor, maps: Tensor, score: Score, *, baseline: Tensor | None = None, steps: int = 8
) -> Tensor:
    """Return the area under the score while the image replaces its baseline, the highest pixels of the map first.

    From RISE (Petsiuk et al. 2018, arXiv 1806.07421). The baseline is the `blurred` image unless another is given, the
    pixels come in `steps` equal parts, and the area is trapezoidal. In the score's range, higher is better. Only the
    order of a map's pixels counts, not how much it marks; pixels of equal value fade in together.
    """
    return _auc(blurred(images) if baseline is None else baseline, images, maps, score, steps)


def deletion_auc(
    images: Tensor, maps: Tensor, score: Score, *, baseline: Tensor | None = None, steps: int = 8
) -> Tensor:
    """Return the area under the score while the baseline replaces the image; the rest is as for `insertion_auc`.

    Here the baseline is the image's `mean_colour` unless another is given, and lower is better.
    """
    return _auc(images, mean_colour(images) if baseline is None else baseline, maps, score, steps)


def blurred(images: Tensor) -> Tensor:
    """Return the images blurred by a Gaussian whose standard deviation is a sixteenth of the longer side in pixels."""
    deviation = max(images.shape[-2:]) / 16
    # The kernel reaches no further than the reflected image.
    width, height = (min(2 * round(2 * deviation) + 1, 2 * images.shape[axis] - 1) for axis in (-1, -2))
    soft: Tensor = gaussian_blur(images, [width, height], [deviation, deviation])
    return soft


def mean_colour(images: Tensor) -> Tensor:
    """Return images of one colour each: the mean colour of the given image."""
    return images.mean((-2, -1), keepdim=True).expand_as(images)


def road(images: Tensor, maps: Tensor, score: Score, *, percentiles: Sequence[int] = (20, 40, 60, 80)) -> Tensor:
    """Return ROAD's difference, halved: least relevant pixels removed first, minus most relevant removed first.

    At each of the `percentiles`, removed pixels are filled in from their neighbours (Rong et al. 2022, arXiv
    2202.00449), which hides the shape of what was removed. Uses the host's `ROADCombined`. Its noise of 0.01, which can
    halve a score, is drawn for the batch and always the same. So is the order of pixels of equal value; the host would
    remove them all at once. The global random state is left as it was. In [-0.5, 0.5] for a score in [0, 1], higher is
    better. A constant map has no order to remove pixels by: NaN.
    """
    maps = _checked(maps, images=images)
    values = maps.flatten(1)
    generator = torch.Generator("cpu").manual_seed(0)
    mixed = torch.randperm(values.shape[1], generator=generator, device="cpu").to(values.device)
    order = mixed[values[:, mixed].argsort(dim=1, stable=True)]
    ranks = torch.linspace(0, 1, values.shape[1], device=values.device).expand_as(values)
    ordered = torch.empty_like(values).scatter_(1, order, ranks).view_as(maps)
    targets: list[Callable[[Tensor], Tensor]] = [lambda scores: scores] * len(images)
    with seeded():
        difference = ROADCombined(list(percentiles))(images.float(), ordered.cpu().numpy(), targets, score)
    result = torch.as_tensor(np.asarray(difference), device=maps.device)
    result[values.amax(1) == values.amin(1)] = torch.nan
    return result


def _iou(selected: Tensor, masks: Tensor) -> Tensor:
    return (selected & masks).flatten(1).sum(1) / (selected | masks).flatten(1).sum(1).clamp_min(1)


def _cuts(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how many of each map's k highest pixels lie on the object, batch x k; all k; and the object's size.

    Pixels of equal value cannot be separated: if k would separate them, the number is 0.
    """
    maps = _checked(maps, masks)
    values, order = maps.flatten(1).sort(1, descending=True)
    hits = masks.flatten(1).gather(1, order).long().cumsum(1)
    # Of pixels of equal value, only the last one ends a set.
    ends = pad(values[:, :-1] > values[:, 1:], (0, 1), value=True)
    return hits * ends, torch.arange(1, values.shape[1] + 1, device=maps.device), hits[:, -1:]


def _energy_share(part: Tensor, maps: Tensor) -> Tensor:
    return part.flatten(1).sum(1) / maps.flatten(1).sum(1).clamp_min(torch.finfo(maps.dtype).tiny)


def _auc(start: Tensor, end: Tensor, maps: Tensor, score: Score, steps: int) -> Tensor:
    first, last = _ranks(_checked(maps, images=start))
    shares = np.linspace(0, 1, steps + 1)
    scores = [score(torch.lerp(start, end, _shown(first, last, share).to(start)[:, None])) for share in shares]
    return torch.trapezoid(torch.stack(scores), dx=1 / steps, dim=0)


def _ranks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each pixel how many pixels are higher, without and with those of equal value."""
    values = maps.flatten(1).contiguous()
    ascending = values.sort(1).values
    first = values.shape[1] - torch.searchsorted(ascending, values, right=True)
    last = values.shape[1] - torch.searchsorted(ascending, values)
    return first.view_as(maps), last.view_as(maps)


def _shown(first: Tensor, last: Tensor, share: float) -> Tensor:
    """Return each pixel's part in the highest `share` of pixels: 1, 0, or in between for the value at the edge."""
    return ((share * first[0].numel() - first) / (last - first)).clamp(0, 1)


def _undefined_without_object(scores: Tensor, masks: Tensor) -> Tensor:
    return scores.masked_fill(~masks.flatten(1).any(1), torch.nan)


def _checked(maps: Tensor, masks: Tensor | None = None, *, images: Tensor | None = None) -> Tensor:
    """Return the maps in float32; TypeError or ValueError if an argument is wrong."""
    if not isinstance(maps, Tensor) or not maps.is_floating_point() or maps.dim() != 3 or 0 in maps.shape:
        raise BadTypeError(f"expected maps of floating point, batch x height x width, got {_described(maps)}")
    low, high = maps.min().item(), maps.max().item()
    # Resizing rounds.
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise BadValueError(f"expected finite maps in [0, 1], got values from {low:.4g} to {high:.4g}")
    shape = tuple(maps.shape)
    fits = isinstance(masks, Tensor) and masks.shape == shape
    if masks is not None and not (fits and masks.dtype == torch.bool):
        mend = "use masks > 0" if fits else "one mask for each image, of its height and width"
        raise BadTypeError(f"expected masks, a torch.Tensor of bool, for maps {shape}, got {_described(masks)}: {mend}")
    if images is not None and not isinstance(images, Tensor):
        raise BadTypeError(f"expected images as a torch.Tensor, got {_described(images)}")
    if images is not None and (images.dim() != 4 or (len(images), *images.shape[-2:]) != shape):
        raise BadValueError(f"expected images of the size of the maps {shape}, got {tuple(images.shape)}")
    return maps.detach().float()


def _described(given: object) -> str:
    return f"{given.dtype}, {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


@dataclass(frozen=True, eq=False)
class Judged:
    """What a measure judges: a method's maps of a batch of pictures, and everything that they can be compared with.

    Maps, masks and images are as the functions above take them; a picture without a mask has an empty one. The score is
    batch x `score_names`: "probability", if the network classifies, and "similarity"; see `score_of`. `whole` is the
    score of the images.
    """

    maps: Tensor
    masks: Tensor
    images: Tensor
    names: Sequence[str]
    score: Score
    score_names: Sequence[str]
    whole: Tensor

    @cached_property
    def change(self) -> ConfidenceChange:
        """How masking by the maps changes the scores."""
        return confidence_change(self.images, self.maps, self.score, whole=self.whole)

    @cached_property
    def change_area_matched(self) -> ConfidenceChange:
        """How masking by the area-matched maps changes the scores."""
        matched = area_matched(self.maps)
        # The uniform map of 0.5 is its own area-matched map.
        if torch.equal(matched, self.maps):
            return self.change
        return confidence_change(self.images, matched, self.score, whole=self.whole)


@dataclass(frozen=True)
class Measure:
    r"""A column of an evaluation; your own measures go into the `metrics` of `evaluate`.

    Attributes:
        name: the name of the column.
        function: takes a `Judged` and returns a value for each picture, batch, NaN where it is not defined; with a
            `score`, batch x scores. Measures of different scores with the same function share its work.
        title: the title for people; by default the name.
        better: "higher", "lower", or "" if neither is better.
        group: the group of metrics that the measure belongs to.
        score: which of the network's scores to take; a network without that score is not measured.

    Example:
        >>> largest = Measure("largest", lambda judged: judged.maps.amax((1, 2)), "largest value")
        >>> largest.heading
        'largest value\nneither is better'
    """

    name: str
    function: Callable[[Judged], Tensor]
    title: str = ""
    better: Better = ""
    group: str = ""
    score: str = ""

    def __post_init__(self) -> None:
        check_choice("better", self.better, Better)

    @property
    def heading(self) -> str:
        """The title and, below it, which of two numbers is better."""
        return f"{self.title or self.name}\n{self.better or 'neither'} is better"


def _on_object(metric: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Judged], Tensor]:
    return lambda judged: metric(judged.maps, judged.masks)


def _on_scores(metric: Callable[[Tensor, Tensor, Score], Tensor]) -> Callable[[Judged], Tensor]:
    return lambda judged: metric(judged.images, judged.maps, judged.score)


_CHANGES: dict[str, Better] = {"drop": "lower", "increase": "higher", "gain": "higher"}
_INSERTION, _DELETION, _ROAD = _on_scores(insertion_auc), _on_scores(deletion_auc), _on_scores(road)
MEASURES = (
    Measure("energy_in_mask", _on_object(energy_in_mask), "energy in the object", "higher", "localisation"),
    Measure("pointing_game", _on_object(pointing_game), "pointing game", "higher", "localisation"),
    Measure("best_threshold_iou", _on_object(best_threshold_iou), "IoU, best threshold", "higher", "localisation"),
    Measure("best_cut_iou", _on_object(best_cut_iou), "IoU, best cut (area-matched)", "higher", "localisation"),
    Measure("max_f_beta", _on_object(max_f_beta), "maxF, beta squared 0.3", "higher", "localisation"),
    Measure("otsu_iou", _on_object(otsu_iou), "IoU, Otsu's threshold", "higher", "localisation"),
    *(
        Measure(
            f"{score}_{kind}{suffix}",
            attrgetter(f"change{suffix}.{kind}"),
            f"{words}: {kind}, %{how}",
            better,
            "drop",
            score,
        )
        for score, words in (("probability", "probability"), ("similarity", "embedding"))
        for suffix, how in (("", ""), ("_area_matched", ", area-matched"))
        for kind, better in _CHANGES.items()
        # An image's similarity with itself is 1 already: it can neither increase nor gain.
        if score == "probability" or kind == "drop"
    ),
    Measure("probability_insertion", _INSERTION, "probability: insertion", "higher", "curves", "probability"),
    Measure("probability_deletion", _DELETION, "probability: deletion", "lower", "curves", "probability"),
    Measure("similarity_insertion", _INSERTION, "embedding: insertion", "higher", "curves", "similarity"),
    Measure("similarity_deletion", _DELETION, "embedding: deletion", "lower", "curves", "similarity"),
    Measure("probability_road", _ROAD, "probability: ROAD", "higher", "road", "probability"),
    Measure("similarity_road", _ROAD, "embedding: ROAD", "higher", "road", "similarity"),
    Measure("mean_saliency", lambda judged: mean_saliency(judged.maps), "mean of the map", group="statistics"),
    Measure("energy_in_top", lambda judged: energy_in_top(judged.maps), "energy in its top 10 %", group="statistics"),
)


def choose_measures(metrics: Collection[str | Measure], score_names: Collection[str]) -> list[Measure]:
    """Return the measures of these groups, the map's statistics and the given measures, as far as the scores allow."""
    if unknown := [each for each in metrics if not isinstance(each, (str, Measure))]:
        raise BadTypeError(f"expected metrics as names of groups or Measure records, got {unknown[0]!r}")
    groups = {check_name("metric", each, GROUPS) for each in metrics if isinstance(each, str)} | {"statistics"}
    known = [measure for measure in MEASURES if measure.group in groups]
    chosen = [*known, *(each for each in metrics if isinstance(each, Measure))]
    return [measure for measure in chosen if not measure.score or measure.score in score_names]
