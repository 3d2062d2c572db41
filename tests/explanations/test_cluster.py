"""The same work on a local Ray cluster of two actors: the maps are those of a single process, bit for bit."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from test_folder import MODEL, make_pictures, run

# Ray leaves files and sockets to be closed by the garbage collector, and asks for pandas' future behaviour.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)


@pytest.fixture(scope="module")
def _cluster():
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}", "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": environment},
    )
    yield
    ray.shutdown()


def maps_in(folder):
    """Return the maps of all tables by picture and method, and the errors by picture; none may come twice."""
    maps, errors = {}, {}
    for path in folder.glob("maps-*.parquet"):
        for row in pq.read_table(path).to_pylist():
            if row["error"] is not None:
                errors[row["picture"]] = row["error"]
                continue
            key = row["picture"], row["method"]
            assert key not in maps
            maps[key] = np.array(row["saliency"], np.float32).reshape(row["shape"])
    return maps, errors


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def refused(out, *options):
    """Return the error of a run that cannot be."""
    result = run(make_pictures(out.parent / "p", 1), *MODEL, *options, "--out", out)
    assert result.exit_code == 2
    return " ".join(result.stderr.split())


def test_tables_of_somebody_else_are_left_alone(out):
    (out / "maps-berlin.parquet").write_text("mine")
    error = refused(out, "--engine", "ray")
    assert "maps-berlin.parquet is there already, and not of a run in this folder" in error
    assert (out / "maps-berlin.parquet").read_text() == "mine"


@pytest.mark.parametrize("engine", ["torch", "ray"])
def test_a_second_run_on_the_same_folder_is_refused(out, engine):
    with FileLock(out / ".manifest.json.lock"):
        assert "another run is writing to it" in refused(out, "--engine", engine)


def test_a_manifest_that_cannot_be_written_whole_is_not_written(out, monkeypatch):
    def on_a_full_disk(self, path, value):
        Path(path).write_bytes(value[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LocalFileSystem, "pipe_file", on_a_full_disk)
    assert "No space left on device" in refused(out, "--engine", "ray")
    assert not (out / "manifest.json").exists()


@pytest.mark.nightly
@pytest.mark.usefixtures("_cluster")
def test_two_actors_give_the_maps_of_one_process_bit_for_bit_and_a_broken_run_is_gone_on_with(
    tmp_path, out, monkeypatch, caplog
):
    monkeypatch.setattr(logging.getLogger("ray.data._internal.util"), "handlers", [caplog.handler])
    pictures = make_pictures(tmp_path / "pictures", 14)
    (pictures / "p005.png").write_bytes(b"no picture")
    encoded = [{"image": path.read_bytes(), "name": f"row-{path.stem}"} for path in sorted(pictures.glob("p00*.png"))]
    pq.write_table(pa.Table.from_pylist(encoded), tmp_path / "table.parquet", row_group_size=3)
    inputs = (pictures, tmp_path / "table.parquet", *MODEL, "--method", "tsm", "--method", "mtsm", "--batch-size", 4)

    single = run(*inputs, "--format", "npy", "--out", tmp_path / "single")
    assert "24 pictures: 22 explained, 0 there already, 2 failed" in single.output
    clustered = run(*inputs, "--engine", "ray", "--workers", 2, "--out", out)
    assert "24 pictures: 22 explained, 0 there already, 2 failed" in clustered.output, clustered.output
    assert clustered.exit_code == 1
    assert clustered.stderr.count("expected a picture") == 2
    assert "deprecated" not in caplog.text

    names = json.loads((tmp_path / "single" / "manifest.json").read_text())["pictures"]
    maps, errors = maps_in(out)
    assert len(maps) == 44
    assert len(errors) == 2
    for (picture, method), saliency in maps.items():
        np.testing.assert_array_equal(saliency, np.load(tmp_path / "single" / f"{names[picture]['name']}_{method}.npy"))

    # What a killed run leaves, one table missing, one half-written; and a third with a damaged page.
    first, second, third, *_ = sorted(out.glob("maps-*.parquet"))
    assert all(len(pq.read_table(path)) for path in (first, second, third))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-20])
    chunk = pq.ParquetFile(third).metadata.row_group(0).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(third.read_bytes())
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    third.write_bytes(content)
    kept = {path: path.read_bytes() for path in (second, third, out / "manifest.json")}
    made = (out / "manifest.json").stat().st_mtime_ns
    make_pictures(tmp_path / "pictures" / "new", 1, seed=5)
    again = run(*inputs, "--engine", "ray", "--workers", 2, "--out", out)
    assert "25 pictures: " in again.output
    assert again.output.count(" 2 failed") == 1
    # Another run might be writing them: they stay.
    assert {path: path.read_bytes() for path in kept} == kept
    assert (out / "manifest.json").stat().st_mtime_ns == made
    for path in (second, third):
        assert f"note: {path}: expected a whole table" in again.output
        path.unlink()
    remade, _ = maps_in(out)
    assert len(remade) == 46
    assert all(np.array_equal(remade[key], saliency) for key, saliency in maps.items())

    before = {path: path.read_bytes() for path in out.glob("*") if path.is_file()}
    beside = out / "networks-tiny_loaded_model_1_ray"
    for already in (0, 1):
        other = run(pictures / "new", *MODEL, "--layer", "1", "--engine", "ray", "--out", out)
        assert f"1 picture: {1 - already} explained, {already} there already, 0 failed; in {beside}" in other.output
    assert {path: path.read_bytes() for path in before} == before
    assert len(maps_in(beside)[0]) == 1


@pytest.mark.nightly
@pytest.mark.usefixtures("_cluster")
def test_a_method_that_fails_on_one_picture_costs_neither_it_the_others_maps_nor_others_theirs(tmp_path, out):
    pictures = make_pictures(tmp_path / "pictures", 3)
    Image.new("RGB", (40, 30), (90, 120, 30)).save(pictures / "flat.png")
    methods = ("--method", "tsm", "--method", "networks:FailsOnFlat")
    for already in (0, 3):
        result = run(pictures, *MODEL, *methods, "--engine", "ray", "--workers", 1, "--out", out)
        assert result.exit_code == 1
        assert f"{pictures / 'flat.png'}, networks.FailsOnFlat: nothing to see" in result.stderr
        assert f"4 pictures: {4 - already} explained, {already} there already, 0 failed" in result.output
    maps, errors = maps_in(out)
    assert len(maps) == 7
    assert len(errors) == 1
