"""Check a data set before any GPU hour is spent, and describe it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from unidpo.data.check.measure import CountTokens, token_estimator
from unidpo.data.check.report import CheckReport, describe
from unidpo.data.check.rows import (
    IMAGE_TOKENS,
    SPECIAL_TOKENS,
    GroupCheck,
    byte_order_mark,
    repeated_pairs,
    special_token_check,
    text_check,
    white_space_check,
)
from unidpo.data.check.scores import DEFAULTS, ScoreKnobs, mixed_scales, partly_missing_scores, score_scale
from unidpo.data.check.usable import write_usable
from unidpo.data.formats import ImageUse, read_groups
from unidpo.data.images import MAX_PIXELS, inspect_image
from unidpo.data.pairs import GroupTokens, ImageSource, PromptGroup
from unidpo.errors import Finding, UserError
from unidpo.progress import OnProgress

__all__ = ["CheckReport", "ScoreKnobs", "check_data", "special_token_check", "write_usable"]

_TICK = 100


def check_data(
    path: str | Path,
    *,
    images: str | Path | None = None,
    scan_images: bool = True,
    require_scores: bool = False,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    max_pixels: int = MAX_PIXELS,
    count_tokens: CountTokens | None = None,
    extra: Iterable[GroupCheck] = (),
    on_progress: OnProgress | None = None,
    knobs: ScoreKnobs | None = DEFAULTS,
) -> CheckReport:
    """Read a data set whole and note every problem of every row.

    Each distinct image is decoded once, however many rows use it. What needs a model (its special tokens,
    its lengths, prompts too long for it) comes in through arguments, so that checking without one needs no torch.

    Args:
        path: a data file in any layout.
        images: the folder relative image paths start from; the file's own folder by default.
        scan_images: look for and decode the images; without it their paths are not even looked at.
        require_scores: a pair without scores is an error.
        special_tokens: what text should not hold; those of the families in use by default. Qwen's image tokens among
            them are an error in data with images.
        max_pixels: what images are scaled down to before the model sees them.
        count_tokens: counts those of a group; by default they are estimated.
        extra: further checks of each row that is usable so far. A `UserError` of theirs, or of ``count_tokens``,
            becomes an error of the row.
        on_progress: called with ``images`` or ``rows``, how many are done and how many there are.
        knobs: values of the loss that the scores are held against; `None` for a loss without such.

    Raises:
        DataError: the file cannot be read at all; see `unidpo.data.formats.read_groups`.
    """
    read = read_groups(path, images=images, require_scores=require_scores)
    odd_images, sizes = _inspect_images(read.image_uses if scan_images else [], max_pixels, on_progress)
    findings = [*read.findings, *odd_images, *byte_order_mark(Path(path))]

    measure = count_tokens or token_estimator(sizes, max_pixels=max_pixels)
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

    findings += [*repeated_pairs(usable), *mixed_scales(usable)]
    if not require_scores:
        findings += partly_missing_scores(usable)
    if knobs is not None:
        findings += score_scale(usable, knobs)
    findings = [replace(finding, file=finding.file or path) for finding in findings]
    return describe(path, images, read.rows, findings, usable, measured, estimated=count_tokens is None)


def _inspect_images(
    uses: Sequence[ImageUse], max_pixels: int, on_progress: OnProgress | None
) -> tuple[list[Finding], dict[ImageSource, tuple[int, int]]]:
    """What is wrong with images, for each use of one, and width and height of those that can be decoded."""
    sources = list({use.source: None for use in uses})
    found: dict[ImageSource, tuple[Finding, ...]] = {}
    sizes: dict[ImageSource, tuple[int, int]] = {}
    pool = ThreadPoolExecutor(os.cpu_count())  # decoders run outside of Python's lock
    try:
        results = pool.map(lambda source: inspect_image(source, max_pixels=max_pixels), sources)
        for done, (source, inspection) in enumerate(zip(sources, results, strict=True), start=1):
            found[source] = inspection.findings
            if inspection.size is not None:
                sizes[source] = inspection.size
            if on_progress:
                on_progress("images", done, len(sources))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the images not begun
    return [replace(each, row=use.row, key=use.key) for use in uses for each in found.get(use.source, ())], sizes


def _examine(
    group: PromptGroup, checks: Iterable[GroupCheck], measure: CountTokens
) -> tuple[list[Finding], GroupTokens | None]:
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
