"""Whether the loss's knobs that live on the scale of the scores fit the scores."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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


def score_scale(groups: Iterable[PromptGroup], knobs: ScoreKnobs) -> Iterator[Finding]:
    """Warnings where no chosen score reaches `tau_good`, or where most quality weights are as good as 1."""
    margins, chosen = [], []
    for group in groups:
        for pair in group.pairs:
            score, margin = group.responses[pair.chosen].score, group.score_margin(pair)
            if score is not None and margin is not None:
                chosen.append(score)
                margins.append(margin)
    if not margins:
        return
    if knobs.tau_good is not None and max(chosen) < knobs.tau_good:
        yield _warning(
            "unreached-tau-good",
            f"no chosen score reaches tau_good {knobs.tau_good:g} ({knobs.whose}), the largest is {max(chosen):g}, so "
            f"the NLL term never switches on; the median is `loss.tau_good={statistics.median(chosen):.3g}`",
        )
    edge = math.log(_SATURATED / (1 - _SATURATED))
    saturated = sum(knobs.quality_eta * margin > edge for margin in margins)
    if 2 * saturated > len(margins):
        fitting = math.log(_WANTED / (1 - _WANTED)) / statistics.median(margins)
        yield _warning(
            "saturated-weights",
            f"with quality_eta {knobs.quality_eta:g} ({knobs.whose}) {saturated:,} of {len(margins):,} pairs have a "
            f"quality weight above {_SATURATED}, so clear pairs and doubtful ones weigh the same; with "
            f"`loss.quality_eta={fitting:.2g}` the pair of the median margin weighs {_WANTED}",
        )


def _warning(kind: str, message: str) -> Finding:
    return Finding(kind, message, severity="warning")
