"""Where the seconds of a step go, by kind of operation, for the ways to train that the aims compare.

    python -m benchmarks.profile
    python -m benchmarks.profile --shape gpu    of the device: what is outside of operations is then its idle time

torch's profiler over the passes of each variant's second step. Adds a record to benchmarks/results/profile-SHAPE.json
and writes docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are forked

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import page
from benchmarks.measure import Seconds, in_own_process
from benchmarks.records import add_record
from benchmarks.settings import Setting
from benchmarks.shapes import SHAPES, Shape, save_model
from benchmarks.speed import environment
from benchmarks.variants import run
from benchmarks.work import matmul_rate, step_work

NAMES = ("prompt packs", "pair packs", "pair packs, features", "selective", "loop")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::mkldnn_convolution")


class Watch(AbstractContextManager["Watch"]):
    """CPU seconds by kind of operation.

    Attributes:
        kinds: matrix products; attention's kernels; the other tensor operations; and what is outside of them: Python,
            autograd, reading the data.
        system: of all, what the operating system spent, nearly all of it on pages of fresh memory.
    """

    kinds: dict[str, float]
    system: float

    def __enter__(self) -> Watch:
        self._device = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device else [])]
        self._profiler = profile(activities=activities).__enter__()
        self._before, self._usage = Seconds.now(), resource.getrusage(resource.RUSAGE_SELF)
        return self

    def __exit__(self, *error: Any) -> None:
        passed = Seconds.now() - self._before
        spent = passed.wall if self._device else passed.cpu
        self.system = resource.getrusage(resource.RUSAGE_SELF).ru_stime - self._usage.ru_stime
        self._profiler.__exit__(None, None, None)
        self.kinds = {"products": 0.0, "attention": 0.0, "other operations": 0.0}
        for event in self._profiler.key_averages():
            if event.key.startswith("aten::"):
                own = event.self_device_time_total if self._device else event.self_cpu_time_total
                self.kinds[_kind(event.key)] += own / 1e6
        self.kinds["outside"] = max(0.0, spent - sum(self.kinds.values()))


def _kind(operation: str) -> str:
    if "scaled_dot_product" in operation:
        return "attention"
    return "products" if operation in PRODUCTS else "other operations"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--json", action="store_true", help="print the record and leave the files as they are")
    options = parser.parse_args()
    record = environment() | profiled(SHAPES[options.shape])
    if options.json:
        print(json.dumps(record))
        return
    add_record(f"profile-{options.shape}", **record)
    page.write()


def profiled(shape: Shape) -> dict[str, Any]:
    """Two pairs of a prompt in a step, all six in a prompt pack; seconds per pair."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        in_own_process(save_model, shape, model, device=shape.device)
        found = {}
        for name in NAMES:
            setting = Setting(shape, model, Path(folder) / name, pairs=2, prompts=1, steps=2)
            found[name] = in_own_process(_watched, name, setting, device=shape.device)
            print(name, found[name])
        return {"matmul_per_second": in_own_process(matmul_rate, shape, device=shape.device), "variants": found}


def _watched(name: str, setting: Setting) -> dict[str, Any]:
    watch = Watch()
    pairs = run(name, replace(setting, watch=watch)).pairs
    return {
        "cpu_seconds_per_pair": {kind: seconds / pairs for kind, seconds in watch.kinds.items()},
        "system_seconds_per_pair": watch.system / pairs,
        "work_per_pair": step_work(setting, name) / pairs,
    }


if __name__ == "__main__":
    main()
