"""Benchmarks during training."""

import json

import pytest
import torch

from exams import write
from unidpo.config import load_recipe
from unidpo.errors import RecipeError, UserError
from unidpo.run.train import run


@pytest.fixture
def recipe(golden, tmp_path):
    """Twelve steps, with a benchmark that a random model fails."""
    image = golden / "data" / "images" / "golden48_000.png"
    rows = [{"index": i, "question": f"What is {i}?", "answer": str(i), "image": str(image)} for i in range(6)]
    mine = write(tmp_path / "exam", rows, max_new_tokens=3)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output: {tmp_path}/run\n"
        f"model: {{name: {golden}/model, dtype: float32}}\n"
        f"data: {{path: {golden}/data/golden48.json, template: chatml}}\n"
        f"train: {{learning_rate: 1.0e-3, global_batch_pairs: 12, save_steps: 2}}\n"
        f"eval: {{benchmarks: [{mine}], steps: 2, limit: 4}}\n"
    )
    return path


def records(run_folder):
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def test_the_metric_is_logged_every_so_many_steps(recipe, tmp_path):
    folder = run(load_recipe(recipe))
    seen = [(record["step"], record["eval_mine"]) for record in records(folder) if "eval_mine" in record]
    assert [step for step, _ in seen] == [2, 4]
    for step, value in seen:
        results = json.loads((folder / "benchmarks" / f"step-{step}" / "mine" / "results.json").read_text())
        assert results["value"] == value
        assert results["counts"]["questions"] == 4


def test_it_changes_no_step(recipe, tmp_path):
    with_benchmark = run(load_recipe(recipe))
    without = run(load_recipe(recipe, ["eval=null", f"output={tmp_path}/other"]))
    losses = [
        [record["loss"] for record in records(folder) if "loss" in record] for folder in (with_benchmark, without)
    ]
    assert losses[0] == losses[1]


def test_it_chooses_the_checkpoint(recipe, tmp_path, monkeypatch):
    from unidpo.run.benchmarks import TrainingBenchmarks

    values = {2: 0.9, 4: 0.1}
    monkeypatch.setattr(TrainingBenchmarks, "run", lambda self, model, processor, step: {"mine": values[step]})
    best = ["train.load_best_model_at_end=true", "train.metric_for_best_model=mine", "train.greater_is_better=true"]
    best += ["train.save_total_limit=null", "train.eval_strategy=steps", "train.eval_steps=2"]
    folder = run(load_recipe(recipe, best))
    from safetensors.torch import load_file

    final = load_file(folder / "model" / "model.safetensors")
    second = load_file(folder / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(final[name], second[name]) for name in second)


def test_a_wrong_benchmark_stops_before_anything_is_read(recipe, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        run(load_recipe(recipe, [f"eval.benchmarks=[{tmp_path}/nowhere.yaml]"]))
    assert not (tmp_path / "run").exists()


def test_a_metric_that_no_benchmark_has(recipe):
    with pytest.raises(RecipeError, match="mine"):
        run(load_recipe(recipe, ["train.metric_for_best_model=yours"]))


def test_the_section_needs_benchmarks(recipe):
    with pytest.raises(RecipeError, match=r"eval\.benchmarks"):
        load_recipe(recipe, ["eval.benchmarks=[]"])
