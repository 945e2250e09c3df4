"""Read scored preference data: every layout people keep it in becomes prompt groups."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from unidpo.errors import DataError, Finding, from_findings
from unidpo.pairs import PromptGroup, merge_by_prompt
from unidpo.sources.files import rows_of
from unidpo.sources.layouts import Row

__all__ = ["ImageUse", "Read", "load_pairs", "read_groups", "select_pairs"]

logger = logging.getLogger("unidpo")


@dataclass(frozen=True, slots=True)
class ImageUse:
    """One mention of an image: the row (from 1) and key that name it, and the image."""

    row: int
    key: str
    source: Path | bytes


@dataclass(frozen=True, slots=True)
class Read:
    """What a data file holds.

    Attributes:
        file: the file.
        rows: how many rows it has, good and bad.
        groups: one prompt group per usable row, in file order; a row of ranked responses has several pairs.
        findings: what was noticed, in file order. A row with an error has no group.
        image_uses: every mention of an image, those of bad rows included. Nothing was opened yet.
    """

    file: Path
    rows: int
    groups: list[PromptGroup]
    findings: list[Finding]
    image_uses: list[ImageUse]

    @property
    def errors(self) -> list[Finding]:
        """The findings for which a row cannot be used."""
        return [finding for finding in self.findings if finding.severity == "error"]


def load_pairs(
    path: str | Path,
    *,
    images: str | Path | None = None,
    group_by_prompt: bool = False,
    min_score_margin: float | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    require_scores: bool = False,
) -> list[PromptGroup]:
    """Read a preference data set for training. Images are not opened here; `unidpo.check.check_data` does that.

    What is left out or worth knowing is counted on the logger ``unidpo``.

    Args:
        path: a JSON or JSONL file, in any layout.
        images: the folder relative image paths start from; the file's own folder by default.
        group_by_prompt: join rows that share prompt and images into one group.
        min_score_margin: leave out pairs whose chosen minus rejected score is smaller. Needs scores.
        on_bad_row: ``error`` raises if any row cannot be used, ``skip`` goes on without those rows.
        require_scores: a pair without scores is a bad row.

    Raises:
        DataError: the file cannot be read, a row cannot be used (all are listed), or no pair is left.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is 'error' or 'skip', not {on_bad_row!r}")
    read = read_groups(path, images=images, require_scores=require_scores or min_score_margin is not None)
    bad_rows = len({finding.row for finding in read.errors})
    if bad_rows and on_bad_row == "error":
        title = f"{path}: {bad_rows} of {read.rows} rows cannot be used"
        raise from_findings(DataError, title, read.errors)
    if bad_rows:
        logger.warning(str(from_findings(DataError, f"{path}: skipped {bad_rows} of {read.rows} rows", read.errors)))
    for kind, count in Counter(f.kind for f in read.findings if f.severity == "warning").items():
        logger.warning("%s: %d %s; `unidpo data check` lists them", path, count, kind)

    return select_pairs(read.groups, min_score_margin=min_score_margin, group_by_prompt=group_by_prompt)


def select_pairs(
    groups: Sequence[PromptGroup], *, min_score_margin: float | None = None, group_by_prompt: bool = False
) -> list[PromptGroup]:
    """What a recipe makes of the usable rows: pairs of at least a margin, joined by prompt. See `load_pairs`.

    Raises:
        DataError: no pair is left.
    """
    before = sum(len(group.pairs) for group in groups)
    if min_score_margin is not None:
        groups = _above_margin(groups, min_score_margin)
        after = sum(len(group.pairs) for group in groups)
        logger.info("left out %d of %d pairs, score margin under %g", before - after, before, min_score_margin)
    if not groups:
        reason = f"all {before} have a score margin under {min_score_margin}" if before else "no row can be used"
        raise DataError(f"no pair is left to train on: {reason}")
    return merge_by_prompt(groups) if group_by_prompt else list(groups)


def read_groups(path: str | Path, *, images: str | Path | None = None, require_scores: bool = False) -> Read:
    """Read every row of a JSON or JSONL file. A bad row becomes a finding and never raises.

    Args:
        path: the file: one JSON list of rows, or one row per line.
        images: the folder relative image paths start from; the file's own folder by default.
        require_scores: a pair without scores is an error.

    Raises:
        DataError: there is no such file or image folder, it is not text, not JSON as a whole, or has no rows.
    """
    file = Path(path)
    root = file.parent if images is None else Path(images)
    if images is not None and not root.is_dir():
        raise DataError(f"{root}: there is no such image folder; give the one that the image paths start from")
    rows, groups, findings, uses = 0, [], [], []
    for number, value in rows_of(file):
        rows += 1
        if isinstance(value, Finding):
            findings.append(replace(value, file=path, row=number))
            continue
        row = Row(value, number, path, root, require_scores)
        group = row.read()
        if group is not None:
            groups.append(group)
        findings += row.findings
        uses += [ImageUse(number, key, source) for key, source in row.sources]
    if not rows:
        raise DataError(f"{path}: the file holds no rows")
    return Read(file, rows, groups, findings, uses)


def _above_margin(groups: Sequence[PromptGroup], minimum: float) -> list[PromptGroup]:
    kept = []
    for group in groups:
        # Rounded because 4.3 - 4.2 is a little under 0.1 in binary.
        pairs = [pair for pair in group.pairs if round(group.score_margin(pair) or 0.0, 9) >= minimum]
        if pairs:
            kept.append(group.keep_pairs(pairs))
    return kept
