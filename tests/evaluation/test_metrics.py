"""Each metric against a case computed by hand, a library's own where there is one, and its inverted map."""

import math

import pytest
import torch
from networks import small_cnn
from pytorch_grad_cam.metrics.road import ROADLeastRelevantFirstAverage, ROADMostRelevantFirstAverage
from scipy.ndimage import gaussian_filter
from skimage.filters import threshold_otsu
from sklearn.metrics import fbeta_score

from tucker_cam.evaluation import metrics
from tucker_cam.evaluation.comparison import score_of
from tucker_cam.explanations.maps import OnePass
from tucker_cam.models import Network, load_model

# One object in the middle, and a map that marks it, with a little beside it.
MASK = torch.tensor([[[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]]).bool()
MAP = torch.tensor([[[0, 0, 0, 0.2], [0, 1.0, 0.6, 0], [0, 0.8, 0.4, 0], [0, 0, 0.1, 0]]])


def iou(selected, mask):
    return (selected & mask).sum() / (selected | mask).sum()


def f_beta(selected, mask):
    return fbeta_score(mask.flatten(), selected.flatten(), beta=math.sqrt(0.3))


# Each metric's definition, of one map.
LOCALISATION = {
    metrics.energy_in_mask: lambda saliency, mask: saliency[mask].sum() / saliency.sum(),
    metrics.pointing_game: lambda saliency, mask: mask[saliency == saliency.max()].float().mean(),
    metrics.best_threshold_iou: lambda saliency, mask: max(iou(saliency >= t / 10, mask) for t in range(1, 10)),
    metrics.best_cut_iou: lambda saliency, mask: max(iou(saliency >= t, mask) for t in saliency.unique()),
    metrics.otsu_iou: lambda saliency, mask: iou(saliency > threshold_otsu(saliency.numpy()), mask),
    metrics.max_f_beta: lambda saliency, mask: max(f_beta(saliency >= t, mask) for t in saliency.unique()),
}


def bright_where(mask):
    """Return images that are 1 on the mask and 0 elsewhere, and a score: how much of the mask is shown."""
    images = mask[:, None].float()
    return images, lambda these: (these[:, 0] * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


@pytest.mark.parametrize(("metric", "definition"), LOCALISATION.items())
def test_localisation_agrees_with_a_case_by_hand_and_its_definition_and_is_nan_without_an_object(metric, definition):
    # Otsu's threshold lies between 0.2 and 0.4.
    expected = 2.8 / 3.1 if metric is metrics.energy_in_mask else 1.0
    torch.testing.assert_close(metric(MAP, MASK), torch.tensor([expected]))
    assert metric(1 - MAP, MASK) < expected - 0.2
    # With values that tie.
    maps, masks = torch.rand(6, 9, 8).round(decimals=1), torch.rand(6, 9, 8) > 0.5
    expected = torch.tensor([float(definition(saliency, mask)) for saliency, mask in zip(maps, masks, strict=True)])
    torch.testing.assert_close(metric(maps, masks), expected)
    masks[4], expected[4] = False, math.nan
    torch.testing.assert_close(metric(maps, masks), expected, equal_nan=True)


def test_an_empty_map_finds_nothing_and_a_uniform_one_the_objects_area():
    empty = torch.zeros_like(MAP)
    assert metrics.energy_in_mask(empty, MASK) == 0
    assert metrics.otsu_iou(empty, MASK) == 0
    assert metrics.energy_in_top(empty) == 0
    for metric in [*LOCALISATION][:4]:
        torch.testing.assert_close(metric(torch.full_like(MAP, 0.5), MASK), torch.tensor([0.25]))
    # The thresholds go from a tenth to nine tenths.
    for inside, outside in (1.0, 0.85), (0.15, 0.05):
        assert metrics.best_threshold_iou(torch.where(MASK, inside, outside), MASK) == 1


def test_statistics_agree_with_a_case_computed_by_hand():
    torch.testing.assert_close(metrics.mean_saliency(MAP), torch.tensor([3.1 / 16]))
    # A quarter of 16 pixels: 1.0, 0.8, 0.6, 0.4.
    torch.testing.assert_close(metrics.energy_in_top(MAP, share=0.25), torch.tensor([2.8 / 3.1]))
    # A tenth: 1.0 and six tenths of 0.8.
    torch.testing.assert_close(metrics.energy_in_top(MAP), torch.tensor([1.48 / 3.1]))
    torch.testing.assert_close(metrics.energy_in_top(torch.full_like(MAP, 0.5)), torch.tensor([0.1]))
    assert metrics.energy_in_top(1 - MAP) < 0.2


def test_area_matching_keeps_the_order_and_gives_every_map_the_same_values():
    maps = torch.rand(3, 5, 4) ** 4
    matched = metrics.area_matched(maps)
    expected = (torch.arange(20) + 0.5) / 20
    for before, after in zip(maps, matched, strict=True):
        torch.testing.assert_close(after.flatten().sort().values, expected)
        assert torch.equal(before.flatten().argsort(), after.flatten().argsort())
    torch.testing.assert_close(metrics.area_matched(1 - maps), 1 - matched)


def test_confidence_change_agrees_with_a_case_computed_by_hand():
    # A score of 0 cannot drop, and one of nearly 1 has no room to gain.
    whole, masked = torch.tensor([0.8, 0.4, 0.2, 0.0, 1 - 6e-8]), torch.tensor([0.4, 0.2, 0.6, 0.5, 1.0])
    images, scores = torch.zeros(5, 1, 1, 1), iter([whole, masked])
    change = metrics.confidence_change(images, torch.ones(5, 1, 1), lambda _: next(scores))
    torch.testing.assert_close(change.drop, torch.tensor([50, 50, 0, math.nan, 0]), equal_nan=True)
    assert change.increase.tolist() == [0, 0, 100, 100, 100]
    torch.testing.assert_close(change.gain[:4], torch.tensor([0.0, 0, 50, 50]))
    assert change.gain[4] < 10
    images, score = bright_where(MASK)
    masked = metrics.confidence_change(images, MAP, score)
    torch.testing.assert_close(masked.drop, torch.tensor([100 * (1 - 2.8 / 4)]))


def test_insertion_and_deletion_agree_with_a_case_by_hand_and_equal_values_fade_in_together():
    images, score = bright_where(MASK)
    nothing = torch.zeros_like(images)
    # The object is the highest quarter: after 1 of 4 steps all of it is there, or all of it gone.
    insertion = metrics.insertion_auc(images, MAP, score, baseline=nothing, steps=4)
    deletion = metrics.deletion_auc(images, MAP, score, baseline=nothing, steps=4)
    torch.testing.assert_close(insertion, torch.tensor([(0 / 2 + 1 + 1 + 1 + 1 / 2) / 4]))
    torch.testing.assert_close(deletion, torch.tensor([(1 / 2 + 0 + 0 + 0 + 0 / 2) / 4]))
    flat = torch.full_like(MAP, 0.3)
    # Of a long strip the blur reaches no further than its image, reflected, does.
    assert metrics.blurred(torch.rand(1, 3, 4, 200)).isfinite().all()
    for curve in metrics.insertion_auc, metrics.deletion_auc:
        torch.testing.assert_close(curve(images, flat, score, baseline=nothing, steps=5), torch.tensor([0.5]))


def test_the_baselines_are_the_mean_colour_and_a_gaussian_blur():
    images = torch.rand(2, 3, 64, 48)
    torch.testing.assert_close(metrics.mean_colour(images), images.mean((2, 3), keepdim=True).expand(2, 3, 64, 48))
    expected = gaussian_filter(images.numpy(), (0, 0, 4, 4), mode="mirror", truncate=2)
    torch.testing.assert_close(metrics.blurred(images), torch.from_numpy(expected), atol=0.01, rtol=0)


def test_road_agrees_with_the_host_changes_sign_when_the_map_is_inverted_and_scores_no_constant_map():
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[:, 4:12, 4:12] = True
    maps = mask + 0.2 * torch.rand(2, 16, 16)
    maps = maps / maps.amax((1, 2), keepdim=True)
    images, score = bright_where(mask)
    right, wrong = (metrics.road(images, each, score) for each in (maps, 1 - maps))
    assert (right > 0.1).all()
    targets = [lambda scores: scores] * 2
    least, most = (
        average([20, 40, 60, 80])(images, maps.numpy(), targets, score)
        for average in (ROADLeastRelevantFirstAverage, ROADMostRelevantFirstAverage)
    )
    torch.testing.assert_close(right, torch.as_tensor((least - most) / 2).to(right), atol=0.02, rtol=0)
    # The two halves of ROADCombined change places, but for its small noise.
    torch.testing.assert_close(wrong, -right, atol=0.02, rtol=0)
    maps[1], state = 1, torch.random.get_rng_state()
    result = metrics.road(images, maps, lambda these: these.mean((2, 3)).expand(-1, 2))
    assert result.isnan().tolist() == [[False, False], [True, True]]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_road_removes_the_share_that_it_says_of_a_map_of_which_half_is_zero():
    maps = torch.cat([torch.zeros(1, 8, 16), torch.rand(1, 8, 16)], dim=1)
    images, removed = torch.rand(1, 3, 16, 16), []

    def score(these):
        removed.append((these != images).any(1).float().mean().item())
        return these.mean((2, 3))[:, :1]

    metrics.road(images, maps, score, percentiles=[20, 60])
    # What lies above each percentile, or below its like; the host scores the whole image beside each.
    assert sorted(filter(None, removed)) == pytest.approx([0.4, 0.4, 0.8, 0.8], abs=0.01)


@pytest.mark.parametrize("layer", ["0", "3"])
def test_the_score_is_the_probability_beside_the_embeddings_similarity(layer):
    model = small_cnn().eval()
    loaded = load_model(Network(model, classifies=True), layers=[layer])
    images, others = torch.randn(2, 3, 3, 24, 24)
    with OnePass(loaded, images) as one_pass:
        score = score_of(loaded, one_pass)
        found, whole = score(others), score(images)
    with torch.no_grad():
        classes = model(images).argmax(1)
        embeddings = [model[:4](each).mean((2, 3)) for each in (images, others)]
        for these, scored in ((others, found), (images, whole)):
            torch.testing.assert_close(scored[:, 0], model(these).softmax(1)[range(3), classes])
    torch.testing.assert_close(found[:, 1], torch.cosine_similarity(*embeddings))
    torch.testing.assert_close(whole[:, 1], torch.ones(3))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: metrics.energy_in_mask(MAP.numpy(), MASK), TypeError, "batch x height x width, got ndarray"),
        (lambda: metrics.energy_in_mask(MAP[0], MASK), TypeError, "batch x height x width, got torch.float32, (4, 4)"),
        (lambda: metrics.energy_in_mask(MAP, MASK.float()), TypeError, "masks > 0"),
        (lambda: metrics.energy_in_mask(MAP, MASK.tolist()), TypeError, "of bool, for maps (1, 4, 4), got list"),
        (lambda: metrics.mean_saliency(MAP[:0]), TypeError, "got torch.float32, (0, 4, 4)"),
        (lambda: metrics.road(MAP[:, None].numpy(), MAP, torch.mean), TypeError, "a torch.Tensor, got ndarray"),
        (lambda: metrics.energy_in_mask(MAP, MASK[:, :2]), TypeError, "(1, 4, 4), got torch.bool, (1, 2, 4)"),
        (lambda: metrics.area_matched(MAP / 0), ValueError, "finite"),
        (lambda: metrics.area_matched(MAP * 255), ValueError, "in [0, 1], got values from 0 to 255"),
        (lambda: metrics.road(torch.rand(1, 3, 5, 4), MAP, None), ValueError, "(1, 4, 4), got (1, 3, 5, 4)"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize("output", [lambda logits: logits[:, :1], lambda logits: (logits, None)])
def test_a_network_that_shall_classify_and_returns_no_logits_is_one_clear_error(output):
    model = small_cnn()
    model.register_forward_hook(lambda module, inputs, logits: output(logits))
    loaded = load_model(Network(model, classifies=True))
    with OnePass(loaded, torch.rand(1, 3, 24, 24)) as one_pass, pytest.raises(TypeError, match="classifies=False"):
        score_of(loaded, one_pass)
