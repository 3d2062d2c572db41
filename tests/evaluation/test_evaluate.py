"""Pictures through `evaluate` and its command line: rows, tables, interruptions, and pictures that cannot be used."""

import csv
import itertools
import os
import shutil
import sys
from collections import Counter

import networks
import numpy as np
import pytest
import torch
from annotated import write_boxes, write_picture
from filelock import FileLock
from PIL import Image
from test_security import huge_png
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from tucker_cam import TSM, evaluate
from tucker_cam.cli import app
from tucker_cam.errors import BadValueError
from tucker_cam.evaluation import comparison, metrics
from tucker_cam.evaluation.controls import CONTROLS
from tucker_cam.evaluation.metrics import MEASURES, Measure, choose_measures
from tucker_cam.methods import METHODS
from tucker_cam.models import load_model
from tucker_cam.pictures.annotations import find_samples, network_view

MODEL = "networks:tiny_loaded_model"
NAMES = [measure.name for measure in MEASURES]


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
    assert all(f"│ {method} " in result.output for method in methods)
    assert "5 pictures scored, 0 skipped" in result.output


def test_the_rows_hold_what_the_metrics_say(data):
    groups = ["localisation", "drop", "curves"]
    found = {(row.picture, row.method): row.values for row in evaluate(data, MODEL, "tsm", metrics=groups).rows}
    loaded = networks.tiny_loaded_model()
    model = loaded.model.eval()
    samples, kind, _ = find_samples(data)
    for sample in samples:
        seen = network_view(sample, kind, loaded)
        images, masks = seen.network_input[None], seen.mask[None]
        with TSM(model, [model[3]]) as cam:
            maps = torch.as_tensor(cam(images))
        with torch.no_grad():
            label = model(images).argmax()

        # The scores, written here once more.
        def probability(these, label=label):
            return model(these).softmax(1)[:, label].detach()

        def similarity(these, images=images):
            return torch.cosine_similarity(*(model[:4](each).mean((2, 3)).detach() for each in (these, images)))

        localisation = [measure.name for measure in metrics.MEASURES if measure.group == "localisation"]
        expected = {name: getattr(metrics, name)(maps, masks) for name in localisation}
        expected |= {name: getattr(metrics, name)(maps) for name in ("mean_saliency", "energy_in_top")}
        blurred, grey = metrics.blurred(images), metrics.mean_colour(images)
        for name, score in (("probability", probability), ("similarity", similarity)):
            for suffix, shown in (("", maps), ("_area_matched", metrics.area_matched(maps))):
                change = metrics.confidence_change(images, shown, score)
                expected |= {f"{name}_{kind}{suffix}": each for kind, each in change._asdict().items()}
            expected[f"{name}_insertion"] = metrics.insertion_auc(images, maps, score, baseline=blurred)
            expected[f"{name}_deletion"] = metrics.deletion_auc(images, maps, score, baseline=grey)
        values = found[sample.name, "tsm"]
        # An embedding's similarity is 1 for the whole image: nothing to gain.
        gains = {f"similarity_{kind}{suffix}" for kind in ("gain", "increase") for suffix in ("", "_area_matched")}
        assert expected.keys() - values.keys() == gains
        for name, value in values.items():
            assert value == pytest.approx(expected[name].item(), rel=1e-3, abs=1e-5)


def test_batches_are_scored_as_the_pictures_of_a_folder_are(data):
    loaded = load_model(MODEL)
    samples, kind, _ = find_samples(data)
    views = [network_view(sample, kind, loaded) for sample in samples]
    images, masks = (torch.stack([view[place] for view in views]) for place in (0, 1))
    expected = evaluate(data, loaded, batch_size=3)
    found = evaluate([(images[:2], masks[:2]), (images[2:], masks[2:])], loaded, batch_size=3)
    assert {row.picture for row in found.rows} == {f"{index:06d}" for index in range(5)}
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        # KPCA-CAM starts anywhere, and noise comes of the picture's name.
        if ours.method not in ("kpca-cam", "random"):
            assert ours.values == pytest.approx(theirs.values, rel=1e-4, abs=1e-5)


def test_a_data_sets_labels_are_no_masks_and_its_pictures_are_counted(caplog):
    caplog.set_level("INFO", "tucker_cam")
    images = torch.rand(5, 3, 24, 24)
    loader = DataLoader(TensorDataset(images, torch.arange(5)), batch_size=2)
    found = evaluate(loader, MODEL, "tsm", metrics="localisation", limit=3)
    assert {row.picture for row in found.rows} == {"000000", "000001", "000002"}
    assert found.rows[0].values.keys() == {"mean_saliency", "energy_in_top"}
    assert "3 pictures, annotations: none" in caplog.text
    assert repr(found).startswith("<Evaluation of 3 pictures by eigencam, tsm, ")


def test_a_measure_of_ones_own_is_in_rows_summary_file_and_report(data, tmp_path, drawn):
    largest = Measure("largest", lambda judged: judged.maps.amax((1, 2)), "largest value")
    found = evaluate(data, MODEL, {"mine": METHODS["tsm"]}, metrics=("localisation", largest))
    found.to_csv(tmp_path / "r.csv")
    found.report(tmp_path / "r.png")
    assert {row.method for row in found.rows} & {*METHODS, "mine"} == {"eigencam", "mine"}
    assert found.summary()["mine"]["largest"].value.mean == 1
    assert {row["largest"] for row in read(tmp_path / "r.csv") if row["method"] == "uniform"} == {"0.5"}
    assert "largest value\nneither is better" in [axes.get_title() for axes in drawn[0].axes]
    with pytest.raises(BadValueError, match="different names"):
        choose_measures(["localisation", largest, largest], ())


def test_a_new_measure_is_one_record(quick, monkeypatch):
    largest = Measure("largest", lambda judged: judged.maps.amax((1, 2)), "largest value", group="localisation")
    monkeypatch.setattr(metrics, "MEASURES", (*MEASURES, largest))
    assert "largest value" in " ".join(run(*quick).stdout.split())
    assert {row["largest"] for row in read(quick[-1]) if row["method"] == "tsm"} == {"1"}


@pytest.mark.parametrize("model", ["networks:tiny_backbone", "networks:tiny_tuple_model"])
def test_a_network_without_classes_is_scored_by_its_embedding(data, model):
    rows = evaluate(data, model).rows
    assert {row.method for row in rows} == {*METHODS, *CONTROLS}
    assert "similarity_drop" in rows[0].values
    assert not [name for name in rows[0].values if name.startswith("probability")]


def test_a_run_cut_off_at_any_byte_ends_with_the_same_rows_and_the_same_means(data, tmp_path):
    out = tmp_path / "results.csv"
    arguments = {"metrics": "localisation", "out": out, "batch_size": 2, "workers": 0}
    expected = evaluate(data, MODEL, "tsm", **arguments).summary()
    written = out.read_bytes()
    header = written.index(b"\n") + 1
    for length in np.random.default_rng(0).integers(header, len(written), 12).tolist():
        out.write_bytes(written[:length])
        assert evaluate(data, MODEL, "tsm", **arguments).summary() == expected
        assert sorted(out.read_bytes().splitlines()) == sorted(written.splitlines())


def test_an_interrupted_run_says_so_and_goes_on_and_a_finished_one_is_not_computed_again(data, quick, monkeypatch):
    for index in range(5, 10):
        shutil.copy(data / "images" / "0.png", data / "images" / f"{index}.png")
    expected, out = run(*quick).stdout, quick[-1]
    whole = out.read_bytes()
    out.unlink()
    real, calls = comparison.saliency_maps, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(comparison, "saliency_maps", interrupted)
    result = run(*quick)
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr
    assert {row["picture"] for row in read(out)} == {f"images/{index}.png" for index in range(8)}
    assert run(*quick).stdout == expected
    assert out.read_bytes() == whole
    monkeypatch.setattr(comparison, "saliency_maps", lambda *_: pytest.fail("computed again"))
    assert run(*quick).stdout == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layer", "0"), "results of the layer 0, found some of 3"),
        (("--model", "networks:tiny_backbone"), "expected the columns"),
        (("--metric", "curves"), "expected the columns"),
        (("--limit", "2"), "which is not among them"),
    ],
)
def test_results_of_another_run_are_not_mixed_in(data, tmp_path, arguments, message):
    out = tmp_path / "results.csv"
    base = ["evaluate", str(data), "--out", str(out), "--model", MODEL]
    assert CliRunner().invoke(app, base).exit_code == 0
    before = out.read_bytes()
    result = CliRunner().invoke(app, [*base, *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert out.read_bytes() == before


def test_results_of_other_weights_or_another_folder_of_the_same_names_are_not_mixed_in(data, tmp_path):
    loaded, out = load_model(MODEL), tmp_path / "r.csv"
    evaluate(data, loaded, "tsm", out=out)
    shutil.copytree(data, tmp_path / "other" / "data")
    with pytest.raises(BadValueError, match="results of the data"):
        evaluate(tmp_path / "other" / "data", loaded, "tsm", out=out)
    with torch.no_grad():
        loaded.model[0].bias += 1
    with pytest.raises(BadValueError, match="results of the weights"):
        evaluate(data, loaded, "tsm", out=out)


@pytest.mark.parametrize("command", ["evaluate", "spectrum"])
def test_outputs_that_would_overwrite_others_or_cannot_be_written_are_refused_before_the_model_is_loaded(
    data, tmp_path, command
):
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    (tmp_path / "rows.csv").write_text("the only copy")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    refused = [data / "images" / "0.png", "/dev/full", tmp_path / "folder.png", tmp_path / "pipe.png"]
    refused += [tmp_path / "rows.csv" / "new" / "r.png"]
    arguments = [(command, data, "--out", out) for out in refused]
    if command == "evaluate":
        reports = [*refused, tmp_path / "a.png", tmp_path / "report.docx"]
        arguments += [(command, data, "--out", tmp_path / "a.png", "--report", report) for report in reports]
    else:
        arguments += [(command, data, "--out", tmp_path / name) for name in ("s.csv", "s.pdf", "rows.png")]
    for each in arguments:
        result = run(*each, model="networks:raises")
        assert result.exit_code == 2, each
        assert len(result.stderr.strip().splitlines()) == 1
        assert "raises" not in result.stderr
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
    assert (tmp_path / "rows.csv").read_text() == "the only copy"


def test_two_runs_do_not_write_to_one_file(quick, tmp_path):
    with FileLock(tmp_path / ".r.csv.lock"):
        result = run(*quick)
    assert result.exit_code == 2
    assert "another run is writing to it" in result.stderr
    assert run(*quick).exit_code == 0
    assert [path.name for path in tmp_path.glob("*r.csv*")] + [path.name for path in tmp_path.glob(".*")] == ["r.csv"]


def test_a_map_that_is_not_finite_is_named_and_the_others_scored(data, tmp_path, monkeypatch):
    def broken(self, features):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(TSM, "saliency", broken)
    result = run("evaluate", data, "--method", "tsm", "--out", tmp_path / "r.csv")
    assert result.exit_code == 0, result.output
    assert "images/3.png: tsm gave a map with NaN or Inf, or none" in result.output
    rows = read(tmp_path / "r.csv")
    assert all(not row[name] for row in rows for name in NAMES if row["method"] == "tsm" and name in row)
    assert all(row["similarity_drop"] for row in rows if row["method"] != "tsm")


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
    # Five pictures are too few for a star.
    assert "*" not in result.output.partition("Means over")[0]


def test_a_file_that_holds_no_results_or_no_number_is_left_alone(quick):
    out = quick[-1]
    out.write_text("the only copy")
    assert "give another file" in run(*quick).stderr
    assert out.read_text() == "the only copy"
    out.unlink()
    run(*quick)
    text = out.read_text()
    out.write_text(text.replace(text.strip().rpartition(",")[2], "abc"))
    result = run(*quick)
    assert result.exit_code == 2
    assert "'abc'" in result.stderr


def test_pictures_and_annotations_that_do_not_fit_are_named_counted_and_the_others_scored(data, tmp_path):
    (data / "images" / "broken.png").write_bytes((data / "images" / "0.png").read_bytes()[:80])
    (data / "images" / "text.jpg").write_text("no picture")
    write_picture(data / "images" / "far.png", size=(40, 30))
    write_boxes(data / "annotations" / "far.xml", (90, 1, 95, 4), size=(40, 30))
    write_picture(data / "images" / "free.png", size=(40, 30))
    result = run("evaluate", data, "--out", tmp_path / "r.csv", "--method", "tsm")
    assert result.exit_code == 1
    errors = "\n".join(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert errors.count("error: ") == 3
    for words in ("broken.png: expected a whole picture", "text.jpg: expected a picture", "far.xml: expected boxes"):
        assert words in errors
    assert "6 pictures scored, 3 skipped" in result.output
    assert "free.png: without boxes" in result.output
    rows = {row["picture"]: row for row in read(tmp_path / "r.csv") if row["method"] == "tsm"}
    assert set(rows) == {f"images/{name}.png" for name in (*range(5), "free")}
    assert rows["images/free.png"]["pointing_game"] == ""
    assert rows["images/free.png"]["similarity_drop"] != ""


@pytest.mark.parametrize("command", ["evaluate", "spectrum"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "expected a folder of pictures, found nothing of that name"),
        (lambda path: path.mkdir(), "at any depth, found none"),
        (lambda path: path.mkdir() or (path / "a.jpg").write_text(""), "found 1 picture, and none could be used: "),
        (lambda path: write_picture(path / "a.png", size=(3, 3)), "found 1 picture, and none could be used: "),
    ],
)
def test_data_without_pictures_that_can_be_used_is_one_line(tmp_path, command, make, message):
    make(tmp_path / "data")
    result = run(command, tmp_path / "data", "--out", tmp_path / "r.png", model="networks:demanding_model")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("r.*"))


@pytest.mark.parametrize("batch", [torch.rand(3, 24, 24), (torch.rand(1, 3, 24, 24), torch.ones(1, 24, 24)), "picture"])
def test_batches_of_another_kind_are_an_error_at_once(batch):
    with pytest.raises(TypeError, match="batch x "):
        evaluate([batch], MODEL)


def test_rows_of_another_preprocessing_are_not_mixed_in(data, tmp_path):
    options = {"metrics": "drop", "out": tmp_path / "r.csv", "progress": False}
    found = evaluate(data, MODEL, "tsm", **options)
    with pytest.raises(BadValueError, match="expected results of the model"):
        evaluate(data, MODEL, "tsm", size=32, **options)
    assert found.run["model"] == MODEL


def test_bad_arguments_are_an_error():
    images = torch.rand(1, 3, 24, 24)
    video = load_model("networks:tiny_video_network")
    for options, message in (
        ({"data": []}, "got none"),
        ({"annotations": "boxes"}, "give their masks"),
        ({"batch_size": 0}, "batch_size of at least 1"),
        ({"layers": ["0", "2"]}, "expected one layer"),
        ({"model": video}, "takes clips"),
        ({"metrics": "locals"}, "near it: localisation"),
        ({"methods": ["tsn"]}, "near it: tsm"),
    ):
        with pytest.raises(BadValueError, match=message):
            evaluate(**({"data": images, "model": MODEL} | options))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_on_which_the_network_fails_is_named_and_the_others_are_done(data, workers):
    Image.new("RGB", (3, 3)).save(data / "images" / "2-small.png")
    found = evaluate(data, "networks:demanding_model", "tsm", metrics="drop", batch_size=4, workers=workers)
    ((name, error),) = found.failures
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
    assert seen["images"] / 5 == 1 + 2 + 2 * maps - 1 <= 26.5


def test_pictures_too_large_to_be_scored_together_are_scored_one_by_one(data, monkeypatch):
    real = comparison.saliency_maps

    def small(one_pass, names, methods):
        if len(names) > 1:
            raise torch.OutOfMemoryError
        return real(one_pass, names, methods)

    monkeypatch.setattr(comparison, "saliency_maps", small)
    found = evaluate(data, MODEL, "tsm")
    assert not found.failures
    assert {row.picture for row in found.rows} == {f"images/{index}.png" for index in range(5)}


def test_rows_of_a_layer_before_the_last_are_scored_by_the_embedding_of_the_last(data):
    loaded = load_model(MODEL, layers=["0"])
    (view,) = (network_view(sample, "none", loaded) for sample in find_samples(data, limit=1).samples)
    whole = view.network_input[None]
    found = evaluate(whole, loaded, "tsm", metrics="drop")
    with TSM(loaded.model, loaded.target_layers) as cam:
        masked = whole * torch.as_tensor(cam(whole))[:, None]
    with torch.no_grad():
        left = torch.cosine_similarity(*(loaded.model[:4](each).mean((2, 3)) for each in (whole, masked)))
    (row,) = (row for row in found.rows if row.method == "tsm")
    assert row.values["similarity_drop"] == pytest.approx(100 * (1 - left.item()), rel=1e-3)


def test_a_picture_whose_name_is_no_utf8_is_scored(data, quick, tmp_path):
    (data / "images" / "0.png").rename(data / "images" / b"\xff.png".decode("utf8", "surrogateescape"))
    result = run(*quick)
    assert result.exit_code == 0, result.output
    assert b"\xff.png,random," in (tmp_path / "r.csv").read_bytes()


def test_what_can_be_found_before_the_model_is_loaded_is_named_then(data, tmp_path):
    (data / "annotations").rename(data / "annots")
    result = run("evaluate", data, "--out", tmp_path / "r.csv", model="networks:raises")
    assert "belong to no picture: 5, " in result.stdout
    assert "annots/0.xml among them" in result.stdout
    (tmp_path / "empty").mkdir()
    for command, name in itertools.product(("evaluate", "spectrum"), ("missing", "empty")):
        result = run(command, tmp_path / name, "--out", tmp_path / "o.png", model="networks:raises")
        assert result.exit_code == 2
        assert f"{name}: expected " in result.stderr


def test_without_the_extra_the_command_that_installs_it_is_named(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "tucker_cam.cli.evaluate", None)
    result = run("evaluate", data)
    assert result.exit_code == 2
    assert "pip install '.[evaluation]'" in result.stderr


def test_a_picture_on_which_the_preprocessing_fails_and_a_huge_mask_are_named_and_the_others_scored(tmp_path):
    folder = tmp_path / "pictures"
    for name in ("whole", "masked"):
        write_picture(folder / f"{name}.png")
    Image.new("RGB", (1, 1)).save(folder / "tiny.png")
    (folder / "masks").mkdir()
    (folder / "masks" / "masked.png").write_bytes(huge_png())
    result = run("evaluate", folder, "--out", tmp_path / "r.csv", model="networks:picky_preprocessing")
    assert result.exit_code == 1
    assert "tiny.png: its preprocessing failed (ZeroDivisionError: too small)" in result.stderr
    assert "masked.png: expected a mask as a picture, found none or a broken one (Image size" in result.stderr
    assert "1 picture scored" in result.stdout
    assert {row["picture"] for row in read(tmp_path / "r.csv")} == {"whole.png"}
