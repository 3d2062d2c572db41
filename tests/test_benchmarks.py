"""The benchmark scripts still run, and the README quotes what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]


def test_the_speed_benchmark_runs_and_reports_every_method(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", "--quick", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    results = json.loads((tmp_path / "speed.json").read_text())
    assert results["environment"]["threads"] == 1
    methods = {"TSM", "MTSM", "MTSM, energy", "Multivec-EigenCAM", "TSM, truncated", "EigenCAM", "KPCA_CAM", "FEM"}
    for case in results["decomposition"].values():
        assert methods <= case.keys()
        assert all(method["samples_ms"] for method in case.values())
    assert all(point["TSM"]["median_ms"] > 0 for axis in results["growth"].values() for point in axis)
    assert "| TSM |" in (tmp_path / "speed.md").read_text()
    with Image.open(tmp_path / "speed.png") as plot:
        assert plot.width > 1000


def test_the_readme_quotes_the_speed_tables_as_they_were_written():
    written = (ROOT / "benchmarks" / "results" / "speed.md").read_text()
    for part in written.strip().split("\n\n"):
        assert part in (ROOT / "README.md").read_text()
