"""A layer that shows where the pictures end is told from one that shows an object, also at the border."""

import logging
from collections import OrderedDict

import pytest
import torch
from torch import nn

from tucker_cam import evaluate, explain
from tucker_cam.evaluation.layers import candidate_layers, examine_layers
from tucker_cam.explanations import border
from tucker_cam.explanations.border import BorderCheck, border_statistics
from tucker_cam.models import Network, load_model


def averaging(channels, outputs, weight, bias, **options):
    """Return a layer whose features are `weight` times the mean around each position, plus `bias`."""
    layer = nn.Conv2d(channels, outputs, 3, **options)
    nn.init.constant_(layer.weight, weight / (9 * channels))
    nn.init.constant_(layer.bias, bias)
    return nn.Sequential(layer, nn.ReLU())


def pooling():
    return nn.AdaptiveAvgPool2d(1), nn.Flatten()


# Strongest where the padding lowers the mean.
PADDED = nn.Sequential(*averaging(3, 4, -1, 1, padding=1), *pooling())
SEEING = nn.Sequential(*averaging(3, 4, 1, 0, padding=1), *pooling())


def squares_at(place, count=12):
    """Return dark pictures, each with a bright square of 5 x 5 at a place that moves along the upper border."""
    images = 0.05 * torch.rand(count, 3, 24, 24)
    for index in range(count):
        row, column = place(index)
        images[index, :, row : row + 5, column : column + 5] = 1
    return images


BRIGHT = 0.8 + 0.1 * torch.rand(12, 3, 24, 24)
AT_THE_BORDER = squares_at(lambda index: (0, index))
IN_A_CORNER = squares_at(lambda index: (19 * (index % 2), 19 * (index // 2 % 2)))


def test_statistics_agree_with_a_case_computed_by_hand():
    left = torch.tensor([[0.9, 0, 0, 0], [0.9, 0.1, 0.1, 0], [0.9, 0.1, 0.1, 0], [0.8, 0, 0, 0]])
    middle = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0, 0.8, 0.1, 0], [0, 0.1, 0.2, 0], [0, 0, 0, 0]])
    both = torch.tensor([[0.7, 0, 0, 0], [0, 0.7, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])  # a shared maximum
    found = border_statistics(torch.stack([left, middle, both, 1 - middle]))
    torch.testing.assert_close(found.maximum, torch.tensor([1.0, 0.0, 0.5, 1.0]))
    assert found.chance == 12 / 16
    assert found.brighter.tolist() == [True, False, False, True]
    assert found.around.tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("model", "images", "artefact"),
    [(PADDED, BRIGHT, True), (SEEING, AT_THE_BORDER, False), (SEEING, IN_A_CORNER, False), (PADDED, BRIGHT[:7], False)],
    ids=["padding", "object at the border", "object in a corner", "too few to tell"],
)
def test_explain_and_evaluate_say_once_that_a_layer_shows_where_the_pictures_end(model, images, artefact, caplog):
    for work in (
        lambda: [*explain(images, model, layers=["1"], batch_size=3)],
        lambda: evaluate(images, model, "tsm", metrics=[], layers=["1"], batch_size=3, progress=False),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tucker_cam"):
            work()
        said = [record.message for record in caplog.records if "along the border" in record.message]
        assert len(said) == artefact
        assert all("at 1 the features" in each for each in said)


def test_clips_and_maps_of_few_positions_have_no_border_and_cost_nothing(monkeypatch):
    check = BorderCheck("layer")
    monkeypatch.setattr(border, "leading_map", lambda _: pytest.fail("computed for nothing"))
    for shape in ((9, 3, 8), (9, 2, 8, 8)):
        check.look_at(torch.rand(shape))
        check.warn_of(torch.rand(9, 4, *shape[1:]))
    assert check.statistics == []


def stages():
    """Return a body that averages, with a stage in which padding dominates, and a head."""
    border = averaging(4, 6, -1, 1, padding=1)
    last = averaging(6, 8, -1, 1, stride=2)
    head = nn.Sequential(*pooling(), nn.Linear(8, 3))
    return nn.Sequential(OrderedDict(stem=SEEING[0], border=border, last=last, head=head))


def test_each_stage_is_looked_at_and_the_one_whose_padding_dominates_is_not_recommended():
    runs = []
    model = stages()
    model.register_forward_hook(lambda *_: runs.append(1))
    loaded = load_model(model)
    assert [layer.name for layer in candidate_layers(loaded)] == ["stem", "border", "last"]
    runs.clear()
    found = examine_layers(BRIGHT, loaded, batch_size=4, progress=False)
    assert found.pictures == 12
    assert len(runs) == 3 * (1 + 3)  # of each batch: all layers together, and what each layer's map leaves
    by_name = {report.layer.name: report for report in found.reports}
    assert by_name["border"].is_border_artefact
    assert not by_name["border"].recommended
    assert sum(report.recommended for report in found.reports) == 1


def test_a_layer_that_shows_the_border_is_not_recommended_though_it_keeps_most(monkeypatch):
    def order(*artefacts):
        monkeypatch.setattr(BorderCheck, "is_artefact", property(lambda self: self.layer in artefacts))
        reports = examine_layers(BRIGHT, stages(), progress=False).reports
        by_worth = sorted(reports, key=lambda report: -report.embedding_kept)
        return [report.layer.name for report in by_worth], [each.layer.name for each in reports if each.recommended]

    names, recommended = order()
    assert recommended == names[:1]
    assert order(names[0]) == (names, names[1:2])
    assert order(*names) == (names, [])


def test_what_a_map_keeps_of_the_embedding_and_how_sharp_it_is():
    bright = torch.zeros(8, 3, 24, 24)
    bright[:, :, 8:16, 8:16] = 1
    (report,) = examine_layers(bright, Network(SEEING), layers=["1"], progress=False).reports
    assert report.layer.name == "1"
    assert report.embedding_kept == pytest.approx(1)  # four channels that are the same
    assert report.maximum_on_border == report.border_brighter == 0
    assert report.chance == pytest.approx(92 / 576)
    assert report.energy_in_top > 0.7  # the square is a ninth of the picture
    assert not any(module._forward_hooks for module in SEEING.modules())


def test_layers_of_half_precision_are_compared_and_no_pictures_are_one_clear_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).bfloat16()
    found = examine_layers(torch.rand(2, 3, 24, 24).bfloat16(), model, progress=False)
    assert all(0 < report.embedding_kept <= 1 for report in found.reports)
    for none, said in (torch.rand(0, 3, 24, 24), "got an empty batch"), (iter([]), "found none"):
        with pytest.raises(ValueError, match=f"expected pictures, {said}"):
            examine_layers(none, model.float(), progress=False)
