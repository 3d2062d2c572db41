"""What is made of the rows: their file, their summary, the report's page, the controls and the spectrum."""

import csv
import itertools
import re

import numpy as np
import pytest
import torch
from networks import tiny_loaded_model
from typer.testing import CliRunner

from tucker_cam import evaluate
from tucker_cam.cli import app
from tucker_cam.cli.evaluate import print_table
from tucker_cam.evaluation.controls import CONTROLS, control_maps
from tucker_cam.evaluation.metrics import MEASURES
from tucker_cam.evaluation.report import Example, pick_examples, write_report
from tucker_cam.evaluation.results import Results, Row
from tucker_cam.evaluation.spectrum import spectrum
from tucker_cam.evaluation.summary import Interval, Summary, summarise
from tucker_cam.pictures.files import open_picture

MODEL = "networks:tiny_loaded_model"
BY_NAME = {measure.name: measure for measure in MEASURES}
CUT = BY_NAME["best_cut_iou"]
NAN = float("nan")


def rows_of(values, name="best_cut_iou"):
    return [
        Row(picture, method, {name: value})
        for method, of_method in values.items()
        for picture, value in of_method.items()
    ]


def test_the_report_shows_each_methods_best_median_and_worst_picture(data, tmp_path, drawn):
    # A name that would be a formula, and one that would be markup.
    for index, name in enumerate(("$x_{$.png", "[b]<script>.png")):
        (data / "images" / f"{index}.png").rename(data / "images" / name)
        (data / "annotations" / f"{index}.xml").rename((data / "annotations" / name).with_suffix(".xml"))
    found = evaluate(data, MODEL, metrics="localisation")
    found.report(tmp_path / "pages" / "report.png")
    page = np.asarray(open_picture(tmp_path / "pages" / "report.png"))
    assert page.shape[1] == 1500
    assert page.std() > 20
    titles = [axes.get_title().partition(":")[0] for axes in drawn[0].axes]
    for method in {row.method for row in found.rows}:
        assert {f"{method}, {place}" for place in ("best", "median", "worst")} <= {*titles}


def test_no_two_texts_of_the_report_overlap_and_every_colour_is_named(tmp_path, drawn):
    methods = ("eigencam", "tsm", "mtsm", "uniform")
    rows = [
        Row(picture, method, dict.fromkeys(BY_NAME, value))
        for method in methods
        for picture, value in (("a", 0.1), ("b", 0.25))
    ]
    picture, saliency = np.ones((8, 8, 3), np.float32), np.ones((8, 8), np.float32)
    example = Example(f"{methods[0]}, median: 0.123\n{'W' * 22}", picture, saliency, np.eye(8) > 0)
    # With a byte that is no UTF-8.
    title = f"hf:{'a/long/path/' * 12}, {'a.layer.' * 12}: 2 pictures\udcff"
    write_report(tmp_path / "r.png", title, summarise(rows, MEASURES), MEASURES, [example] * 12, CUT)
    (page,) = drawn
    (legend,) = (legend for part in page.subfigs for legend in part.legends)
    titles = [axes.title for axes in page.axes] + [part._suptitle for part in (page, *page.subfigs)]
    boxes = [each.get_window_extent() for each in (legend, *titles) if each is legend or (each and each.get_text())]
    assert len(boxes) == len(MEASURES) + 12 + 3
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    assert all(page.bbox.x0 <= box.x0 <= box.x1 <= page.bbox.x1 for box in boxes)
    named = {patch.get_facecolor() for patch in legend.get_patches()}
    assert named == {bar.get_facecolor() for axes in page.axes for bar in axes.patches}
    assert len(named) == 3
    assert [line.get_color() for line in legend.get_lines()] == ["black"]


def test_summaries_agree_with_the_normal_approximation_and_pair_by_picture():
    rng = np.random.default_rng(0)
    names, difficulty = [f"{index}" for index in range(400)], rng.normal(0, 1, 400)
    better = difficulty + 0.5 + rng.normal(0, 0.1, 400)
    # In another order, and one picture was not scored.
    tsm = dict(zip(reversed(names), reversed(better.tolist()), strict=True)) | {"7": NAN}
    rows = rows_of({"eigencam": dict(zip(names, difficulty.tolist(), strict=True)), "tsm": tsm, "mtsm": {"a": 0.25}})
    summaries = {method: found["best_cut_iou"] for method, found in summarise(rows, [CUT]).items()}
    assert summarise(rows[::-1], [CUT])["tsm"]["best_cut_iou"] == summaries["tsm"]
    pictures, value, difference, pairs = summaries["tsm"]
    kept = np.delete(better, 7)
    assert pictures == pairs == 399
    assert summaries["mtsm"].pairs == 0
    assert value.mean == pytest.approx(kept.mean())
    assert value.high - value.low == pytest.approx(2 * 1.96 * kept.std() / np.sqrt(399), rel=0.1)
    # Paired, the pictures' difficulty drops out.
    assert difference.mean == pytest.approx((kept - np.delete(difficulty, 7)).mean())
    assert difference.high - difference.low == pytest.approx(4 * 0.098 / 20, rel=0.15)
    assert summaries["eigencam"].difference is None
    single = summaries["mtsm"]
    assert (single.value.mean, np.isnan(single.value.low), single.difference) == (0.25, True, None)


def test_the_printed_table_has_three_measures_and_a_sign_where_the_difference_is_clear(capsys):
    names = ("max_f_beta", "probability_drop", "best_cut_iou", "similarity_drop_area_matched")
    measures = [BY_NAME[name] for name in names]
    above = Interval(0.1, 0.05, 0.2)
    # Of how many pairs, the difference from the baseline, and the signs: of a drop between two measures whose higher
    # values are better.
    cases = {
        "eigencam": (10, None, ["", "", ""]),
        "tsm": (10, above, ["+", "-", "+"]),
        "mtsm": (10, Interval(-1, -2, -0.5), ["-", "+", "-"]),
        "lafam": (10, Interval(0.1, -1, 1), ["", "", ""]),
        "fem": (9, above, ["", "", ""]),
        # Folded: cut, two of them would be alike.
        "a_package.SomeMethod.Plus": (10, None, ["", "", ""]),
    }
    summaries = {
        method: {
            each.name: Summary(20, Interval(100, 99.5, 100) if "drop" in each.name else above, difference, count)
            for each in measures
        }
        for method, (count, difference, _) in cases.items()
    }
    print_table(summaries, measures)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["IoU,", "best", "cut", "embedding:", "drop,", "%,", "maxF,", "beta", "squared"]
    assert "probability" not in "".join(lines)
    signs = {line.split()[0]: re.findall(r"\]([+-]?)", line) for line in lines if line.split()[0] in cases}
    *ours, own_method = cases
    assert signs == {method: cases[method][2] for method in ours}
    assert own_method in "".join(line.split()[0] for line in lines)


def test_rows_survive_names_of_any_kind_and_a_torn_one_is_thrown_away(tmp_path):
    names = ["plain.jpg", 'quo"te,comma.jpg', "line\r\nbreak.jpg", b"\xff.jpg".decode("utf8", "surrogateescape")]
    numbers = [0.5, NAN, 1e-9, 123457]
    rows = [Row(name, "tsm", {"a": number}) for name, number in zip(names, numbers, strict=True)]
    out = tmp_path / "r.csv"
    Results(out, {"model": "m"}, ["a"]).append(rows)
    whole = out.read_bytes()
    assert whole.count(b",m,") == 4
    for cut in range(len(b"picture,method,model,a\r\n"), len(whole)):
        out.write_bytes(whole[:cut])
        results = Results(out, {"model": "m"}, ["a"])
        results.append(rows)
        assert out.read_bytes() == whole
    assert [name for name, _ in results.rows] == names
    assert [row.values["a"] for row in results.rows.values()] == [0.5, pytest.approx(NAN, nan_ok=True), 1e-9, 123457]


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_know_nothing_but_the_pictures_name(name):
    maps = control_maps(name, pictures=["\udcff", "b", "\udcff"], size=(20, 30), resolution=(3, 5))
    assert maps.shape == (3, 20, 30)
    assert maps.dtype == torch.float32
    assert 0 <= maps.min() <= maps.max() <= 1
    assert torch.equal(maps[0], maps[2])
    assert torch.equal(maps[0], maps[1]) == (name != "random")


def test_the_centre_gaussian_is_highest_in_the_centre_and_the_random_map_is_not_white():
    centre = control_maps("centre-gaussian", pictures=["a"], size=(21, 31), resolution=(3, 5))[0]
    assert centre.argmax() == 10 * 31 + 15
    # A quarter of the side away from the centre, one deviation: exp(-1/2).
    assert centre[10, 15 - 7] == pytest.approx(np.exp(-0.5 * (7 / 30 / 0.25) ** 2), rel=1e-5)
    random_map = control_maps("random", pictures=["a"], size=(224, 224), resolution=(7, 7))[0]
    assert random_map.diff(dim=0).abs().max() < 0.1
    assert random_map.max() > 0.99


@pytest.mark.parametrize(("layer", "count"), [("1", 8), ("3", 16)])
def test_the_spectrum_is_that_of_numpy(layer, count):
    model, images = tiny_loaded_model().model.eval(), torch.randn(3, 3, 24, 24)
    found = spectrum(images, MODEL, layers=[layer], batch_size=2)
    with torch.no_grad():
        features = model[: int(layer) + 1](images).double().flatten(2).numpy()
    for name, centred in (("SVD, centred", True), ("Tucker", False)):
        values = np.linalg.svd(features - centred * features.mean(2, keepdims=True), compute_uv=False)
        np.testing.assert_allclose(
            found.shares[name][:, :count], (values / values.sum(1, keepdims=True))[:, :10], atol=1e-5
        )
        assert np.isnan(found.shares[name][:, count:]).all()


def test_the_spectrum_is_plotted_and_written(data, tmp_path):
    (data / "images" / "text.jpg").write_text("no picture")
    out = tmp_path / "new" / "s.png"
    result = CliRunner().invoke(app, ["spectrum", str(data), "--out", str(out), "--model", MODEL])
    assert result.exit_code == 1
    assert "text.jpg" in result.stderr
    with out.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * 2 * 10
    shares = [float(row["share"]) for row in rows[:10]]
    assert shares == sorted(shares, reverse=True)
    for name in ("SVD, centred", "Tucker"):
        assert f"{name}: the first value holds" in result.output
    assert np.asarray(open_picture(out)).std() > 10


@pytest.mark.parametrize(("measure", "expected"), [("best_cut_iou", "bca"), ("similarity_drop", "acb")])
def test_examples_are_the_best_the_median_and_the_worst(measure, expected):
    values = {"tsm": {"a": 0.1, "b": 0.5, "c": 0.3, "d": NAN}}
    found = list(pick_examples(rows_of(values, measure), BY_NAME[measure]))
    assert [picture for _, picture, _ in found] == [*expected]
    assert [title.partition(":")[0] for _, _, title in found] == ["tsm, best", "tsm, median", "tsm, worst"]
    ((*_, title), *_) = pick_examples(rows_of({"tsm": {"\udcff" * 22 + ".png": 0.5}}, measure), BY_NAME[measure])
    assert title.startswith("tsm, best: 0.5\n...")
    assert len(title.partition("\n")[2]) == 22
