"""Check a data set before any GPU hour is spent, and describe it."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unidpo.errors import Finding
from unidpo.images import verify
from unidpo.pairs import PromptGroup
from unidpo.sources import ImageUse, read_groups

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with what is being checked (``images`` or ``rows``), how many are done and how many there are."""
GroupCheck: TypeAlias = Callable[[PromptGroup], Iterable[Finding]]
"""Findings about one usable row; file and row are filled in where the finding has none."""

_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Spread:
    """How a quantity is distributed: its extremes, deciles and median."""

    minimum: float
    decile: float
    median: float
    ninth_decile: float
    maximum: float


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a data set holds and what is wrong with it. Everything but `rows` describes the usable rows.

    Attributes:
        file: the data file.
        findings: all of them, in the order of the rows.
        groups: the usable rows, in the order of the file.
        rows: rows of the file, good and bad.
        usable_rows: rows without an error.
        pairs: preference pairs.
        scored_pairs: pairs of which both responses have a score.
        prompts: distinct prompts (text and images).
        images: distinct images.
        pairs_per_prompt: over distinct prompts.
        images_per_prompt: over distinct prompts.
        response_characters: over the responses that take part in a pair.
        score_margin: chosen minus rejected score over the scored pairs, or ``None`` without any.
        chosen_score_median: over the scored pairs, or ``None`` without any. A candidate for ``tau_good``.
    """

    file: str
    findings: list[Finding]
    groups: list[PromptGroup]
    rows: int
    usable_rows: int
    pairs: int
    scored_pairs: int
    prompts: int
    images: int
    pairs_per_prompt: Spread | None
    images_per_prompt: Spread | None
    response_characters: Spread | None
    score_margin: Spread | None
    chosen_score_median: float | None

    @property
    def ok(self) -> bool:
        """Whether every row can be used."""
        return not self.errors

    @property
    def errors(self) -> list[Finding]:
        """The findings for which a row cannot be used."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """The findings about rows that can be used."""
        return [finding for finding in self.findings if finding.severity == "warning"]

    @property
    def verdict(self) -> str:
        """One sentence: can this be trained on, and if not, what to do."""
        usable = f"{self.usable_rows:,} of {self.rows:,} rows are usable"
        if not self.usable_rows:
            return f"Not usable: {usable}."
        if self.errors:
            return f"Not ready: {usable}. Mend the others, or train without them (`data.on_bad_row=skip`)."
        rows = len({finding.row for finding in self.warnings})
        return f"Ready: {usable}" + (f", {rows:,} of them with a warning." if rows else ".")

    def to_json(self) -> dict[str, Any]:
        """The report as values that `json.dumps` takes."""
        fields = {field: value for field, value in asdict(replace(self, groups=[])).items() if field != "groups"}
        fields["findings"] = [{**asdict(finding), "file": str(finding.file)} for finding in self.findings]
        return {"verdict": self.verdict, "errors": len(self.errors), "warnings": len(self.warnings), **fields}

    def render(self, console: Console) -> None:
        """Print the findings by kind with a few examples of each, the description, and the verdict."""
        kinds: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            kinds.setdefault((finding.severity, finding.kind), []).append(finding)
        # Text, not markup, wherever the data speaks: a path may hold "[red]".
        for (severity, kind), findings in sorted(kinds.items()):
            color = "red" if severity == "error" else "yellow"
            console.print(Text.assemble((f"{severity} ", color), (kind, "bold"), f"  {len(findings):,}"))
            for finding in findings[:_EXAMPLES]:
                console.print(Text(f"  {replace(finding, file=None)}"), soft_wrap=True)
            if len(findings) > _EXAMPLES:
                console.print(Text(f"  ... and {len(findings) - _EXAMPLES:,} more", "dim"))
        if kinds:
            console.print()
        console.print(Text(self.file, "bold"), soft_wrap=True)
        console.print(self._table())
        console.print(Text(self.verdict, "red" if self.errors else "green"), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("", "", "min", "10 %", "median", "90 %", "max"):
            table.add_column(name, justify="left" if not name else "right")
        for name, count in {"rows": self.rows, "usable rows": self.usable_rows, "prompts": self.prompts}.items():
            table.add_row(name, f"{count:,}")
        table.add_row("pairs", f"{self.pairs:,}")
        _add_spread(table, "  per prompt", self.pairs_per_prompt)
        table.add_row("images", f"{self.images:,}")
        _add_spread(table, "  per prompt", self.images_per_prompt)
        _add_spread(table, "response, characters", self.response_characters)
        table.add_row("scored pairs", f"{self.scored_pairs:,}")
        _add_spread(table, "  score margin", self.score_margin)
        if self.chosen_score_median is not None:
            table.add_row("  chosen score", "", "", "", f"{self.chosen_score_median:,.6g}")
        return table


def check_data(
    path: str | Path,
    *,
    images: str | Path | None = None,
    scan_images: bool = True,
    require_scores: bool = False,
    extra: Iterable[GroupCheck] = (),
    on_progress: Progress | None = None,
    workers: int = 4,
) -> CheckReport:
    """Read a data set whole and note every problem of every row.

    Each distinct image is decoded once, whoever uses it.

    Args:
        path: a JSON or JSONL file, in any layout.
        images: the folder relative image paths start from; the file's own folder by default.
        scan_images: look for and decode the images; without it their paths are not even looked at.
        require_scores: a pair without scores is an error.
        extra: further checks of each row that is usable so far, for what needs a model (prompts too long).
        on_progress: see `Progress`.
        workers: threads that decode images.

    Raises:
        DataError: the file cannot be read at all; see `unidpo.sources.read_groups`.
    """
    read = read_groups(path, images=images, require_scores=require_scores)
    findings = list(read.findings)
    if scan_images:
        findings += _scan(read.image_uses, path, workers, on_progress)
    bad_rows = {finding.row for finding in findings if finding.severity == "error"}
    checks = tuple(extra)
    usable = [group for group in read.groups if _row(group) not in bad_rows]
    if checks:
        for done, group in enumerate(usable, start=1):
            found = [finding for check in checks for finding in check(group)]
            findings += [replace(f, file=f.file or path, row=f.row or _row(group)) for f in found]
            if on_progress:
                on_progress("rows", done, len(usable))
        bad_rows = {finding.row for finding in findings if finding.severity == "error"}
        usable = [group for group in usable if _row(group) not in bad_rows]
    findings.sort(key=lambda finding: finding.row or 0)
    return _describe(str(path), findings, read.rows, usable)


def _scan(uses: Sequence[ImageUse], path: str | Path, workers: int, on_progress: Progress | None) -> list[Finding]:
    """One finding for each use of an image that is missing or broken."""
    sources = list({use.source: None for use in uses})
    bad: dict[Path | bytes, Finding] = {}
    pool = ThreadPoolExecutor(workers)
    try:
        for done, (source, finding) in enumerate(zip(sources, pool.map(verify, sources), strict=True), start=1):
            if finding is not None:
                bad[source] = finding
            if on_progress:
                on_progress("images", done, len(sources))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the images not begun
    return [replace(bad[use.source], file=path, row=use.row, key=use.key) for use in uses if use.source in bad]


def _describe(file: str, findings: list[Finding], rows: int, groups: list[PromptGroup]) -> CheckReport:
    pairs_of: Counter[Any] = Counter()
    images_of: dict[Any, int] = {}
    for group in groups:
        key = group.prompt_key()
        pairs_of[key] += len(group.pairs)
        images_of[key] = len(group.images)
    scored = [(g, p, margin) for g in groups for p in g.pairs if (margin := g.score_margin(p)) is not None]
    chosen = [score for g, p, _ in scored if (score := g.responses[p.chosen].score) is not None]
    return CheckReport(
        file=file,
        findings=findings,
        groups=groups,
        rows=rows,
        usable_rows=len(groups),
        pairs=sum(pairs_of.values()),
        scored_pairs=len(scored),
        prompts=len(pairs_of),
        images=len({image for group in groups for image in group.images if isinstance(image, (Path, bytes))}),
        pairs_per_prompt=_spread(pairs_of.values()),
        images_per_prompt=_spread(images_of.values()),
        response_characters=_spread(len(response.text) for group in groups for response in group.responses),
        score_margin=_spread(margin for _, _, margin in scored),
        chosen_score_median=statistics.median(chosen) if chosen else None,
    )


def _row(group: PromptGroup) -> int:
    return group.pairs[0].row


def _spread(values: Iterable[float]) -> Spread | None:
    """Quantiles by linear interpolation between neighbours, or ``None`` without values."""
    ordered = sorted(values)
    if not ordered:
        return None

    def quantile(fraction: float) -> float:
        rest, below = math.modf(fraction * (len(ordered) - 1))
        low = ordered[int(below)]
        return low + rest * (ordered[int(below) + 1] - low) if rest else low

    return Spread(*(quantile(fraction) for fraction in (0, 0.1, 0.5, 0.9, 1)))


def _add_spread(table: Table, name: str, spread: Spread | None) -> None:
    if spread is not None:
        values = (spread.minimum, spread.decile, spread.median, spread.ninth_decile, spread.maximum)
        table.add_row(name, "", *(f"{value:,.6g}" for value in values))
