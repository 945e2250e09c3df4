"""Time of one layer's attention over a pack, forward and backward, by each backend that is there.

    python -m benchmarks.attention

On a CPU: one prompt of 560 tokens with responses of 110, 140, 170 and 200, 8 heads of 64, float32, process time of one
thread. On a CUDA GPU: 8 such prompts, 12 heads of 128 over 2 of keys, bfloat16. Runs are interleaved; the median and
the fastest are printed, in milliseconds.
"""

import statistics
import time

import torch

from unidpo.model.attention import BACKENDS, Attend, Segment, SegmentTable, missing
from unidpo.model.transfer import to_device

PROMPT, RESPONSES = 560, (110, 140, 170, 200)
RUNS = 20


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if gpu else (torch.device("cpu"), torch.float32)
    groups, heads, kv_heads, dim = (8, 12, 2, 128) if gpu else (1, 8, 8, 64)
    length = PROMPT + sum(RESPONSES)
    segments = [Segment(number * length, PROMPT, RESPONSES) for number in range(groups)]
    kernels: dict[str, tuple[Attend, SegmentTable]] = {}
    for name, backend in BACKENDS.items():
        reason = missing(name, device=device, dtype=dtype)
        if reason is None:
            made = None if backend.table is None else to_device(backend.table(segments), device)
            kernels[name] = backend.attend, SegmentTable(segments, device, made)
        else:
            print(f"{name:10} not measured: {reason}")

    inputs = [
        torch.randn(1, groups * length, count, dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]
    gradient = torch.randn(1, groups * length, heads, dim, device=device, dtype=dtype)
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for run in range(RUNS + 3):  # the first three compile and warm up
        for name, (attend, table) in kernels.items():
            seconds = _now(device)
            torch.autograd.grad(attend(*inputs, table, None, 0.0), inputs, gradient)
            if run >= 3:
                times[name].append(1000 * (_now(device) - seconds))
    for name, taken in times.items():
        print(f"{name:10} median {statistics.median(taken):7.2f}   fastest {min(taken):7.2f}")


def _now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
