"""Check a data set before any GPU hour is spent, and describe it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unidpo.data.check.measure import (
    EpochTokens,
    GroupLengths,
    Lengths,
    Spread,
    epoch_tokens,
    estimated_lengths,
    spread,
)
from unidpo.data.check.report import CheckReport
from unidpo.data.check.rows import (
    IMAGE_TOKENS,
    SPECIAL_TOKENS,
    GroupCheck,
    byte_order_mark,
    mixed_scales,
    partly_missing_scores,
    repeated_pairs,
    special_token_check,
    text_check,
    white_space_check,
)
from unidpo.data.check.scale import DEFAULTS, ScoreKnobs, score_scale
from unidpo.data.check.scan import ImageScan, Progress, inspect_images
from unidpo.data.check.usable import write_usable
from unidpo.data.formats import read_groups
from unidpo.data.images import MAX_PIXELS
from unidpo.data.pairs import PromptGroup
from unidpo.errors import Finding, UserError

__all__ = [
    "SPECIAL_TOKENS",
    "CheckReport",
    "EpochTokens",
    "GroupCheck",
    "GroupLengths",
    "Lengths",
    "Progress",
    "ScoreKnobs",
    "Spread",
    "check_data",
    "special_token_check",
    "write_usable",
]

_TICK = 100


def check_data(
    path: str | Path,
    *,
    images: str | Path | None = None,
    scan_images: bool = True,
    require_scores: bool = False,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    max_pixels: int = MAX_PIXELS,
    lengths: Lengths | None = None,
    extra: Iterable[GroupCheck] = (),
    on_progress: Progress | None = None,
    workers: int | None = None,
    knobs: ScoreKnobs | None = DEFAULTS,
) -> CheckReport:
    """Read a data set whole and note every problem of every row.

    Each distinct image is decoded once, whoever uses it. What needs a model (its special tokens, its lengths, prompts
    too long for it) comes in through arguments, so that checking without one needs no torch.

    Args:
        path: a data file in any layout.
        images: the folder relative image paths start from; the file's own folder by default.
        scan_images: look for and decode the images; without it their paths are not even looked at.
        require_scores: a pair without scores is an error.
        special_tokens: what text should not hold; those of the families in use by default. Qwen's image tokens among
            them are an error in data with images.
        max_pixels: what images are scaled down to before the model sees them.
        lengths: counts tokens; by default they are estimated.
        extra: further checks of each row that is usable so far. A `UserError` they (or ``lengths``) raise becomes an
            error of the row.
        on_progress: see `Progress`.
        workers: threads that decode images; as many as there are processors by default.
        knobs: values of the loss that the scores are held against; `None` for a loss without such.

    Raises:
        DataError: the file cannot be read at all; see `unidpo.data.formats.read_groups`.
    """
    read = read_groups(path, images=images, require_scores=require_scores)
    scan = ImageScan([], {})
    if scan_images:
        scan = inspect_images(read.image_uses, max_pixels=max_pixels, workers=workers, on_progress=on_progress)
    findings = [*read.findings, *scan.findings]
    if (mark := byte_order_mark(Path(path))) is not None:
        findings.append(mark)

    measure = lengths or estimated_lengths(scan.sizes, max_pixels=max_pixels)
    # A pack puts rows with images beside those without, so that one image token too many stops them all.
    stops = IMAGE_TOKENS if read.image_uses else ()
    checks = (special_token_check(special_tokens, fatal=stops), text_check, white_space_check, *extra)
    bad_rows = {finding.row for finding in findings if finding.severity == "error"}
    candidates = [group for group in read.groups if group.pairs[0].row not in bad_rows]
    usable, measured = [], []
    for done, group in enumerate(candidates, start=1):
        found, length = _examine(group, checks, measure)
        findings += found
        if length is not None:
            usable.append(group)
            measured.append(length)
        if on_progress and (done % _TICK == 0 or done == len(candidates)):
            on_progress("rows", done, len(candidates))

    findings += repeated_pairs(usable)
    if not require_scores:
        findings += partly_missing_scores(usable)
    if (scales := mixed_scales(usable)) is not None:
        findings.append(scales)
    if knobs is not None:
        findings += score_scale(usable, knobs)
    return _describe(
        path=path,
        images=images,
        rows=read.rows,
        findings=[replace(finding, file=finding.file or path) for finding in findings],
        groups=usable,
        lengths=measured,
        estimated=lengths is None,
    )


def _examine(
    group: PromptGroup, checks: Iterable[GroupCheck], measure: Lengths
) -> tuple[list[Finding], GroupLengths | None]:
    """What is wrong with one row, and its lengths, or ``None`` if it cannot be used."""
    findings: list[Finding] = []
    length = None
    try:
        for check in checks:
            findings += check(group)
        length = measure(group)
    except UserError as error:
        kind = error.findings[0].kind if error.findings else "refused-row"
        findings.append(Finding(kind, str(error)))
    located = [replace(finding, row=finding.row or group.pairs[0].row) for finding in findings]
    return located, None if any(finding.severity == "error" for finding in findings) else length


def _describe(
    *,
    path: str | Path,
    images: str | Path | None,
    rows: int,
    findings: list[Finding],
    groups: list[PromptGroup],
    lengths: list[GroupLengths],
    estimated: bool,
) -> CheckReport:
    pairs_of: Counter[Any] = Counter()
    images_of: dict[Any, int] = {}
    for group in groups:
        key = group.prompt_key()
        pairs_of[key] += len(group.pairs)
        images_of[key] = len(group.images)
    scored = [(g, p, margin) for g in groups for p in g.pairs if (margin := g.score_margin(p)) is not None]
    chosen = [score for g, p, _ in scored if (score := g.responses[p.chosen].score) is not None]
    return CheckReport(
        file=str(path),
        image_root=None if images is None else str(images),
        findings=sorted(findings, key=lambda finding: finding.row or 0),
        groups=groups,
        rows=rows,
        usable_rows=len(groups),
        pairs=sum(pairs_of.values()),
        scored_pairs=len(scored),
        prompts=len(pairs_of),
        images=len({image for group in groups for image in group.images if isinstance(image, (Path, bytes))}),
        pairs_per_prompt=spread(pairs_of.values()),
        images_per_prompt=spread(images_of.values()),
        prompt_tokens=spread(length.prompt for length in lengths),
        response_tokens=spread(tokens for length in lengths for tokens in length.responses),
        response_characters=spread(len(response.text) for group in groups for response in group.responses),
        score_margin=spread(margin for _, _, margin in scored),
        chosen_score_median=statistics.median(chosen) if chosen else None,
        epoch_tokens=epoch_tokens(groups, lengths, estimated=estimated),
    )
