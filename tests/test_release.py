import re
import tomllib
from pathlib import Path

import tucker_cam

ROOT = Path(__file__).parents[1]


def test_the_changelog_and_the_citation_are_of_this_version():
    version, date = re.search(r"^## \[([\d.]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    citation = dict(re.findall(r'^([\w-]+): "?(.*?)"?$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert version == citation["version"] == tucker_cam.__version__
    assert date == citation["date-released"]


def test_the_pythons_of_the_classifiers_are_those_of_the_workflow():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = [name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', workflow) == pythons
    assert project["requires-python"] == f">={pythons[0]}"
