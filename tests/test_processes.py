"""Several processes make the steps that one makes, though some batches have no image and ranks unequal work."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForImageTextToText

from forked import Forked, environment
from unidpo.run.launch import free_port

pytest.importorskip("deepspeed")
ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
ZERO_3 = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,  # else it leaves weights as small as these whole
    "stage3_gather_16bit_weights_on_model_save": True,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, golden):
    """The golden pairs, every third without its image, and settings of DeepSpeed."""
    folder = tmp_path_factory.mktemp("processes")
    rows = json.loads((golden / "data" / "golden48.json").read_text())
    for number, row in enumerate(rows):
        row["images"] = [str(golden / "data" / image) for image in row["images"]]
        if number % 3 == 1:
            row |= {"images": [], "instruction": row["instruction"].replace("<image>", "")}
    (folder / "mixed.json").write_text(json.dumps(rows))
    for name, stage in {"zero2": {"stage": 2}, "zero3": ZERO_3}.items():
        (folder / f"{name}.json").write_text(json.dumps(ZERO | {"zero_optimization": stage}))
    (folder / "recipe.yaml").write_text(
        f"output: {folder}/one\n"
        f"model: {{name: {golden}/model, dtype: float32}}\n"
        f"data: {{path: {folder}/mixed.json, template: chatml, shuffle: false}}\n"
        # Five pairs a step, so that two processes never have equal work.
        "train: {learning_rate: 1.0e-3, global_batch_pairs: 5, save_strategy: 'no', max_steps: 6}\n"
    )
    return folder


@pytest.fixture(scope="module")
def forked(world):
    runs = Forked()
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def one(world, forked):
    """The steps of one process."""
    assert forked.run("train", world / "recipe.yaml", log=world / "one.log", env=cache(world)) == [0], log(world, "one")
    return steps(world / "one")


def cache(world):
    return {"UNIDPO_CACHE": str(world / "cache")}


def log(world, name):
    return "\n".join(path.read_text() for path in sorted(world.glob(f"{name}.log.*")))


def steps(run):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "grad_norm" in record]


def assert_same_steps(ours, one):
    assert [record["step"] for record in ours] == [record["step"] for record in one]
    for ours_at, one_at in zip(ours, one, strict=True):
        for key in set(one_at) - {"grad_norm"}:
            assert ours_at[key] == pytest.approx(one_at[key], abs=1e-4), key
        assert ours_at["grad_norm"] == pytest.approx(one_at["grad_norm"], rel=1e-3)


def assert_whole_ledger(run):
    ledger = pq.read_table(run / "pairs.parquet").to_pydict()
    assert sorted(zip(ledger["step"], ledger["row"], strict=True)) == [(i // 5 + 1, i + 1) for i in range(30)]


WAYS = {
    "ddp": [],
    "ddp, vision learns": ["model.freeze=none"],
    "fsdp2": ["train.fsdp=true"],
    "zero2": ["train.deepspeed={world}/zero2.json"],
    "zero3": ["train.deepspeed={world}/zero3.json"],
    "zero3, features from disk": ["train.deepspeed={world}/zero3.json", "data.cache_image_features=true"],
    "zero3, padded": ["train.deepspeed={world}/zero3.json", "model.attention=padded"],
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_make_the_steps_of_one(world, forked, one, way):
    name = way.replace(", ", "-").replace(" ", "-")
    overrides = [f"output={world / name}", *(override.format(world=world) for override in WAYS[way])]
    env = cache(world) | ({"FSDP_ON_A_CPU": "1"} if way.startswith("fsdp2") else {})
    codes = forked.run("train", world / "recipe.yaml", *overrides, log=world / f"{name}.log", ranks=2, env=env)
    assert codes == [0, 0], log(world, name)
    if "model.freeze=none" in overrides:
        own = [f"output={world}/one-{name}", "model.freeze=none"]
        assert forked.run("train", world / "recipe.yaml", *own, log=world / f"one-{name}.log", env=cache(world)) == [0]
        one = steps(world / f"one-{name}")
    assert_same_steps(steps(world / name), one)
    assert_whole_ledger(world / name)
    AutoModelForImageTextToText.from_pretrained(world / name / "model")


def test_the_reference_is_computed_in_shares_and_written_once(world, forked, one):
    env = {"UNIDPO_CACHE": str(world / "cache-two")}
    overrides = [f"output={world}/shares", "train.max_steps=1"]
    codes = forked.run("train", world / "recipe.yaml", *overrides, log=world / "shares.log", ranks=2, env=env)
    assert codes == [0, 0], log(world, "shares")
    assert "0 responses found" in log(world, "shares")
    shared, alone = (
        {
            row["key"]: row["logp"]
            for part in sorted((world / name / "reference").rglob("*.parquet"))
            for row in pq.read_table(part).to_pylist()
        }
        for name in ("cache-two", "cache")
    )
    parts = [pq.read_table(part).num_rows for part in (world / "cache-two" / "reference").rglob("*.parquet")]
    assert sum(parts) == len(shared)
    assert shared == pytest.approx(alone, abs=1e-4)


def test_processes_go_on_from_a_checkpoint(world, forked, one):
    run = ["train", world / "recipe.yaml", f"output={world}/resumed", "train.save_strategy=steps", "train.save_steps=2"]
    pids = forked.start(*run, log=world / "resumed.log", ranks=2, env=cache(world))
    while not (world / "resumed" / "checkpoint-2").is_dir():
        pass
    os.kill(pids[1], signal.SIGTERM)  # one is told, all stop
    codes = forked.wait(pids)
    if codes != [0, 0]:  # else it was told too late
        assert codes == [143, 143], log(world, "resumed")
        assert "resume with" in log(world, "resumed")
        codes = forked.run(*run, "--resume", log=world / "resumed.log", ranks=2, env=cache(world))
        assert codes == [0, 0], log(world, "resumed")
    assert_same_steps(steps(world / "resumed"), one)
    assert_whole_ledger(world / "resumed")


def unidpo(world, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "unidpo", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment() | cache(world),
        timeout=300,
        check=False,
    )


def test_one_command_starts_the_processes(world, one):
    done = unidpo(world, "train", world / "recipe.yaml", f"output={world}/nproc", "train.max_steps=6", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert_same_steps(steps(world / "nproc"), one)
    assert done.stderr.count("finished:") == 1


def test_what_is_wrong_is_said_once(world):
    (world / "broken").mkdir()
    (world / "broken" / "config.json").write_text("{")
    overrides = (f"output={world}/bad", f"model.name={world}/broken")
    failed = unidpo(world, "train", world / "recipe.yaml", *overrides, "--nproc", 2)
    assert failed.returncode == 2
    assert len(re.findall("broken: cannot load", failed.stderr)) == 1
    assert "Traceback" not in failed.stderr


def test_a_process_that_is_killed_ends_all_in_a_message(world, one):
    run = world / "one-killed"
    overrides = [f"output={run}", "train.save_strategy=steps", "train.save_steps=1", "train.max_steps=200"]
    command = [sys.executable, "-m", "unidpo", "train", str(world / "recipe.yaml"), *overrides, "--nproc", "2"]
    with (world / "one-killed.log").open("w") as output:
        launcher = subprocess.Popen(command, stderr=output, env=environment() | cache(world))
        while not (run / "checkpoint-2").is_dir():
            time.sleep(0.01)
        children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True)
        os.kill(int(children.stdout.split()[1]), signal.SIGKILL)
        assert launcher.wait(timeout=60) == 1
    said = (world / "one-killed.log").read_text()
    assert "process 1 was ended by SIGKILL" in said
    assert "resume from the last checkpoint with: unidpo train" in said
    assert "Traceback" not in said
    assert "internal error" not in said


def start_node(world, port, *more):
    """A launcher with one process, as on each of two machines."""
    launcher = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--local-addr", "127.0.0.1"]
    command = [*launcher, "--rdzv-endpoint", f"127.0.0.1:{port}", "-m", "unidpo", "train", str(world / "recipe.yaml")]
    overrides = [f"output={world}/nodes", "train.max_steps=12", "train.save_strategy=steps", "train.save_steps=1"]
    with (world / "nodes.log").open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *command, *overrides, *more],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment() | cache(world),
        )


def test_one_of_two_machines_is_lost_and_both_start_again(world, forked):
    """torchrun's rendezvous on the loopback. A machine that is lost takes its launcher and its process along."""
    alone = ["train", world / "recipe.yaml", f"output={world}/long", "train.max_steps=12"]
    assert forked.run(*alone, log=world / "long.log", env=cache(world)) == [0], log(world, "long")
    port = free_port()
    nodes = [start_node(world, port) for _ in range(2)]
    while not (world / "nodes" / "checkpoint-2").is_dir():
        assert [node.poll() for node in nodes] == [None, None], (world / "nodes.log").read_text()
        time.sleep(0.01)
    for process in [*psutil.Process(nodes[1].pid).children(recursive=True), nodes[1]]:
        process.kill()
    assert nodes[0].wait(timeout=60) != 0
    nodes[1].wait()
    said = (world / "nodes.log").read_text()
    assert "another process of this training is gone" in said
    assert not (world / "nodes" / "model").exists()
    port = free_port()
    nodes = [start_node(world, port, "--resume") for _ in range(2)]
    assert [node.wait(timeout=120) for node in nodes] == [0, 0], (world / "nodes.log").read_text()
    assert_same_steps(steps(world / "nodes"), steps(world / "long"))
