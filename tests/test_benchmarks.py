import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from annotated import write_boxes
from networks import passing_on
from PIL import Image
from typer.testing import CliRunner

from benchmarks.quality import SignedEigenCAM
from benchmarks.reporting import read_samples
from benchmarks.signs import signs
from tucker_cam.cli import app
from tucker_cam.evaluation.controls import CONTROLS
from tucker_cam.methods import METHODS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def run(name, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)


@pytest.fixture
def annotated(tmp_path):
    """Return a folder of two photographs with a box each."""
    for name in ("coffee", "chelsea"):
        picture = Image.fromarray(getattr(skimage.data, name)())
        picture.save(tmp_path / f"{name}.png")
        write_boxes(tmp_path / f"{name}.xml", (150, 60, 400, 250), size=picture.size)
    return tmp_path


def first_column(table):
    return re.findall(r"^\| ([^|]+) \|", table.read_text(), re.MULTILINE)


@pytest.mark.nightly
def test_the_speed_benchmark_runs_and_reports_every_method(tmp_path):
    run("speed", "--quick", "--out", tmp_path)
    results = read_samples(tmp_path / "speed.json.gz")
    assert results["environment"]["threads"] == 1
    methods = {"TSM", "MTSM", "MTSM, energy", "Multivec-EigenCAM", "TSM, truncated", "EigenCAM", "KPCA_CAM", "FEM"}
    for case in results["decomposition"].values():
        assert methods <= case.keys()
        assert all(method["samples_ms"] for method in case.values())
    assert all(point["TSM"]["median_ms"] > 0 for axis in results["growth"].values() for point in axis)
    assert "| TSM |" in (tmp_path / "speed.md").read_text()
    with Image.open(tmp_path / "speed.png") as plot:
        assert plot.width > 1000


def test_eigencam_is_signed_by_the_rule_that_the_signs_are_counted_for():
    maps = torch.relu(torch.randn(8, 6, 5, 7, generator=torch.Generator().manual_seed(0)) + 0.3)
    model = passing_on()
    with SignedEigenCAM(model, [model.layer]) as cam:
        found = cam(maps)
    for image, actual in zip(maps.double().flatten(2).mT.numpy(), found, strict=True):
        centred = image - image.mean(0)
        projection = centred @ np.linalg.svd(centred, full_matrices=False)[2][0]
        expected = np.maximum(0, signs(centred, image)["correlates with the features' energy"] * projection)
        np.testing.assert_allclose(actual.ravel(), expected / expected.max(), atol=1e-5)


@pytest.mark.nightly
def test_the_quality_benchmark_runs_and_reports_every_method_and_control(annotated, tmp_path):
    pictures = ["--raccoons", annotated, "--photographs", annotated, "--network", "lite0"]
    run("quality", *pictures, "--rows", tmp_path / "rows", "--out", tmp_path / "out", "--processes", "1")
    written = (tmp_path / "out" / "scores.md").read_text()
    methods = {*METHODS, "tsm-centred", "eigencam-signed", "gradcam", *CONTROLS}
    for head in ("EfficientNet-Lite0, bn2; raccoons, 2 pictures", "EfficientNet-Lite0, bn2; ImageNet photographs, 2"):
        table = written[written.index(f"| {head}") :].partition("\n\n")[0]
        assert methods <= set(re.findall(r"^\| ([a-z-]+) \|", table, re.MULTILINE))
    rows = gzip.decompress((tmp_path / "out" / "quality.csv.gz").read_bytes()).decode().splitlines()
    assert {row.split(",")[3] for row in rows[1:]} >= methods


@pytest.mark.nightly
def test_the_self_supervised_benchmark_runs_and_its_network_is_explained_by_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run("selfsupervised", "--quick", "--out", tmp_path / "out", "--save", tmp_path / "saved")
    results = read_samples(tmp_path / "out" / "selfsupervised.json.gz")
    for network in ("trained", "untrained"):
        assert {"tsm", "mtsm", "eigencam", "random"} <= results["by_network"][network].keys()
        assert "two components of cam.modes" in results["both_objects_found"][network]
    saved = sorted((tmp_path / "saved").iterdir())
    model = ["--model", "benchmarks.selfsupervised:rotation_network", "--weights", str(tmp_path / "saved/network.pt")]
    scenes = [str(path) for path in saved if path.suffix == ".png"]
    result = CliRunner().invoke(app, ["explain", *scenes, *model, "--out", str(tmp_path / "maps")])
    assert result.exit_code == 0, result.output
    assert "layer: block5 128x" in result.output
    assert len(list((tmp_path / "maps").glob("*.png"))) == len(scenes) == 4


@pytest.mark.nightly
def test_the_folder_benchmark_runs_and_loses_nothing_when_it_is_killed(tmp_path):
    run("folders", "--quick", "--out", tmp_path)
    results = json.loads((tmp_path / "folders.json").read_text())
    assert len(results["speed_of_a_plain_loop"]["rounds"]) == 3
    killed = results["killed"]
    assert (killed["missing"], killed["unexpected"], killed["half_written"], killed["litter"]) == (0, 0, 0, [])
    assert "pictures a second" in (tmp_path / "folders.md").read_text()


@pytest.mark.parametrize(
    "name", ["drop_in", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("signs", "polarity"))]
)
def test_a_benchmark_writes_the_rows_that_stand_in_its_results(name, annotated):
    pictures = [] if name == "drop_in" else [annotated]
    run(name, *pictures, "--out", annotated)
    assert first_column(annotated / f"{name}.md") == first_column(RESULTS / f"{name}.md")


def test_the_page_for_the_host_quotes_its_tables_as_they_were_written():
    page = (ROOT / "docs" / "upstream.md").read_text()
    for part in (RESULTS / "signs.md").read_text().strip().split("\n\n"):
        assert part in page


def test_the_readmes_results_are_quoted_from_what_the_benchmarks_wrote():
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## How good the maps are\n")[2].partition("\n## ")[0]
    quoted = [part for part in section.strip().split("\n\n") if part.startswith("|")]
    assert len(quoted) == 1
    assert quoted[0] in (RESULTS / "quality.md").read_text()
