"""A training from Python leaves the metrics and the ledger of the command, where it is asked to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import TrainerCallback, TrainingArguments

from unidpo import PreferenceTrainer, UniDPO, load_pairs
from unidpo.config import recipe_from
from unidpo.errors import FolderInUse, RunError
from unidpo.run.train import run
from worlds import GOLDEN

DATA = GOLDEN / "data"
STEPS = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "save_steps": 2,
    "eval_strategy": "epoch",
}


def trained(folder: Path, *, stop_after: int | None = None, resume: bool = False, **options: Any) -> Path:
    """What README's Python does, on twelve golden rows; `folder`/python is the output."""

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == stop_after

    groups = load_pairs(pairs_file(folder), images=DATA)
    trainer = PreferenceTrainer(
        GOLDEN / "model",
        loss=UniDPO(beta=1.5),
        args=TrainingArguments(
            str(folder / "python"), lr_scheduler_type="cosine", logging_steps=1, use_cpu=True, report_to="none", **STEPS
        ),
        train_dataset=groups[:8],
        eval_dataset=groups[8:],
        template="chatml",
        callbacks=[Stop()],
        **{"record": True} | options,
    )
    trainer.train(resume_from_checkpoint=resume)
    return folder / "python"


def pairs_file(folder: Path, rows: slice = slice(12)) -> Path:
    path = folder / "pairs.json"
    path.write_text(json.dumps(json.loads((DATA / "golden48.json").read_text())[rows]), "utf-8")
    return path


def ledger_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "pairs.parquet").to_pylist()
    return rows


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIDPO_CACHE", str(folder / "cache"))
        return trained(folder)


def test_the_record_is_that_of_the_command(tmp_path: Path, recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unidpo.run import data

    def split(groups: list[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
        return groups[:8], groups[8:]

    monkeypatch.setattr(data, "split_by_prompt", split)  # a trainer from Python is given the two parts
    recipe = {
        "output": str(tmp_path / "run"),
        "model": {"name": str(GOLDEN / "model"), "dtype": "float32"},
        "data": {
            "path": str(recorded.parent / "pairs.json"),
            "images": str(DATA),
            "template": "chatml",
            "eval_fraction": 0.3,
        },
        "loss": {"name": "uni_dpo", "beta": 1.5},
        "train": STEPS,
    }
    run(recipe_from(recipe))
    assert [row["step"] for row in ledger_of(recorded)] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert ledger_of(recorded) == ledger_of(tmp_path / "run")
    assert [record["step"] for record in metrics_of(recorded)] == [1, 2, 2, 3, 4, 4]
    assert metrics_of(recorded) == metrics_of(tmp_path / "run")


def test_a_resumed_training_goes_on_with_its_record(tmp_path: Path, recorded: Path) -> None:
    trained(tmp_path, stop_after=3)  # one step after its last checkpoint
    assert [path.name for path in (tmp_path / "python").glob("checkpoint-*")] == ["checkpoint-2"]
    assert ledger_of(tmp_path / "python")[-1]["step"] == 3
    trained(tmp_path, resume=True)
    ours, theirs = ([row | {"file": None} for row in ledger_of(each)] for each in (tmp_path / "python", recorded))
    assert ours == theirs
    assert metrics_of(tmp_path / "python") == metrics_of(recorded)


def test_the_record_of_another_training_is_not_written_over(recorded: Path) -> None:
    before = metrics_of(recorded)
    with pytest.raises(RunError, match="python: the record of an earlier training lies here; resume it with"):
        trained(recorded.parent)
    assert metrics_of(recorded) == before


def test_nobody_else_writes_there_meanwhile(tmp_path: Path) -> None:
    from unidpo.run_folder.folder import RunFolder

    with RunFolder(tmp_path / "python").locked(), pytest.raises(FolderInUse, match=str(os.getpid())):
        trained(tmp_path)


def test_nothing_is_left_where_nothing_is_asked(tmp_path: Path) -> None:
    trained(tmp_path, record=False)
    assert not {"metrics.jsonl", "pairs.parquet"} & {path.name for path in (tmp_path / "python").iterdir()}
