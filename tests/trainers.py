"""Trainers of the golden model on a few small groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from unidpo.data.pairs import PromptGroup
from unidpo.losses import PreferenceLoss, UniDPO
from unidpo.training.arguments import spelled_for_transformers
from unidpo.training.callbacks import Hooks, PairsCallback
from unidpo.training.metrics import Columns
from unidpo.training.trainer import PreferenceTrainer
from worlds import GOLDEN, group


def arguments(folder: Path, batch: tuple[int, int] = (2, 2), **more: Any) -> TrainingArguments:
    """Two steps on the CPU. `batch`: pairs in a micro-batch, micro-batches in a step."""
    plain = {
        "learning_rate": 1e-4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    sizes = dict(zip(("per_device_train_batch_size", "gradient_accumulation_steps"), batch, strict=True))
    return TrainingArguments(str(folder), **plain | sizes | more)


def some_groups(count: int = 4, *, images: Callable[[int], int] = lambda i: 1) -> list[PromptGroup]:
    return [group(images=images(i), responses=(3, 5), seed=i, row=i + 1) for i in range(count)]


class OnPairs(PairsCallback):
    """Calls a function with the pairs of each step."""

    def __init__(self, take: Callable[[Columns], None]) -> None:
        self._take = take

    def on_pairs(self, columns: Columns) -> None:
        self._take(columns)


def trainer_of(
    folder: Path,
    groups: Sequence[PromptGroup] | None = None,
    model: Any = GOLDEN / "model",
    loss: PreferenceLoss | None = None,
    *,
    batch: tuple[int, int] = (2, 2),
    on_pairs: Callable[[Columns], None] | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> PreferenceTrainer:
    """A trainer that writes to `folder`; keywords that `TrainingArguments` knows go there."""
    if on_pairs is not None:
        options["callbacks"] = [*options.get("callbacks", []), OnPairs(on_pairs)]
    if on_progress is not None:
        options["hooks"] = Hooks(on_progress=on_progress)
    options = spelled_for_transformers(options)
    known = TrainingArguments.__dataclass_fields__.keys() & options.keys()
    args = arguments(folder, batch, **{name: options.pop(name) for name in known})
    groups = some_groups() if groups is None else groups
    return PreferenceTrainer(model, loss=loss or UniDPO(), args=args, train_dataset=groups, **options)


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    torch.manual_seed(0)
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
