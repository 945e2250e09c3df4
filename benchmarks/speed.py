"""How fast each way to train is, in one interleaved run on the same model and the same pairs.

    python -m benchmarks.speed --shape cpu                  some minutes a run
    python -m benchmarks.speed --shape answers              the same model; small images and long answers
    python -m benchmarks.speed --shape gpu                  Qwen2-VL-2B's shape, on a CUDA GPU
    python -m benchmarks.speed --curves                     cost against lengths, responses and batch; with plots
    python -m benchmarks.speed --shape tiny --json          what the tests do

Every variant trains in a process of its own: a first step, which warms up and whose losses are compared, then the
steps that are measured. Adds a record to benchmarks/results and writes docs/performance.md. What is measured is kept
after each run of a variant, and a command that was stopped goes on from there. A variant that fails or computes
something else than the others is recorded so; the command then ends with status 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are forked

import torch
from pydantic import TypeAdapter

from benchmarks import curves, page
from benchmarks.measure import Taken, in_own_process
from benchmarks.records import RESULTS, add_record
from benchmarks.settings import Setting
from benchmarks.shapes import SHAPES, Shape, save_model
from benchmarks.variants import VARIANTS, run
from benchmarks.work import matmul_rate, step_work

PACKAGES = ("torch", "transformers", "accelerate", "trl")
# Largest relative difference that rounding explains: of losses, log-probabilities, norms of gradients.
TOLERANCE = {torch.float32: (1e-4, 1e-4, 1e-3), torch.bfloat16: (1e-2, 1e-2, 5e-2)}
TRY_AGAIN = 75
"""Exit status where the time was up before everything was measured; the same command goes on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--pairs", type=int, help="in an optimizer step: 2, 4 or a multiple of 6 (default 6, GPU 48)")
    parser.add_argument("--steps", type=int, default=1, help="measured in each run (default 1)")
    parser.add_argument("--runs", type=int, default=3, help="of each variant, interleaved (default 3)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--curves", action="store_true", help="measure cost against lengths instead")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so many")
    parser.add_argument("--json", action="store_true", help="print the record and leave the files as they are")
    options = parser.parse_args()
    if options.curves:
        name, record = "speed-curves", curves.measure(options.runs)
    else:
        pairs = options.pairs or (48 if options.shape == "gpu" else 6)
        if pairs not in (2, 4) and pairs % 6:
            parser.error("--pairs is 2, 4 or a multiple of 6: every response must be in equally many")
        per_pass = SHAPES[options.shape].pairs_per_pass
        if pairs % (6 * per_pass) and per_pass > 1:
            parser.error(f"--pairs is a multiple of {6 * per_pass} for this shape, so that all passes are full")
        name = f"speed-{options.shape}"
        shape = SHAPES[options.shape]
        kept = Kept(
            None if options.json else RESULTS / f"{name}-unfinished.json", [asdict(shape), pairs, options.steps]
        )
        until = time.monotonic() + 60 * options.minutes
        found = compare(shape, pairs, options.steps, options.runs, options.variants, kept, until)
        if found is None:
            print("the time is up; the same command goes on")
            sys.exit(TRY_AGAIN)
        record = found
    record = environment() | record
    if options.json:
        print(json.dumps(record))
    else:
        add_record(name, **record)
        if options.curves:
            curves.plot(record)
        else:
            kept.forget()
        page.write()
    if wrong := [*record.get("different", ()), *record.get("failed", {}).items()]:
        sys.exit(f"not as it should be: {wrong}")


class Kept:
    """Runs that were measured, or why they failed, by run and variant; in a file after each.

    Args:
        path: `None` to keep nothing.
        setting: what was measured; a file of another one, or of other versions and hardware, is not taken.
    """

    _type = TypeAdapter(dict[str, Taken | str])

    def __init__(self, path: Path | None, setting: Any) -> None:
        self._path = path
        self._setting = json.loads(json.dumps([setting, environment() | {"load_average_before": 0}], default=str))
        self.runs: dict[str, Taken | str] = {}
        if path is not None and path.exists():
            held = json.loads(path.read_text("utf-8"))
            if held["setting"] == self._setting:
                self.runs = self._type.validate_python(held["runs"])

    def add(self, key: str, run: Taken | str) -> None:
        self.runs[key] = run
        if self._path is not None:
            runs = self._type.dump_python(self.runs, mode="json")
            self._path.write_text(json.dumps({"setting": self._setting, "runs": runs}, indent=2), "utf-8")

    def forget(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def compare(
    shape: Shape, pairs: int, steps: int, runs: int, names: Sequence[str], kept: Kept, until: float
) -> dict[str, Any] | None:
    """Train with each variant in turn, `runs` times over; `None` where the time is up before that.

    Args:
        kept: what was measured before is not measured again.
        until: on the monotonic clock; nothing new begins after it.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        parameters = in_own_process(save_model, shape, model, device=shape.device)
        prompts = math.ceil(pairs / 6)
        for number in range(runs):
            for name in names:
                work = Path(folder) / f"{number} {name}"
                setting = Setting(shape, model, work, pairs=pairs, prompts=prompts, steps=1 + steps)
                if f"{number} {name}" in kept.runs:
                    continue
                if time.monotonic() > until:
                    return None
                kept.add(f"{number} {name}", _one(name, setting))
        works = {name: in_own_process(step_work, setting, name, device="cpu") for name in names}
        rate = in_own_process(matmul_rate, shape, device=shape.device)
    every = {name: [kept.runs[f"{number} {name}"] for number in range(runs)] for name in names}
    failed = {
        name: next(run for run in of_name if isinstance(run, str))
        for name, of_name in every.items()
        if str in map(type, of_name)
    }
    found = {
        name: [run for run in of_name if isinstance(run, Taken)]
        for name, of_name in every.items()
        if name not in failed
    }
    largest, different = agreement(shape.dtype, {name: takes[0] for name, takes in found.items()})
    return {
        "parameters": parameters,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "gradient_checkpointing": shape.gradient_checkpointing,
        "pairs_per_pass": shape.pairs_per_pass,
        "pairs_per_step": pairs,
        "measured_steps": steps,
        "runs": runs,
        "matmul_per_second": rate,
        "largest_difference": largest,
        "different": different,
        "failed": failed,
        "variants": {
            name: summary(takes, works[name] / takes[0].pairs) | {"first": asdict(takes[0].first)}
            for name, takes in found.items()
        },
    }


def _one(name: str, setting: Setting) -> Taken | str:
    """One run of a variant, or why it failed: out of memory, or a library that is not there."""
    try:
        taken = in_own_process(run, name, setting, device=setting.shape.device)
    except Exception as error:
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"{name:24} {failure}")
        return failure
    spent = taken.per_pair()
    print(f"{name:24} {spent.cpu:8.3f} CPU s/pair {spent.wall:8.3f} s/pair {taken.peak / 2**20:8,.0f} MiB")
    return taken


def summary(takes: Sequence[Taken], work_per_pair: float) -> dict[str, Any]:
    """Medians over the runs, and each run's seconds."""
    spent = [taken.per_pair() for taken in takes]
    wall = median(each.wall for each in spent)
    reference = [t.reference for t in takes if t.reference is not None]
    return {
        "pairs": takes[0].pairs,
        "cpu_seconds_per_pair": median(each.cpu for each in spent),
        "wall_seconds_per_pair": wall,
        "pairs_per_second": 1 / wall,
        "update_cpu_seconds": median(t.update.cpu for t in takes if t.update),
        "reference_cpu_seconds_per_pair": median(r.cpu for r in reference) / takes[0].reference_pairs
        if reference
        else None,
        "reference_wall_seconds_per_pair": median(r.wall for r in reference) / takes[0].reference_pairs
        if reference
        else None,
        "work_per_pair": work_per_pair,
        "peak_bytes": median(taken.peak for taken in takes),
        "cpu_seconds_of_runs": [each.cpu for each in spent],
        "wall_seconds_of_runs": [each.wall for each in spent],
    }


def agreement(dtype: torch.dtype, takes: Mapping[str, Taken]) -> tuple[dict[str, float], list[str]]:
    """Largest relative differences between the variants, and what of them is larger than rounding explains.

    Each is compared with the first one that takes as many pairs in a step. The first loss is ln 2 whatever a variant
    computes, for the policy is its own reference; log-probabilities, the gradient and the loss after an update are not.
    """
    largest = {"losses": 0.0, "logps": 0.0, "gradients": 0.0}
    different: list[str] = []
    tolerance = dict(zip(largest, TOLERANCE[dtype], strict=True))
    for name, taken in takes.items():
        first = next(iter(takes.values())).first
        peer = next(other for other in takes.values() if other.pairs == taken.pairs)
        compared = {
            "losses": [(taken.first.loss, math.log(2))],
            "logps": [
                (taken.first.chosen_logps, first.chosen_logps),
                (taken.first.rejected_logps, first.rejected_logps),
            ],
            "gradients": [(taken.first.grad_norm, peer.first.grad_norm)],
        }
        if taken.second_loss is not None and peer.second_loss is not None:
            compared["losses"].append((taken.second_loss, peer.second_loss))
        for what, values in compared.items():
            differences = [abs(found - expected) / abs(expected) for found, expected in values]
            if not all(difference <= tolerance[what] for difference in differences):
                different.append(f"{name}: {what} differ: found and expected {values}")
            largest[what] = max(largest[what], *differences)
    return largest, different


def environment() -> dict[str, Any]:
    """Versions and hardware beyond what `add_record` knows."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
