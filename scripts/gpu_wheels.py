"""Collect as wheels what `make gpu` needs on a machine without a network that has torch and transformers already.

    python -m scripts.gpu_wheels wheels                        for Python 3.12 on Linux, x86-64
    python -m scripts.gpu_wheels wheels --have torch           where transformers is missing, too

There, in a copy of the repository:

    pip install --no-index --no-deps wheels/*.whl && pip install --no-build-isolation --no-deps -e .
    python -m benchmarks.gpu

The list is what this environment's packages say they require, without what the packages under `--have` require; the
versions are those of constraints.txt.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
ROOTS = ("unidpo", "trl", "pytest", "beartype", "hypothesis", "hatchling", "editables")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--have", nargs="*", default=["torch", "transformers"], help="what is there with all it needs")
    parser.add_argument("--python", default="3.12")
    parser.add_argument("--platforms", nargs="+", default=[f"manylinux_2_{libc}_x86_64" for libc in range(34, 4, -1)])
    options = parser.parse_args()
    wanted = sorted(closure(ROOTS) - closure(options.have) - {"unidpo"})
    print("\n".join(wanted))
    only = ["--only-binary=:all:", "--no-deps", "--python-version", options.python]
    only += [word for platform in options.platforms for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", *only, "-c", str(CONSTRAINTS), "-d", options.folder, *wanted]
    sys.exit(subprocess.run(command).returncode)


def closure(names: Iterable[str]) -> set[str]:
    """Packages with all that they require, as far as it is installed here."""
    found: set[str] = set()
    ahead = [canonicalize_name(name) for name in names]
    while ahead:
        name = ahead.pop()
        if name in found:
            continue
        try:
            needed = map(Requirement, requires(name) or ())
        except PackageNotFoundError:
            continue  # a marker that does not hold here, or an extra
        found.add(name)
        ahead += [canonicalize_name(each.name) for each in needed if each.marker is None or each.marker.evaluate()]
    return found


if __name__ == "__main__":
    main()
