"""What `unidpo demo` reaches with several seeds, and how long it takes.

    python -m benchmarks.demo                     seeds 0 to 3
    python -m benchmarks.demo --seeds 0

Each seed runs in a process and a folder of its own, without stored reference log-probabilities. Adds a record to
benchmarks/results/demo.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.records import add_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    runs = [run(seed) for seed in parser.parse_args().seeds]
    packages = {name: version(name) for name in ("torch", "transformers", "unidpo")}
    add_record("demo", packages=packages, runs=runs)


def run(seed: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "demo", time.perf_counter()
        command = [sys.executable, "-m", "unidpo", "demo", "--out", str(out), "--seed", str(seed)]
        environment = os.environ | {"UNIDPO_CACHE": f"{folder}/cache"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        seconds = round(time.perf_counter() - start, 1)
        accuracy = json.loads((out / "accuracy.json").read_text())
    changes = [
        f"{kind} {100 * before['accuracy']:.1f} -> {100 * accuracy['trained'][kind]['accuracy']:.1f} %"
        for kind, before in accuracy["base"].items()
    ]
    print(f"seed {seed}: {', '.join(changes)}, {seconds} s")
    return {"seed": seed, "seconds": seconds, **accuracy}


if __name__ == "__main__":
    main()
