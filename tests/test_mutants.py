"""`make mutants`: the lists of planted bugs fit the package, and the script tells a catch from all else."""

import re
import subprocess
import sys

import pytest

from scripts.plant_bugs import PACKAGE, PROJECT, Bug, ListError, read_bugs

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


def bug(name="minus", old="a + b", new="a - b", tests=("test_add.py::test_add",)):
    return Bug("__init__.py", name, old, new, "Sums are wrong.", tests)


@pytest.fixture
def project(tmp_path):
    """A package of one function in the place of this one, with its tests."""
    (tmp_path / PACKAGE).mkdir(parents=True)
    (tmp_path / PACKAGE / "__init__.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "tests" / "mutants").mkdir(parents=True)
    (tmp_path / "tests" / "test_add.py").write_text(
        "import subprocess, sys\n"
        "import pytest\n"
        "from unidpo import add\n\n\n"
        "@pytest.fixture\ndef three():\n    assert add(2, 1) == 3\n    return 3\n\n\n"
        "def test_zeros():\n    assert add(0, 0) == 0\n\n\n"
        "def test_add():\n    assert add(2, 1) == 3\n\n\n"
        "def test_three(three):\n    assert three\n\n\n"
        "def test_skipped():\n    pytest.skip('never')\n\n\n"
        "def test_process():\n"
        "    code = 'import unidpo; print(unidpo.add(2, 1))'\n"
        "    assert subprocess.check_output([sys.executable, '-c', code]) == b'3\\n'\n"
    )
    return tmp_path


def planted(project, *bugs):
    """Exit code and output of `make mutants` where these are the bugs."""
    entries = "".join(
        f"[[module.bug]]\nname = {each.name!r}\nold = {each.old!r}\nnew = {each.new!r}\nharm = {each.harm!r}\n"
        f"tests = {[*each.tests]}\n"
        for each in bugs
    )
    (project / "tests" / "mutants" / "list.toml").write_text(f"[[module]]\npath = '__init__.py'\n{entries}")
    # In a process that forks well, without the slow imports.
    code = f"""
import sys
from scripts import plant_bugs
plant_bugs.SLOW_IMPORTS = ()
sys.exit(plant_bugs.main(["--project", {str(project)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=PROJECT)
    return done.returncode, done.stdout + done.stderr


def test_a_bug_is_caught_only_by_a_test_that_runs_and_fails(project):
    code, said = planted(
        project,
        bug("in this process"),
        bug("in another process", tests=("test_add.py::test_process",)),
        bug("in all of a file", tests=("test_add.py",)),
        bug("missed", tests=("test_add.py::test_zeros",)),
        bug("not collected", old="def add(", new="def plus("),
        bug("not set up", tests=("test_add.py::test_three",)),
    )
    assert code == 1
    for line in (
        "caught  in this process by test_add::test_add\n",
        "caught  in another process by test_add::test_process\n",
        "caught  in all of a file by test_add::test_add\n",
        "MISSED  missed: Sums are wrong.\n",
        "WRONG   not collected: no test could fail by running",
        "WRONG   not set up: no test could fail by running",
        "6 planted, 3 caught\n",
    ):
        assert line in said
    assert (project / PACKAGE / "__init__.py").read_text() == "def add(a, b):\n    return a + b\n"
    assert not [*project.rglob("__pycache__"), *project.rglob(".hypothesis"), *project.rglob(".pytest_cache")]


@pytest.mark.parametrize(
    ("test", "problem"),
    [
        ("test_gone", "no test could fail"),
        ("test_skipped", "no test could fail"),
        ("test_add", "fails without any bug"),
    ],
)
def test_without_a_bug_every_test_that_is_named_runs_and_passes(project, test, problem):
    if test == "test_add":
        (project / PACKAGE / "__init__.py").write_text("def add(a, b):\n    return (a + b) * 2\n")
    code, said = planted(project, bug(tests=(f"test_add.py::{test}",)))
    assert code == 1
    assert problem in said
    assert "planted" not in said


def test_all_bugs_caught_is_exit_code_0(project):
    assert planted(project, bug())[0] == 0


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (bug(old="a"), r"minus: its old text stands 3 times in __init__.py, not once"),
        (bug(old="a - b"), r"stands 0 times"),
        (bug(new="a +"), r"is no Python"),
        (Bug("gone.py", "minus", "a", "b", "x", ()), r"there is no .*gone\.py"),
    ],
    ids=["text too short", "text gone", "no Python", "file gone"],
)
def test_a_bug_that_cannot_be_planted(project, wrong, problem):
    with pytest.raises(ListError, match=problem):
        wrong.planted(project / PACKAGE)


def test_a_name_that_comes_twice_is_refused(project):
    code, said = planted(project, bug(), bug())
    assert (code, said) == (1, "two bugs are called minus\n")
