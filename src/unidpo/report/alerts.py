"""What in a run deserves a second look: each alert with what was measured, its threshold, the reason, and a remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from unidpo.report.pairs import late
from unidpo.report.reading import Note, Run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers: TypeAlias = NDArray[np.float64]

FEWEST_STEPS = 10
"""Shorter runs say nothing yet."""
FEWEST_VISITS = 50
DISPLACED = 0.1
"""Nats per token by which chosen answers fell below the reference."""
LENGTH_CORRELATION = 0.5
"""Rank correlation of reward margin and length difference, which is above this by two standard errors."""
UNMOVED = 0.02
"""Mean absolute reward margin; the preference term's gradient is then as at the start to 1 %."""
ALWAYS_ON = 0.9
"""Share of pairs that could open the gate and do."""
SATURATED, SATURATED_WEIGHT = 0.9, 0.05
"""Share of pairs whose performance weight is below so much."""
FALL = 0.02
"""Held-out accuracy lost since its best, if that is more than two standard errors."""


def alerts_of(run: Run) -> list[Note]:
    """What is odd about a run; nothing for one that is too short to tell. Keys begin with `alert-`."""
    if run.last_step < FEWEST_STEPS:
        return []
    return [note for check in _CHECKS for note in check(run)]


def _displacement(run: Run) -> Iterator[Note]:
    visits = late(run)
    chosen = _per_token(run, visits, "chosen")
    rejected = _per_token(run, visits, "rejected")
    if len(chosen) >= FEWEST_VISITS and np.mean(chosen) < -DISPLACED and np.mean(rejected) < 0:
        values = {"chosen": _signed(np.mean(chosen)), "rejected": _signed(np.mean(rejected)), "threshold": DISPLACED}
        yield Note("alert-displacement", values)


def _signed(value: float | np.floating[Any]) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _per_token(run: Run, visits: dict[str, Numbers], which: str) -> Numbers:
    """Log-ratio to the reference, in nats per token whatever the loss takes; empty without a reference."""
    moved = visits[f"{which}_logps"] - visits[f"ref_{which}_logps"]
    if not _length_normalized(run):
        moved = moved / np.maximum(visits[f"{which}_tokens"], 1)
    return moved[np.isfinite(moved)]


def _length_normalized(run: Run) -> bool:
    averaged = {"uni_dpo", "simpo", "ipo"}
    return bool(run.loss.get("length_normalized", run.loss.get("name") in averaged))


def _margins(run: Run, visits: dict[str, Numbers]) -> Numbers:
    """Implicit reward margins; NaN without a reference."""
    moved = [visits[f"{which}_logps"] - visits[f"ref_{which}_logps"] for which in ("chosen", "rejected")]
    return (moved[0] - moved[1]) * run.beta


def _length_bias(run: Run) -> Iterator[Note]:
    visits = late(run)
    margins, longer = _margins(run, visits), visits["chosen_tokens"] - visits["rejected_tokens"]
    if len(margins) < FEWEST_VISITS or np.isnan(margins).any() or np.mean(np.abs(margins)) < UNMOVED:
        return
    correlation = _rank_correlation(margins, longer)
    error = 1 / np.sqrt(len(margins))
    if correlation - 2 * error > LENGTH_CORRELATION:
        values = {"correlation": f"{correlation:.2f}", "error": f"{error:.2f}", "threshold": LENGTH_CORRELATION}
        yield Note("alert-length", values)


def _rank_correlation(one: Numbers, other: Numbers) -> float:
    """Spearman's; 0 where all values are the same."""
    ranks = np.stack([_ranks(one), _ranks(other)])
    return 0.0 if np.ptp(ranks, axis=1).min() == 0 else float(np.asarray(np.corrcoef(ranks))[0, 1])


def _ranks(values: Numbers) -> Numbers:
    """Ranks from 0, equal values sharing their mean."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    return np.asarray((ends - (count + 1) / 2)[place], dtype=np.float64)


def _unmoved(run: Run) -> Iterator[Note]:
    margins = np.abs(_margins(run, late(run)))
    if len(margins) and np.isfinite(margins).all() and np.mean(margins) < UNMOVED:
        rate = run.config.get("train", {}).get("learning_rate")
        mean = f"{np.mean(margins):.2g}"
        yield Note(
            "alert-unmoved", {"margin": mean, "threshold": UNMOVED, "rate": "?" if rate is None else f"{rate:g}"}
        )


def _gate(run: Run) -> Iterator[Note]:
    loss = run.loss
    if not loss.get("nll_weight") or "tau_good" not in loss or not len(run.ledger["step"]):
        return
    tau, best = loss["tau_good"], np.max(run.ledger["chosen_score"], initial=-np.inf, where=_scored(run))
    if best < tau:
        yield Note("alert-gate-never", {"tau_good": f"{tau:g}", "best": f"{best:g}"})
        return
    visits = late(run)
    open_ = visits["nll_gate"][visits["chosen_score"] >= tau]
    if len(open_) >= FEWEST_VISITS and np.mean(open_) > ALWAYS_ON:
        yield Note("alert-gate-always", {"share": f"{np.mean(open_):.0%}", "threshold": f"{ALWAYS_ON:.0%}"})


def _scored(run: Run) -> Any:
    return np.isfinite(run.ledger["chosen_score"])


def _saturated(run: Run) -> Iterator[Note]:
    weights = late(run)["performance_weight"]
    share = np.mean(weights < SATURATED_WEIGHT) if len(weights) >= FEWEST_VISITS else 0.0
    if share > SATURATED:
        values = {"share": f"{share:.0%}", "weight": SATURATED_WEIGHT, "threshold": f"{SATURATED:.0%}"}
        yield Note("alert-saturated", values)


def _overfitting(run: Run) -> Iterator[Note]:
    key = "rewards/accuracies"
    measured = [(record["step"], record.get(f"eval_{key}")) for record in run.evaluated]
    held_out = [(step, value) for step, value in measured if value is not None]
    if len(held_out) < 2:
        return
    (best_step, best), (last_step, last) = max(held_out, key=lambda point: point[1]), held_out[-1]
    groups = max(run.held_out, 1)
    threshold = max(FALL, 2 * float(np.sqrt(best * (1 - best) / groups)))
    then, now = _training_accuracy(run, best_step), _training_accuracy(run, last_step)
    if best - last > threshold and now > then:
        yield Note(
            "alert-overfitting",
            {
                "best": f"{best:.1%}",
                "step": best_step,
                "last": f"{last:.1%}",
                "threshold": f"{threshold:.1%}",
                "then": f"{then:.1%}",
                "now": f"{now:.1%}",
            },
        )


def _training_accuracy(run: Run, step: int) -> float:
    """Mean over the records of a tenth of the run before a step."""
    since = step - max(run.last_step / 10, 1)
    values = [record.get("rewards/accuracies") for record in run.trained if since < record["step"] <= step]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


_CHECKS: tuple[Callable[[Run], Iterator[Note]], ...] = (
    _displacement,
    _overfitting,
    _unmoved,
    _length_bias,
    _gate,
    _saturated,
)
