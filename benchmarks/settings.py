"""What all variants share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shapes import Shape

BETA = 0.1
# Large enough that the second step's loss shows what the first one learned.
LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Setting:
    """One run of a variant.

    Attributes:
        model: folder.
        work: folder for images and whatever else a run leaves.
        pairs: in an optimizer step of the variants that lay pairs.
        prompts: in an optimizer step of those that lay prompts, from which the pairs are taken.
        steps: the first warms up and is compared, the others are measured.
        seed: of the data.
        watch: entered for the passes of the second step, as a profiler is.
    """

    shape: Shape
    model: Path
    work: Path
    pairs: int
    prompts: int
    steps: int
    seed: int = 0
    watch: AbstractContextManager[Any] | None = None

    @property
    def per_prompt(self) -> int:
        """Pairs that are taken of each prompt."""
        return self.pairs // self.prompts


def training_arguments(setting: Setting, *, pairs: int, pairs_per_pass: int) -> dict[str, Any]:
    """Keywords of `TrainingArguments` for a step of so many pairs."""
    shape = setting.shape
    return {
        "output_dir": str(setting.work / "run"),
        "per_device_train_batch_size": min(pairs, pairs_per_pass),
        "gradient_accumulation_steps": max(1, pairs // pairs_per_pass),
        "max_steps": setting.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "optim": "adamw_torch_fused",
        "bf16": shape.dtype.itemsize == 2,
        "gradient_checkpointing": shape.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": shape.device == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
