"""`make mutants`: the lists of planted bugs fit the package, and the script tells a catch from all else."""

import re
import subprocess
import sys

import pytest

from scripts.plant_bugs import PACKAGE, PROJECT, ListError, read_bugs

BUGS = read_bugs(PROJECT / "tests" / "mutants")


def test_there_are_bugs_enough():
    assert len(BUGS) >= 60


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_bug_can_be_planted_and_its_tests_exist(bug):
    assert bug.planted(PROJECT / PACKAGE)
    assert bug.old != bug.new
    assert re.fullmatch(r"[a-z0-9-]+", bug.name)
    assert bug.harm.endswith(".")
    assert bug.tests
    for test in bug.tests:
        file, *names = test.split("::")
        text = (PROJECT / "tests" / file).read_text("utf-8")
        for name in names:
            assert re.search(rf"^ *(class|def) {re.escape(name.partition('[')[0])}\b", text, re.MULTILINE), test


LIST = """
[[module]]
path = "__init__.py"

[[module.bug]]
name = "{name}"
old = "{old}"
new = "{new}"
harm = "Sums are wrong."
tests = ["{test}"]
"""


@pytest.fixture
def project(tmp_path):
    """A package of one function in the place of this one, with tests good and bad."""
    (tmp_path / PACKAGE).mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("def add(a, b):\n    return a + b\n")
    lists = tmp_path / "tests" / "mutants"
    lists.mkdir(parents=True)
    (tmp_path / "tests" / "test_add.py").write_text(
        "import subprocess, sys\n"
        "from unidpo import add\n\n\n"
        "def test_zeros():\n    assert add(0, 0) == 0\n\n\n"
        "def test_add():\n    assert add(2, 1) == 3\n\n\n"
        "def test_process():\n"
        "    code = 'import unidpo; print(unidpo.add(2, 1))'\n"
        "    assert subprocess.check_output([sys.executable, '-c', code]) == b'3\\n'\n"
    )
    return tmp_path


def planted(project, **bug):
    """Exit code and output over a list of this bug alone."""
    usual = {"name": "minus", "old": "a + b", "new": "a - b", "test": "test_add.py::test_add"}
    (project / "tests" / "mutants" / "list.toml").write_text(LIST.format(**usual | bug))
    # In a process that forks well, without the slow imports.
    code = f"""
import sys
from scripts import plant_bugs
plant_bugs.SLOW_IMPORTS = ()
sys.exit(plant_bugs.main(["--project", {str(project)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PROJECT)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("test", ["test_add.py::test_add", "test_add.py::test_process", "test_add.py"])
def test_a_bug_is_caught_by_a_test_that_runs_and_fails(project, test):
    code, said = planted(project, test=test)
    assert (code, "1 planted, 1 caught" in said) == (0, True), said
    assert f"caught  minus by test_add::{test.rpartition('::')[2].replace('test_add.py', 'test_add')}" in said
    assert (project / PACKAGE / "__init__.py").read_text() == "def add(a, b):\n    return a + b\n"
    assert not [*project.rglob("__pycache__"), *project.rglob(".hypothesis"), *project.rglob(".pytest_cache")]


@pytest.mark.parametrize(
    ("bug", "expected"),
    [
        ({"test": "test_add.py::test_zeros"}, "MISSED  minus: Sums are wrong."),
        ({"test": "test_add.py::test_gone"}, "test_add.py::test_gone: no test could fail by running"),
        ({"old": "a", "new": "b"}, "minus: its old text stands 3 times in __init__.py, not once"),
        ({"old": "a - b"}, "minus: its old text stands 0 times"),
        ({"new": "a +"}, "minus: its new text is no Python"),
        ({"old": "def add(", "new": "def plus("}, "WRONG   minus: no test could fail by running"),
    ],
    ids=["missed", "no such test", "text too short", "text gone", "no Python", "not collected"],
)
def test_what_is_no_catch_is_said_and_counts_as_none(project, bug, expected):
    code, said = planted(project, **bug)
    assert code == 1
    assert expected in said
    assert "1 caught" not in said


def test_a_test_that_fails_without_a_bug_is_said(project):
    text = (project / "tests" / "test_add.py").read_text()
    (project / "tests" / "test_add.py").write_text(text.replace("== 3", "== 4"))
    code, said = planted(project)
    assert (code, "test_add::test_add fails without any bug" in said) == (1, True), said


def test_a_name_that_comes_twice_is_refused(project):
    for name in ("one", "two"):
        (project / "tests" / "mutants" / f"{name}.toml").write_text(LIST.format(name="same", old="", new="", test=""))
    with pytest.raises(ListError, match="two bugs are called same"):
        read_bugs(project / "tests" / "mutants")
