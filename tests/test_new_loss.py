"""A new loss, tried and thrown away: a class in one file, its row in the table, and everything knows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from unidpo.losses import PreferenceLoss
from worlds import GOLDEN

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "loss.md"
EXAMPLE = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8").partition("## A loss of your own")[2], re.DOTALL)[1]
ROW = "| `hinge` | arXiv:2305.10425 | a hinge | not used | none | averaged | – |\n"


def test_the_example_of_the_docs_is_a_loss():
    names: dict[str, type[PreferenceLoss]] = {}
    exec(compile(EXAMPLE, "docs/loss.md", "exec", dont_inherit=True), names)
    assert names["Hinge"](margin=2.0).margin == 2.0
    with pytest.raises(ValueError, match="extra"):
        names["Hinge"](beta=2.0)


def test_a_class_and_a_row_are_all_that_a_new_loss_takes(tmp_path):
    for part in ("src", "tests", "docs", "recipes"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "src/unidpo/losses/unscored.py").open("a") as file:
        file.write("\n\n" + EXAMPLE[EXAMPLE.index("class Hinge") :])

    def run(*command: object) -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "src"), "UNIDPO_CACHE": str(tmp_path / "cache")}
        words = [sys.executable, "-m", *map(str, command)]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    rows = json.loads((GOLDEN / "data" / "golden48.json").read_text())[:4]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    recipe = {
        "output": "run",
        "model": {"name": str(GOLDEN / "model"), "dtype": "float32"},
        "data": {"path": "pairs.json", "images": str(GOLDEN / "data"), "template": "chatml"},
        "loss": {"name": "hinge", "margin": 3.0},
        "train": {"global_batch_pairs": 4},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run("unidpo", "recipe", "check", "recipe.yaml")
    run("unidpo", "train", "recipe.yaml")
    ledger = pq.read_table(tmp_path / "run" / "pairs.parquet").to_pylist()
    logratios = [row["chosen_logps"] - row["rejected_logps"] for row in ledger]
    assert [row["loss"] for row in ledger] == pytest.approx([max(3.0 - x, 0.0) for x in logratios], rel=1e-5)
    assert "hinge" in (tmp_path / "run" / "model" / "README.md").read_text()

    # The table lists losses in the order of the code, where a class at the end of the file is the last.
    page = tmp_path / "docs" / "loss.md"
    before, last, after = page.read_text("utf-8").partition("| `mpo`")
    page.write_text(before + last + after.replace("\n", "\n" + ROW, 1), "utf-8")
    run("pytest", "-q", "tests/test_losses.py", "-k", "table_of_the_docs or terms_say or every_loss or no_more_than")
