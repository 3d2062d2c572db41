"""What is imported is declared: in the dependencies what always is, in an extra what its part of the package needs."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# The extra that a module, or a package with its modules, may count on; all others have the dependencies alone.
PARTS = {
    "tucker_cam.cli": "cli",
    "tucker_cam.cli.demo": "demo",
    "tucker_cam.cli.evaluate": "evaluation",
    "tucker_cam.cli.spectrum": "evaluation",
    "tucker_cam.console": "cli",
    "tucker_cam.evaluation": "evaluation",
    "tucker_cam.explanations": "cli",
    "tucker_cam.explanations.cluster": "ray",
    "tucker_cam.pictures": "cli",
    "tucker_cam.pictures.annotations": "evaluation",
    "tucker_cam.progress": "cli",
    "tucker_cam.writing": "cli",
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "tucker_cam").rglob("*.py"))
}
OF_OUR_OWN = {"tucker_cam", "benchmarks"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
PROVIDERS = packages_distributions()


def declared(*extras):
    """Return the names of the dependencies and of what these extras add, those that they name in turn with them."""
    requirements = list(PROJECT["dependencies"]) + [line for extra in extras for line in EXTRAS[extra]]
    names = set()
    for requirement in map(Requirement, requirements):
        if requirement.name == PROJECT["name"]:
            names |= declared(*requirement.extras)
        else:
            names.add(canonicalize_name(requirement.name))
    return names


def undeclared(packages, names):
    foreign = set(packages) - set(sys.stdlib_module_names) - OF_OUR_OWN
    return {
        package for package in foreign if names.isdisjoint(map(canonicalize_name, PROVIDERS.get(package, [package])))
    }


def imported(node, *, in_functions):
    """Yield what is imported when a module is, or in its functions too; not what is there for type checkers."""
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.If) and getattr(inner.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(inner, ast.Import):
            yield from (alias.name for alias in inner.names)
        elif isinstance(inner, ast.ImportFrom):
            yield inner.module
            yield from (f"{inner.module}.{alias.name}" for alias in inner.names)
        elif in_functions or not isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported(inner, in_functions=in_functions)


def packages_on_import(module, seen):
    """Return the packages of others that an import of this module brings, by way of modules of ours too."""
    if module in seen or module not in MODULES:
        return set()
    seen.add(module)
    packages = packages_on_import(module.rpartition(".")[0], seen)
    for name in imported(ast.parse(MODULES[module].read_text(encoding="utf-8")), in_functions=False):
        packages |= packages_on_import(name, seen) if name in MODULES else {name.partition(".")[0]}
    return packages


@pytest.mark.parametrize("module", MODULES)
def test_what_a_module_imports_is_declared_for_its_part_of_the_package(module):
    part = max((part for part in PARTS if f"{module}.".startswith(f"{part}.")), key=len, default=None)
    names = declared(PARTS[part]) if part else declared()
    assert not undeclared(packages_on_import(module, set()), names)


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("tucker_cam", [extra for extra in EXTRAS if extra not in ("test", "dev", "docs")]),
        ("tests", ["test"]),
        ("benchmarks", ["test"]),
    ],
)
def test_all_that_is_imported_anywhere_is_declared(folder, extras):
    packages = set()
    for path in (ROOT / folder).rglob("*.py"):
        names = imported(ast.parse(path.read_text(encoding="utf-8")), in_functions=True)
        packages |= {name.partition(".")[0] for name in names}
    assert not undeclared(packages, declared(*extras))


def test_imports_go_down_the_table_of_rooms_and_never_up():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    names = [re.findall(r"`(\w+)(?:\.py|/)`", row) for row in rows]

    def place(module):
        room = module.split(".")[1] if "." in module else "__init__"
        return next(index for index, of_row in enumerate(names) if room in of_row)

    for module, path in MODULES.items():
        for name in imported(ast.parse(path.read_text(encoding="utf-8")), in_functions=True):
            if name in MODULES:
                assert place(name) <= place(module), f"{module} imports {name}"
