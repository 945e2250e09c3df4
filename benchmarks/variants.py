"""The ways to train that are compared, each a function of a `Setting`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from benchmarks.loops import full_logits, selective, train_padded
from benchmarks.measure import Clock, First, Seconds, Taken, taken
from benchmarks.settings import BETA, Setting, training_arguments
from benchmarks.world import as_pairs, make_prompts
from unidpo.data.pairs import PromptGroup
from unidpo.losses import DPO
from unidpo.model.encode import CHATML
from unidpo.model.load import load_policy, load_processor
from unidpo.model.parts import freeze, keep_trainable_in_float32
from unidpo.training.callbacks import Hooks, PairsCallback
from unidpo.training.metrics import Columns
from unidpo.training.trainer import PreferenceTrainer


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to train.

    Attributes:
        layout: what is laid together: all pairs of a prompt, one pair, or every response with a prompt of its own.
        live: a reference model runs along.
        all_logits: of all positions, not of the responses alone.
        vision: images are seen in the step; else their features were stored.
    """

    title: str
    run: Callable[[Setting], Taken]
    layout: Literal["prompts", "pairs", "rows"]
    live: bool = True
    all_logits: bool = False
    vision: bool = True


def prompts_of(setting: Setting) -> list[PromptGroup]:
    """One step more than is trained, because loaders read ahead."""
    tokenizer = load_processor(setting.model).tokenizer
    return [
        prompt
        for step in range(setting.steps + 1)
        for prompt in make_prompts(
            tokenizer, setting.shape.lengths, setting.prompts, setting.work / "images", seed=setting.seed + step
        )
    ]


def pairs_of(setting: Setting) -> list[PromptGroup]:
    return as_pairs(prompts_of(setting), setting.per_prompt)


class _Rows(PairsCallback):
    """Keeps the pairs of each step."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def on_pairs(self, columns: Columns) -> None:
        self._rows.append(dict(columns))


def unidpo(
    setting: Setting, groups: Sequence[PromptGroup], *, reference: str, groups_per_pass: int, features: bool = False
) -> Taken:
    """The package's own trainer on these groups."""
    each = len(groups[0].pairs)
    pairs = each * len(groups) // (setting.steps + 1)
    clock = Clock(setting.watch)
    rows: list[dict[str, Any]] = []
    marks: dict[str, list[Seconds]] = {}  # by stage, so that what lies between the passes is not in them

    def mark(stage: str, done: int, total: int) -> None:
        if not stage.startswith("tokenizing"):
            marks.setdefault(stage, []).append(Seconds.now())

    trainer = PreferenceTrainer(
        load_policy(setting.model, dtype=setting.shape.dtype),
        loss=DPO(beta=BETA),
        args=TrainingArguments(
            **training_arguments(setting, pairs=pairs, pairs_per_pass=each * groups_per_pass),
        ),
        train_dataset=groups,
        processing_class=load_processor(setting.model),
        reference=reference,
        template="chatml",
        shuffle=False,
        cache=setting.work / "cache",
        cache_image_features=features,
        callbacks=[clock, _Rows(rows)],
        hooks=Hooks(on_progress=mark),
    )
    trainer.train()
    # Of each prompt the pairs that the other variants have, too.
    shared = [place for place in range(pairs) if place % each < setting.per_prompt]
    history = _history(trainer)
    first = First(
        loss=history[0]["loss"],
        grad_norm=history[0]["grad_norm"],
        chosen_logps=fmean(rows[0]["chosen_logps"][place] for place in shared),
        rejected_logps=fmean(rows[0]["rejected_logps"][place] for place in shared),
    )
    losses = [entry["loss"] for entry in history]
    spent = sum((of_stage[-1] - of_stage[0] for of_stage in marks.values()), Seconds(0, 0)) if marks else None
    return taken(clock, first, losses, pairs, reference=spent, reference_pairs=each * len(groups))


def trl(setting: Setting) -> Taken:
    """TRL's own trainer on the same token ids. It refuses a stored reference for images."""
    from datasets import Dataset, Features, Image, List, Value
    from trl import DPOConfig, DPOTrainer

    shape = setting.shape
    rows = [_trl_row(group) for group in pairs_of(setting)]
    says = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"images": List(Image()), "prompt": says, "chosen": says, "rejected": says})
    policy, reference = (load_policy(setting.model, dtype=shape.dtype) for _ in range(2))
    freeze(policy, ("vision", "projector"))
    if shape.dtype.itemsize == 2:
        keep_trainable_in_float32(policy)
    processor = load_processor(setting.model)
    processor.chat_template = CHATML
    clock = Clock(setting.watch)
    trainer = DPOTrainer(
        policy,
        ref_model=reference,
        args=DPOConfig(
            **training_arguments(setting, pairs=setting.pairs, pairs_per_pass=shape.pairs_per_pass),
            train_sampling_strategy="sequential",
            beta=BETA,
            max_length=None,  # its limit of 1,024 tokens would cut longer pairs
        ),
        train_dataset=Dataset.from_list(rows, features=features),
        processing_class=processor,
        callbacks=[clock],
    )
    trainer.train()
    history = _history(trainer)
    names = {"chosen_logps": "logps/chosen", "rejected_logps": "logps/rejected"}
    first = First(
        loss=history[0]["loss"],
        grad_norm=history[0]["grad_norm"],
        **{name: history[0][key] for name, key in names.items()},
    )
    return taken(clock, first, [entry["loss"] for entry in history], setting.pairs)


def _trl_row(group: PromptGroup) -> dict[str, Any]:
    (pair,), (message,) = group.pairs, group.messages
    text = "".join(part for part in message.content if isinstance(part, str))
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    return {
        "images": [str(image) for image in group.images],
        "prompt": [{"role": "user", "content": text}],
        **{n: [{"role": "assistant", "content": group.responses[i].text}] for n, i in answers.items()},
    }


def _history(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _packs(title: str, layout: Literal["prompts", "pairs"], *, live: bool = False, features: bool = False) -> Variant:
    groups_of = prompts_of if layout == "prompts" else pairs_of

    def run(setting: Setting) -> Taken:
        return unidpo(
            setting,
            groups_of(setting),
            reference="live" if live else "stored",
            groups_per_pass=setting.shape.pairs_per_pass,
            features=features,
        )

    return Variant(f"unidpo, {title}", run, layout, live=live, vision=not features)


VARIANTS = {
    "prompt packs": _packs("prompt packs, stored reference", "prompts"),
    "prompt packs, features": _packs("prompt packs, stored reference and image features", "prompts", features=True),
    "pair packs": _packs("pair packs, stored reference", "pairs"),
    "pair packs, features": _packs("pair packs, stored reference and image features", "pairs", features=True),
    "live": _packs("pair packs, live reference", "pairs", live=True),
    "selective": Variant("padded rows, logits of responses", lambda s: train_padded(s, pairs_of(s), selective), "rows"),
    "trl": Variant("TRL's DPOTrainer", trl, "rows", all_logits=not torch.cuda.is_available()),
    "loop": Variant(
        "padded rows, all logits, as LLaMA-Factory",
        lambda s: train_padded(s, pairs_of(s), full_logits),
        "rows",
        all_logits=True,
    ),
}


def run(name: str, setting: Setting) -> Taken:
    """Train as the variant does."""
    setting.work.mkdir(parents=True, exist_ok=True)
    return VARIANTS[name].run(setting)
