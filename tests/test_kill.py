"""A run that is killed at any moment goes on, and ends where it would have ended."""

import hashlib
import os
import random
import signal
import time

import pyarrow.parquet as pq
import pytest

from forked import Forked

pytest.importorskip("deepspeed")  # which the forking process imports
KILLS = 10
STEPS = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory, golden):
    folder = tmp_path_factory.mktemp("kill")
    (folder / "recipe.yaml").write_text(
        f"output: {folder}/whole\n"
        f"model: {{name: {golden}/model, dtype: float32}}\n"
        f"data: {{path: {golden}/data/golden48.json, template: chatml}}\n"
        f"train: {{learning_rate: 1.0e-3, global_batch_pairs: 6, save_steps: 1, max_steps: {STEPS}}}\n"
    )
    return folder


@pytest.fixture(scope="module")
def forked(world):
    runs = Forked()
    yield runs
    runs.close()


def state(run):
    """Everything a run leaves that must not depend on whether it was killed."""
    weights = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    ledger = pq.read_table(run / "pairs.parquet").to_pylist()
    return weights, sorted(ledger, key=lambda row: (row["step"], row["row"])), (run / "metrics.jsonl").read_text()


def steps_of(metrics):
    return [line for line in metrics.splitlines() if "grad_norm" in line]


def leftovers(*folders):
    """Files that are written to be renamed."""
    return [path for folder in folders for path in folder.rglob(".*")]


def wait_for(appears, seconds=60):
    end = time.monotonic() + seconds
    while not appears() and time.monotonic() < end:
        time.sleep(0.001)


def text(log):
    path = log.with_name(f"{log.name}.0")
    return path.read_text() if path.exists() else ""


def taken_over(run, before):
    """Whether a start has made the run folder its own, which it does before it reads the data."""
    lock = run / ".lock.json"
    return lock.exists() and lock.stat().st_mtime_ns != before


def test_kill_and_resume(world, forked):
    own_cache = {"UNIDPO_CACHE": str(world / "cache")}  # numbers of another version may differ in rounding
    codes = forked.run("train", world / "recipe.yaml", log=world / "whole.log", env=own_cache)
    assert codes == [0], text(world / "whole.log")
    whole_weights, whole_ledger, whole_metrics = state(world / "whole")
    chance = random.Random(1)
    # After the folder is taken over, in seconds: the first ones fall into the reference pass, then steps; and
    # checkpoints at work.
    moments = [*[lambda: chance.uniform(0.1, 0.7)] * 3, *["checkpoint"] * 3, *[lambda: chance.uniform(0.1, 1.5)] * 4]
    assert len(moments) == KILLS
    number = 0
    while moments:  # a run that comes to its end gives way to the next
        run, log = world / f"killed-{number}", world / f"killed-{number}.log"
        command = ["train", world / "recipe.yaml", f"output={run}"]
        env = {"UNIDPO_CACHE": str(world / f"cache-{number}")}
        while not (run / "model").is_dir():
            resume = ["--resume"] if (run / "config.json").is_file() else []
            before = (run / ".lock.json").stat().st_mtime_ns if resume else 0
            (pid,) = forked.start(*command, *resume, log=log, env=env)
            if moments:
                wait_for(lambda run=run, before=before: taken_over(run, before))
                if moments[0] == "checkpoint":
                    wait_for(lambda run=run: (run / ".checkpoint-unfinished").exists() or (run / "model").exists())
                else:
                    time.sleep(moments[0]())
                os.kill(pid, signal.SIGKILL)
            (code,) = forked.wait([pid])
            assert code in (0, -signal.SIGKILL), text(log)
            if code != 0:
                moments.pop(0)
        weights, ledger, metrics = state(run)
        assert weights == whole_weights
        assert ledger == whole_ledger
        assert steps_of(metrics) == steps_of(whole_metrics)
        assert leftovers(run, world / f"cache-{number}") == []
        number += 1
