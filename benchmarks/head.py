"""Time and memory of the head, forward and backward, by each way to compute log-probabilities from hidden states.

    python -m benchmarks.head

The vocabulary of Qwen2-VL, 151,936; on a CPU hidden size 512 and float32, on a CUDA GPU 1,536 and bfloat16. Runs are
interleaved, each in a process of its own; medians. Adds a record to benchmarks/results/head.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import in_own_process
from benchmarks.records import add_record
from unidpo.model.head import LOGITS_CHUNK_BYTES, linear_logps

VOCABULARY = 151_936
TARGETS = (180, 720)
RUNS = 1


def all_at_once(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_logps(hidden, weight, targets, LOGITS_CHUNK_BYTES // (4 * VOCABULARY))


def of_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none")


def of_torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "logits at once, autograd": all_at_once,
    "unidpo.model.head.linear_logps": in_chunks,
}
if hasattr(F, "linear_cross_entropy"):
    WAYS |= {"torch linear_cross_entropy": of_torch, "torch linear_cross_entropy, chunked": of_torch_chunked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the record and add it to no file")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, dict[str, Any]] = {}
    for targets in TARGETS:
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        more: dict[str, Any] = {}
        for _ in range(RUNS):
            for name in WAYS:
                spent, more[name] = in_own_process(measure, name, targets, device=device)
                seconds[name].append(spent)
        found[str(targets)] = {name: {"seconds": statistics.median(seconds[name]), **more[name]} for name in WAYS}
        for name, values in found[str(targets)].items():
            print(f"{targets:5} targets  {name:36} {values['seconds']:7.3f} s {values['more_bytes'] / 2**20:7,.0f} MiB")
    record = {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "targets": found}
    if options.dry_run:
        print(json.dumps(record))
    else:
        add_record("head", torch=torch.__version__, runs=RUNS, **record)


def measure(name: str, targets: int) -> tuple[float, dict[str, Any]]:
    """Seconds of one pass, and the most bytes it held beyond weight and hidden states, gradients included."""
    gpu = torch.cuda.is_available()
    device, dtype, width = ("cuda", torch.bfloat16, 1536) if gpu else ("cpu", torch.float32, 512)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.empty(VOCABULARY, width, device=device, dtype=dtype).normal_(0, 0.02).requires_grad_()
    hidden = torch.randn(targets, width, device=device, dtype=dtype, requires_grad=True)
    at = torch.randint(0, VOCABULARY, (targets,), device=device)
    coefficients = torch.randn(targets, device=device)
    before, start = _held(gpu), _now(gpu)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logps = WAYS[name](hidden, weight, at)
        (logps * coefficients).sum().backward()
    spent = _now(gpu) - start
    more = torch.cuda.max_memory_allocated() if gpu else _held(gpu)
    return spent, {"more_bytes": more - before, "warned": sorted({str(each.message) for each in caught})}


def _held(gpu: bool) -> int:
    return torch.cuda.memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _now(gpu: bool) -> float:
    if not gpu:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
