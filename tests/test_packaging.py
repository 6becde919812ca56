"""What the package promises about itself: its list of packages, its names and its entry point match the tree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("lowering", "kernels", "runtime", "tools")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(path for folder in (*FOLDERS, "tests") for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Full names of what a file imports absolutely."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return names


def test_every_folder_with_code_is_a_listed_package():
    folders = {path.parent.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    packages = {"terrazzo." + ".".join(folder.parts) for folder in folders}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_listed_package_is_mapped_to_its_folder():
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    expected = {name: "/".join(name.split(".")[1:]) for name in PROJECT["tool"]["setuptools"]["packages"]}
    assert mapped == expected


@pytest.mark.parametrize("folder", ["kernels", "tests"])
def test_folders_that_must_not_be_packages_are_none(folder):
    # transformers imports a third-party package called `kernels`; a folder with __init__.py on sys.path hides it.
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_no_tool_is_named_like_a_standard_module():
    names = {path.stem for path in (ROOT / "tools").glob("*.py")} - {"__init__"}
    assert not names & sys.stdlib_module_names


def test_modules_are_imported_under_one_name():
    bare = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        for name in imported_modules(path)
        if name.split(".")[0] in FOLDERS
    }
    assert not bare, "import terrazzo.… or relatively"


@pytest.mark.parametrize("folder", ["lowering", "kernels", "runtime"])
def test_the_compiler_needs_neither_its_tools_nor_its_tests(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert not {name for name in imported_modules(path) if name.startswith(("terrazzo.tools", "tests"))}, path


def test_files_stay_short_enough_to_read():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {path: count for path, count in lines.items() if count >= 400}


def test_the_namespace_works_from_anywhere(tmp_path):
    code = "import terrazzo.lowering.errors as errors; print(errors.__file__)"
    for cwd in (tmp_path, ROOT, ROOT / "tools"):
        found = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout
        assert Path(found.strip()).name == "errors.py"


def test_torch_finds_the_backend():
    found = {point.name: point.value for point in entry_points(group="torch_dynamo_backends")}
    assert found.get("terrazzo") == PROJECT["project"]["entry-points"]["torch_dynamo_backends"]["terrazzo"]
    module, attribute = found["terrazzo"].split(":")
    source = (ROOT / Path(*module.split(".")[1:]).with_suffix(".py")).read_text()
    assert re.search(rf"^(def {attribute}\b|{attribute} =)", source, re.MULTILINE)


def test_versions_agree():
    constraints = (ROOT / "constraints.txt").read_text()
    for requirement in PROJECT["project"]["dependencies"]:
        name, least = re.fullmatch(r"([a-z]+)(?:>=([\d.]+))?.*", requirement).groups()
        pinned = re.search(rf"^{name}==([\d.]+)$", constraints, re.MULTILINE)
        if least and pinned:
            assert [int(n) for n in pinned[1].split(".")] >= [int(n) for n in least.split(".")]
