"""The floors of docs/architecture.md: imports go down, and never in a circle."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.helpers.tiny import ROOT

PACKAGE = ROOT / "aimv2_jax"
ARCHITECTURE = ROOT / "docs/architecture.md"
READING_PATHS = {"One training step": 5, "A batch": 12, "Resume": 8, "A parameter's sharding": 4}
READING_PATHS |= {"A probe": 10, "A dense probe": 10}
FILES = {path.relative_to(ROOT).as_posix(): path for path in PACKAGE.rglob("*.py")}


def floors() -> dict[str, int]:
    """What the table says: a folder or file of the package -> its floor."""
    table = ARCHITECTURE.read_text()
    return {name.rstrip("/"): int(floor) for floor, name in re.findall(r"^\| (\d) \| `([\w./]+)` \|", table, re.M)}


def file_of(module: str) -> str | None:
    """The file of a module of the package."""
    path = module.replace(".", "/")
    return next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in FILES), None)


@cache
def imports() -> dict[str, set[str]]:
    """File -> files that it imports, wherever in it the import is."""
    graph = {}
    for name, path in FILES.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[name] |= {file_of(module) or file_of(node.module or "") for module in modules}
            elif isinstance(node, ast.Import):
                graph[name] |= {file_of(alias.name) for alias in node.names}
        graph[name] -= {None, name}
    return graph


def part_of(file: str) -> str:
    """The row of the table that a file belongs to."""
    return file.split("/")[1]


def folder_of(file: str, depth: int) -> str:
    """Its folder, `depth` folders below the package; a file that is not so deep stands for itself."""
    *folders, _ = file.split("/")[1:]
    return "/".join(folders[:depth]) if len(folders) >= depth else file


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_imports_each_file_has_a_floor():
    """And each row of the table has files."""
    assert {part_of(file) for file in FILES} == set(floors())


def test_imports_go_down():
    height = floors()
    upward = [
        f"{file} ({height[part_of(file)]}) imports {other} ({height[part_of(other)]})"
        for file, others in imports().items()
        for other in others
        if height[part_of(other)] > height[part_of(file)]
    ]
    assert not upward


def test_imports_files_have_no_circle():
    assert_no_circle(imports())


@pytest.mark.parametrize("depth", [1, 2])
def test_imports_folders_have_no_circle(depth):
    """Neither folders of the package, nor folders beside each other in one of them."""
    graph: dict[str, set[str]] = {}
    for file, others in imports().items():
        here = folder_of(file, depth)
        graph.setdefault(here, set()).update(
            there for there in (folder_of(other, depth) for other in others) if there != here
        )
    assert_no_circle(graph)


@pytest.mark.parametrize("path", READING_PATHS)
def test_reading_path_is_short(path):
    """A reading path names files that exist, and not more of them than a reader can bear."""
    [line] = re.findall(rf"^- \*\*{path}\*\*.*", ARCHITECTURE.read_text(), re.M)
    files = re.findall(r"`([\w/]+\.py)`", line)
    assert [name for name in files if not (PACKAGE / name).is_file()] == []
    assert 0 < len(files) <= READING_PATHS[path]
