"""Plants each bug of `tests/mutants` in a copy of the package, and names the test that catches it (`make mutants`).

The lists there are TOML. A `[[module]]` has the `path` of a file below `src/unidpo` and its `[[module.bug]]`s:

    name   what to call it, in small letters and hyphens
    old    text that stands in the file exactly once
    new    the text to plant in its place
    harm   what a user would suffer, in one sentence
    tests  those that must catch it, `test_file.py` or `test_file.py::test_name`; the narrowest there are

A bug counts as caught only where one of these tests ran and failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src", "unidpo")
SECONDS = 600
"""After which the tests of one bug have gone astray."""
SLOW_IMPORTS = (
    *("torch", "accelerate", "transformers.trainer", "transformers.modeling_outputs", "peft", "datasets", "pandas"),
    *("transformers.models.qwen2_vl.modeling_qwen2_vl", "transformers.models.qwen2_vl.processing_qwen2_vl"),
    *("transformers.models.gemma2.modeling_gemma2", "pyarrow.parquet"),
)
"""Of other packages. Each run of tests is a fork of a process that has them, for that is most of a run's time."""


class ListError(Exception):
    """A list does not fit the package or its tests; says which bug to mend, and how."""


@dataclass(frozen=True)
class Bug:
    """One planted bug; see the docstring of this module. `path` is relative to the package."""

    path: str
    name: str
    old: str
    new: str
    harm: str
    tests: tuple[str, ...]

    def planted(self, package: Path) -> str:
        """The whole text of its file, with the bug in it.

        Raises:
            ListError: there is no such file, the old text is not in it exactly once, or the new one is no Python.
        """
        file = package / self.path
        if not file.is_file():
            raise ListError(f"{self.name}: there is no {file}; mend the `path` of its module")
        text = file.read_text("utf-8")
        if (count := text.count(self.old)) != 1:
            raise ListError(f"{self.name}: its old text stands {count} times in {self.path}, not once; mend it")
        text = text.replace(self.old, self.new)
        try:
            compile(text, self.path, "exec", dont_inherit=True)
        except SyntaxError as error:
            raise ListError(f"{self.name}: its new text is no Python: {error}") from error
        return text


@dataclass
class Run:
    """Tests over a copy of the package, with a bug or none."""

    tests: Sequence[str]
    bug: Bug | None = None
    began: float = field(default_factory=time.monotonic)


def read_bugs(folder: Path) -> list[Bug]:
    """The bugs of all lists in a folder. Raises `ListError` where a name comes twice."""
    lists = [tomllib.loads(file.read_text("utf-8")) for file in sorted(folder.glob("*.toml"))]
    bugs = [
        Bug(path=module["path"], **bug | {"tests": tuple(bug["tests"])})
        for each in lists
        for module in each["module"]
        for bug in module["bug"]
    ]
    names = [bug.name for bug in bugs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ListError(f"two bugs are called {', '.join(twice)}")
    return bugs


def carried_out(runs: Sequence[Run], project: Path, workers: int) -> Iterator[tuple[Run, str | ListError]]:
    """Each run with the first test that failed, "" where all passed, or why no test could fail; as they end."""
    todo, running = list(runs), {}
    with tempfile.TemporaryDirectory(prefix="unidpo-mutants-") as name:
        try:
            while todo or running:
                if todo and len(running) < workers:
                    run = todo.pop(0)
                    run.began = time.monotonic()
                    folder = Path(tempfile.mkdtemp(dir=name))
                    running[_start(run, project, folder)] = run, folder
                    continue
                pid, status = os.wait()
                run, folder = running.pop(pid)
                yield run, _verdict(run, os.waitstatus_to_exitcode(status), folder)
                shutil.rmtree(folder)
        finally:
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)


def _start(run: Run, project: Path, folder: Path) -> int:
    """Begin a run in a process of its own, which is returned."""
    package = folder / PACKAGE
    # Without bytecode, which is of other sources.
    shutil.copytree(project / PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    if run.bug is not None:
        (package / run.bug.path).write_text(run.bug.planted(package), "utf-8")
    if pid := os.fork():
        return pid
    code = 70
    try:
        signal.alarm(SECONDS)
        os.chdir(project)
        sys.path[0] = str(package.parent)
        sys.dont_write_bytecode = True
        # Processes that a test starts get the same package.
        os.environ |= {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(folder / "hypothesis")
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = _test(run.tests, package, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _test(tests: Sequence[str], package: Path, folder: Path) -> int:
    import unidpo

    assert Path(unidpo.__file__).parent == package, f"tests would see {unidpo.__file__}"
    del sys.modules["unidpo"]  # to be imported anew, by tests that check its types
    import pytest
    from hypothesis import Phase, settings

    # The same examples each time, and a failure is enough: to make it small takes longer than to find it.
    settings.register_profile("planted", deadline=None, phases=(Phase.explicit, Phase.generate))
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=planted", "--hypothesis-seed=0"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins that came with the slow imports
    options += [f"--junitxml={folder / 'report.xml'}", f"--basetemp={folder / 'tests'}"]
    return int(pytest.main([*options, *(f"tests/{test}" for test in tests)]))


def _verdict(run: Run, code: int, folder: Path) -> str | ListError:
    report = folder / "report.xml"
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in cases if case.find("failure") is not None]
    broken = [case for case in cases if case.find("error") is not None]  # when it was collected or set up
    if code == 1 and failed and not broken:
        return failed[0].removeprefix("tests.")
    if code == 0 and any(len(case) == 0 for case in cases):  # the others were skipped
        return ""
    about = " ".join(run.tests) if run.bug is None else run.bug.name
    if code == -signal.SIGALRM:
        return ListError(f"{about}: still running after {SECONDS} s")
    output = (folder / "output").read_text("utf-8", "replace")
    return ListError(f"{about}: no test could fail by running (exit code {code})\n{output[-3000:]}")


def show_that_all_pass(bugs: Sequence[Bug], project: Path, workers: int) -> None:
    """Run all tests of some bugs without any. Raises `ListError` where one fails."""
    by_file: dict[str, set[str]] = defaultdict(set)
    for test in {test for bug in bugs for test in bug.tests}:
        by_file[test.partition("::")[0]].add(test)
    runs = [Run(sorted(tests)) for tests in by_file.values()]
    for _, failed in carried_out(runs, project, workers):
        if isinstance(failed, ListError):
            raise failed
        if failed:
            raise ListError(f"{failed} fails without any bug")


def plant(bugs: Sequence[Bug], project: Path, workers: int) -> int:
    """How many of some bugs their tests catch; tells of each."""
    caught = 0
    for run, found in carried_out([Run(bug.tests, bug) for bug in bugs], project, workers):
        assert run.bug is not None
        seconds = time.monotonic() - run.began
        if isinstance(found, ListError):
            print(f"{seconds:5.1f} s  WRONG   {found}", flush=True)
        elif not found:
            print(f"{seconds:5.1f} s  MISSED  {run.bug.name}: {run.bug.harm}", flush=True)
        else:
            print(f"{seconds:5.1f} s  caught  {run.bug.name} by {found}", flush=True)
            caught += 1
    return caught


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every bug was caught, 1 where one was missed or the list is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="plant only these: names of bugs, or paths of modules")
    parser.add_argument("--list", action="store_true", help="print the bugs and plant none")
    parser.add_argument("--workers", type=int, default=2, help="bugs at a time")
    parser.add_argument("--project", type=Path, default=PROJECT, help="the checkout; it is only read")
    asked = parser.parse_args(arguments)
    package = asked.project / PACKAGE
    try:
        bugs = read_bugs(asked.project / "tests" / "mutants")
        if unknown := set(asked.names) - {name for bug in bugs for name in (bug.name, bug.path)}:
            raise ListError(f"there is no bug called {', '.join(sorted(unknown))}; --list shows them")
        bugs = [bug for bug in bugs if not asked.names or {bug.name, bug.path} & set(asked.names)]
        if asked.list:
            for bug in bugs:
                print(f"{bug.path}: {bug.name}\n    {bug.harm}")
            return 0
        for bug in bugs:
            bug.planted(package)
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        for name in SLOW_IMPORTS:
            importlib.import_module(name)
        show_that_all_pass(bugs, asked.project, asked.workers)
        print("every test that is named passes without a bug", flush=True)
        caught = plant(bugs, asked.project, asked.workers)
    except ListError as error:
        print(error)
        return 1
    print(f"{len(bugs)} planted, {caught} caught")
    return 0 if caught == len(bugs) else 1


if __name__ == "__main__":
    sys.exit(main())
