"""What is measured on the pairs of a step: the rows of the ledger, and the means that are logged."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
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


_LOGPS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


class PairColumns:
    """The pairs of some batches as columns of plain numbers, one entry per pair: the rows of the ledger.

    What is computed stays on its device until it is asked for, all of it by one copy: to wait for a number within a
    step leaves the device without work.
    """

    def __init__(self) -> None:
        self._known: list[Columns] = []
        self._names: list[str] = []
        self._computed: list[Tensor] = []

    def add(self, batch: Batch, pairs: PairLogps, terms: LossTerms) -> None:
        """Add the pairs of a batch.

        Args:
            batch: as it lies on the host.
        """
        index, tokens = batch.pairs, batch.responses.response_tokens
        self._known.append(
            {
                "file": index.files,
                "row": index.rows,
                "chosen": index.source_chosen,
                "rejected": index.source_rejected,
                "chosen_score": index.chosen_scores.tolist(),
                "rejected_score": index.rejected_scores.tolist(),
                "chosen_tokens": tokens[index.chosen].tolist(),
                "rejected_tokens": tokens[index.rejected].tolist(),
            }
        )
        computed = {name: getattr(pairs, name) for name in _LOGPS}
        computed |= {field.name: getattr(terms, field.name) for field in fields(terms)}
        self._names = [name for name, numbers in computed.items() if numbers is not None]
        # As wide as the widest of them, so that no number changes.
        self._computed.append(torch.stack([computed[name].detach() for name in self._names]))

    def take(self) -> dict[str, list[Any]]:
        """The columns of all pairs so far; empty where there is none."""
        known = joined(self._known)
        if not known:
            return known
        missing = dict.fromkeys(_LOGPS, [None] * len(known["row"]))
        return known | missing | dict(zip(self._names, torch.cat(self._computed, dim=1).tolist(), strict=True))


def joined(parts: Iterable[Columns]) -> dict[str, list[Any]]:
    """Columns one behind the other, of several batches or processes; empty where there is no pair."""
    together: dict[str, list[Any]] = {}
    for part in parts:
        for name, values in part.items():
            together.setdefault(name, []).extend(values)
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
        """Take in the pairs of some columns, see `PairColumns`."""
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
        """Take in the pairs of a step, see `PairColumns`."""
        self.total += sum(columns["chosen_reward"]) + sum(columns["rejected_reward"])
        self.responses += 2 * len(columns["chosen_reward"])

    @property
    def value(self) -> float:
        """0 before the first pair."""
        return self.total / self.responses if self.responses else 0.0
