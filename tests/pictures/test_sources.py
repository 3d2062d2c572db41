"""Pictures found in files, folders, globs, tables and URLs, read whatever their kind; what cannot be used says why."""

import io
import json
import os
import re
import shutil

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from annotated import write_picture
from PIL import Image

from tucker_cam.errors import BadFileError, BadValueError
from tucker_cam.pictures.annotations import find_samples
from tucker_cam.pictures.files import open_picture
from tucker_cam.pictures.held import collect
from tucker_cam.pictures.sources import Source, find_sources, random_sample


@pytest.fixture
def pictures(tmp_path):
    for name in ("a.png", "b.JPG", "deeper/a.png", ".hidden/x.png", ".x.png"):
        write_picture(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def found_in(*arguments, **options):
    sources, failures = find_sources([str(argument) for argument in arguments], **options)
    assert not failures
    return sources


def write_table(path, names=None, count=3, **options):
    encoded = [write_picture(path.parent / f".{index}.png").read_bytes() for index in range(count)]
    columns = {"image": encoded} if names is None else {"image": encoded, "name": names}
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_files_globs_and_folders_name_each_picture_once(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (pictures / "link").symlink_to(write_picture(tmp_path / "other" / "x.png").parent, target_is_directory=True)
    found = found_in("pictures/[a].png", "pictures/a.png", "pictures", pictures, "pictures/**/a.png")
    assert [source.name for source in found] == ["a", "b", "deeper/a"]
    odd = pictures.joinpath("a.png").rename(pictures / "a[1]*.png")
    assert [source.path for source in found_in(odd)] == [str(odd)]
    monkeypatch.chdir(pictures)
    assert [source.name for source in found_in("**/a*.png", ".")] == ["a[1]*", "deeper/a", "b"]


def test_explain_and_evaluate_find_the_same_files(pictures):
    for suffix in ("gif", "avif", "webp", "bmp", "tiff", "pgm"):
        (pictures / f"x.{suffix}").write_bytes(b"")
    # What a run wrote, in any format; its manifest says that the file of b was there before.
    for name in ("a_tsm.png", "a_my-own.Method.jpg", "deeper/a_tsm.png", "a_other.png", "b_tsm.png", "c_tsm.png"):
        write_picture(pictures / "out" / name)
    run = {name: {"name": name, "modified": modified} for name, modified in (("a", 1), ("b", -1), ("deeper/a", 1))}
    manifest = {"versions": {"tucker-cam": "1"}, "methods": ["tsm", "my_own.Method"], "pictures": run}
    (pictures / "out" / "manifest.json").write_text(json.dumps({**manifest, "suffixes": [".png", ".jpg"]}))
    write_table(pictures / "out" / "maps-0.parquet")
    for name in ("a_tsm.webp", "more/a_tsm.jpg", "more/a_tsm.png", "older/a_tsm.png"):
        write_picture(pictures / "out" / name)
    (pictures / "out" / "older" / "manifest.json").write_text(json.dumps(manifest))
    (pictures / "out" / "more" / "manifest.json").write_text(json.dumps({**manifest, "suffixes": []}))
    # Other programs' manifests.
    (pictures / "manifest.json").write_text("[]")
    write_picture(pictures / "deeper" / "a_tsm.png")
    (pictures / "deeper" / "manifest.json").write_text(json.dumps({**manifest, "versions": {}}))
    (pictures / "gone.png").symlink_to("nowhere.png")
    for folder in ("masks", "deeper/SegmentationClass", "SegmentationObject"):
        write_picture(pictures / folder / "a.png")
    paths = [source.path for source in found_in(pictures)]
    assert paths == [str(sample.picture) for sample in find_samples(pictures).samples]
    kept = ("a_other.png", "a_tsm.webp", "b_tsm.png", "c_tsm.png", "more/a_tsm.jpg", "more/a_tsm.png")
    assert [path for path in paths if "/out/" in path] == [str(pictures / "out" / name) for name in kept]
    assert len(paths) == 17
    assert len(found_in(pictures / "masks")) == 1


@pytest.mark.parametrize(
    ("argument", "kind", "message"),
    [
        ("nowhere.png", BadValueError, "found none: no such file or folder that may be read"),
        ("nowhere*", BadValueError, "expected pictures or Parquet files, found none"),
        ("memory://nowhere/*.png", BadValueError, "expected pictures or Parquet files, found none"),
        ("empty.parquet", BadValueError, "expected pictures or Parquet files with rows, found none"),
        ("broken.parquet", BadFileError, "expected a Parquet file, found something else or a broken one"),
    ],
)
def test_what_cannot_be_used_keeps_its_error_and_costs_no_other(pictures, monkeypatch, argument, kind, message):
    monkeypatch.chdir(pictures.parent)
    write_table(pictures.parent / "empty.parquet", count=0)
    (pictures.parent / "broken.parquet").write_bytes(b"PAR1 no table")
    collection = collect([argument, pictures])
    assert collection.number == 3
    ((name, error, _),) = collection.failures
    assert (name, type(error)) == (argument, kind)
    assert f"{argument}: " in str(error)
    assert message in str(error)
    with pytest.raises(BadValueError, match=re.escape(str(error))):
        collect(argument)


def test_a_folder_that_may_not_be_entered_says_so_when_it_is_read(pictures, monkeypatch):
    scandir = os.scandir

    def guarded(path="."):
        if str(path).endswith("deeper"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    by_name = {source.name: source for source in found_in(pictures)}
    assert by_name.keys() == {"a", "b", "deeper"}
    with pytest.raises(OSError, match="deeper: expected a file to read, found none, or one that may not be read"):
        by_name["deeper"].read()
    assert "deeper" in [sample.name for sample in find_samples(pictures).samples]


def test_pictures_are_read_from_any_file_system_and_from_archives(pictures, tmp_path):
    for name in ("a/x.png", "a/b/y.png", "a/.z.png", "a/notes.txt"):
        fsspec.filesystem("memory").pipe_file(f"/sources/{name}", (pictures / "a.png").read_bytes())
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", pictures)
    for argument, names in {
        "memory://sources/a": ["b/y", "x"],
        "memory://sources/a/*.png": [".z", "x"],
        "memory://sources/[a]/x.png": ["a/x"],
        f"zip://deeper/a.png::{archive}": ["a"],
    }.items():
        found = found_in(argument)
        assert [source.name for source in found] == names
        assert all(source.read().tobytes() == open_picture(pictures / "a.png").tobytes() for source in found)
    (source,) = found_in("memory://sources/nothing.png")
    with pytest.raises(OSError, match="could not be opened"):
        source.read()


def test_what_a_server_said_is_told(monkeypatch):
    def refused(url, mode):
        raise FileNotFoundError(url) from ValueError("404, message='Not Found'")

    monkeypatch.setattr(fsspec, "open", refused)
    with pytest.raises(OSError, match=r"http://a/x\.png: could not be opened \(404, message='Not Found'\)"):
        Source("x", "http://a/x.png").read()


def test_the_rows_of_a_table_have_names_of_its_own_or_by_their_place(tmp_path):
    file = write_table(tmp_path / "t.parquet", [*"ab", None, *"def"], 6, row_group_size=2)
    assert [source.name for source in found_in(file)] == ["a", "b", "t-1-0", "d", "e", "f"]
    assert len({source.key for source in found_in(file)}) == 6
    no_utf8 = pa.Array.from_buffers(pa.string(), 1, pa.array([b"b\xff/d"], pa.binary()).buffers())
    for names in (None, no_utf8):
        (source,) = found_in(write_table(tmp_path / "one.parquet", names, 1))
        assert source.name == "one-0-0"
        assert source.read().size == (8, 6)


def test_a_table_that_was_written_again_is_read_again(tmp_path):
    def written(colours):
        stored = [io.BytesIO() for _ in colours]
        for file, colour in zip(stored, colours, strict=True):
            Image.new("L", (4, 4), colour).save(file, "PNG")
        pq.write_table(pa.table({"image": [file.getvalue() for file in stored]}), tmp_path / "t.parquet")
        return found_in(tmp_path / "t.parquet")

    for colours in ([10], [200, 20]):
        sources = written(colours)
        assert [source.read().getpixel((0, 0))[0] for source in sources] == colours
    written([30])
    with pytest.raises(OSError, match="the table has changed"):
        sources[1].read()


def test_a_tiff_of_16_bits_in_which_0_is_white_or_with_planes_is_not_read_as_another_picture(tmp_path):
    greys = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    tifffile.imwrite(tmp_path / "negative.tif", greys, photometric="miniswhite")
    np.testing.assert_allclose(np.asarray(open_picture(tmp_path / "negative.tif"))[..., 0], 255 - greys / 257, atol=1)
    tifffile.imwrite(tmp_path / "planes.tif", np.stack([greys] * 3), photometric="rgb", planarconfig="separate")
    with pytest.raises(OSError, match=r"planes.tif: expected the colours of a pixel together, found planes"):
        open_picture(tmp_path / "planes.tif")
    planes = np.stack([greys // 257] * 3).astype(np.uint8)
    tifffile.imwrite(tmp_path / "bytes.tif", planes, photometric="rgb", planarconfig="separate")
    assert np.array_equal(np.asarray(open_picture(tmp_path / "bytes.tif")), planes.transpose(1, 2, 0))


def test_a_clip_is_read_as_so_many_frames_evenly_spread(tmp_path):
    frames = [Image.new("RGB", (30, 20), (0, index * 10, 0)) for index in range(20)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    (source,) = found_in(tmp_path / "clip.gif")
    greens = [np.asarray(frame)[0, 0, 1] for frame in source.read(frames=4)]
    np.testing.assert_allclose(greens, [0, 60, 130, 190], atol=4)
    assert np.asarray(source.read())[0, 0, 1] <= 4


def test_a_sample_is_the_same_again_and_part_of_a_larger_one():
    small, large = random_sample(range(20), 5), random_sample(range(20), 12)
    assert small == random_sample(range(20), 5) == sorted(small)
    assert set(small) < set(large)
    assert random_sample(range(20), 100) == random_sample(range(20), None) == list(range(20))
    with pytest.raises(ValueError, match="at least 1 picture, got 0"):
        random_sample(range(20), 0)


def test_a_picture_of_more_than_8_bits_keeps_its_greys_or_is_refused(tmp_path):
    greys = np.linspace(0, 65535, 256).reshape(16, 16)
    deep = Image.fromarray(greys.astype(np.uint16))
    deep.save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as opened:
        (held,) = collect([opened, deep]).parts()
    for picture in (open_picture(tmp_path / "deep.png"), *(each.read() for each in held)):
        np.testing.assert_allclose(np.asarray(picture)[..., 0], greys / 257, atol=1)
    for dtype in (np.float32, np.int32):
        Image.fromarray(greys.astype(dtype)).save(tmp_path / "a.tif")
        with pytest.raises(OSError, match=r"a.tif: expected a picture of 8 or 16 bits a channel, found one of 32"):
            open_picture(tmp_path / "a.tif")
        with pytest.raises(ValueError, match="found one of 32"):
            collect(Image.fromarray(greys.astype(dtype)))
