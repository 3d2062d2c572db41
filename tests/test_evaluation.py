"""Folders through the command line: rows, tables, figures, interruptions, and pictures that cannot be used."""

import csv
import itertools
import os
import shutil
import sys
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from annotated import write_boxes, write_picture
from filelock import FileLock
from matplotlib.figure import Figure
from networks import tiny_loaded_model
from PIL import Image
from test_security import huge_png
from typer.testing import CliRunner

from tucker_cam import TSM
from tucker_cam.cli import app
from tucker_cam.evaluation import comparison, folder, metrics
from tucker_cam.evaluation.comparison import MEASURES, Measure, measures
from tucker_cam.evaluation.controls import CONTROLS, control_maps
from tucker_cam.evaluation.report import Example, caption, pick_examples, write_report
from tucker_cam.evaluation.results import ResultsFile
from tucker_cam.evaluation.spectrum import draw_spectrum, spectrum
from tucker_cam.evaluation.summary import summarise
from tucker_cam.models import load_model
from tucker_cam.pictures.annotations import find_samples, network_view
from tucker_cam.pictures.files import open_picture

METHODS = {"eigencam", "tsm", "mtsm", "mtsm-energy", "multivec-eigencam", "kpca-cam", "fem"}
BY_COLUMN = {measure.column: measure for measure in MEASURES}


def run(*arguments, model="networks:tiny_loaded_model"):
    return CliRunner().invoke(app, [*(str(argument) for argument in arguments), "--model", model])


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def data(tmp_path):
    """Five pictures with a box each."""
    for index in range(5):
        rng = np.random.default_rng(index)
        pixels = rng.integers(0, 90, (30, 40, 3), np.uint8)
        left, top = rng.integers(4, 16, 2)
        pixels[top : top + 12, left : left + 14] = rng.integers(120, 255, 3)
        (tmp_path / "data" / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{index}.png")
        box = (left + 1, top + 1, left + 14, top + 12)
        write_boxes(tmp_path / "data" / "annotations" / f"{index}.xml", box, size=(40, 30))
    return tmp_path / "data"


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(folder, "_BATCH", 2)


def test_every_picture_and_method_is_a_row_and_every_method_in_the_tables(data, tmp_path):
    out = tmp_path / "new" / "results.csv"
    result = run("evaluate", data, "--out", out)
    assert result.exit_code == 0, result.output
    rows = read(out)
    reference = {"gradcam"} | ({"seg-eigencam"} & {row["method"] for row in rows})
    assert Counter((row["picture"], row["method"]) for row in rows) == {
        (f"images/{index}.png", method): 1 for index in range(5) for method in METHODS | reference | {*CONTROLS}
    }
    for method in METHODS | reference | {*CONTROLS}:
        assert f"│ {method} " in result.output
    assert "5 pictures scored, 0 skipped" in result.output
    assert {row["model"] for row in rows} == {"networks:tiny_loaded_model"}
    assert {row["layer"] for row in rows} == {"3"}
    assert {row["annotations"] for row in rows} == {"boxes"}


def test_the_rows_hold_what_the_metrics_say(data, tmp_path):
    groups = [word for group in ("localisation", "drop", "curves") for word in ("--metric", group)]
    run("evaluate", data, "--out", tmp_path / "results.csv", *groups)
    loaded = tiny_loaded_model()
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

        matched = metrics.area_matched(maps)
        grey = metrics.mean_colour(images)
        expected = {
            "energy_in_mask": metrics.energy_in_mask(maps, masks),
            "pointing_game": metrics.pointing_game(maps, masks),
            "best_threshold_iou": metrics.best_threshold_iou(maps, masks),
            "best_cut_iou": metrics.best_cut_iou(maps, masks),
            "otsu_iou": metrics.otsu_iou(maps, masks),
            "mean_saliency": metrics.mean_saliency(maps),
            "energy_in_top": metrics.energy_in_top(maps),
            "probability_drop": metrics.confidence_change(images, maps, probability).drop,
            "probability_increase": metrics.confidence_change(images, maps, probability).increase,
            "probability_gain": metrics.confidence_change(images, maps, probability).gain,
            "probability_drop_area_matched": metrics.confidence_change(images, matched, probability).drop,
            "probability_increase_area_matched": metrics.confidence_change(images, matched, probability).increase,
            "probability_gain_area_matched": metrics.confidence_change(images, matched, probability).gain,
            "similarity_drop": metrics.confidence_change(images, maps, similarity).drop,
            "similarity_drop_area_matched": metrics.confidence_change(images, matched, similarity).drop,
            "probability_insertion": metrics.insertion_auc(images, maps, probability, baseline=metrics.blurred(images)),
            "similarity_deletion": metrics.deletion_auc(images, maps, similarity, baseline=grey),
            "probability_deletion": metrics.deletion_auc(images, maps, probability, baseline=grey),
            "similarity_insertion": metrics.insertion_auc(images, maps, similarity, baseline=metrics.blurred(images)),
        }
        (row,) = (r for r in read(tmp_path / "results.csv") if (r["picture"], r["method"]) == (sample.name, "tsm"))
        assert expected.keys() == {
            measure.column for measure in measures(["localisation", "drop", "curves"], ["probability", "similarity"])
        }
        for column, value in expected.items():
            assert float(row[column]) == pytest.approx(value.item(), rel=1e-3, abs=1e-5)


def test_a_backbone_without_classes_is_scored_by_its_embedding(data, tmp_path):
    result = run("evaluate", data, "--out", tmp_path / "r.csv", model="networks:tiny_backbone")
    assert result.exit_code == 0, result.output
    rows = read(tmp_path / "r.csv")
    assert "gradcam" not in {row["method"] for row in rows}
    assert "similarity_drop" in rows[0]
    assert not [column for column in rows[0] if column.startswith("probability")]


def test_all_metrics_and_chosen_methods_can_be_asked_for(data, tmp_path):
    groups = [word for group in ("localisation", "drop", "curves", "road") for word in ("--metric", group)]
    result = run("evaluate", data, "--limit", 2, "--method", "tsm", "--out", tmp_path / "r.csv", *groups)
    assert result.exit_code == 0, result.output
    rows = read(tmp_path / "r.csv")
    assert {row["method"] for row in rows} & METHODS == {"tsm", "eigencam"}
    assert set(rows[0]) >= {measure.column for measure in MEASURES}
    for row in rows:
        assert all(row[column] for column in BY_COLUMN if row["method"] != "uniform" or "road" not in column)


def test_a_run_cut_off_at_any_byte_ends_with_the_same_rows_and_the_same_table(data, tmp_path, small_batches):
    out = tmp_path / "results.csv"
    arguments = ("evaluate", data, "--out", out, "--metric", "localisation", "--method", "tsm")
    whole = run(*arguments)
    table, written = whole.stdout, out.read_bytes()
    header = written.index(b"\n") + 1
    for length in np.random.default_rng(0).integers(header, len(written), 12).tolist():
        out.write_bytes(written[:length])
        again = run(*arguments)
        assert again.exit_code == 0, again.output
        assert again.stdout == table
        assert sorted(out.read_bytes().splitlines()) == sorted(written.splitlines())


def test_a_finished_run_is_not_computed_again(data, tmp_path, monkeypatch):
    arguments = ("evaluate", data, "--out", tmp_path / "results.csv", "--metric", "localisation")
    first = run(*arguments)
    monkeypatch.setattr(comparison, "saliency_maps", lambda *_: pytest.fail("computed again"))
    assert run(*arguments).stdout == first.stdout


def test_an_interrupted_run_says_so_and_goes_on(data, tmp_path, small_batches, monkeypatch):
    arguments = ("evaluate", data, "--out", tmp_path / "results.csv", "--metric", "localisation", "--method", "tsm")
    expected = run(*arguments).stdout
    (tmp_path / "results.csv").unlink()
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    real = comparison.saliency_maps
    monkeypatch.setattr(comparison, "saliency_maps", interrupted)
    result = run(*arguments)
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr
    assert {row["picture"] for row in read(tmp_path / "results.csv")} == {"images/0.png", "images/1.png"}
    assert run(*arguments).stdout == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layer", "0"), "results of the layer 0, found some of 3"),
        (("--model", "networks:tiny_backbone"), "expected the columns"),
        (("--metric", "curves"), "expected the columns"),
        (("--annotations", "none"), "expected the columns"),
        (("--limit", "2"), "which is not among them"),
    ],
)
def test_results_of_another_run_are_not_mixed_in(data, tmp_path, arguments, message):
    out = tmp_path / "results.csv"
    base = ("evaluate", data, "--out", out, "--model", "networks:tiny_loaded_model")
    assert CliRunner().invoke(app, [str(each) for each in base]).exit_code == 0
    before = out.read_bytes()
    result = CliRunner().invoke(app, [str(each) for each in (*base, *arguments)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert out.read_bytes() == before


def test_results_of_other_weights_or_another_folder_of_the_same_names_are_not_mixed_in(data, tmp_path):
    arguments = ("--method", "tsm", "--metric", "localisation", "--out", tmp_path / "r.csv", "--weights")
    for folder_of, scale in (("a", 1), ("b", 2)):
        (tmp_path / folder_of).mkdir()
        state = {key: scale * value for key, value in tiny_loaded_model().model.state_dict().items()}
        torch.save(state, tmp_path / folder_of / "w.pt")
    assert run("evaluate", data, *arguments, tmp_path / "a" / "w.pt").exit_code == 0
    assert "results of the weights" in run("evaluate", data, *arguments, tmp_path / "b" / "w.pt").stderr
    (tmp_path / "other").mkdir()
    shutil.copytree(data, tmp_path / "other" / "data")
    result = run("evaluate", tmp_path / "other" / "data", *arguments, tmp_path / "a" / "w.pt")
    assert "results of the data" in result.stderr


def test_outputs_that_would_overwrite_each_other_or_the_data_are_refused(data, tmp_path):
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    (tmp_path / "rows.csv").write_text("the only copy")
    for arguments in (
        ("evaluate", data, "--out", tmp_path / "a.png", "--report", tmp_path / "a.png"),
        ("evaluate", data, "--out", tmp_path / "a.csv", "--report", data / "images" / "0.png"),
        ("evaluate", data, "--out", data / "images" / "0.png"),
        ("evaluate", data, "--out", tmp_path),
        ("spectrum", data, "--out", data / "s.png"),
        ("spectrum", data, "--out", tmp_path / "s.csv"),
        ("spectrum", data, "--out", tmp_path / "s.pdf"),
        ("spectrum", data, "--out", tmp_path / "rows.png"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, arguments
        assert len(result.stderr.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before
    assert (tmp_path / "rows.csv").read_text() == "the only copy"


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_computed(data, tmp_path):
    (tmp_path / "folder.png").mkdir()
    result = run("evaluate", data, "--out", tmp_path / "r.csv", "--report", tmp_path / "folder.png")
    assert result.exit_code == 2
    assert "found a folder" in result.stderr
    assert not (tmp_path / "r.csv").exists()


def test_outputs_that_cannot_be_written_are_found_before_the_model_is_loaded(data, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "file").write_text("the only copy")
    for out in ("/dev/full", tmp_path / "pipe.png", tmp_path / "file" / "new" / "r.png"):
        arguments = [("evaluate", data, "--out", out)]
        if str(out).endswith(".png"):
            arguments += [("spectrum", data, "--out", out)]
            arguments += [("evaluate", data, "--out", tmp_path / "r.csv", "--report", out)]
        for each in arguments:
            result = run(*each, model="networks:raises")
            assert result.exit_code == 2, each
            assert f"{out}: expected a " in result.stderr
            assert len(result.stderr.strip().splitlines()) == 1
    assert (tmp_path / "file").read_text() == "the only copy"


def test_what_this_run_prints_is_not_replaced_by_its_rows(data, tmp_path):
    # As `--out /dev/stdout > rows.csv` does.
    printed_to = os.dup(1)
    with (tmp_path / "rows.csv").open("w") as rows:
        os.dup2(rows.fileno(), 1)
    try:
        result = run("evaluate", data, "--out", "/dev/stdout", model="networks:raises")
    finally:
        os.dup2(printed_to, 1)
        os.close(printed_to)
    assert result.exit_code == 2
    assert "/dev/stdout: expected a regular file for the output" in result.stderr


def test_two_runs_do_not_write_to_one_file(data, tmp_path):
    with FileLock(tmp_path / ".r.csv.lock"):
        result = run("evaluate", data, "--out", tmp_path / "r.csv")
    assert result.exit_code == 2
    assert "another run is writing to it" in result.stderr
    assert run("evaluate", data, "--method", "tsm", "--out", tmp_path / "r.csv").exit_code == 0
    assert [path.name for path in tmp_path.glob("*r.csv*")] + [path.name for path in tmp_path.glob(".*")] == ["r.csv"]


def test_a_map_that_is_not_finite_is_named_and_the_others_scored(data, tmp_path, monkeypatch):
    def broken(self, features):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(TSM, "saliency", broken)
    result = run("evaluate", data, "--method", "tsm", "--out", tmp_path / "r.csv")
    assert result.exit_code == 0, result.output
    assert "images/3.png: tsm gave a map with NaN or Inf, or none" in result.output
    rows = read(tmp_path / "r.csv")
    assert all(not row[column] for row in rows for column in BY_COLUMN if row["method"] == "tsm" and column in row)
    assert all(row["similarity_drop"] for row in rows if row["method"] != "tsm")


def test_a_model_that_returns_a_tuple_is_scored_by_its_embedding(data, tmp_path):
    result = run("evaluate", data, "--out", tmp_path / "r.csv", model="networks:tiny_tuple_model")
    assert result.exit_code == 0, result.output
    assert {row["method"] for row in read(tmp_path / "r.csv")} == METHODS | {*CONTROLS}


def test_names_in_a_table_or_a_line_are_neither_markup_nor_escape_sequences(data, tmp_path):
    out = tmp_path / "\x1b[31m.csv"
    arguments = ("evaluate", data, "--method", "tsm", "--metric", "localisation", "--out", out)
    run(*arguments)
    row = next(line for line in out.read_text().splitlines() if ",tsm," in line)
    with out.open("a") as file:
        file.write(row.replace(",tsm,", ",[/x] :cat: \x1b[31m,") + "\n")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "[/x] :cat: \\x1b[31m" in result.output
    assert "\x1b" not in result.output


def test_an_edited_number_is_one_line_that_names_it(data, tmp_path):
    arguments = ("evaluate", data, "--method", "tsm", "--metric", "localisation", "--out", tmp_path / "r.csv")
    run(*arguments)
    text = (tmp_path / "r.csv").read_text()
    last = text.strip().rpartition(",")[2]
    (tmp_path / "r.csv").write_text(text.replace(last, "abc"))
    result = run(*arguments)
    assert result.exit_code == 2
    assert "found 'abc'" in result.stderr


def test_intervals_of_a_few_pictures_get_no_star(data, tmp_path):
    result = run("evaluate", data, "--method", "tsm", "--metric", "localisation", "--out", tmp_path / "r.csv")
    table = result.output.partition("Means over")[0]
    assert "*" not in table


def test_a_file_that_holds_no_results_is_left_alone(data, tmp_path):
    out = tmp_path / "thesis.txt"
    out.write_text("the only copy")
    result = run("evaluate", data, "--out", out)
    assert result.exit_code == 2
    assert "give another file" in result.stderr
    assert out.read_text() == "the only copy"


def test_pictures_and_annotations_that_do_not_fit_are_named_counted_and_the_others_scored(data, tmp_path):
    (data / "images" / "broken.png").write_bytes((data / "images" / "0.png").read_bytes()[:80])
    (data / "images" / "text.jpg").write_text("no picture")
    write_picture(data / "images" / "far.png", size=(40, 30))
    write_boxes(data / "annotations" / "far.xml", (90, 1, 95, 4), size=(40, 30))
    write_picture(data / "images" / "free.png", size=(40, 30))
    write_picture(data / "images" / "grey.png", size=(40, 30), mode="L")
    write_picture(data / "images" / "print.jpg", size=(40, 30), mode="CMYK")
    result = run("evaluate", data, "--out", tmp_path / "r.csv", "--method", "tsm")
    assert result.exit_code == 1
    errors = "\n".join(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert errors.count("error: ") == 3
    for words in ("broken.png: expected a whole picture", "text.jpg: expected a picture", "far.xml: expected boxes"):
        assert words in errors
    assert "8 pictures scored, 3 skipped" in result.output
    assert "free.png: without boxes" in result.output
    rows = {row["picture"]: row for row in read(tmp_path / "r.csv") if row["method"] == "tsm"}
    assert set(rows) == {f"images/{n}" for n in (*(f"{i}.png" for i in range(5)), "free.png", "grey.png", "print.jpg")}
    assert rows["images/free.png"]["pointing_game"] == ""
    assert rows["images/free.png"]["similarity_drop"] != ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "expected a folder of pictures, found nothing of that name"),
        (lambda path: path.mkdir(), "at any depth, found none"),
        (lambda path: path.write_text(""), "found a file"),
        (lambda path: path.mkdir() or (path / "a.jpg").write_text(""), "found 1 picture, and none could be read: "),
    ],
)
def test_data_without_pictures_is_one_line(tmp_path, make, message):
    make(tmp_path / "data")
    result = run("evaluate", tmp_path / "data", "--out", tmp_path / "r.csv")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "r.csv").exists()


def test_a_picture_on_which_the_network_fails_is_named_and_the_others_are_done(data, tmp_path):
    Image.new("RGB", (3, 3)).save(data / "images" / "2-small.png")
    for command, out in (("evaluate", tmp_path / "results.csv"), ("spectrum", tmp_path / "s.png")):
        result = run(command, data, "--out", out, model="networks:demanding_model")
        assert result.exit_code == 1, result.output
        lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
        assert len(lines) == 1
        assert "2-small.png: " in lines[0]
        assert "Kernel size can't be greater than actual input size" in result.stderr.replace("\n", " ")
        rows = read(out.with_suffix(".csv"))
        assert {row["picture"] for row in rows} == {f"images/{index}.png" for index in range(5)}


def test_a_picture_takes_one_pass_for_all_methods_two_with_gradients_and_two_for_each_map(data, tmp_path, monkeypatch):
    loaded, seen = load_model("networks:tiny_loaded_model"), Counter()
    loaded.model.register_forward_hook(lambda module, inputs, output: seen.update(images=len(output)))
    monkeypatch.setattr("tucker_cam.models.load_model", lambda *_, **__: loaded)
    assert run("evaluate", data, "--metric", "drop", "--out", tmp_path / "results.csv").exit_code == 0
    maps = len(METHODS) + 2 + len(CONTROLS)
    # The uniform map is scored once: it is its own area-matched one.
    assert seen["images"] / 5 == 1 + 2 + 2 * maps - 1 <= 26.5


def test_pictures_too_large_to_be_scored_together_are_scored_one_by_one(data, tmp_path, monkeypatch):
    compare = folder.compare

    def small(images, *arguments):
        if len(images) > 1:
            raise torch.OutOfMemoryError
        return compare(images, *arguments)

    monkeypatch.setattr(folder, "compare", small)
    result = run("evaluate", data, "--method", "tsm", "--out", tmp_path / "results.csv")
    assert result.exit_code == 0, result.output
    assert "5 pictures scored, 0 skipped" in result.output
    assert {row["picture"] for row in read(tmp_path / "results.csv")} == {f"images/{index}.png" for index in range(5)}


def test_the_report_shows_each_methods_best_median_and_worst_picture(data, tmp_path):
    # A name that would be a formula, and one that would be markup.
    for index, name in enumerate(("$x_{$.png", "[b]<script>.png")):
        (data / "images" / f"{index}.png").rename(data / "images" / name)
        (data / "annotations" / f"{index}.xml").rename((data / "annotations" / name).with_suffix(".xml"))
    report = tmp_path / "pages" / "report.png"
    result = run("evaluate", data, "--out", tmp_path / "r.csv", "--report", report, "--metric", "localisation")
    assert result.exit_code == 0, result.output
    page = np.asarray(open_picture(report))
    assert page.shape[1] == 1500
    assert page.std() > 20
    assert [path.name for path in report.parent.iterdir()] == ["report.png"]


@pytest.fixture
def drawn(monkeypatch):
    """Return a list of the figures that are written from now on."""
    figures, savefig = [], Figure.savefig

    def saved(figure, *arguments, **options):
        figures.append(figure)
        return savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return figures


def example_of(mask):
    return Example(np.ones((8, 8, 3), np.float32), np.ones((8, 8), np.float32), mask, caption("W" * 22, 0.12345))


def test_no_two_texts_of_the_report_overlap_and_every_colour_is_named(tmp_path, drawn):
    methods = ("eigencam", "tsm", "mtsm", "uniform")
    rows = [
        {"picture": picture, "method": method} | dict.fromkeys(BY_COLUMN, value)
        for method in methods
        for picture, value in (("a", "0.1"), ("b", "0.25"))
    ]
    examples = {method: dict.fromkeys(("best", "median", "worst"), example_of(np.eye(8) > 0)) for method in methods}
    title = f"hf:{'a/long/path/' * 12}, {'a.layer.' * 12}: 2 pictures"
    write_report(tmp_path / "r.png", title, summarise(rows, MEASURES), MEASURES, examples, BY_COLUMN["best_cut_iou"])
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


def test_an_objects_outline_is_closed_where_it_reaches_the_edge(tmp_path, drawn):
    measure = BY_COLUMN["best_cut_iou"]
    mask = np.arange(64).reshape(8, 8) % 8 > 3
    summaries = summarise(rows_of({"eigencam": {"a": "0.1"}}), [measure])
    write_report(tmp_path / "r.png", "", summaries, [measure], {"eigencam": {"best": example_of(mask)}}, measure)
    (outline,) = (path for axes in drawn[0].axes for each in axes.collections for path in each.get_paths())
    np.testing.assert_array_equal(outline.vertices[0], outline.vertices[-1])


def test_every_box_of_the_spectrum_lies_inside_its_panel(tmp_path, drawn):
    low = np.random.default_rng(0).uniform(0.1, 0.2, (9, 3))
    draw_spectrum(tmp_path / "s.png", "", {"SVD, centred": low, "Tucker": low + 0.3})
    for axes in drawn[0].axes:
        bottom, top = axes.get_ylim()
        heights = np.concatenate([line.get_ydata() for line in axes.lines])
        assert bottom == 0
        assert heights.max() < top


def test_a_title_that_is_no_utf8_is_drawn(tmp_path):
    measure = BY_COLUMN["best_cut_iou"]
    summaries = summarise(rows_of({"eigencam": {"a": "0.1"}}), [measure])
    examples = {"eigencam": {"best": example_of(np.zeros((8, 8), bool))}}
    write_report(tmp_path / "r.png", "\udcff", summaries, [measure], examples, measure)
    draw_spectrum(tmp_path / "s.png", "\udcff", {"SVD, centred": np.ones((3, 2)), "Tucker": np.ones((3, 2))})
    for name in ("r.png", "s.png"):
        assert np.asarray(open_picture(tmp_path / name)).std() > 0


def test_pictures_on_which_the_network_fails_altogether_are_one_line(tmp_path):
    write_picture(tmp_path / "in" / "a.png", size=(3, 3))
    result = run("spectrum", tmp_path / "in", "--out", tmp_path / "s.png", model="networks:demanding_model")
    assert result.exit_code == 2
    assert "found 1 picture, and none could be decomposed" in " ".join(result.stderr.split())
    assert not list(tmp_path.glob("s.*"))


def test_a_report_in_an_unknown_format_is_refused_before_anything_is_computed(data, tmp_path):
    result = run("evaluate", data, "--out", tmp_path / "r.csv", "--report", tmp_path / "report.docx")
    assert result.exit_code == 2
    assert ".docx" in result.stderr
    assert not (tmp_path / "r.csv").exists()


def rows_of(values, column="best_cut_iou"):
    return [
        {"picture": picture, "method": method, column: value}
        for method, of_method in values.items()
        for picture, value in of_method.items()
    ]


def test_examples_are_the_best_the_median_and_the_worst():
    values = {"tsm": {"a": "0.1", "b": "0.5", "c": "0.3", "d": ""}}
    higher = pick_examples(rows_of(values), BY_COLUMN["best_cut_iou"])["tsm"]
    lower = pick_examples(rows_of(values, "similarity_drop"), BY_COLUMN["similarity_drop"])["tsm"]
    assert {place: name for place, (name, _) in higher.items()} == {"best": "b", "median": "c", "worst": "a"}
    assert {place: name for place, (name, _) in lower.items()} == {"best": "a", "median": "c", "worst": "b"}


def test_summaries_agree_with_the_normal_approximation_and_pair_by_picture():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 1, 400)
    eigencam, tsm = difficulty, difficulty + 0.5 + rng.normal(0, 0.1, 400)
    names = [f"{index}" for index in range(400)]
    values = {
        "eigencam": dict(zip(names, map(repr, eigencam.tolist()), strict=True)),
        # In another order, and one picture was not scored.
        "tsm": dict(zip(reversed(names), [*map(repr, reversed(tsm.tolist()))], strict=True)) | {"7": ""},
    }
    summaries = summarise(rows_of(values), [BY_COLUMN["best_cut_iou"]])
    summary = summaries["tsm"]["best_cut_iou"]
    kept = np.delete(tsm, 7)
    assert summary.pictures == 399
    assert summary.value.mean == pytest.approx(kept.mean())
    error = 1.96 * kept.std() / np.sqrt(399)
    assert summary.value.high - summary.value.low == pytest.approx(2 * error, rel=0.1)
    # Paired, the pictures' difficulty drops out.
    assert summary.difference.mean == pytest.approx((kept - np.delete(eigencam, 7)).mean())
    assert summary.difference.high - summary.difference.low == pytest.approx(4 * 0.098 / 20, rel=0.15)
    assert summaries["eigencam"]["best_cut_iou"].difference is None


def test_the_order_of_the_rows_does_not_change_a_summary():
    values = {f"{index}": repr(number) for index, number in enumerate(np.random.default_rng(0).random(30).tolist())}
    rows = rows_of({"tsm": values})
    assert summarise(rows, [BY_COLUMN["best_cut_iou"]]) == summarise(rows[::-1], [BY_COLUMN["best_cut_iou"]])


def test_a_single_picture_has_a_mean_and_no_interval():
    summary = summarise(rows_of({"tsm": {"a": "0.25"}}), [BY_COLUMN["best_cut_iou"]])["tsm"]["best_cut_iou"]
    assert summary.value.mean == 0.25
    assert np.isnan(summary.value.low)
    assert summary.difference is None


def test_measures_follow_the_scores_there_are():
    columns = {measure.column for measure in measures(["drop", "curves"], ["similarity"])}
    assert columns == {
        "similarity_drop",
        "similarity_drop_area_matched",
        "similarity_insertion",
        "similarity_deletion",
        "mean_saliency",
        "energy_in_top",
    }


def test_a_picture_whose_name_is_no_utf8_is_scored(data, tmp_path):
    (data / "images" / "0.png").rename(data / "images" / b"\xff.png".decode("utf8", "surrogateescape"))
    result = run("evaluate", data, "--method", "tsm", "--metric", "localisation", "--out", tmp_path / "r.csv")
    assert result.exit_code == 0, result.output
    assert b"\xff.png,random," in (tmp_path / "r.csv").read_bytes()
    assert caption("\udcff.png", 0.5) == "0.5\n\\udcff.png"
    assert len(caption("\udcff" * 22, 0.5)) == len("0.5\n") + 22


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_know_nothing_but_the_pictures_name(name):
    maps = control_maps(name, pictures=["a", "b", "a"], size=(20, 30), resolution=(3, 5))
    assert maps.shape == (3, 20, 30)
    assert maps.dtype == torch.float32
    assert maps.min() >= 0
    assert maps.max() <= 1
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


def test_rows_survive_names_of_any_kind(tmp_path):
    names = [
        "plain.jpg",
        'quo"te,comma.jpg',
        "line\nbreak.jpg",
        "carriage\rreturn.jpg",
        b"\xff.jpg".decode("utf8", "surrogateescape"),
    ]
    for _ in range(2):
        results = ResultsFile(tmp_path / "r.csv", run={"model": "m"}, columns=["a"])
        results.append("tsm", names, {"a": [0.5, float("nan"), 1e-9, 3.0, 123456.7]})
    assert [name for name, _ in results.rows] == names
    assert [row["a"] for row in results.rows.values()] == ["0.5", "", "1e-09", "3", "123457"]


def test_a_row_torn_inside_a_name_with_a_line_break_is_thrown_away(tmp_path):
    for cut in range(40, 60):
        (tmp_path / "r.csv").unlink(missing_ok=True)
        results = ResultsFile(tmp_path / "r.csv", run={"model": "m"}, columns=["a"])
        results.append("tsm", ["a.jpg", "line\r\nbreak.jpg"], {"a": [0.5, 0.25]})
        whole = (tmp_path / "r.csv").read_bytes()
        (tmp_path / "r.csv").write_bytes(whole[:cut])
        again = ResultsFile(tmp_path / "r.csv", run={"model": "m"}, columns=["a"])
        again.append("tsm", ["a.jpg", "line\r\nbreak.jpg"], {"a": [0.5, 0.25]})
        assert (tmp_path / "r.csv").read_bytes() == whole


def test_the_spectrum_is_that_of_numpy():
    loaded = tiny_loaded_model()
    model, images = loaded.model.eval(), torch.randn(3, 3, 24, 24)
    shares = spectrum(model, model[3], images, count=20)
    with torch.no_grad():
        features = model[:4](images).double().flatten(2).numpy()
    for name, centred in (("SVD, centred", True), ("Tucker", False)):
        for image, share in zip(features, shares[name], strict=True):
            values = np.linalg.svd(image - centred * image.mean(1, keepdims=True), compute_uv=False)
            np.testing.assert_allclose(share[:16], values / values.sum(), atol=1e-5)
            assert np.isnan(share[16:]).all()


def test_the_spectrum_is_plotted_and_written(data, tmp_path):
    (data / "images" / "text.jpg").write_text("no picture")
    result = run("spectrum", data, "--out", tmp_path / "new" / "s.png")
    assert result.exit_code == 1
    assert "text.jpg" in result.stderr
    rows = read(tmp_path / "new" / "s.csv")
    assert len(rows) == 5 * 2 * 10
    assert {row["decomposition"] for row in rows} == {"SVD, centred", "Tucker"}
    for name in ("SVD, centred", "Tucker"):
        of_one = [row for row in rows if (row["decomposition"], row["picture"]) == (name, "images/0.png")]
        shares = [float(row["share"]) for row in of_one]
        assert shares == sorted(shares, reverse=True)
        assert f"{name}: the first value holds" in result.output
    assert np.asarray(open_picture(tmp_path / "new" / "s.png")).std() > 10


def test_the_spectrums_progress_counts_every_picture(data, tmp_path, monkeypatch):
    (data / "images" / "text.jpg").write_text("no picture")
    counted = []

    @contextmanager
    def progress(title, total):
        yield counted.append
        assert sum(counted) == total == 6

    monkeypatch.setattr("tucker_cam.cli.spectrum.progress", progress)
    assert run("spectrum", data, "--out", tmp_path / "s.png").exit_code == 1
    assert counted


def test_annotations_of_no_picture_are_named_before_the_model_is_loaded(data, tmp_path):
    (data / "annotations").rename(data / "annots")
    result = run("evaluate", data, "--out", tmp_path / "r.csv", model="networks:raises")
    assert "belong to no picture: 5, " in result.stdout
    assert "annots/0.xml among them" in result.stdout


def test_pictures_are_looked_for_before_the_model_is_loaded(tmp_path):
    (tmp_path / "empty").mkdir()
    for command, name in itertools.product(("evaluate", "spectrum"), ("missing", "empty")):
        result = run(command, tmp_path / name, "--out", tmp_path / "o.png", model="networks:raises")
        assert result.exit_code == 2
        assert f"{name}: expected " in result.stderr


def test_one_picture_is_one(data, tmp_path):
    result = run("evaluate", data, "--limit", 1, "--metric", "localisation", "--out", tmp_path / "r.csv")
    assert "1 picture scored" in result.stdout
    assert "1 pictures" not in result.stdout


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
    assert {row["picture"] for row in read(tmp_path / "r.csv")} == {"whole.png"}


def test_a_new_measure_is_one_record(data, tmp_path, monkeypatch):
    largest = Measure("largest", "statistics", "largest value", "", lambda maps, masks: maps.flatten(1).amax(1))
    monkeypatch.setattr(comparison, "MEASURES", (*MEASURES, largest))
    result = run("evaluate", data, "--metric", "localisation", "--method", "tsm", "--out", tmp_path / "results.csv")
    assert result.exit_code == 0, result.output
    rows = read(tmp_path / "results.csv")
    assert {row["largest"] for row in rows if row["method"] == "tsm"} == {"1"}
    assert {row["largest"] for row in rows if row["method"] == "uniform"} == {"0.5"}
    assert "largest value" in " ".join(result.stdout.split())
