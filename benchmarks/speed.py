"""How fast each way to train is, in one interleaved run on the same model and the same pairs.

    python -m benchmarks.speed --shape cpu                  some minutes a run
    python -m benchmarks.speed --shape gpu                  Qwen2-VL-2B's shape, on a CUDA GPU
    python -m benchmarks.speed --curves                     cost against lengths, responses and batch; with plots
    python -m benchmarks.speed --shape tiny --json          what the tests do

Every variant trains in a process of its own: a first step, which warms up and whose losses are compared, then the
steps that are measured. Adds a record to benchmarks/results and writes docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are forked

import torch

from benchmarks import curves, page
from benchmarks.measure import Taken, in_own_process
from benchmarks.records import add_record
from benchmarks.settings import Setting
from benchmarks.shapes import SHAPES, Shape, save_model
from benchmarks.variants import VARIANTS, run
from benchmarks.work import matmul_rate, step_work

PACKAGES = ("torch", "transformers", "accelerate", "trl")
# Largest relative difference that rounding explains: of losses, log-probabilities, norms of gradients.
TOLERANCE = {torch.float32: (1e-4, 1e-4, 1e-3), torch.bfloat16: (1e-2, 1e-2, 5e-2)}


class DifferentResult(AssertionError):
    """A variant computes something else than the others."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--pairs", type=int, help="in an optimizer step: 2, 4 or a multiple of 6 (default 6, GPU 48)")
    parser.add_argument("--steps", type=int, default=1, help="measured in each run (default 1)")
    parser.add_argument("--runs", type=int, default=3, help="of each variant, interleaved (default 3)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--curves", action="store_true", help="measure cost against lengths instead")
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
        record = compare(SHAPES[options.shape], pairs, options.steps, options.runs, options.variants)
    record = environment() | record
    if options.json:
        print(json.dumps(record))
        return
    add_record(name, **record)
    if options.curves:
        curves.plot(record)
    page.write()


def compare(shape: Shape, pairs: int, steps: int, runs: int, names: Sequence[str]) -> dict[str, Any]:
    """Train with each variant in turn, `runs` times over.

    Raises:
        DifferentResult: the first step's losses, log-probabilities or gradients differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        parameters = in_own_process(save_model, shape, model, device=shape.device)
        found: dict[str, list[Taken]] = {name: [] for name in names}
        prompts = math.ceil(pairs / 6)
        for number in range(runs):
            for name in names:
                work = Path(folder) / f"{number} {name}"
                setting = Setting(shape, model, work, pairs=pairs, prompts=prompts, steps=1 + steps)
                taken = in_own_process(run, name, setting, device=shape.device)
                found[name].append(taken)
                spent = taken.per_pair()
                print(f"{name:12} {spent.cpu:8.3f} CPU s/pair {spent.wall:8.3f} s/pair {taken.peak / 2**20:8,.0f} MiB")
        works = {name: in_own_process(step_work, setting, name, device="cpu") for name in names}
        rate = in_own_process(matmul_rate, shape, device=shape.device)
    firsts = {name: takes[0] for name, takes in found.items()}
    return {
        "parameters": parameters,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "gradient_checkpointing": shape.gradient_checkpointing,
        "pairs_per_pass": shape.pairs_per_pass,
        "pairs_per_step": pairs,
        "measured_steps": steps,
        "runs": runs,
        "matmul_per_second": rate,
        "largest_difference": agreement(shape.dtype, firsts),
        "variants": {
            name: summary(takes, works[name] / takes[0].pairs) | {"first": asdict(takes[0].first)}
            for name, takes in found.items()
        },
    }


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


def agreement(dtype: torch.dtype, takes: Mapping[str, Taken]) -> dict[str, float]:
    """Largest relative differences between the variants, each to the first one that takes as many pairs in a step.

    The first loss is ln 2 whatever a variant computes, for the policy is its own reference; log-probabilities, the
    gradient and the loss after an update are not.

    Raises:
        DifferentResult: they are larger than rounding explains.
    """
    largest = {"losses": 0.0, "logps": 0.0, "gradients": 0.0}
    tolerance = dict(zip(largest, TOLERANCE[dtype], strict=True))
    first = next(iter(takes.values())).first
    for name, taken in takes.items():
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
                raise DifferentResult(f"{name}: {what} differ: found and expected {values}")
            largest[what] = max(largest[what], *differences)
    return largest


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
