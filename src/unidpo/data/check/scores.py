"""What is odd about the scores of a data set, by themselves and for the loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from unidpo.data.check.rows import warning
from unidpo.data.pairs import PromptGroup
from unidpo.errors import Finding

_SATURATED = 0.999
_WANTED = 0.8
"""Quality weight of the median pair with the value that is proposed."""


@dataclass(frozen=True, slots=True)
class ScoreKnobs:
    """Values of `uni_dpo` that have the unit of the scores.

    Attributes:
        quality_eta: steepness of the quality weight.
        tau_good: score from which the NLL term guards a chosen response; `None` where that term is off.
        whose: where the values come from, for the messages.
    """

    quality_eta: float = 0.7
    tau_good: float | None = 2.5
    whose: str = "the default of uni_dpo"


DEFAULTS = ScoreKnobs()
"""Where there is no recipe."""


def partly_missing_scores(groups: Sequence[PromptGroup]) -> Iterator[Finding]:
    """Rows without scores, in data of which other rows have them."""
    unscored = [group for group in groups if any(group.score_margin(pair) is None for pair in group.pairs)]
    if len(unscored) == len(groups):
        return
    problem = "there is no score, unlike in other rows; losses that use scores (Uni-DPO) refuse the row"
    yield from (warning("missing-score", problem, group.pairs[0].row) for group in unscored)


@dataclass(frozen=True, slots=True)
class _Range:
    """The lowest and the highest score of a row."""

    row: int
    low: float
    high: float


def mixed_scales(groups: Iterable[PromptGroup]) -> Iterator[Finding]:
    """Whether some rows are scored on a small scale (0 to 1, 5 or 10) and the others on a larger one.

    Two things must come together, which hardly do on one scale: nearly no row has scores on both sides of the small
    scale's upper end, and the spread of a row's scores is twice as large beyond it.
    """
    ranges = []
    for group in groups:
        scores = [response.score for response in group.responses if response.score is not None]
        if len(scores) > 1 and min(scores) < max(scores):
            ranges.append(_Range(group.pairs[0].row, min(scores), max(scores)))
    for end in (1, 5, 10):
        small = [r for r in ranges if r.low >= 0 and r.high <= end]
        large = [r for r in ranges if r.low >= end and r.high > end]
        fewer = min(len(small), len(large))
        crossing = len(ranges) - len(small) - len(large)
        if fewer < 3 or crossing > fewer / 4 or _median_width(large) < 2 * _median_width(small):
            continue
        problem = f"scores seem to be on different scales: {_described(small)}, but {_described(large)}"
        remedy = "bring them to one, because weights and `tau_good` compare them"
        yield warning("mixed-scales", f"{problem}; {remedy}")
        return


def _median_width(ranges: Sequence[_Range]) -> float:
    return statistics.median(r.high - r.low for r in ranges)


def _described(ranges: Sequence[_Range]) -> str:
    low, high = min(r.low for r in ranges), max(r.high for r in ranges)
    examples = ", ".join(str(r.row) for r in ranges[:3])
    return f"{len(ranges):,} rows lie within {low:g} to {high:g} (such as rows {examples})"


def scored_pairs(groups: Iterable[PromptGroup]) -> Iterator[tuple[float, float]]:
    """Chosen score and margin of each pair that has both scores."""
    for group in groups:
        for pair in group.pairs:
            score, margin = group.responses[pair.chosen].score, group.score_margin(pair)
            if score is not None and margin is not None:
                yield score, margin


def score_scale(groups: Iterable[PromptGroup], knobs: ScoreKnobs) -> Iterator[Finding]:
    """Warnings where no chosen score reaches `tau_good`, or where most quality weights are as good as 1."""
    scored = list(scored_pairs(groups))
    if not scored:
        return
    chosen, margins = [score for score, _ in scored], [margin for _, margin in scored]
    if knobs.tau_good is not None and max(chosen) < knobs.tau_good:
        yield warning(
            "unreached-tau-good",
            f"no chosen score reaches tau_good {knobs.tau_good:g} ({knobs.whose}), the largest is {max(chosen):g}, so "
            f"the NLL term never switches on; the median is `loss.tau_good={statistics.median(chosen):.3g}`",
        )
    edge = math.log(_SATURATED / (1 - _SATURATED))
    saturated = sum(knobs.quality_eta * margin > edge for margin in margins)
    if 2 * saturated > len(margins):
        fitting = math.log(_WANTED / (1 - _WANTED)) / statistics.median(margins)
        yield warning(
            "saturated-weights",
            f"with quality_eta {knobs.quality_eta:g} ({knobs.whose}) {saturated:,} of {len(margins):,} pairs have a "
            f"quality weight above {_SATURATED}, so clear pairs and doubtful ones weigh the same; with "
            f"`loss.quality_eta={fitting:.2g}` the pair of the median margin weighs {_WANTED}",
        )
