"""What `data.group_by_prompt` does to what is learned: accuracy on the digits with and without it, over several seeds.

    OMP_NUM_THREADS=1 python -m benchmarks.grouping

Trains the demo's base checkpoint with the demo's loss and optimizer on data in which every prompt has several pairs:
up to four of the model's own answers to a question, graded as in the demo, and a row for each pair of them. A seed
draws questions, answers, grading errors, the order of training and the held-out questions; the two ways to train
share all of it but the order. Adds a record to benchmarks/results/grouping.json and writes the measured part of
docs/grouping.md. What is finished lies in `--work`, and is not done again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers
from rich.console import Console

from benchmarks.records import RESULTS, add_record
from unidpo.config import load_recipe
from unidpo.data.formats import load_pairs, write_pairs
from unidpo.demo import CHECKPOINT
from unidpo.demo.answers import accuracies, greedy_answers, sampled_answers, write_ranked_data
from unidpo.demo.digits import load_world
from unidpo.demo.story import GRADING_NOISE
from unidpo.model.load import load_policy, load_processor
from unidpo.run.train import run
from unidpo.run_folder.folder import RunFolder

DOCUMENT = RESULTS.parents[1] / "docs" / "grouping.md"
MEASURED = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- end -->)", re.DOTALL)
ARMS = {"apart": "data.group_by_prompt=false", "grouped": "data.group_by_prompt=true"}
PROMPTS = 240
RESPONSES = 4
FEWEST_PAIRS = 3
# With fewer, less than half of the questions have so many pairs.
SAMPLES = 16
HELD_OUT = 1200
# Reading a number is what the base model is bad at, and where its answers differ.
KINDS = ("read",)
RECIPE = """
output: {folder}/{name}
model: {{name: {base}, dtype: float32, freeze: [vision, projector]}}
data: {{path: {folder}/pairs.jsonl}}
loss: {{name: uni_dpo, beta: 2.0, tau_good: 4.0}}
train:
  learning_rate: 2.0e-4
  global_batch_pairs: 32
  per_device_train_batch_size: 32
  num_train_epochs: 1
  logging_steps: 1
  save_strategy: "no"
"""
# Every step's gradient is that of the base model then.
STANDING_STILL = "train.learning_rate=0"
Record = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(20)))
    parser.add_argument("--work", type=Path, default=Path("runs/grouping"), help="folder of data and runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    packages = {name: version(name) for name in ("torch", "transformers", "unidpo")}
    seeds = measure(options.work, options.seeds)
    setting = {"prompts": PROMPTS, "responses": RESPONSES, "global_batch_pairs": 32, "held_out": HELD_OUT}
    add_record("grouping", packages=packages, threads=1, **setting, **summary(seeds), seeds=seeds)
    DOCUMENT.write_text(rendered(DOCUMENT.read_text("utf-8")), "utf-8")


def measure(work: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What each seed gives. The arms of a seed are run one after the other, so that both meet the same machine."""
    parts = {"base": measure_base, **{arm: partial(measure_arm, arm=arm) for arm in ARMS}}
    results = {(seed, part): work / f"seed-{seed}" / f"{part}.json" for seed in seeds for part in parts}
    todo = [key for key, path in results.items() if not path.exists()]
    start = time.perf_counter()
    for done, (seed, part) in enumerate(todo, start=1):
        path = results[seed, part]
        if not (path.parent / "pairs.jsonl").exists():
            make_data(path.parent, seed)
        result = parts[part](path.parent, seed)
        path.write_text(json.dumps(result))
        left = (len(todo) - done) * (time.perf_counter() - start) / done
        print(
            f"seed {seed}, {part}: {result['accuracy']:.1%}; {done} of {len(todo)}, {left / 60:.0f} min left",
            flush=True,
        )
    return [{"seed": seed, **{part: json.loads(results[seed, part].read_text()) for part in parts}} for seed in seeds]


def make_data(folder: Path, seed: int, *, prompts: int = PROMPTS) -> None:
    """Write `pairs.jsonl`: the rows of so many prompts, those of a prompt one after the other."""
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng([seed, 0])
    questions = load_world().questions(3 * prompts, split="train", rng=rng, kinds=KINDS)
    sampled = sampled_answers(load_policy(CHECKPOINT), load_processor(CHECKPOINT), questions, count=SAMPLES, seed=seed)
    answers = [list(dict.fromkeys(filter(None, texts)))[:RESPONSES] for texts in sampled]
    ranked = write_ranked_data(questions, answers, folder, noise=GRADING_NOISE, rng=rng)
    groups = [group for group in load_pairs(ranked) if len(group.pairs) >= FEWEST_PAIRS]
    if len(groups) < prompts:
        raise SystemExit(f"seed {seed}: only {len(groups)} of {len(questions)} questions have {FEWEST_PAIRS} pairs")
    write_pairs(groups[:prompts], folder / "pairs.jsonl", "alpaca")


def measure_base(folder: Path, seed: int) -> dict[str, Any]:
    """Of the model that training starts from: its accuracy, and the length of the gradient of all pairs together."""
    still = train(folder, "still", seed, ARMS["grouped"], STANDING_STILL, "train.global_batch_pairs=1000000")
    return {"accuracy": accuracy(CHECKPOINT, seed), "gradient_norm": norms(still)[0]}


def measure_arm(folder: Path, seed: int, *, arm: str) -> dict[str, Any]:
    """Accuracy after training, seconds of it, prompts per step, and how long the gradient of a step is at its start."""
    start = time.process_time()
    trained = train(folder, arm, seed, ARMS[arm])
    seconds = time.process_time() - start
    still = train(folder, "still", seed, ARMS[arm], STANDING_STILL)
    prompts = [len(prompts) for prompts in prompts_of_steps(folder / "pairs.jsonl", trained)[:-1]]
    return {
        "accuracy": accuracy(trained.model, seed),
        "cpu_seconds": round(seconds, 1),
        "steps": len(norms(trained)),
        "pairs": len(pq.read_table(trained.ledger)),
        "prompts_per_step": fmean(prompts),
        "mean_squared_gradient_norm": fmean(norm**2 for norm in norms(still)[:-1]),
    }


def train(folder: Path, name: str, seed: int, *overrides: str) -> RunFolder:
    """Train on a seed's pairs. No run finds a reference that another one has computed."""
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, name=name, base=CHECKPOINT))
    recipe = load_recipe(folder / "recipe.yaml", [*overrides, f"train.seed={seed}"])
    os.environ["UNIDPO_CACHE"] = str(folder / "cache")
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return RunFolder(run(recipe, console=Console(quiet=True)))


def accuracy(model: Path, seed: int) -> float:
    """The share of a seed's held-out numbers that is read right."""
    questions = load_world().questions(HELD_OUT, split="held_out", rng=np.random.default_rng([seed, 1]), kinds=KINDS)
    answers = greedy_answers(load_policy(model), load_processor(model), questions)
    return accuracies(questions, answers)["read"].accuracy


def norms(trained: RunFolder) -> list[float]:
    """The length of each step's gradient, before it is clipped."""
    records = map(json.loads, trained.metrics.read_text("utf-8").splitlines())
    return [record["grad_norm"] for record in records if "grad_norm" in record]


def prompts_of_steps(pairs: Path, trained: RunFolder) -> list[set[Path]]:
    """The pictures, of which each prompt has one of its own, whose pairs made up each step."""
    picture = {pair.row: group.images[0] for group in load_pairs(pairs) for pair in group.pairs}
    steps = defaultdict(set)
    for visit in pq.read_table(trained.ledger, columns=["step", "row"]).to_pylist():
        steps[visit["step"]].add(picture[visit["row"]])
    return [steps[step] for step in sorted(steps)]


def summary(seeds: Sequence[Record]) -> dict[str, Any]:
    """Mean and spread over the seeds.

    `gradient_noise` is the variance of a step's gradient, over the squared length of the gradient of all pairs; both
    with the weights that training starts from.
    """
    arms = {}
    for arm in ARMS:
        runs = [seed[arm] for seed in seeds]
        signal = [seed["base"]["gradient_norm"] ** 2 for seed in seeds]
        arms[arm] = {
            "accuracy": fmean(run["accuracy"] for run in runs),
            "standard_deviation": stdev(run["accuracy"] for run in runs),
            "prompts_per_step": fmean(run["prompts_per_step"] for run in runs),
            "gradient_noise": fmean(r["mean_squared_gradient_norm"] / s - 1 for r, s in zip(runs, signal, strict=True)),
            "cpu_seconds": fmean(run["cpu_seconds"] for run in runs),
        }
    differences = [seed["grouped"]["accuracy"] - seed["apart"]["accuracy"] for seed in seeds]
    difference = {"mean": fmean(differences), "standard_error": stdev(differences) / len(seeds) ** 0.5}
    return {"base_accuracy": fmean(seed["base"]["accuracy"] for seed in seeds), "arms": arms, "difference": difference}


def rendered(text: str) -> str:
    """The page with its measured part made anew from the last record."""
    record = json.loads((RESULTS / "grouping.json").read_text("utf-8"))[-1]
    return MEASURED.sub(lambda _: report(record) + "\n", text)


def report(record: Record) -> str:
    """A record as a sentence on where it was measured, a table, and what follows from it."""
    seeds, arms, difference = record["seeds"], record["arms"], record["difference"]
    packages = ", ".join(f"{name} {number}" for name, number in record["packages"].items())
    pairs = fmean(seed["grouped"]["pairs"] for seed in seeds)
    steps = fmean(seed["grouped"]["steps"] for seed in seeds)
    noise = arms["grouped"]["gradient_noise"] / arms["apart"]["gradient_noise"]
    shown = {
        "numbers read right": lambda arm: f"{arm['accuracy']:.1%}",
        "standard deviation over the seeds": lambda arm: f"{100 * arm['standard_deviation']:.1f} points",
        "different prompts in a global batch": lambda arm: f"{arm['prompts_per_step']:.1f}",
        "variance of a step's gradient ÷ squared length of the mean": lambda arm: f"{arm['gradient_noise']:.1f}",
        "CPU seconds of a run": lambda arm: f"{arm['cpu_seconds']:.1f}",
    }
    head = ["", *(f"`{override}`" for override in ARMS.values())]
    lines = [head, ["---"] * len(head), *([name, *map(show, arms.values())] for name, show in shown.items())]
    return "\n".join(
        [
            f"{record['date']}: {record['processor']}, {record['threads']} thread; {packages}; {len(seeds)} seeds, on "
            f"average {pairs:,.0f} pairs of {record['prompts']} prompts in {steps:.0f} steps. The base model reads "
            f"{record['base_accuracy']:.1%} right.\n",
            *(f"| {' | '.join(line)} |" for line in lines),
            f"\nAccuracy with grouping minus without, seed by seed: {100 * difference['mean']:+.2f} ± "
            f"{100 * difference['standard_error']:.2f} points (standard error). Grouping makes the variance of a "
            f"step's gradient {noise:.1f} times as large; pairs of a prompt that say all the same would make it "
            f"{pairs / record['prompts']:.1f} times as large, pairs that have nothing in common would leave it.",
        ]
    )


if __name__ == "__main__":
    main()
