"""How near `unidpo plan` is to what a step really takes: floating-point work counted, peak memory measured, on a CPU.

    python -m benchmarks.plan

The model of the CPU benchmark (about 110 million parameters, random) in a few settings, each planned and then trained
for an epoch of two steps in a process of its own. Adds a record to benchmarks/results/plan.json.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import TrainingArguments

from benchmarks.records import add_record
from benchmarks.shapes import SHAPES, save_model
from benchmarks.world import as_pairs, make_prompts
from unidpo.config import load_recipe
from unidpo.data.formats import load_pairs
from unidpo.data.pairs import IMAGE, PromptGroup
from unidpo.model.load import load_policy, load_processor
from unidpo.plan import plan_recipe
from unidpo.training.trainer import PreferenceTrainer

SHAPE = SHAPES["cpu"]
PAIRS = ["train.global_batch_pairs=1"]
PROMPTS = [
    "data.path={folder}/prompts.json",
    "data.group_by_prompt=true",
    "train.per_device_train_batch_size=6",
    "train.global_batch_pairs=6",
]
SETTINGS = {
    "pair packs": PAIRS,
    "pair packs, checkpointing": [*PAIRS, "train.gradient_checkpointing=true"],
    "prompt packs": PROMPTS,
    "prompt packs, features on disk": [*PROMPTS, "data.cache_image_features=true"],
}
RECIPE = """
output: {folder}/run
model: {{name: {folder}/model, dtype: float32}}
data: {{path: {folder}/pairs.json, shuffle: false}}
loss: {{name: simpo}}
"""
# What torch does not count by itself: products that are added in place, and the attention kernel of the CPU.
UNCOUNTED = {
    torch.ops.aten.addmm_: lambda own, left, right, **_: 2 * math.prod(left) * right[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: (
        sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, out_shape=None, **__: (
        sdpa_backward_flop_count(g, q, k, v)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the record and add it to no file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        in_own_process(save_model, SHAPE, folder / "model")
        write_data(folder)
        (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
        runs = {}
        for name, overrides in SETTINGS.items():
            runs[name] = compare(folder, [override.format(folder=folder) for override in overrides])
            ratios = (f"{what} {values['planned'] / values['measured']:.2f}" for what, values in runs[name].items())
            print(f"{name:32}", *ratios, flush=True)
    if options.dry_run:
        print(json.dumps(runs, indent=2))
    else:
        add_record("plan", torch=torch.__version__, transformers=transformers.__version__, runs=runs)


def write_data(folder: Path) -> None:
    tokenizer = load_processor(folder / "model").tokenizer
    prompts = make_prompts(tokenizer, SHAPE.lengths, 2, folder / "images", seed=0)
    for name, groups in (("prompts", prompts), ("pairs", as_pairs(prompts, per_prompt=1))):
        (folder / f"{name}.json").write_text(json.dumps([row_of(group) for group in groups]))


def row_of(prompt: PromptGroup) -> dict[str, Any]:
    text = "".join("<image>" if part is IMAGE else part for part in prompt.messages[0].content)
    responses = [{"text": response.text, "score": response.score} for response in prompt.responses]
    return {"prompt": text, "images": [str(image) for image in prompt.images], "responses": responses}


def compare(folder: Path, overrides: Sequence[str]) -> dict[str, dict[str, float]]:
    recipe = load_recipe(folder / "recipe.yaml", overrides)
    plan = plan_recipe(recipe, console=Console(quiet=True))
    measured = in_own_process(measure, recipe)
    # The process has more than the model: `resident` before it was loaded is taken off what was measured.
    planned = {
        "work": plan.epoch_work.total,
        "held": plan.memory.weights + plan.memory.optimizer,
        "peak": plan.memory.total - plan.memory.margin,
    }
    return {what: {"planned": planned[what], "measured": measured[what]} for what in planned}


def measure(recipe: Any) -> dict[str, float]:
    before = resident()
    ours = ("per_device_train_batch_size", "gradient_checkpointing")
    given = {name: value for name, value in recipe.train.given().items() if name in ours}
    trainer = Measured(
        load_policy(recipe.model.name),
        loss=recipe.loss,
        args=TrainingArguments(
            str(recipe.output),
            num_train_epochs=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **given,
        ),
        train_dataset=load_pairs(recipe.data.path, group_by_prompt=recipe.data.group_by_prompt),
        processing_class=load_processor(recipe.model.name),
        global_batch_pairs=recipe.train.global_batch_pairs,
        attention=recipe.model.attention,
        cache_image_features=recipe.data.cache_image_features,
        cache=Path(recipe.output) / "cache",
        shuffle=False,
    )
    trainer.train()
    states = trainer.optimizer.state.values()
    held = [*trainer.model.parameters(), *(t for s in states for t in s.values())]
    return {
        "work": trainer.work,
        "held": sum(tensor.nbytes for tensor in held),
        "peak": peak() - before,
    }


def resident() -> int:
    """Bytes this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """The most bytes this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


class Measured(PreferenceTrainer):
    """Counts what the passes of its steps compute."""

    work = 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.work += counter.get_total_flops()
        return loss


if __name__ == "__main__":
    main()
