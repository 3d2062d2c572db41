import os

import numpy as np
import pytest

from tucker_cam.errors import BadValueError
from tucker_cam.writing import complete_or_absent, only_run


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted():
        with complete_or_absent(tmp_path / "x.png") as unfinished:
            unfinished.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_link_stays_a_link_and_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    with complete_or_absent(tmp_path / "link.txt") as unfinished:
        unfinished.write_text("new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="expected a file to write"), complete_or_absent(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


def test_one_run_at_a_time_writes_to_a_folder_and_leaves_no_lock(tmp_path):
    with only_run(tmp_path / "out"), pytest.raises(BadValueError, match="another run"), only_run(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_what_chooses_its_format_by_the_suffix_writes_behind_a_link_too(tmp_path):
    (tmp_path / "maps.npz").symlink_to(tmp_path / "3f2a")
    (tmp_path / "3f2a").touch()
    with complete_or_absent(tmp_path / "maps.npz") as unfinished:
        np.savez_compressed(unfinished, saliency=np.ones(3))
    assert np.load(tmp_path / "maps.npz")["saliency"].sum() == 3
    assert {path.name for path in tmp_path.iterdir()} == {"maps.npz", "3f2a"}
