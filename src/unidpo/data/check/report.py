"""What the data check says, for people and for machines."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unidpo.data.check.measure import EpochTokens, Spread, epoch_tokens, spread
from unidpo.data.check.scores import scored_pairs
from unidpo.data.pairs import GroupTokens, PromptGroup
from unidpo.errors import Finding, printable

_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a data set holds and what is wrong with it. Everything but `rows` describes the usable rows.

    Attributes:
        file: the data file.
        image_root: the folder relative image paths start from, or ``None`` for the file's own.
        findings: all of them, in the order of the rows; those about the whole file come first.
        groups: the usable rows, in the order of the file.
        rows: rows of the file, good and bad.
        usable_rows: rows without an error.
        pairs: preference pairs.
        scored_pairs: pairs of which both responses have a score.
        prompts: distinct prompts (text and images).
        images: distinct images.
        pairs_per_prompt: over distinct prompts.
        images_per_prompt: over distinct prompts.
        prompt_tokens: over the rows, images included; see `EpochTokens.estimated`.
        response_tokens: over the responses that take part in a pair.
        response_characters: likewise.
        score_margin: chosen minus rejected score over the scored pairs, or ``None`` without any.
        chosen_score_median: over the scored pairs, or ``None`` without any. A candidate for ``tau_good``.
        epoch_tokens: what packing saves.
    """

    file: str
    image_root: str | None
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
    prompt_tokens: Spread | None
    response_tokens: Spread | None
    response_characters: Spread | None
    score_margin: Spread | None
    chosen_score_median: float | None
    epoch_tokens: EpochTokens

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
        """The findings about rows that can be used, and about the file."""
        return [finding for finding in self.findings if finding.severity == "warning"]

    @property
    def verdict(self) -> str:
        """One sentence: can this be trained on, and if not, what to do."""
        usable = f"{self.usable_rows:,} of {self.rows:,} rows are usable"
        if not self.usable_rows:
            return f"Not usable: {usable}."
        if self.errors:
            remedy = "Correct the others, write the usable ones (`--fix FILE`), or skip them (`data.on_bad_row=skip`)."
            return f"Not ready: {usable}. {remedy}"
        rows = len({finding.row for finding in self.warnings} - {None})
        return f"Ready: {usable}" + (f", {rows:,} of them with a warning." if rows else ".")

    def to_json(self) -> dict[str, Any]:
        """The report as values that `json.dumps` takes. Complete but for the data itself."""
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
        console.print(Text(printable(self.file), "bold"), soft_wrap=True)
        console.print(self._table())
        console.print()
        console.print(Text(self.verdict, "red" if self.errors else "green"), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("", "", "min", "10 %", "median", "90 %", "max"):
            table.add_column(name, justify="left" if not name else "right")
        table.add_column("", no_wrap=True, style="cyan")

        def add(name: str, spread: Spread | None) -> None:
            if spread is not None:
                values = (spread.minimum, spread.decile, spread.median, spread.ninth_decile, spread.maximum)
                table.add_row(name, "", *(f"{value:,.6g}" for value in values))

        about = "~" if self.epoch_tokens.estimated else ""
        for name, count in {"rows": self.rows, "usable rows": self.usable_rows, "prompts": self.prompts}.items():
            table.add_row(name, f"{count:,}")
        add(f"  {about}tokens, images too", self.prompt_tokens)
        table.add_row("images", f"{self.images:,}")
        add("  per prompt", self.images_per_prompt)
        table.add_row("pairs", f"{self.pairs:,}")
        add("  per prompt", self.pairs_per_prompt)
        add("response, characters", self.response_characters)
        add(f"  {about}tokens", self.response_tokens)
        table.add_row("scored pairs", f"{self.scored_pairs:,}")
        add("  score margin", self.score_margin)
        if self.chosen_score_median is not None:
            table.add_row("  chosen score", "", "", "", f"{self.chosen_score_median:,.6g}", "", "", "try as tau_good")
        costs = self.epoch_tokens
        table.add_row(f"{about}tokens per epoch")
        for name, tokens in (
            ("  padded pairs", costs.padded_pairs),
            ("  pair packs", costs.pair_packs),
            ("  prompt packs", costs.prompt_packs),
        ):
            fewer = f"{costs.padded_pairs / tokens:.1f} times fewer" if 0 < tokens < costs.padded_pairs else ""
            table.add_row(name, f"{tokens:,}", "", "", "", "", "", fewer)
        return table


def describe(
    path: str | Path,
    images: str | Path | None,
    rows: int,
    findings: list[Finding],
    groups: list[PromptGroup],
    lengths: list[GroupTokens],
    *,
    estimated: bool,
) -> CheckReport:
    """Describe the usable rows; ``lengths`` has one entry per group."""
    pairs_of: Counter[Any] = Counter()
    images_of: dict[Any, int] = {}
    scored = list(scored_pairs(groups))
    for group in groups:
        key = group.prompt_key()
        pairs_of[key] += len(group.pairs)
        images_of[key] = len(group.images)
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
        score_margin=spread(margin for _, margin in scored),
        chosen_score_median=statistics.median(score for score, _ in scored) if scored else None,
        epoch_tokens=epoch_tokens(groups, lengths, estimated=estimated),
    )
