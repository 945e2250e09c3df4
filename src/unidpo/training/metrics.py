"""What is measured on the pairs of a step: the rows of the ledger, and the means that are logged."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from torch import Tensor

from unidpo.errors import Finding, TrainingError, from_findings
from unidpo.losses import LossTerms, PairLogps, PreferenceLoss
from unidpo.model.batches import Batch

Columns: TypeAlias = Mapping[str, Sequence[Any]]
"""Plain numbers (or `None` where a loss has no such value) by name, one entry per pair."""

LOGGED: Mapping[str, str] = {
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "logps/chosen": "chosen_logps",
    "logps/rejected": "rejected_logps",
    "logps/ref_chosen": "ref_chosen_logps",
    "logps/ref_rejected": "ref_rejected_logps",
    "weights/quality": "quality_weight",
    "weights/performance": "performance_weight",
    "nll/gate_rate": "nll_gate",
    "nll/loss": "nll",
    "preference/loss": "preference",
}
"""Logged key, as TRL names it where TRL has it → column of the ledger it is the mean of."""


def held_out_keys(loss: PreferenceLoss) -> list[str]:
    """What an evaluation measures, without the `eval_` before it."""
    logged = [key for key in LOGGED if loss.needs_reference or not key.startswith("logps/ref_")]
    return ["loss", *logged, "rewards/margins", "rewards/accuracies"]


def pair_columns(batch: Batch, pairs: PairLogps, terms: LossTerms) -> dict[str, list[Any]]:
    """The pairs of a batch as columns of plain numbers, one entry per pair: the rows of the ledger."""
    index, tokens = batch.pairs, batch.responses.response_tokens
    columns: dict[str, Tensor | None] = {
        "row": index.rows,
        "chosen": index.source_chosen,
        "rejected": index.source_rejected,
        "chosen_score": index.chosen_scores,
        "rejected_score": index.rejected_scores,
        "chosen_logps": pairs.chosen_logps,
        "rejected_logps": pairs.rejected_logps,
        "ref_chosen_logps": pairs.ref_chosen_logps,
        "ref_rejected_logps": pairs.ref_rejected_logps,
        "chosen_tokens": tokens[index.chosen],
        "rejected_tokens": tokens[index.rejected],
        **{field.name: getattr(terms, field.name) for field in fields(terms)},
    }
    count = len(index.rows)
    numbers = {n: [None] * count if c is None else c.detach().tolist() for n, c in columns.items()}
    return {"file": list(index.files)} | numbers


def extend(columns: dict[str, list[Any]], more: Columns) -> None:
    """Add the pairs of other columns behind those of `columns`."""
    for name, values in more.items():
        columns.setdefault(name, []).extend(values)


def joined(parts: Iterable[Columns]) -> dict[str, list[Any]]:
    """The columns of several processes as one; empty where no process has a pair."""
    together: dict[str, list[Any]] = {}
    for part in parts:
        extend(together, part)
    return together if together and together["row"] else {}


def require_finite(columns: Columns) -> None:
    """Raise `TrainingError`, which names the pairs, where a loss is no finite number."""
    pairs = zip(columns["loss"], columns["file"], columns["row"], strict=True)
    findings = [
        Finding("loss-not-finite", f"the loss of this pair is {loss}", file, row)
        for loss, file, row in pairs
        if not math.isfinite(loss)
    ]
    if findings:
        raise from_findings(
            TrainingError,
            "the loss is not a finite number; where it was one before, a smaller train.learning_rate helps most often, "
            "else the model gives such numbers: look at its weights, or set model.dtype=bfloat16 or float32",
            findings,
        )


class Means:
    """Running means over pairs, by logged key."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._pairs = 0

    def add(self, columns: Columns) -> None:
        """Take in the pairs of some columns, see `pair_columns`."""
        for key, name in LOGGED.items():
            if columns[name][0] is not None:
                self._sums[key] += sum(columns[name])
        rewards = list(zip(columns["chosen_reward"], columns["rejected_reward"], strict=True))
        self._sums["rewards/margins"] += sum(chosen - rejected for chosen, rejected in rewards)
        self._sums["rewards/accuracies"] += sum(chosen > rejected for chosen, rejected in rewards)
        self._pairs += len(rewards)

    def take(self) -> dict[str, float]:
        """The means since the last call; empty where no pair came in."""
        means = {key: total / self._pairs for key, total in self._sums.items()}
        self._sums.clear()
        self._pairs = 0
        return means


@dataclass
class RewardShift:
    """The mean implicit reward of all responses of all pairs seen so far, which some losses measure rewards from."""

    total: float = 0.0
    responses: int = 0

    def add(self, columns: Columns) -> None:
        """Take in the pairs of a step, see `pair_columns`."""
        self.total += sum(columns["chosen_reward"]) + sum(columns["rejected_reward"])
        self.responses += 2 * len(columns["chosen_reward"])

    @property
    def value(self) -> float:
        """0 before the first pair."""
        return self.total / self.responses if self.responses else 0.0
