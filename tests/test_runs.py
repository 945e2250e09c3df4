"""Run folders are never written over, and the ledger holds each visit once, wherever a run was cut off."""

import json
import math
import sys
from types import SimpleNamespace

import pandas as pd
import pyarrow
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unidpo.errors import RunError
from unidpo.files.writing import write_atomically
from unidpo.run_folder.folder import RunFolder
from unidpo.run_folder.manifest import write_manifest
from unidpo.run_folder.records import LEDGER_COLUMNS, LEDGER_SCHEMA, Ledger, Metrics

CONFIG = {"output": "runs/x", "train": {"seed": 1, "logging_steps": 1}, "loss": {"beta": 2.0}}


def checkpoint(run, step):
    folder = run.path / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    write_manifest(folder, step, run=run.path, resumable=True)
    return folder


def visits(steps):
    """Rows of the ledger, one per step given; `row` numbers them."""
    rows = {column.name: [0.5] * len(steps) for column in LEDGER_COLUMNS}
    rows["file"] = ["pairs.json"] * len(steps)
    rows |= {name: [1] * len(steps) for name in ("chosen", "rejected", "chosen_tokens", "rejected_tokens")}
    return rows | {"step": list(steps), "row": list(range(1, len(steps) + 1))}


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


class TestRunFolder:
    def test_a_new_run_says_what_and_where(self, run):
        run.create(CONFIG, {"threads": 2})
        assert json.loads(run.config.read_text()) == CONFIG
        (start,) = json.loads(run.environment.read_text())["starts"]
        assert start["packages"]["pyarrow"] == pyarrow.__version__
        assert not run.finished

    def test_the_build_of_torch_that_runs_is_recorded(self, run, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__="2.13.0+cu130"))
        run.create(CONFIG)
        (start,) = json.loads(run.environment.read_text())["starts"]
        assert start["packages"]["torch"] == "2.13.0+cu130"

    def test_a_finished_run_is_refused_with_and_without_resume(self, run):
        run.create(CONFIG)
        run.finish(lambda folder: (folder / "weights").write_text("w"))
        assert (run.model / "weights").read_text() == "w"
        for begin in (run.create, run.resume):
            with pytest.raises(RunError, match=r"finished run.*another `output`"):
                begin(CONFIG)

    def test_a_model_half_written_is_no_finished_run(self, run):
        run.create(CONFIG)

        def killed(folder):
            (folder / "weights").write_text("w")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run.finish(killed)
        assert not run.finished
        run.finish(lambda folder: (folder / "other").write_text("w"))
        assert [path.name for path in run.model.iterdir()] == ["other"]

    def test_an_unfinished_run_goes_on_only_when_asked(self, run):
        run.create(CONFIG)
        Metrics(run.metrics).add({"step": 1})
        with pytest.raises(RunError, match="--resume"):
            run.create(CONFIG)
        assert run.resume(CONFIG) is None
        run.add_start(CONFIG)
        checkpoint(run, 9)
        checkpoint(run, 10)
        assert run.resume(CONFIG).name == "checkpoint-10"
        run.add_start(CONFIG)
        assert len(json.loads(run.environment.read_text())["starts"]) == 3

    def test_a_checkpoint_half_written_does_not_count(self, run):
        run.create(CONFIG)
        checkpoint(run, 5)
        (checkpoint(run, 10) / "trainer_state.json").unlink()
        assert run.last_checkpoint.name == "checkpoint-5"

    def test_a_run_that_never_made_a_step_may_begin_again_otherwise(self, run):
        run.create(CONFIG)
        Metrics(run.metrics)
        run.create({**CONFIG, "loss": {"beta": 3.0}})
        assert json.loads(run.config.read_text())["loss"] == {"beta": 3.0}

    def test_nothing_to_resume(self, run):
        with pytest.raises(RunError, match="no run to resume"):
            run.resume(CONFIG)
        assert not run.path.exists()

    def test_files_of_others_are_left_alone(self, run):
        run.path.mkdir()
        (run.path / "thesis.tex").write_text("")
        with pytest.raises(RunError, match="no run"):
            run.create(CONFIG)
        assert [path.name for path in run.path.iterdir()] == ["thesis.tex"]

    def test_a_file_in_the_way(self, run):
        run.path.write_text("")
        with pytest.raises(RunError, match="cannot be a run folder"):
            run.create(CONFIG)

    def test_resuming_with_another_recipe_names_every_difference(self, run):
        run.create(CONFIG)
        checkpoint(run, 1)
        with pytest.raises(RunError) as error:
            run.resume({**CONFIG, "loss": {"beta": 3.0, "gamma": 1.0}})
        assert [finding.key for finding in error.value.findings] == ["loss.beta", "loss.gamma"]
        assert "was 2.0, is 3.0" in str(error.value)

    def test_resuming_elsewhere_or_logging_otherwise_is_no_other_recipe(self, run):
        run.create(CONFIG)
        checkpoint(run, 1)
        changed = {**CONFIG, "output": "elsewhere", "train": {"seed": 1, "logging_steps": 5, "report_to": "none"}}
        assert run.resume(changed).name == "checkpoint-1"

    @pytest.mark.parametrize("name", ["config", "environment"])
    def test_damaged_files_are_named(self, run, name):
        run.create(CONFIG)
        getattr(run, name).write_text("{")
        with pytest.raises(RunError, match=f"{name}.json.*damaged"):
            run.resume(CONFIG)


class TestMetrics:
    def test_resuming_drops_later_and_broken_lines(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        metrics = Metrics(path)
        for step in (1, 2, 3):
            metrics.add({"step": step, "loss": 0.5})
        with path.open("a") as file:
            file.write('{"step": 2, "lo')
        Metrics(path, resume_step=2).add({"step": 3, "loss": math.nan, "text": "é"})
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert [record["step"] for record in records] == [1, 2, 3]
        assert records[2] == {"step": 3, "loss": None, "text": "é"}

    def test_a_record_needs_a_step(self, tmp_path):
        with pytest.raises(ValueError, match="step"):
            Metrics(tmp_path / "m").add({"loss": 1.0})


class TestLedger:
    @settings(max_examples=50)
    @given(steps=st.lists(st.integers(1, 9), max_size=40).map(sorted), cuts=st.sets(st.integers(0, 40)))
    def test_rows_in_are_rows_out(self, tmp_path_factory, steps, cuts):
        path = tmp_path_factory.mktemp("ledger") / "pairs.parquet"
        ledger, at = Ledger(path, rows_per_part=7), 0
        rows = visits(steps)
        for cut in [*sorted(cuts), len(steps)]:
            ledger.add({name: values[at:cut] for name, values in rows.items()})
            ledger.flush()
            at = max(at, cut)
        if steps:
            found = pd.read_parquet(path)
            assert found["row"].tolist() == rows["row"]
            assert found["step"].tolist() == steps

    @given(
        steps=st.lists(st.integers(1, 9), min_size=1, max_size=40).map(sorted),
        size=st.integers(1, 9),
        resumes=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    )
    def test_resuming_keeps_exactly_the_rows_up_to_the_step(self, tmp_path_factory, steps, size, resumes):
        path = tmp_path_factory.mktemp("ledger") / "pairs.parquet"
        ledger = Ledger(path, rows_per_part=size)
        for step in steps:
            ledger.add(visits([step]))
        ledger.flush()
        for resume_step in resumes:
            Ledger(path, resume_step=resume_step)
            steps = [step for step in steps if step <= resume_step]
            parts = sorted(path.glob("*.parquet"))
            assert [s for part in parts for s in pq.read_table(part)["step"].to_pylist()] == steps
            assert all(not part.name.startswith(".") for part in path.iterdir())

    def test_a_part_half_written_is_swept_away(self, tmp_path):
        path = tmp_path / "pairs.parquet"
        path.mkdir()
        (path / ".part-00000001-00000002.parquet.unfinished").write_bytes(b"PAR1")
        ledger = Ledger(path)
        ledger.add(visits([1]))
        ledger.flush()
        assert len(list(path.iterdir())) == 1
        assert len(pd.read_parquet(path)) == 1

    def test_missing_values_are_null_and_a_lost_loss_is_not(self, tmp_path):
        ledger = Ledger(tmp_path / "pairs.parquet")
        rows = visits([1, 2]) | {"chosen_score": [math.nan, 3.0], "ref_chosen_logps": None, "loss": [math.nan, 0.5]}
        ledger.add(rows)
        ledger.flush()
        (part,) = (tmp_path / "pairs.parquet").iterdir()
        table = pq.read_table(part)
        assert table["chosen_score"].to_pylist() == [None, 3.0]
        assert table["ref_chosen_logps"].null_count == 2
        assert table["loss"].null_count == 0
        assert math.isnan(table["loss"][0].as_py())
        assert table.schema.equals(LEDGER_SCHEMA)
        assert table.schema.field("loss").metadata[b"description"]

    def test_wrong_columns_are_refused(self, tmp_path):
        ledger = Ledger(tmp_path / "pairs.parquet")
        with pytest.raises(ValueError, match="sore"):
            ledger.add(visits([1]) | {"sore": [1.0]})
        with pytest.raises(ValueError, match="expected length 1 but got length 2"):
            ledger.add(visits([1]) | {"loss": [1.0, 2.0]})
        with pytest.raises(ValueError, match=r"without values.*loss"):
            ledger.add(visits([1]) | {"loss": None})
        ledger.flush()
        assert list((tmp_path / "pairs.parquet").iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text")
    assert path.read_bytes() == b"old"
