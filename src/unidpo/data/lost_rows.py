"""Rows that could be read when the data was checked and cannot be read any more."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from unidpo.data.pairs import Pair, PromptGroup
from unidpo.errors import DataError, Finding, UserError, from_findings

_LOG = logging.getLogger(__name__)
_Place: TypeAlias = tuple[str | Path | None, int | None]
"""A data file and a row of it."""


def lost_rows(pairs: Sequence[Pair], error: UserError) -> list[Finding]:
    """The rows of some pairs as findings that say why they cannot be used any more."""
    rows = sorted({(pair.row, pair.file) for pair in pairs}, key=str)
    return [Finding("lost-row", str(error), file=file, row=row) for row, file in rows]


class LostRows:
    """What becomes of lost rows: they stop the training, or are named once and left out.

    Args:
        groups: by what they are for, such as training.
        stop: whether they stop the training.
        max_fraction: share of the pairs of any of `groups` that may be left out; more stop the training.
        quiet: log nothing; for every process but the main one.
    """

    def __init__(
        self, groups: Mapping[str, Sequence[PromptGroup]], *, stop: bool, max_fraction: float, quiet: bool = False
    ) -> None:
        self._pairs: dict[str, Counter[_Place]] = {
            purpose: Counter((pair.file, pair.row) for group in its for pair in group.pairs)
            for purpose, its in groups.items()
        }
        self._stop = stop
        self._max_fraction = max_fraction
        self._quiet = quiet
        self._seen: dict[_Place, Finding] = {}

    def add(self, findings: Sequence[Finding]) -> None:
        """Add what all processes lost; every process must. Raises `DataError` where it stops the training."""
        if findings and self._stop:
            raise from_findings(DataError, f"{len(findings)} rows cannot be read any more", findings)
        new = {row: finding for finding in findings if (row := (finding.file, finding.row)) not in self._seen}
        self._seen |= new
        for purpose, pairs in self._pairs.items():
            lost = sum(pairs[row] for row in self._seen)
            if new and lost > self._max_fraction * pairs.total():
                raise from_findings(
                    DataError,
                    f"{lost} of {pairs.total()} {purpose} pairs cannot be read any more, which is more than "
                    f"data.max_lost_fraction={self._max_fraction:g} of them; bring them back, or raise it",
                    list(self._seen.values()),
                )
        if not self._quiet:
            for finding in new.values():
                _LOG.warning("skipped: %s", finding)

    def warn(self) -> None:
        """Say how many there were, if any."""
        if self._seen:
            _LOG.warning("%d rows could not be read any more and were skipped", len(self._seen))
