"""docs/architecture.md: the functions it walks through are there, and each is used by one before it."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "unidpo"
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
STATIONS = re.findall(r"^\d+\. `([\w/]+\.py)`, `([\w.]+)`", PAGE, re.MULTILINE)


def source_of(file: str, name: str) -> ast.AST:
    """The definition of a function, a class or a method, `Class.method`."""
    node: ast.AST = ast.parse((SOURCE / file).read_text("utf-8"))
    for part in name.split("."):
        inside = [n for n in ast.iter_child_nodes(node) if getattr(n, "name", None) == part]
        assert inside, f"docs/architecture.md: there is no {name} in {file}"
        node = inside[0]
    return node


def names_used(file: str, name: str) -> set[str]:
    """Every name that a definition uses, by itself or through private helpers of its file."""
    helpers = {
        node.name: node
        for node in ast.walk(ast.parse((SOURCE / file).read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("_")
    }
    used: set[str] = set()
    waiting: list[ast.AST] = [source_of(file, name)]
    while waiting:
        inner = ast.walk(waiting.pop())
        new = {getattr(node, "id", None) or getattr(node, "attr", "") for node in inner} - used
        used |= new
        waiting += [helpers[helper] for helper in new & helpers.keys()]
    return used


def test_the_walk_is_short():
    assert 8 <= len(STATIONS) <= 15


@pytest.mark.parametrize("station", range(len(STATIONS)), ids=lambda place: ".".join(STATIONS[place][1:]))
def test_each_station_is_there_and_used_by_one_before_it(station):
    source_of(*STATIONS[station])
    wanted = STATIONS[station][1].rpartition(".")[2]
    before = STATIONS[:station]
    assert not before or any(wanted in names_used(*each) for each in before), (
        f"docs/architecture.md: no station before it uses {wanted}"
    )


def test_the_floors_in_the_picture_are_those_of_the_walk():
    picture = PAGE.partition("```text\n")[2].partition("```")[0]
    assert {file.partition("/")[0] for file, _ in STATIONS} <= set(re.findall(r"[a-z_]+", picture))


def test_no_import_runs_in_a_circle():
    """Imports within functions count too: they hide a circle, they do not undo it."""
    modules = {
        ".".join(("unidpo", *path.relative_to(SOURCE).with_suffix("").parts)): path for path in SOURCE.rglob("*.py")
    }
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    uses: dict[str, set[str]] = {}
    for module, path in modules.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (below & modules.keys()) or ({node.module} & modules.keys())
        # A package lists what its modules offer.
        uses[module] = {name for name in found if not name.startswith(f"{module}.")}
    graphlib.TopologicalSorter(uses).prepare()  # raises CycleError, which names the circle
