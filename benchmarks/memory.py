"""What one full fine-tuning step holds in memory: packs with a stored reference beside padded rows with all logits.

    python -m benchmarks.memory

Each in a process of its own, on the same pairs: peak resident memory of the process (on a GPU: allocated), from its
start to the end of its second optimizer step, in which gradients, AdamW's moments and, where there is one, the
reference model are all there. Adds a record to benchmarks/results/memory-cpu.json and writes docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.measure import MIB, in_own_process, peak
from benchmarks.records import add_record
from benchmarks.settings import Setting
from benchmarks.shapes import SHAPES, Shape, save_model
from benchmarks.speed import agreement, environment
from benchmarks.variants import VARIANTS, run

NAMES = ("pair packs", "prompt packs", "selective", "loop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--json", action="store_true", help="print the record and leave the files as they are")
    options = parser.parse_args()
    record = environment() | compare(SHAPES[options.shape])
    if options.json:
        print(json.dumps(record))
        return
    add_record(f"memory-{options.shape}", **record)
    page.write()


def compare(shape: Shape) -> dict[str, Any]:
    """Two pairs of one prompt in a step, each of its four responses once; a prompt pack takes all six."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        in_own_process(save_model, shape, model, device=shape.device)
        takes = {}
        for name in NAMES:
            setting = Setting(shape, model, Path(folder) / name, pairs=2, prompts=1, steps=2)
            takes[name] = in_own_process(run, name, setting, device=shape.device)
            print(f"{VARIANTS[name].title:45} {takes[name].peak / MIB:8,.0f} MiB")
        libraries = in_own_process(peak, device="cpu") if shape.device == "cpu" else 0
    largest, different = agreement(shape.dtype, takes)
    if different:
        raise SystemExit("; ".join(different))
    return {
        "largest_difference": largest,
        "libraries_bytes": libraries,
        "variants": {n: {"peak_bytes": t.peak} for n, t in takes.items()},
    }


if __name__ == "__main__":
    main()
