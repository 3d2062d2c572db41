"""Every command and every program of the README runs: offline, with random weights; and it stays short."""

import re

import pytest
from documents import ROOT, assert_runs, blocks, commands, make_pictures, offline_program
from PIL import Image

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_pictures()


@pytest.mark.parametrize("command", commands(README))
def test_each_command_runs(command):
    assert_runs(command)


def test_the_programs_run_one_after_the_other():
    names = {}
    for program in blocks(README, "python"):
        exec(offline_program(program), names)  # noqa: S102
    with Image.open("overlay.png") as overlay:
        assert overlay.size == (120, 90)
    assert names["saliency"].shape == (224, 224)


def test_it_is_short_and_what_it_links_to_is_there():
    lines = README.splitlines()
    assert len(lines) <= 180
    tables = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    assert max(len(table.splitlines()) - 2 for table in tables) <= 15
    for target in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", README):
        assert (ROOT / "".join(target)).is_file(), target
