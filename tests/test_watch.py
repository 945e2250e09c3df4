"""What a run tells TensorBoard and its like, on a machine without a network."""

import json
import os
import subprocess
import sys

import pytest

from test_train import metrics_of, rows_of, unidpo, write_recipe, write_rows


def small(folder):
    data = write_rows(folder, rows_of(6)) | {"eval_fraction": 0.3}
    return write_recipe(folder, data=data, train={"global_batch_pairs": 2}, loss={"name": "simpo"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what TensorBoard imports
def test_tensorboard_has_what_metrics_jsonl_has(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, printed = unidpo("train", small(tmp_path), "train.report_to=tensorboard")
    assert code == 0, printed
    assert "training, pairs: 4/4" in printed
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for record in metrics_of(tmp_path / "run"):
        for key, value in record.items():
            if key != "step":
                tag = (
                    f"eval/{key.removeprefix('eval_')}" if "eval_loss" in record and key != "epoch" else f"train/{key}"
                )
                seen = {event.step: event.value for event in events.Scalars(tag)}
                assert seen[record["step"]] == pytest.approx(value, rel=1e-6), tag


@pytest.mark.parametrize(
    ("package", "written"),
    [("wandb", "**/run-*.wandb"), ("swanlab", "run-*"), ("trackio", "*.db")],
)
def test_a_run_is_told_to_others_offline(tmp_path, package, written):
    pytest.importorskip(package)
    told = tmp_path / "told"
    told.mkdir()
    variables = {"WANDB_MODE": "offline", "WANDB_DIR": told, "SWANLAB_MODE": "offline", "SWANLAB_LOG_DIR": told}
    done = subprocess.run(
        [sys.executable, "-m", "unidpo", "train", str(small(tmp_path)), f"train.report_to={package}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {name: str(value) for name, value in (variables | {"TRACKIO_DIR": told}).items()},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "training, pairs: 4/4" in done.stderr
    assert [*told.glob(written)], f"{package} wrote nothing"


def test_the_best_evaluation_is_the_model_that_is_left(tmp_path):
    """The learning rate is so large that the first evaluation stays the best."""
    from safetensors.torch import load_file

    recipe = small(tmp_path)
    steps = ("eval_strategy=steps", "eval_steps=1", "save_strategy=steps", "save_steps=1", "save_total_limit=3")
    train = [f"train.{each}" for each in (*steps, "max_steps=3", "load_best_model_at_end=true", "learning_rate=1.0")]
    code, printed = unidpo("train", recipe, *train)
    assert code == 0, printed
    seen = {r["step"]: r["eval_loss"] for r in metrics_of(tmp_path / "run") if "eval_loss" in r}
    best = min(seen, key=seen.get)
    assert best != 3, seen
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_global_step"] == best
    left = load_file(tmp_path / "run" / "model" / "model.safetensors")
    kept = load_file(tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors")
    assert all((left[name] == kept[name]).all() for name in kept)
    assert f"those of step {best}" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["load_best_model_at_end=true", "metric_for_best_model=reward/accuracies"],
            "did you mean `rewards/accuracies`",
        ),
        (["load_best_model_at_end=true", "metric_for_best_model=logps/ref_chosen"], "there are loss, rewards/chosen"),
        (["save_strategy=best"], "metric_for_best_model"),
    ],
)
def test_a_best_model_by_something_that_is_not_measured(tmp_path, options, expected):
    every = ("save_strategy=epoch", *options)  # SimPO has no reference to measure
    code, printed = unidpo("train", small(tmp_path), *(f"train.{each}" for each in every))
    assert code == 2
    assert expected in printed
    assert not (tmp_path / "run").exists()


def test_every_key_an_evaluation_may_be_judged_by_is_measured(tmp_path):
    from unidpo.losses import SimPO
    from unidpo.training.metrics import held_out_keys

    code, printed = unidpo("train", small(tmp_path), "train.max_steps=1")
    assert code == 0, printed
    (record,) = (record for record in metrics_of(tmp_path / "run") if "eval_loss" in record)
    assert {key.removeprefix("eval_") for key in record if key.startswith("eval_")} == set(held_out_keys(SimPO()))
