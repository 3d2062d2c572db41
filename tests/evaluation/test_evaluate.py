"""Pictures through `evaluate` and its command line: rows, tables, interruptions, and pictures that cannot be used."""

import csv
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from annotated import write_boxes, write_picture
from filelock import FileLock
from networks import FailsOnFlat, small_cnn
from PIL import Image
from pytorch_grad_cam import EigenCAM
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from tucker_cam import TSM, evaluate
from tucker_cam.cli import app
from tucker_cam.errors import BadValueError, TuckerCamError
from tucker_cam.evaluation import comparison, metrics
from tucker_cam.evaluation.comparison import score_of
from tucker_cam.evaluation.controls import CONTROLS
from tucker_cam.evaluation.metrics import MEASURES, Measure
from tucker_cam.explanations.maps import OnePass
from tucker_cam.methods import METHODS
from tucker_cam.models import Network, load_model
from tucker_cam.pictures.annotations import find_samples, network_view

MODEL = "networks:tiny_loaded_model"
NAMES = [measure.name for measure in MEASURES]
STATISTICS = {measure.name for measure in MEASURES if measure.group == "statistics"}


def run(*arguments, model=MODEL):
    return CliRunner().invoke(app, [*(str(argument) for argument in arguments), "--model", model])


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def quick(data, tmp_path):
    """The shortest command line that writes rows."""
    return ("evaluate", data, "--method", "tsm", "--metric", "localisation", "--out", tmp_path / "r.csv")


def test_every_picture_and_method_is_a_row_with_every_metric_and_every_method_in_the_tables(data, tmp_path):
    out = tmp_path / "new" / "results.csv"
    groups = [word for group in metrics.GROUPS for word in ("--metric", group)]
    result = run("evaluate", data, "--out", out, *groups)
    assert result.exit_code == 0, result.output
    rows = read(out)
    methods = {*METHODS, *CONTROLS, "gradcam"} | ({"seg-eigencam"} & {row["method"] for row in rows})
    assert Counter((row["picture"], row["method"]) for row in rows) == {
        (f"images/{index}.png", method): 1 for index in range(5) for method in methods
    }
    assert [*rows[0]] == ["picture", "method", "data", "model", "weights", "layer", "annotations", *NAMES]
    for row in rows:
        assert all(row[name] for name in NAMES if row["method"] != "uniform" or "road" not in name)
        assert (row["model"], row["layer"], row["annotations"]) == (MODEL, "3", "boxes")
    lines = result.output.splitlines()
    assert all(any(line.split()[:1] == [method] for line in lines) for method in methods)
    summed = read(out.with_name("results-summary.csv"))
    assert {row["method"] for row in summed} == methods
    assert {row["measure"] for row in summed if row["method"] == "tsm"} == set(NAMES)
    assert not any(None in row.values() for row in summed)
    assert "5 pictures scored, 0 skipped" in result.output


def test_the_rows_of_a_folder_and_of_batches_hold_what_the_metrics_say(data):
    loaded = load_model(MODEL)
    samples, kind, _ = find_samples(data)
    views = [network_view(sample, kind, loaded) for sample in samples]
    images, masks = (torch.stack([view[place] for view in views]) for place in (0, 1))
    with TSM(loaded.model, loaded.target_layers) as cam, OnePass(loaded, images) as one_pass:
        maps, score = torch.as_tensor(cam(images)), score_of(loaded, one_pass)
    localisation = [measure.name for measure in MEASURES if measure.group == "localisation"]
    expected = {name: getattr(metrics, name)(maps, masks) for name in localisation}
    expected |= {name: getattr(metrics, name)(maps) for name in STATISTICS}
    of_scores = {name: getattr(metrics, f"{name}_auc")(images, maps, score) for name in ("insertion", "deletion")}
    for suffix, shown in ("", maps), ("_area_matched", metrics.area_matched(maps)):
        change = metrics.confidence_change(images, shown, score)
        of_scores |= {f"{kind}{suffix}": each for kind, each in change._asdict().items()}
    for name, each in of_scores.items():
        expected |= {f"probability_{name}": each[:, 0], f"similarity_{name}": each[:, 1]}
    # An embedding's similarity is 1 for the whole image: nothing to gain.
    gains = {f"similarity_{kind}{suffix}" for kind in ("gain", "increase") for suffix in ("", "_area_matched")}
    for given in data, [(images[:2], masks[:2]), (images[2:], masks[2:])]:
        rows = evaluate(given, loaded, "tsm", metrics=["localisation", "drop", "curves"], batch_size=3).rows
        assert len({row.picture for row in rows}) == 5
        found = [row.values for row in rows if row.method == "tsm"]
        assert expected.keys() - found[0].keys() == gains
        for name in expected.keys() - gains:
            assert [values[name] for values in found] == pytest.approx(expected[name].tolist(), rel=1e-3, abs=1e-5)


def test_a_measure_of_ones_own_is_in_rows_summary_file_and_report(data, tmp_path, drawn):
    largest = Measure("largest", lambda judged: judged.maps.numpy().max((1, 2)), "largest value")
    found = evaluate(data, MODEL, {"mine": METHODS["tsm"]}, metrics=iter(["localisation", largest]))
    found.to_csv(tmp_path / "r.csv")
    found.report(tmp_path / "r.png")
    assert {row.method for row in found.rows} & {*METHODS, "mine"} == {"eigencam", "mine"}
    assert found.summary()["mine"]["largest"].value.mean == 1
    assert {row["largest"] for row in read(tmp_path / "r.csv") if row["method"] == "uniform"} == {"0.5"}
    assert "largest value\nneither is better" in [axes.get_title() for axes in drawn[0].axes]


def test_a_measure_has_a_number_for_each_picture(data):
    for wrong, shape in ((torch.zeros(()), r"\(\)"), (torch.zeros(1, 1), r"\(1, 1\)")):
        with pytest.raises(BadValueError, match=rf"shape \(1,\) from the measure own, got {shape}"):
            evaluate(data, MODEL, "tsm", metrics=Measure("own", lambda judged, wrong=wrong: wrong))
    with pytest.raises(BadValueError, match=r"the measure own failed \(ZeroDivisionError: "):
        evaluate(data, MODEL, "tsm", metrics=Measure("own", lambda judged: 1 / 0))
    with pytest.raises(BadValueError, match="better as one of 'higher', 'lower', '', got 'up'"):
        Measure("own", torch.zeros, better="up")


def test_a_network_without_classes_is_scored_by_its_embedding(data):
    rows = evaluate(data, "networks:tiny_backbone").rows
    assert {row.method for row in rows} == {*METHODS, *CONTROLS}
    assert "similarity_drop" in rows[0].values
    assert not [name for name in rows[0].values if name.startswith("probability")]


def test_an_interrupted_run_says_so_and_goes_on_and_a_finished_one_is_not_computed_again(quick, monkeypatch):
    arguments, out = (*quick, "--batch-size", "2"), quick[-1]
    expected = run(*arguments).stdout
    whole = out.read_bytes()
    out.write_text("")
    real, calls = comparison.saliency_maps, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(comparison, "saliency_maps", interrupted)
    result = run(*arguments)
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr
    assert {row["picture"] for row in read(out)} == {"images/0.png", "images/1.png"}
    assert run(*arguments).stdout == expected
    assert out.read_bytes() == whole
    monkeypatch.setattr(comparison, "saliency_maps", lambda *_: pytest.fail("computed again"))
    assert run(*arguments).stdout == expected


def test_names_are_neither_markup_nor_escape_sequences_and_methods_of_another_run_stay(quick, tmp_path):
    out = tmp_path / "\x1b[31m.csv"
    arguments = (*quick[:-1], out, "--report", tmp_path / "r.png")
    run(*arguments)
    row = next(line for line in out.read_text().splitlines() if ",tsm," in line)
    with out.open("a") as file:
        file.write(row.replace(",tsm,", ",[/x] :cat: \x1b[31m,") + "\n")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "[/x] :cat: \\x1b[31m" in result.output
    assert "\x1b" not in result.output


def test_a_file_that_another_run_writes_or_that_holds_no_results_or_no_number_is_left_alone(quick, tmp_path):
    with FileLock(tmp_path / ".r.csv.lock"):
        assert "another run is writing to it" in run(*quick).stderr
    run(*quick)
    text = quick[-1].read_text()
    for content, said in ("the only copy", "give another file"), (text[:-3] + "abc\n", "abc'): give another file"):
        quick[-1].write_text(content)
        result = run(*quick)
        assert result.exit_code == 2
        assert said in result.stderr
        assert quick[-1].read_text() == content


def test_pictures_and_annotations_that_do_not_fit_are_named_counted_and_the_others_scored(data, tmp_path):
    (data / "images" / "broken.png").write_bytes((data / "images" / "0.png").read_bytes()[:80])
    write_picture(data / "images" / "far.png", size=(40, 30))
    write_boxes(data / "annotations" / "far.xml", (90, 1, 95, 4), size=(40, 30))
    write_picture(data / "images" / "free.png", size=(40, 30))
    write_boxes(data / "annotations" / "nobodys.xml", (1, 1, 5, 4), size=(40, 30))
    result = run("evaluate", data, "--out", tmp_path / "r.csv", "--method", "tsm")
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    for words in ("broken.png: expected a whole picture", "far.xml: expected boxes"):
        assert words in "".join(errors)
    assert "6 pictures scored, 2 skipped" in result.output
    # Before the work begins.
    assert result.output.startswith("note: XML files or masks that belong to no picture: 1, ")
    assert "free.png: without boxes" in result.output
    rows = {row["picture"]: row for row in read(tmp_path / "r.csv") if row["method"] == "tsm"}
    assert set(rows) == {f"images/{name}.png" for name in (*range(5), "free")}
    assert rows["images/free.png"]["pointing_game"] == ""
    assert rows["images/free.png"]["similarity_drop"] != ""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_on_which_the_network_fails_is_named_and_the_others_are_done(data, workers):
    Image.new("RGB", (3, 3)).save(data / "images" / "2-small.png")
    found = evaluate(data, "networks:demanding_model", "tsm", metrics="drop", batch_size=4, workers=workers)
    ((name, error, _),) = found.failures
    assert name == "images/2-small.png"
    assert "Kernel size can't be greater than actual input size" in str(error)
    assert error.__traceback__ is not None
    assert {row.picture for row in found.rows} == {f"images/{index}.png" for index in range(5)}


def test_a_picture_takes_one_pass_for_all_methods_two_with_gradients_and_two_for_each_map(data):
    loaded, seen = load_model(MODEL), Counter()
    loaded.model.register_forward_hook(lambda module, inputs, output: seen.update(images=len(output)))
    evaluate(data, loaded, metrics="drop")
    maps = len(METHODS) + 2 + len(CONTROLS)
    # The uniform map is scored once: it is its own area-matched one.
    assert seen["images"] / 5 == 1 + 2 + 2 * maps - 1


def test_results_of_another_run_are_not_mixed_in(data, tmp_path):
    loaded, out = load_model(MODEL), tmp_path / "r.csv"
    evaluate(data, loaded, "tsm", out=out)
    before = out.read_bytes()
    shutil.copytree(data, tmp_path / "other" / "data")
    other = load_model(MODEL)
    other.model[0].bias.data += 1
    for folder, model, options, message in (
        (tmp_path / "other" / "data", loaded, {}, "results of the data"),
        (data, other, {}, "results of the weights"),
        (data, MODEL, {"size": 32}, "results of the model"),
        (data, MODEL, {"layers": ["0"]}, "results of the layer 0, found some of 3"),
        (data, loaded, {"metrics": "curves"}, "expected the columns"),
        (data, loaded, {"limit": 2}, "which is not among them"),
    ):
        with pytest.raises(BadValueError, match=message):
            evaluate(folder, model, "tsm", out=out, **options)
    assert out.read_bytes() == before


@pytest.mark.parametrize("command", ["evaluate", "spectrum"])
def test_outputs_that_would_overwrite_others_or_cannot_be_written_are_refused_before_the_model_is_loaded(
    data, tmp_path, command
):
    (tmp_path / "rows.csv").write_text("the only copy")
    (tmp_path / "r-summary.csv").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    refused = [data / "images" / "0.png", "/dev/full", tmp_path / "folder.png", tmp_path / "rows.csv" / "r.png"]
    if command == "evaluate":
        reports = [*refused, tmp_path / "a.png", tmp_path / "report.docx"]
        options = [("--out", tmp_path / "a.png", "--report", report) for report in reports]
        options.append(("--out", tmp_path / "r.csv"))
    else:
        options = [("--out", tmp_path / name) for name in ("s.csv", "s.pdf", "rows.png")]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for each in [("--out", out) for out in refused] + options:
        result = run(command, data, *each, model="networks:raises")
        assert result.exit_code == 2, each
        assert len(result.stderr.strip().splitlines()) == 1
        assert "raises" not in result.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_map_that_is_not_finite_is_named_and_the_others_scored(data, monkeypatch):
    real = comparison.saliency_maps

    def broken(one_pass, names, methods):
        for method, maps, errors in real(one_pass, names, methods):
            maps[-1] *= torch.nan if method == "tsm" else 1
            yield method, maps, errors

    monkeypatch.setattr(comparison, "saliency_maps", broken)
    found = evaluate(data, MODEL, "tsm")
    assert found.remarks == ["images/4.png: tsm gave a map with NaN or Inf, so not scored"]
    for row in found.rows:
        missing = {np.isnan(value) for value in row.values.values()}
        assert missing == {(row.picture, row.method) == ("images/4.png", "tsm")}


def test_a_method_that_fails_costs_its_own_rows_and_one_that_nobody_asked_for_a_remark():
    images = torch.rand(3, 3, 24, 24)
    images[1] = 0.5
    found = evaluate(images, MODEL, {"tsm": TSM, "picky": FailsOnFlat}, metrics="drop", batch_size=2)
    assert [(failure.name, failure.method, str(failure.error)) for failure in found.failures] == [
        ("000001", "picky", "nothing to see")
    ]
    methods = {"eigencam", "tsm", "picky", "gradcam", *CONTROLS}
    rows = {(row.picture, row.method) for row in found.rows if row.method != "seg-eigencam"}
    assert rows == {(f"00000{index}", method) for index in range(3) for method in methods} - {("000001", "picky")}
    alone = evaluate(images[2:], MODEL, {"picky": EigenCAM}, metrics="drop")
    (expected,), (row,) = (
        [row.values for row in each.rows if (row.picture, row.method) == (name, "picky")]
        for each, name in ((alone, "000000"), (found, "000002"))
    )
    assert row == pytest.approx(expected, abs=1e-3)

    # The host's methods of a class take no bfloat16.
    half = evaluate(images.bfloat16(), Network(small_cnn().bfloat16(), classifies=True), "tsm", metrics="drop")
    assert half.failures == []
    assert half.remarks[0].startswith("gradcam, there for reference, failed on 3 pictures: ")
    assert {row.method for row in half.rows} == {"eigencam", "tsm", *CONTROLS}


def test_where_eigencam_fails_the_others_have_their_summary_without_differences(tmp_path, monkeypatch):
    monkeypatch.setattr(EigenCAM, "get_cam_image", lambda *_: [][0])
    found = evaluate(torch.rand(2, 3, 24, 24), MODEL, "tsm", metrics="drop")
    assert found.remarks[0].startswith("eigencam, there for reference, failed on 2 pictures: ")
    assert all(summary.difference is None for summary in found.summary()["tsm"].values())
    found.report(tmp_path / "r.png")


@pytest.mark.parametrize("command", ["evaluate", "spectrum"])
def test_pictures_none_of_which_can_be_used_are_one_line(tmp_path, command):
    write_picture(tmp_path / "data" / "a.png", size=(3, 3))
    result = run(command, tmp_path / "data", "--out", tmp_path / "r.png", model="networks:demanding_model")
    assert result.exit_code == 2
    assert "found 1 picture, and none could be used" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("r.*"))


def test_bad_arguments_are_an_error(tmp_path):
    images = torch.rand(1, 3, 24, 24)
    for options, message in (
        ({"data": tmp_path / "none"}, "expected a folder of pictures, found none of that name"),
        ({"data": tmp_path}, "at any depth, found none"),
        ({"data": []}, "got none"),
        ({"data": None}, "expected a folder, or batches of network inputs, got NoneType"),
        ({"data": [(images, torch.ones(0, 24, 24) > 0)]}, "expected a mask for each of 1 images, got 0"),
        ({"data": tmp_path, "annotations": "polygons"}, "expected annotations as one of 'boxes', 'masks', 'none'"),
        ({"data": [images[0]]}, "batch x channels"),
        ({"data": [(images, torch.ones(1, 24, 24))]}, "^expected masks of bool after the images, got torch.float32"),
        ({"annotations": "boxes"}, "give their masks"),
        ({"batch_size": 0}, "batch_size of at least 1"),
        ({"limit": 0}, "limit of at least 1"),
        ({"layers": ["0", "2"]}, "expected one layer"),
        ({"model": "networks:tiny_video_network"}, "takes clips"),
        ({"metrics": "locals"}, "near it: localisation"),
        ({"out": "s3://bucket/r.csv"}, "expected a file of this machine, got a URL"),
        ({"methods": ["tsn"]}, "near it: tsm"),
        ({"methods": {"tsm": METHODS["mtsm"]}}, "names of your own for methods of your own, got tsm"),
        ({"methods": {"random": METHODS["tsm"]}}, "names of your own for methods of your own, got random"),
        ({"metrics": Measure("layer", lambda judged: judged.maps)}, "different names, got the columns picture"),
    ):
        with pytest.raises(TuckerCamError, match=message):
            evaluate(**({"data": images, "model": MODEL} | options))


def test_differences_are_from_the_method_that_is_named(data):
    found = evaluate(data, MODEL, ["tsm", "mtsm"], metrics="localisation")
    eigencam, tsm, mtsm = (found.summary(baseline="tsm")[name]["best_cut_iou"] for name in ("eigencam", "tsm", "mtsm"))
    assert mtsm.difference.mean == pytest.approx(mtsm.value.mean - tsm.value.mean)
    assert tsm.difference is None
    assert eigencam.difference is not None
    with pytest.raises(BadValueError, match="there is no method 'tsn'; near it: tsm"):
        found.summary(baseline="tsn")


def test_masks_may_be_of_numpy_have_a_channel_and_stand_after_labels():
    images, masks = torch.rand(2, 3, 24, 24), torch.zeros(2, 24, 24, dtype=torch.bool)
    masks[:, 5:15, 8:20] = True
    labels = torch.tensor([3, 4])
    ways = [[masks], [masks.numpy()], [labels, masks[:, None]]]
    batches = [[(images, *way)] for way in ways]
    first, *others = (evaluate(each, MODEL, "tsm", metrics="localisation").rows for each in batches)
    assert all(each == first for each in others)
    assert "pointing_game" in first[0].values
    with pytest.raises(BadValueError, match="expected masks or boxes for the metric localisation, found none"):
        evaluate([(images, labels)], MODEL, "tsm", metrics="localisation")
    # What has a map for each image is meant as masks.
    for others in [labels, masks.long()], [torch.rand(2, 3, 24, 24)]:
        with pytest.raises(TypeError, match=r"expected masks of bool after the images, got .*: use masks > 0, or"):
            evaluate([(images, *others)], MODEL, "tsm")


def test_a_data_sets_labels_are_no_masks_and_its_rows_hold_the_maps_statistics_in_a_new_file_only(tmp_path):
    loader = DataLoader(TensorDataset(torch.rand(5, 3, 24, 24), torch.arange(5)), batch_size=2)
    options = {"methods": "tsm", "metrics": (), "out": tmp_path / "r.csv"}
    found = evaluate(loader, MODEL, limit=3, **options)
    assert {row.picture for row in found.rows} == {"000000", "000001", "000002"}
    assert found.rows[0].values.keys() == STATISTICS
    assert repr(found).startswith("<Evaluation of 3 pictures by eigencam, tsm, ")
    before = (tmp_path / "r.csv").read_bytes()
    with pytest.raises(BadValueError, match=r"r\.csv: expected a new file, as nothing tells"):
        evaluate(loader, MODEL, **options)
    assert (tmp_path / "r.csv").read_bytes() == before
