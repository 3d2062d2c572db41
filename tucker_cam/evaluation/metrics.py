r"""Saliency maps in, one number for each map out: does the map lie on the object, does the network need what it shows?

Every function takes a batch of maps $m$ in [0, 1], batch x height x width, and returns one value for each, float32
unless said otherwise. Localisation compares with the object's mask, faithfulness with a `Score` of the network on
changed images. Maps that keep more of the picture have an advantage in some (Average Drop) and a drawback in others
(energy in the mask); `area_matched` takes it away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from pytorch_grad_cam.metrics.road import ROADCombined
from skimage.filters import threshold_otsu
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from tucker_cam.errors import BadTypeError, BadValueError

Score = Callable[[Tensor], Tensor]
"""From images, batch x channels x height x width, to scores, batch or batch x scores; image i is always sample i."""

TENTHS = tuple(tenth / 10 for tenth in range(1, 10))
_ROUNDING = 1e-4
# A probability of nearly 1 has no room to gain: what float32 rounds there is no gain of 100 %.
_LEAST_ROOM = 1e-6


class ConfidenceChange(NamedTuple):
    """What masking an image by its map does to a score, in %; each batch or batch x scores.

    Attributes:
        drop: in [0, 100] for a score that is never negative, lower is better; NaN where the whole image scores 0.
        increase: 0 or 100, higher is better.
        gain: in [0, 100], higher is better.
    """

    drop: Tensor
    increase: Tensor
    gain: Tensor


# Localisation


def energy_in_mask(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Return the share of the map's energy that lies on the object, $\sum_{p \in M} m_p / \sum_p m_p$.

    The Energy-Based Pointing Game of Score-CAM (Wang et al. 2020, arXiv 1910.01279). In [0, 1], higher is better; a
    small map scores high more easily. An empty map scores 0, an empty mask NaN.

    Args:
        maps: in [0, 1], batch x height x width.
        masks: bool, batch x height x width, true on the object.

    Raises:
        TypeError, ValueError: maps or masks of another kind or shape, or maps with values that are not finite.

    Example:
        >>> energy_in_mask(torch.tensor([[[0.2, 0.6]]]), torch.tensor([[[False, True]]]))
        tensor([0.7500])
    """
    maps = _checked(maps, masks)
    inside = (maps * masks).flatten(1).sum(1) / maps.flatten(1).sum(1).clamp_min(torch.finfo(maps.dtype).tiny)
    return _undefined_without_object(inside, masks)


def pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Return whether the map's maximum lies on the object (Zhang et al. 2018, arXiv 1608.00507).

    1 or 0, higher is better; where several pixels share the maximum, the share of them that lies on the object, so
    that a uniform map scores the object's area. Deviation from the source: no tolerance of 15 pixels around the
    object. An empty mask gives NaN.

    Args:
        maps: see `energy_in_mask`.
        masks: see `energy_in_mask`.

    Raises:
        TypeError, ValueError: see `energy_in_mask`.
    """
    maps = _checked(maps, masks)
    maxima = (maps == maps.amax((1, 2), keepdim=True)).flatten(1).float()
    hits = (maxima * masks.flatten(1)).sum(1) / maxima.sum(1)
    return _undefined_without_object(hits, masks)


def best_threshold_iou(maps: Tensor, masks: Tensor, thresholds: Sequence[float] = TENTHS) -> Tensor:
    r"""Return $\max_t\, |\{m \ge t\} \cap M| / |\{m \ge t\} \cup M|$ over the thresholds t, for each map on its own.

    How well the object could be cut out of the map (after Choe et al. 2020, arXiv 2001.07437, who choose one threshold
    for all maps, and put a box around what it selects). In [0, 1], higher is better; a uniform map scores the object's
    area, if it is as high as the lowest threshold. That threshold matters: near 0 nearly the whole picture is selected,
    which no viewer of the map would call marked, and which is right by itself where objects are large. An empty mask
    gives NaN.

    Args:
        maps: see `energy_in_mask`.
        masks: see `energy_in_mask`.
        thresholds: in [0, 1].

    Raises:
        TypeError, ValueError: see `energy_in_mask`.
    """
    maps = _checked(maps, masks)
    objects = masks.flatten(1).sum(1)
    best = torch.zeros(len(maps), device=maps.device)
    for threshold in thresholds:
        selected = maps >= threshold
        intersection = (selected & masks).flatten(1).sum(1)
        best = torch.maximum(best, intersection / (selected.flatten(1).sum(1) + objects - intersection).clamp_min(1))
    return _undefined_without_object(best, masks)


def best_cut_iou(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Return the highest intersection over union of the object and the map's k highest pixels, over all k.

    `best_threshold_iou` over every threshold there is, down to 0: only the order of the pixels counts, so it is that
    metric's area-matched form. In [0, 1], higher is better; a uniform map scores the object's area, since pixels of
    equal value cannot be parted. An empty mask gives NaN.

    Args:
        maps: see `energy_in_mask`.
        masks: see `energy_in_mask`.

    Raises:
        TypeError, ValueError: see `energy_in_mask`.
    """
    maps = _checked(maps, masks)
    values, order = maps.flatten(1).sort(1, descending=True)
    hits = masks.flatten(1).gather(1, order).long().cumsum(1)
    selected = torch.arange(1, values.shape[1] + 1, device=maps.device)
    iou = hits / (selected + hits[:, -1:] - hits)
    # Of pixels of the same value only the last ends a set.
    ends = torch.ones_like(values, dtype=torch.bool)
    ends[:, :-1] = values[:, :-1] > values[:, 1:]
    return _undefined_without_object(iou.masked_fill(~ends, 0).amax(1), masks)


def otsu_iou(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Return the intersection over union of the object and what lies above the map's own Otsu threshold.

    What cutting out the object gives without knowing it (Otsu 1979, scikit-image's `threshold_otsu`). In [0, 1],
    higher is better; a uniform map, in which nothing lies above, scores 0. An empty mask gives NaN.

    Args:
        maps: see `energy_in_mask`.
        masks: see `energy_in_mask`.

    Raises:
        TypeError, ValueError: see `energy_in_mask`.
    """
    maps = _checked(maps, masks)
    thresholds = torch.tensor([threshold_otsu(each) for each in maps.cpu().numpy()], device=maps.device)
    above = maps > thresholds[:, None, None]
    intersection = (above & masks).flatten(1).sum(1)
    union = (above | masks).flatten(1).sum(1)
    return _undefined_without_object(intersection / union.clamp_min(1), masks)


# The map itself


def mean_saliency(maps: Tensor) -> Tensor:
    """Return the map's mean: how much of the picture it keeps, in [0, 1]; neither high nor low is better.

    Args:
        maps: see `energy_in_mask`.

    Raises:
        TypeError, ValueError: see `energy_in_mask`.
    """
    maps = _checked(maps)
    return maps.flatten(1).mean(1)


def energy_in_top(maps: Tensor, share: float = 0.1) -> Tensor:
    """Return how much of the map's energy its highest pixels hold: 1 is a single spot, `share` a uniform map.

    In [`share`, 1]; neither high nor low is better. An empty map holds nothing: 0.

    Args:
        maps: see `energy_in_mask`.
        share: of the pixels that count as the highest, in (0, 1].

    Raises:
        TypeError, ValueError: see `energy_in_mask`.
    """
    maps = _checked(maps)
    first, last = _ranks(maps)
    top = maps * _shown(first, last, share).to(maps.dtype)
    return top.flatten(1).sum(1) / maps.flatten(1).sum(1).clamp_min(torch.finfo(maps.dtype).tiny)


def area_matched(maps: Tensor) -> Tensor:
    """Replace the map's values by their ranks, so that every map keeps the same share of the picture, half of it.

    Equal values share their mean rank: a uniform map becomes 0.5 everywhere.

    Args:
        maps: see `energy_in_mask`.

    Returns:
        Maps with the order of `maps`, mean 0.5 each, without ties uniform on (0, 1).

    Raises:
        TypeError, ValueError: see `energy_in_mask`.

    Example:
        >>> area_matched(torch.tensor([[[0.0, 0.9], [0.1, 0.1]]]))
        tensor([[[0.1250, 0.8750],
                 [0.5000, 0.5000]]])
    """
    maps = _checked(maps)
    first, last = _ranks(maps)
    matched: Tensor = 1 - (first + last) / (2 * maps[0].numel())
    return matched.to(maps.dtype)


# Faithfulness


def confidence_change(images: Tensor, maps: Tensor, score: Score, *, whole: Tensor | None = None) -> ConfidenceChange:
    r"""Return Average Drop, Average Increase and Average Gain of each image, before averaging.

    With Y the score of the whole image and O that of the image times its map: drop $100\,[Y - O]_+ / Y$ and increase
    $100\,[O > Y]$ (Grad-CAM++, Chattopadhay et al. 2018, arXiv 1710.11063), gain $100\,[O - Y]_+ / (1 - Y)$ (Opti-CAM,
    Zhang et al. 2024, arXiv 2301.07002). The network's normalised input is multiplied, as by the host's
    `CamMultImageConfidenceChange`: where the map is 0 lies the colour that the preprocessing takes for the mean.

    All three reward maps that keep more of the picture: see `area_matched`.

    Args:
        images: the network's input, batch x channels x height x width.
        maps: see `energy_in_mask`; of the images' height and width.
        score: at most 1.
        whole: the score of `images`, if it is known already.

    Raises:
        TypeError, ValueError: see `energy_in_mask`; ValueError also for images of another size than the maps.
    """
    maps = _checked(maps, images=images)
    whole = score(images) if whole is None else whole
    masked = score(images * maps[:, None])
    # Nothing can drop from a score of 0, as of an embedding of zeros: NaN, not the perfect score.
    drop = torch.where(whole > 0, (whole - masked).clamp_min(0) / whole, torch.nan)
    gain = (masked - whole).clamp_min(0) / (1 - whole).clamp_min(_LEAST_ROOM)
    return ConfidenceChange(100 * drop, 100 * (masked > whole).to(whole.dtype), 100 * gain)


def insertion_auc(images: Tensor, maps: Tensor, score: Score, *, baseline: Tensor, steps: int = 8) -> Tensor:
    """Return the area under the score while the image appears in its `baseline`, the highest pixels of the map first.

    RISE (Petsiuk et al. 2018, arXiv 1806.07421), whose baseline here is `blurred`. In the score's range, higher is
    better. A map's size plays no part, only the order of its pixels; pixels of equal value fade in together.

    Args:
        images: see `confidence_change`.
        maps: see `confidence_change`.
        score: any.
        baseline: shaped as `images`: what stands where nothing is inserted yet, `blurred` or `mean_colour`.
        steps: in which the pixels come, in equal parts, at least 1.

    Returns:
        Trapezoidal area over the share of pixels inserted, batch or batch x scores.

    Raises:
        TypeError, ValueError: see `confidence_change`; ValueError also for fewer than 1 step.
    """
    maps = _checked(maps, images=images)
    _check_baseline(images, baseline, steps)
    return _auc(baseline, images, maps, score, steps)


def deletion_auc(images: Tensor, maps: Tensor, score: Score, *, baseline: Tensor, steps: int = 8) -> Tensor:
    """Return the area under the score while the image gives way to its `baseline`, the highest pixels first.

    RISE (Petsiuk et al. 2018, arXiv 1806.07421), whose baseline here is a plain colour, as `mean_colour`. In the
    score's range, lower is better. Arguments and ties as in `insertion_auc`.
    """
    maps = _checked(maps, images=images)
    _check_baseline(images, baseline, steps)
    return _auc(images, baseline, maps, score, steps)


def blurred(images: Tensor) -> Tensor:
    """Return the images without their details: a Gaussian of a sixteenth of the longer side, in pixels, deviation."""
    deviation = max(images.shape[-2:]) / 16
    reach = [min(2 * round(2 * deviation) + 1, 2 * side - 1) for side in reversed(images.shape[-2:])]
    soft: Tensor = gaussian_blur(images, reach, [deviation, deviation])
    return soft


def mean_colour(images: Tensor) -> Tensor:
    """Return images of one colour each: the mean of the image's own."""
    return images.mean((-2, -1), keepdim=True).expand_as(images)


def road(
    images: Tensor, maps: Tensor, score: Score, *, percentiles: Sequence[int] = (20, 40, 60, 80), seed: int = 0
) -> Tensor:
    """Return ROAD's difference, least relevant pixels first minus most relevant first, halved.

    Removed pixels are painted over from their neighbours (Rong et al. 2022, arXiv 2202.00449), which hides the shape
    of what was removed. The host's `ROADCombined`. In [-1, 1] for a score in [0, 1], higher is better. A constant map
    has no order to remove by: NaN.

    Args:
        images: see `confidence_change`.
        maps: see `confidence_change`.
        score: any.
        percentiles: of the pixels removed, averaged over.
        seed: of the imputation's small noise, which is drawn for the batch; the global random state is left as it was.

    Raises:
        TypeError, ValueError: see `confidence_change`.
    """
    maps = _checked(maps, images=images)
    constant = maps.flatten(1).amax(1) == maps.flatten(1).amin(1)
    # The imputation's equations have no solution where all pixels are removed: such maps get any order.
    ordered = torch.where(
        constant[:, None, None], torch.linspace(0, 1, maps[0].numel()).view_as(maps[0]).to(maps), maps
    )
    targets: list[Callable[[Tensor], Tensor]] = [lambda scores: scores] * len(images)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        difference = ROADCombined(list(percentiles))(images, ordered.cpu().numpy(), targets, score)
    result = torch.as_tensor(np.asarray(difference), device=maps.device)
    result[constant] = torch.nan
    return result


# What the above share


def _auc(start: Tensor, end: Tensor, maps: Tensor, score: Score, steps: int) -> Tensor:
    first, last = _ranks(maps)
    shares = np.linspace(0, 1, steps + 1)
    scores = [score(torch.lerp(start, end, _shown(first, last, share).to(start)[:, None])) for share in shares]
    return torch.trapezoid(torch.stack(scores), dx=1 / steps, dim=0)


def _check_baseline(images: Tensor, baseline: Tensor, steps: int) -> None:
    if baseline.shape != images.shape:
        raise BadValueError(
            f"expected a baseline shaped as the images, {tuple(images.shape)}, got {tuple(baseline.shape)}"
        )
    if steps < 1:
        raise BadValueError(f"expected at least 1 step, got {steps}")


def _ranks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each pixel how many pixels lie above it, without and with those of its own value.

    Whole numbers: as shares of the pixels, float32 would blur them, and not every device has float64.
    """
    values = maps.flatten(1).contiguous()
    ascending = values.sort(1).values
    first = values.shape[1] - torch.searchsorted(ascending, values, right=True)
    last = values.shape[1] - torch.searchsorted(ascending, values)
    return first.view_as(maps), last.view_as(maps)


def _shown(first: Tensor, last: Tensor, share: float) -> Tensor:
    """Return each pixel's part in the highest `share` of the pixels: 1, 0, or between for the value at its edge."""
    return ((share * first[0].numel() - first) / (last - first)).clamp(0, 1)


def _undefined_without_object(scores: Tensor, masks: Tensor) -> Tensor:
    return scores.masked_fill(~masks.flatten(1).any(1), torch.nan)


def _checked(maps: Tensor, masks: Tensor | None = None, *, images: Tensor | None = None) -> Tensor:
    """Return the maps in float32, or say what is wrong with the arguments."""
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        kind = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise BadTypeError(f"expected maps as a floating-point torch.Tensor, got {kind}: use torch.as_tensor(maps)")
    if maps.dim() != 3 or 0 in maps.shape:
        raise BadValueError(f"expected maps as batch x height x width, got {tuple(maps.shape)}")
    low, high = maps.min().item(), maps.max().item()
    # Resizing rounds.
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise BadValueError(f"expected finite maps in [0, 1], got values from {low:.4g} to {high:.4g}")
    if masks is not None:
        if not isinstance(masks, Tensor) or masks.dtype != torch.bool:
            kind = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
            raise BadTypeError(f"expected masks as a torch.Tensor of bool, got {kind}: use masks > 0")
        if masks.shape != maps.shape:
            raise BadValueError(f"expected masks of the maps' shape, {tuple(maps.shape)}, got {tuple(masks.shape)}")
    if images is not None:
        if not isinstance(images, Tensor):
            raise BadTypeError(f"expected images as a torch.Tensor, got {type(images).__name__}")
        if images.dim() != 4 or images.shape[0] != len(maps) or images.shape[-2:] != maps.shape[-2:]:
            raise BadValueError(
                f"expected images as batch x channels x height x width with the maps' batch, height and width, "
                f"{tuple(maps.shape)}, got {tuple(images.shape)}"
            )
    return maps.detach().float()
