"""What became of MM-RLHF's rows and pairs: the options, the counts, and the decision about one pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rich.console import Console
from rich.table import Table

from unidpo.data.formats.files import rows_of
from unidpo.data.mm_rlhf.ratings import DEFAULT_SUBSETS, DEFAULT_WEIGHTS, SUBSETS, check_weights
from unidpo.errors import DataError, Finding, did_you_mean, shown

Progress: TypeAlias = Callable[[str, int, int], None]

RATINGS_FILE, PAIRS_FILE = "data.jsonl", "dpo_pairs.jsonl"
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
            highest. If most pairs disagree, the assumption is probably wrong, which is said.
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
        check_weights(self.weights)
        known = ", ".join(SUBSETS[:-1])
        for subset in self.subsets:
            if subset not in SUBSETS:
                hint = did_you_mean(subset, SUBSETS)
                raise DataError(f"--subsets: there is no subset {shown(subset)}; there are {known}{hint}")
        if "video" in self.subsets:
            raise DataError("--subsets: video cannot be used, only images are read; leave it out")
        if not self.subsets:
            raise DataError(f"--subsets: name at least one of {known}")
        if self.min_margin is not None and not 0 <= self.min_margin <= _WIDEST_MARGIN:
            problem = f"{self.min_margin:g} is not between 0 and {_WIDEST_MARGIN}, the most two ratings differ by"
            raise DataError(f"--min-margin: {problem}")
        if self.conflicts not in ("drop", "keep"):
            raise DataError(f"--conflicts: drop or keep, not {shown(self.conflicts)}")
        if self.best_rank not in ("lowest", "highest"):
            raise DataError(f"--best-rank: lowest or highest, not {shown(self.best_rank)}")


@dataclass(slots=True)
class RatingsReport:
    """What became of the rows.

    Attributes:
        source: the file with the ratings.
        scoring: how it was read.
        to: the file written, ``None`` before.
        rows: rows of the source, good and bad.
        subsets: rows in each subset, chosen or not; "unknown" where it cannot be told.
        prompts: prompts with at least one pair.
        responses: responses in these pairs.
        pairs: pairs kept.
        agreements: pairs about which ratings and ranking (or the pairs file) say the same.
        conflicts: pairs about which they say the opposite; what became of them says `scoring`.
        ties: pairs whose responses score the same: no pair by ratings, a pair of margin 0 from the pairs file.
        below_margin: pairs left out because their scores are too close.
        findings: what was noticed, by row. An error means the row was left out, a warning a part of it.
        pair_rows: rows of the pairs file in the chosen subsets, where it was joined.
    """

    source: Path
    scoring: Scoring
    to: Path | None = None
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

    @property
    def left_out(self) -> Counter[str]:
        """How often each kind of error was found."""
        return Counter(finding.kind for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> Counter[str]:
        """How often each kind of warning was found."""
        return Counter(finding.kind for finding in self.findings if finding.severity == "warning")

    def render(self, console: Console) -> None:
        """Print the counts, an example of every kind of finding, and what was assumed."""
        table = Table(title=f"Scored preference data from {self.source}", title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_column()
        subsets = ", ".join(f"{name} {count:,}" for name, count in sorted(self.subsets.items()))
        table.add_row("rows read", f"{self.rows:,}", subsets)
        table.add_row("prompts kept", f"{self.prompts:,}", f"{self.responses:,} responses")
        table.add_row(
            "pairs kept", f"{self.pairs:,}", "" if self.pair_rows is None else f"of {self.pair_rows:,} joined"
        )
        conflicts = "kept" if self.scoring.conflicts == "keep" else "dropped"
        table.add_row("pairs in conflict", f"{self.conflicts:,}", f"{conflicts}; {self.agreements:,} agree")
        table.add_row("pairs of equal score", f"{self.ties:,}", "")
        table.add_row("pairs below the margin", f"{self.below_margin:,}", "")
        for title, severity, counts in (("left out", "error", self.left_out), ("in part", "warning", self.warnings)):
            for kind, count in counts.most_common():
                example = next(f for f in self.findings if (f.kind, f.severity) == (kind, severity))
                table.add_row(f"{title}: {kind}", f"{count:,}", f"row {example.row}: {example.message}")
        console.print(table, markup=False)
        if self.to is not None:
            end = f"written to {self.to}; `unidpo data check {self.to}` looks at the images"
            console.print(end, markup=False, highlight=False, soft_wrap=True)

    def keeps(self, margin: float, agrees: bool | None) -> bool:
        """Whether a pair stays, which is counted: by the margin of its scores, and whether the other source agrees."""
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


def counted_rows(file: Path, stage: str, on_progress: Progress | None) -> Iterator[tuple[int, Any]]:
    """The rows of a file of MM-RLHF's, with progress. Raises `DataError` if there are none."""
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; `unidpo data fetch mm-rlhf --to {file.parent}` fetches it")
    total = 0
    if on_progress is not None:
        with file.open("rb") as lines:
            total = sum(1 for _ in lines)
    done = 0
    for done, (number, values) in enumerate(rows_of(file), start=1):
        if on_progress is not None and done % 100 == 0:
            on_progress(stage, min(done, total), total)
        yield number, values
    if not done:
        raise DataError(f"{file}: the file holds no rows")
    if on_progress is not None:
        on_progress(stage, total, total)
