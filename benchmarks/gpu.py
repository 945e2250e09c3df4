"""What a CUDA GPU has to show: that everything computes there what it computes on a CPU, and how fast.

    make gpu                                  everything; half an hour on one GPU
    python -m benchmarks.gpu --minutes 9      a slice; the same command goes on where the last one ended
    python -m benchmarks.gpu --shape tiny     a rehearsal, which needs no GPU

Each check is a command with a process of its own. One that fails is recorded with its last words and does not stop the
others. Writes benchmarks/results/gpu.json after each, and docs/performance.md; logs lie beside the results.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import page
from benchmarks.records import RESULTS, add_record, last_record
from benchmarks.shapes import SHAPES
from benchmarks.speed import TRY_AGAIN, environment

UNFINISHED = "not finished"
SLICE = 9
"""Minutes after which a check is stopped; those that take longer go on by themselves, see `TRY_AGAIN`."""


def checks(shape: str) -> dict[str, list[str]]:
    """Arguments of Python by the name of the check, the shortest first."""
    leave = [] if shape == "gpu" else ["--json"]  # results and docs as they are
    return {
        "equality": ["-m", "pytest", "-q", "-m", "gpu", "tests/test_attention.py"],
        "attention": ["-m", "benchmarks.attention"],
        "head": ["-m", "benchmarks.head", *leave],
        "speed": ["-m", "benchmarks.speed", "--shape", shape, "--runs", "1", "--minutes", str(SLICE - 3), *leave],
        "profile": ["-m", "benchmarks.profile", "--shape", shape, *leave],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpu")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so many")
    parser.add_argument("--only", nargs="+", choices=checks("gpu"), help="these, done before or not")
    options = parser.parse_args()
    if options.shape == "gpu" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here, or this torch has none; `--shape tiny` rehearses")
    until = time.monotonic() + 60 * options.minutes
    setting = environment() | {"load_average_before": 0, "shape": options.shape}
    before = last_record("gpu") or {}
    goes_on = all(before.get(key) == value for key, value in setting.items())
    done: dict[str, dict[str, Any]] = before["checks"] if goes_on else {}
    for name, arguments in checks(options.shape).items():
        if name not in options.only if options.only else done.get(name, {}).get("outcome") == "passed":
            continue
        check = {"command": f"python {' '.join(arguments)}", "outcome": UNFINISHED, "seconds": 0.0}
        while check["outcome"] == UNFINISHED and time.monotonic() < until:
            print(f"--- {check['command']}", flush=True)
            begun = time.monotonic()
            check["outcome"] = _outcome(arguments, RESULTS / f"gpu-{name}.log")
            check["seconds"] += time.monotonic() - begun
            print(check["outcome"])
            done[name] = check
            if options.shape == "gpu":
                add_record("gpu", instead_of_last=goes_on, **setting, checks=done)
                goes_on = True
                page.write()
    if [name for name in checks(options.shape) if done.get(name, {}).get("outcome") != "passed"]:
        sys.exit("not everything passed yet: benchmarks/results/gpu.json says what, the logs beside it why")


def _outcome(arguments: list[str], log: Path) -> str:
    """How a command ended: passed, failed with its last words, or `UNFINISHED`."""
    with log.open("w") as out:
        try:
            code = subprocess.run([sys.executable, *arguments], stdout=out, stderr=out, timeout=60 * SLICE).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {SLICE} minutes"
    if code in (0, TRY_AGAIN):
        return UNFINISHED if code else "passed"
    words = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"failed: {words[-1][:200] if words else f'status {code}'}"


if __name__ == "__main__":
    main()
