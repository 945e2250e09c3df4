"""One process at a time in a folder, through the real commands; and children end with their parent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import filelock
import pandas
import pytest
from typer.testing import CliRunner

from exams import exam, run_eval
from test_train import rows_of, unidpo, write_recipe, write_rows
from unidpo import cli
from unidpo.data.mm_rlhf import FetchPlan
from unidpo.data.mm_rlhf.hubs import HuggingFaceHub
from unidpo.errors import FolderInUse
from unidpo.files.locks import locked
from unidpo.training.record import RunRecord
from worlds import GOLDEN

TINY = Path(__file__).parent.parent / "recipes" / "tiny.yaml"
ME = f"process {os.getpid()} on "


def test_a_start_beside_a_live_run_is_refused_and_does_the_run_no_harm(tmp_path):
    train = {"global_batch_pairs": 2, "save_steps": 1}
    recipe = write_recipe(tmp_path, data=write_rows(tmp_path, rows_of(8)), train=train)
    on_pairs, others = RunRecord.on_pairs, []

    def meanwhile(self, columns):
        on_pairs(self, columns)
        if columns["step"][0] == 3:
            others.extend([unidpo("train", recipe), unidpo("train", recipe, "--resume")])

    with mock.patch.object(RunRecord, "on_pairs", meanwhile):
        code, printed = unidpo("train", recipe)
    assert code == 0, printed
    for code, printed in others:
        assert code == 2
        assert f"{tmp_path / 'run'}: {ME}" in printed
        assert "is at work in this folder; wait for its end or stop it" in printed
    assert len(others) == 2
    assert pandas.read_parquet(tmp_path / "run" / "pairs.parquet")["row"].tolist() == [*range(1, 9)]
    assert not list((tmp_path / "run").glob(".*"))


def test_a_killed_sweep_takes_its_run_along_and_the_folder_is_free(tmp_path):
    sweep, run = tmp_path / "sweep.yaml", tmp_path / "out" / "tiny"
    sweep.write_text(
        f"output: {tmp_path}/out\n"
        f"overrides: {{data.path: {GOLDEN}/data/golden48.json, model.name: {GOLDEN}/model}}\n"
        f"methods: [{{recipe: {TINY}, name: tiny}}]\n"
    )
    command = [sys.executable, "-m", "unidpo", "train", "--sweep", str(sweep)]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert _soon(lambda: (run / ".lock.json").exists())
        child = json.loads((run / ".lock.json").read_text())["process"]
        assert child != parent.pid
        code, printed = unidpo("train", "--sweep", sweep)
        assert code == 1
        assert "1 of 1 runs failed: tiny" in printed
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert _soon(lambda: not Path(f"/proc/{child}").exists())
    with locked(run):
        pass


def _soon(happens, seconds=60):
    end = time.monotonic() + seconds
    while not happens() and time.monotonic() < end:
        time.sleep(0.05)
    return happens()


def test_a_second_fetch_into_a_folder_is_refused(tmp_path, monkeypatch):
    plan = FetchPlan("me/data", HuggingFaceHub(None), tmp_path / "data", (), free=1 << 40)
    monkeypatch.setattr("unidpo.data.mm_rlhf.plan_fetch", lambda *_, **__: plan)
    command = ["data", "fetch", "mm-rlhf", "--to", str(plan.to)]
    with locked(plan.to):
        done = CliRunner().invoke(cli.app, command)
    assert isinstance(done.exception, FolderInUse)
    assert done.exception.exit_code == 2
    assert f"{plan.to}: {ME}" in str(done.exception)
    assert CliRunner().invoke(cli.app, command).exit_code == 0


def test_a_second_evaluation_into_a_folder_is_refused(tmp_path):
    command = ["x", "--benchmarks", exam(tmp_path / "exam"), "--out", tmp_path / "out"]
    with locked(tmp_path / "out"):
        done = run_eval(*command)
    assert isinstance(done.exception, FolderInUse)
    assert f"{tmp_path / 'out'}: {ME}" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_what_a_killed_process_left_locks_nobody_out(tmp_path):
    code = (
        "import os, pathlib, signal, sys, unidpo.files.locks\n"
        "with unidpo.files.locks.locked(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / ".lock.json").exists()
    recipe = write_recipe(tmp_path, output=str(tmp_path / "run"), data={"path": str(tmp_path / "gone.json")})
    (tmp_path / "run").mkdir()
    for name in (".lock", ".lock.json"):
        (tmp_path / name).rename(tmp_path / "run" / name)
    _, printed = unidpo("train", recipe)
    assert "gone.json" in printed
    assert "at work" not in printed
    assert "no run" not in printed


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def no_locks(self):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", no_locks)
    with locked(tmp_path):
        assert "knows no locks" in caplog.text
        assert f"{tmp_path}" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_stands_for_a_lock_says_how_to_be_rid_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("unidpo.files.locks.FileLock", filelock.SoftFileLock)
    with (
        locked(tmp_path),
        pytest.raises(FolderInUse, match=r"or delete .*/\.lock if that process is gone"),
        locked(tmp_path),
    ):
        pass
