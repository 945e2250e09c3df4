"""Every model family against separate passes of the stock model: packs and padded rows, full fine-tuning and LoRA.

    python -m benchmarks.models

Makes a small random model of each family, prints the largest differences in log-probabilities and gradients, adds a
record to benchmarks/results/model_table.json and writes the table in docs/models.md. Half a minute on one core.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.records import add_record
from unidpo.model.attention import PackAttentionError

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from families import (  # noqa: E402
    FAMILIES,
    LAYOUTS,
    Family,
    difference,
    load_family,
    measure,
    prompts,
    save_family,
    separate_logps,
)

DOCUMENT = ROOT / "docs" / "models.md"
TUNINGS = ("full", "LoRA")
TABLE = re.compile(r"(?<=<!-- model table -->\n).*?(?=<!-- end of model table -->)", re.DOTALL)


def main() -> None:
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    start = time.perf_counter()
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES.values():
            cells += compare(family, Path(folder) / family.name)
    record = {
        "versions": {package: version(package) for package in ("torch", "transformers", "peft")},
        "seconds": round(time.perf_counter() - start),
        "cells": cells,
    }
    add_record("model_table", **record)
    DOCUMENT.write_text(TABLE.sub(lambda _: table(record) + "\n", DOCUMENT.read_text("utf-8")), "utf-8")


def compare(family: Family, folder: Path) -> list[dict[str, Any]]:
    """A cell for each layout and way to train: differences, or what packs refuse."""
    save_family(family, folder)
    groups = prompts(images=family.processor is not None)
    cells = []
    for tuning in TUNINGS:
        world = load_family(folder, tuning)
        expected = measure(world, groups, separate_logps)
        for name, layout in LAYOUTS.items():
            cell: dict[str, Any] = {"family": family.name, "layout": name, "tuning": tuning}
            try:
                found = difference(measure(world, groups, layout), expected)
                cell |= {"logps": found.logps, "gradients": found.gradients}
            except PackAttentionError as error:
                cell |= {"refused": str(error)}
            cells.append(cell)
            print(*cell.values(), sep="  ")
    return cells


def table(record: Mapping[str, Any]) -> str:
    """A record's cells as a Markdown table, one family per row."""
    cells = {(cell["family"], cell["layout"], cell["tuning"]): cell for cell in record["cells"]}
    columns = [(layout, tuning) for layout in LAYOUTS for tuning in TUNINGS]
    lines = [["family", *(f"{layout}, {tuning}" for layout, tuning in columns)], ["---"] * (1 + len(columns))]
    lines += [[name, *(_shown(cells[name, *column]) for column in columns)] for name in FAMILIES]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(cell: Mapping[str, Any]) -> str:
    return cell["refused"] if "refused" in cell else f"{cell['logps']:.0e} / {cell['gradients']:.0e}"


if __name__ == "__main__":
    main()
