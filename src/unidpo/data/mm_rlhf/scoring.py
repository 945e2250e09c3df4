"""How MM-RLHF's ratings become scored pairs (the options), and what became of its rows and pairs (the counts)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from unidpo.data.formats.ratings import check_weights
from unidpo.data.mm_rlhf.ratings import DEFAULT_SUBSETS, SUBSETS
from unidpo.errors import DataError, Finding, Severity, require_known

RATINGS_FILE, PAIRS_FILE = "data.jsonl", "dpo_pairs.jsonl"
RATINGS = ("helpfulness", "faithfulness", "ethical")
DEFAULT_WEIGHTS: Mapping[str, float] = {"helpfulness": 1.0, "faithfulness": 1.0}
_ENOUGH_TO_JUDGE = 20
"""Pairs that ranking and ratings must both decide before their disagreement says that one is read backwards."""
_WIDEST_MARGIN = 4


@dataclass(frozen=True, slots=True)
class Scoring:
    """How ratings become scored pairs.

    Attributes:
        weights: how much each rating counts in a score: helpfulness, faithfulness, ethical.
        subsets: which of long, short, mcq, safety.
        min_margin: pairs whose scores differ by less are left out.
        conflicts: what becomes of pairs that ranking and ratings see the other way round.
        best_rank: whether the best response has the lowest place (1, as is assumed: the data set does not say) or the
            highest. If most pairs disagree, the assumption is probably wrong, which is an error.
        join_pairs: the pairs are those of ``dpo_pairs.jsonl``, scored by the ratings, instead of all that the scores
            make. Those of equal score are kept, with a margin of 0, unless there is a ``min_margin``.

    Raises:
        DataError: a value is none of those.
    """

    weights: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    subsets: tuple[str, ...] = DEFAULT_SUBSETS
    min_margin: float | None = None
    conflicts: Literal["drop", "keep"] = "drop"
    best_rank: Literal["lowest", "highest"] = "lowest"
    join_pairs: bool = False

    def __post_init__(self) -> None:
        for option, what, names, known in (
            ("--score", "rating", tuple(self.weights), RATINGS),
            ("--subsets", "subset", self.subsets, SUBSETS),
            ("--conflicts", "choice", (self.conflicts,), ("drop", "keep")),
            ("--best-rank", "choice", (self.best_rank,), ("lowest", "highest")),
        ):
            require_known(option, what, names, known)
            if not names:
                raise DataError(f"{option}: name at least one of {', '.join(known)}")
        check_weights(self.weights)
        if "video" in self.subsets:
            raise DataError("--subsets: video cannot be used, only images are read; leave it out")
        if self.min_margin is not None and not 0 <= self.min_margin <= _WIDEST_MARGIN:
            problem = f"{self.min_margin:g} is not between 0 and {_WIDEST_MARGIN}, the most two ratings differ by"
            raise DataError(f"--min-margin: {problem}")


@dataclass(slots=True)
class RatingsReport:
    """What became of the rows.

    Attributes:
        source: the file with the ratings.
        scoring: how it was read.
        rows: rows of the source, good and bad.
        subsets: rows in each subset, chosen or not; "unknown" where it cannot be told.
        prompts: prompts with at least one pair.
        responses: responses in these pairs.
        pairs: pairs kept.
        agreements: pairs about which ratings and ranking (or the pairs file) say the same.
        conflicts: pairs about which they say the opposite; `scoring` says whether they were kept.
        ties: pairs whose responses score the same: no pair by ratings, a pair of margin 0 from the pairs file.
        below_margin: pairs left out because their scores are too close.
        findings: problems, by row. An error means the row was left out, a warning a part of it.
        pair_rows: rows of the pairs file in the chosen subsets, where it was joined.
    """

    source: Path
    scoring: Scoring
    rows: int = 0
    subsets: Counter[str] = field(default_factory=Counter)
    prompts: int = 0
    responses: int = 0
    pairs: int = 0
    agreements: int = 0
    conflicts: int = 0
    ties: int = 0
    below_margin: int = 0
    findings: list[Finding] = field(default_factory=list)
    pair_rows: int | None = None

    def kinds(self, severity: Severity) -> Counter[str]:
        """How often each kind of error, or of warning, was found."""
        return Counter(finding.kind for finding in self.findings if finding.severity == severity)

    def keeps(self, margin: float, agrees: bool | None) -> bool:
        """Count a pair and say whether it stays, by the margin of its scores and whether the other source agrees."""
        if agrees is not None:
            self.agreements += agrees
            self.conflicts += not agrees
        if agrees is False and self.scoring.conflicts == "drop":
            return False
        if self.scoring.min_margin is not None and round(margin, 6) < self.scoring.min_margin:
            self.below_margin += 1
            return False
        return True

    def refuse_if_reversed(self) -> None:
        """Raise `DataError` if most pairs that would be dropped for a conflict are one."""
        both = self.agreements + self.conflicts
        if self.scoring.conflicts == "keep" or both < _ENOUGH_TO_JUDGE or self.conflicts * 2 <= both:
            return
        other, remedy = "the final ranking", "give `--best-rank highest`"
        if self.scoring.join_pairs:
            other, remedy = PAIRS_FILE, "give `--conflicts keep` to go by its order"
        raise DataError(
            f"{self.source}: ratings and {other} disagree about {self.conflicts:,} of {both:,} pairs, so one of them "
            f"is probably read backwards; {remedy} if that is so"
        )

    def render(self, console: Console) -> None:
        """Print the counts, and an example of every kind of finding."""
        table = Table(title=f"Scored preference data from {self.source}", title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_column()
        kept = "kept" if self.scoring.conflicts == "keep" else "dropped"
        for name, count, note in (
            ("rows read", self.rows, ", ".join(f"{name} {rows:,}" for name, rows in sorted(self.subsets.items()))),
            ("prompts kept", self.prompts, f"{self.responses:,} responses"),
            ("pairs kept", self.pairs, "" if self.pair_rows is None else f"of {self.pair_rows:,} joined"),
            ("pairs in conflict", self.conflicts, f"{kept}; {self.agreements:,} agree"),
            ("pairs of equal score", self.ties, ""),
            ("pairs below the margin", self.below_margin, ""),
        ):
            table.add_row(name, f"{count:,}", note)
        severities: dict[Severity, str] = {"error": "left out", "warning": "in part"}
        for severity, title in severities.items():
            for kind, count in self.kinds(severity).most_common():
                example = next(f for f in self.findings if (f.kind, f.severity) == (kind, severity))
                table.add_row(f"{title}: {kind}", f"{count:,}", f"row {example.row}: {example.message}")
        console.print(table, markup=False)
