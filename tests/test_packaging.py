"""What pyproject.toml promises is what the environments of the Makefile are made of."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in ("demo", "dev")))
    for line in lines
]


def pinned(name: str) -> dict[str, str]:
    """Versions by package of a constraints file."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): version for package, version in lines}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_oldest_environment_has_every_lowest_bound(requirement):
    (bound,) = [clause.version for clause in requirement.specifier if clause.operator == ">="]
    assert Version(pinned("constraints-oldest.txt")[canonicalize_name(requirement.name)]) == Version(bound)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_tested_versions_are_allowed(requirement):
    assert requirement.specifier.contains(pinned("constraints.txt")[canonicalize_name(requirement.name)])


def test_the_oldest_python_is_the_lowest_of_those_named():
    named = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert named == sorted(named, key=Version)
