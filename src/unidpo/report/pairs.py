"""The ledger's visits as pairs: what the policy thought of each before, and what it does now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from unidpo.report.reading import Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers: TypeAlias = NDArray[np.float64]
    Places: TypeAlias = NDArray[np.int64]

OUTCOMES = ("learnt", "known", "not_learnt", "unlearnt")
"""Whether a pair is ranked right now, and whether it was before: no → yes, yes → yes, no → no, yes → no."""
MOST_PAIRS = 60_000
"""Pairs of all runs in one page."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Columns with one entry per pair, at its last visit unless another is named.

    Attributes:
        total: how many pairs the ledger has; those here are spread evenly over them where there are fewer.
        columns: numbers by name. `file`, `row`, `chosen`, `rejected` as in the ledger; `visits`; the scores; `before`
            and `after`, log-probability of chosen minus rejected before the training and at the last visit;
            `chosen_moved` and `rejected_moved`, log-ratios to the reference; `margin`, the implicit reward margin;
            the weights, `weight` their product, `gate`, `loss`, the tokens and `step`. NaN where there is no value.
        outcome: index into `OUTCOMES`.
    """

    total: int
    columns: dict[str, Numbers]
    outcome: Places


def pairs_of(run: Run, most: int = MOST_PAIRS) -> Pairs:
    """Each pair of a run once.

    What was before is what the reference says; for a loss without one, the policy at the first visit.
    """
    ledger = run.ledger
    key = [ledger[name] for name in ("rejected", "chosen", "row", "file")]
    order = np.lexsort(key)  # stable: visits stay in their order
    begins = np.ones(len(order), dtype=bool)
    if len(order):
        begins[1:] = np.any([column[order][1:] != column[order][:-1] for column in key], axis=0)
    first = np.flatnonzero(begins)
    visits = np.diff(np.append(first, len(order)))
    total = len(first)
    if total > most:
        kept = np.linspace(0, total - 1, most).astype(np.int64)
        first, visits = first[kept], visits[kept]
    began, last = order[first], order[first + visits - 1]

    def at_last(name: str) -> Numbers:
        return ledger[name][last]

    chosen, rejected = at_last("chosen_logps"), at_last("rejected_logps")
    chosen_moved, rejected_moved = chosen - at_last("ref_chosen_logps"), rejected - at_last("ref_rejected_logps")
    at_first = ledger["chosen_logps"][began] - ledger["rejected_logps"][began]
    reference = at_last("ref_chosen_logps") - at_last("ref_rejected_logps")
    before, after = np.where(np.isnan(reference), at_first, reference), chosen - rejected
    margin = np.where(np.isnan(reference), after, chosen_moved - rejected_moved) * run.beta
    columns = {name: at_last(name) for name in ("file", "row", "chosen", "rejected", "step", "loss")}
    columns |= {name: at_last(name) for name in ("chosen_score", "rejected_score", "chosen_tokens", "rejected_tokens")}
    columns |= {
        "visits": visits.astype(np.float64),
        "score_margin": at_last("chosen_score") - at_last("rejected_score"),
        "before": before,
        "after": after,
        "chosen_moved": chosen_moved,
        "rejected_moved": rejected_moved,
        "margin": margin,
        "quality": at_last("quality_weight"),
        "performance": at_last("performance_weight"),
        "weight": at_last("quality_weight") * at_last("performance_weight"),
        "gate": at_last("nll_gate"),
        "longer": at_last("chosen_tokens") - at_last("rejected_tokens"),
    }
    right, was_right = after > 0, before > 0
    outcome = np.select([right & ~was_right, right & was_right, ~right & ~was_right], [0, 1, 2], 3)
    return Pairs(total, columns, outcome.astype(np.int64))


def late(run: Run, share: float = 0.25) -> dict[str, Numbers]:
    """The ledger's visits of the last part of a run's steps, enough to say where it ended."""
    steps = run.ledger["step"]
    if not len(steps):
        return dict(run.ledger)
    kept = steps > steps.max() * (1 - share)
    return {name: column[kept] for name, column in run.ledger.items()}
