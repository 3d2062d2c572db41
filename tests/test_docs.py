"""README and docs: every program and command runs, promises and links lead somewhere, messages are verbatim."""

import ast
import json
import re
from pathlib import Path

import pytest
from documents import PAGES, ROOT, blocks, commands, make_pictures, offline, offline_program, put_in_ultralytics
from typer.testing import CliRunner

import tucker_cam
from tucker_cam import models
from tucker_cam.cli import app

README = ROOT / "README.md"
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in [README, *PAGES]}
COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands(text)))
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PROGRAMS = [name for name, text in TEXTS.items() if blocks(text, "python")]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pictures():
    make_pictures()


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_runs(command):
    result = CliRunner().invoke(app, offline(command))
    assert result.exit_code == 0, result.output
    out = re.search(r"--out (\S+)", command)
    if out and command.startswith("tucker-cam explain"):
        written = {path.name for path in Path(out[1]).iterdir()}
        assert "manifest.json" in written
        assert len(written) > 1
        assert ("gallery.html" in written) == ("--gallery" in command)


@pytest.mark.usefixtures("pictures")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is not supported")
@pytest.mark.parametrize("page", PROGRAMS)
def test_the_programs_of_a_page_run_one_after_the_other(page, monkeypatch):
    put_in_ultralytics(monkeypatch)
    names = {"__name__": "a_page"}
    for program in blocks(TEXTS[page], "python"):
        exec(offline_program(program), names)  # noqa: S102
    if "saliency" in names:
        assert names["saliency"].min() >= 0
        assert names["saliency"].max() <= 1


def test_the_readme_is_short_and_what_it_links_to_is_there():
    readme = TEXTS["README.md"]
    assert len(readme.splitlines()) <= 180
    tables = re.findall(r"(?:^\|.*\n)+", readme, re.MULTILINE)
    assert max(len(table.splitlines()) - 2 for table in tables) <= 15
    for target in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", readme):
        assert (ROOT / "".join(target)).is_file(), target


def test_each_promise_stands_beside_a_test_that_is_there():
    promises = [line for line in TEXTS["promises.md"].splitlines() if "::test_" in line]
    assert len(promises) == 25
    for line in promises:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", line)
        assert len(named) == line.count("::") > 0
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def slugs(text):
    """Return the anchors of a page's headings, as mkdocs makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_each_link_to_a_page_leads_to_it_and_to_a_heading(page):
    for target, anchor in re.findall(
        r"\]\(((?:\.\./|notebooks/)?[\w-]*(?:\.md|\.ipynb|\.patch)?)#?([\w.-]*)\)", page.read_text()
    ):
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), target
        if anchor.startswith("tucker_cam."):
            assert re.search(rf"(::: |- )[\w.]*\b{anchor.rpartition('.')[2]}$", TEXTS["api.md"], re.MULTILINE)
        elif anchor:
            assert anchor in slugs(file.read_text(encoding="utf-8"))


def test_the_reference_has_every_public_name():
    ends = re.findall(r"^::: (?:\w+\.)+(\w+)$", TEXTS["api.md"], re.MULTILINE)
    assert "errors" in ends
    assert {*tucker_cam.__all__, *models.__all__} - {*ends} == {"Failure", "TuckerCamError"}  # of the module errors


def strings_of_the_package():
    for path in (ROOT / "tucker_cam").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_our_messages_are_answered_in_their_own_words():
    said = "\n".join(strings_of_the_package())
    ours = TEXTS["troubleshooting.md"].partition("## Messages of tucker_cam")[2]
    headings = re.findall(r"^### `(.+)`$", ours, re.MULTILINE)
    assert len(headings) > 20
    for heading in headings:
        for words in re.split(r"\.\.\.|\b\d+\b", heading):
            # What a name or a number stands for begins or ends the words.
            assert words.strip().removeprefix("expected feature maps from").strip(" ,") in said, heading


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_was_run_whole_and_without_errors(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < 400_000
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    # Neither errors nor warnings, which name files of the machine.
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
