"""What a GPU would be asked to do for one micro-batch of Qwen2-VL-2B, counted on a CPU that says it is one.

    python -m benchmarks.pretend

Shapes alone: no weights are held and nothing is timed. Takes ten minutes. Adds a record to
benchmarks/results/pretend.json and writes docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch
import transformers

from benchmarks import page
from benchmarks.fused import with_compiled_layers
from benchmarks.pretended_training import Case, counted
from benchmarks.records import add_record
from benchmarks.shapes import SHAPES

CASES = (
    Case("a pair, as in the faithful recipe", 1, 2),
    Case("10 prompts", 10),
    Case("10 prompts, stored features", 10, features=True),
    Case("13 prompts", 13),
    Case("13 prompts, checkpointing", 13, checkpointing=True),
    Case("13 prompts, stored features", 13, features=True),
    Case("13 prompts, backend `sdpa`", 13, backend="sdpa"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the record and add it to no file")
    options = parser.parse_args()
    shape, found = SHAPES["gpu"], {}
    for case in CASES:
        found[case.title] = counted(shape, case)
        found[case.title]["compiled"] = asdict(with_compiled_layers(shape, case, found[case.title]))
        print(case.title, json.dumps(found[case.title], indent=1), flush=True)
    if not options.dry_run:
        versions: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
        add_record("pretend", command="python -m benchmarks.pretend", versions=versions, cases=found)
        page.write()


if __name__ == "__main__":
    main()
