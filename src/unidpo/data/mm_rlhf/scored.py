"""Scored preference data from MM-RLHF's human ratings, as one prompt group per prompt.

The ratings say how good each response is, and a final ranking says in which order people put them. Where the two
disagree about a pair, it is unknown which is right, so the pair is left out and counted.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unidpo.data.formats import write_pairs
from unidpo.data.formats.files import json_type, rows_of
from unidpo.data.mm_rlhf.ratings import SUBSETS, RatedPrompt, RatedRow, plain_question, subset_of
from unidpo.data.mm_rlhf.scoring import PAIRS_FILE, RATINGS_FILE, RatingsReport, Scoring
from unidpo.data.pairs import Pair, PromptGroup
from unidpo.errors import DataError, Finding, shown


@dataclass(frozen=True, slots=True)
class Scored:
    """Prompt groups, in file order, and what was left out of them."""

    groups: list[PromptGroup]
    report: RatingsReport


def from_mm_rlhf(
    folder: str | Path,
    to: str | Path,
    scoring: Scoring | None = None,
    *,
    layout: str | None = None,
    force: bool = False,
) -> RatingsReport:
    """Write MM-RLHF's human ratings as scored preference data, see `scored_groups`.

    Args:
        folder: where ``data.jsonl`` lies, and the image folders beside it.
        to: the file to write, ``.jsonl``, ``.json`` or ``.parquet``.
        scoring: how ratings become scores and pairs.
        layout: ranked responses, a row per prompt, by default; with joined pairs the authors' layout ``alpaca``, a row
            per pair.
        force: write over a file that is there.

    Raises:
        DataError: as `scored_groups`; the file exists, or cannot be written.
    """
    to, scoring = Path(to), scoring or Scoring()
    if to.exists() and not force:
        raise DataError(f"{to}: this file exists; give another one, or `--force` to write over it")
    if to.absolute() in {(_folder(folder) / name).absolute() for name in (RATINGS_FILE, PAIRS_FILE)}:
        raise DataError(f"{to}: this is what is read; give another file to write")
    scored = scored_groups(folder, scoring)
    write_pairs(scored.groups, to, layout or ("alpaca" if scoring.join_pairs else "ranked"))
    return scored.report


def scored_groups(folder: str | Path, scoring: Scoring | None = None) -> Scored:
    """Scored preference data from MM-RLHF's human ratings. Images are not opened.

    A response's score is the weighted mean of its ratings (1 to 5). A response without one of them is left out, and a
    row whose ratings cannot be told apart; all of it is counted. Responses of different scores make a pair, unless the
    final ranking says the opposite, or the scores are too close.

    Args:
        folder: where ``data.jsonl`` lies, and the image folders beside it.
        scoring: how ratings become scores and pairs.

    Raises:
        DataError: a file is missing or unreadable, no pair is left, or ranking and ratings disagree about most pairs.
    """
    folder, scoring = _folder(folder), scoring or Scoring()
    report = RatingsReport(folder / RATINGS_FILE, scoring)
    prompts = _rated_prompts(report)
    if scoring.join_pairs:
        pairs = _joined_pairs(folder / PAIRS_FILE, prompts, report)
    else:
        pairs = [_rated_pairs(prompt, report) for prompt in prompts]
    report.refuse_if_reversed()
    groups = []
    for prompt, kept in zip(prompts, pairs, strict=True):
        if kept:
            images = tuple(folder / image for image in prompt.images)
            groups.append(PromptGroup((prompt.message,), images, prompt.responses, tuple(kept)).keep_pairs(kept))
        elif not scoring.join_pairs:
            problem = "no pair is left: the scores are equal, too close, or contradict the ranking"
            report.findings.append(Finding("no-pair", problem, report.source, prompt.row, "models_output"))
    report.prompts = len(groups)
    report.responses = sum(len(group.responses) for group in groups)
    report.pairs = sum(len(group.pairs) for group in groups)
    if not groups:
        reasons = ", ".join(f"{kind} {count:,}" for kind, count in report.kinds("error").most_common())
        raise DataError(
            f"{report.source}: no pair is left of {report.rows:,} rows ({reasons or 'none is in the chosen subsets'})",
            findings=report.findings,
        )
    return Scored(groups, report)


def _rated_prompts(report: RatingsReport) -> list[RatedPrompt]:
    prompts: list[RatedPrompt] = []
    seen: dict[tuple[str, str, tuple[str, ...]], int] = {}
    for number, values in _rows(report.source):
        report.rows += 1
        if _subset(values, number, report) not in report.scoring.subsets:
            continue
        row = RatedRow(values, number, report.source)
        prompt = row.read(report.scoring.weights)
        report.findings += row.findings
        if prompt is None:
            continue
        first = seen.setdefault((prompt.id, prompt.question, prompt.images), number)
        if first != number:
            problem = f"id, question and image are those of row {first}; the first one is kept"
            report.findings.append(Finding("duplicate-row", problem, report.source, number, "id"))
        else:
            prompts.append(prompt)
    return prompts


def _subset(values: Any, number: int, report: RatingsReport) -> str | None:
    """The row's subset, counted; ``None`` with a finding where there is none."""
    problem, subset = _row_problem(values), None
    if problem is None and (subset := subset_of(values)) is None:
        where = shown(values.get("image") or values.get("id"))
        problem = Finding("unknown-subset", f"{where} names none of {', '.join(SUBSETS)}", key="image")
    if problem is not None:
        report.findings.append(replace(problem, file=report.source, row=number))
    report.subsets[subset or "unknown"] += 1
    return subset


def _row_problem(values: Any) -> Finding | None:
    if isinstance(values, dict):
        return None
    problem = f"a row is an object with keys, not {json_type(values)}"
    return values if isinstance(values, Finding) else Finding("wrong-type", problem)


def _rated_pairs(prompt: RatedPrompt, report: RatingsReport) -> list[Pair]:
    """Every pair of different scores, the better first, that may stay."""
    best = 1 if report.scoring.best_rank == "lowest" else -1
    pairs = []
    for chosen, rejected in itertools.permutations(range(len(prompt.responses)), 2):
        margin = prompt.margin(chosen, rejected)
        report.ties += margin == 0 and chosen < rejected
        place, other = prompt.ranks[chosen], prompt.ranks[rejected]
        ahead = 0.0 if place is None or other is None else best * (other - place)
        if margin > 0 and report.keeps(margin, ahead > 0 if ahead else None):
            pairs.append(Pair(chosen, rejected, prompt.row, prompt.file))
    return pairs


def _joined_pairs(file: Path, prompts: Sequence[RatedPrompt], report: RatingsReport) -> list[list[Pair]]:
    """The published pairs of each prompt: the prompt is found by id or question, the responses by text."""
    by_key: dict[Any, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        if prompt.id:
            by_key[prompt.id].append(i)
        # One question is asked about many images; a pair without an image has to do without.
        for image in (*prompt.images, None):
            by_key[prompt.question, image].append(i)
    texts = [{response.text.strip(): i for i, response in enumerate(prompt.responses)} for prompt in prompts]
    pairs: list[list[Pair]] = [[] for _ in prompts]
    seen: set[tuple[int, Pair]] = set()
    report.pair_rows = 0
    for number, values in _rows(file):
        subset = subset_of(values) if isinstance(values, dict) else None
        if subset is not None and subset not in report.scoring.subsets:
            continue
        report.pair_rows += 1
        found = _find_pair(values, by_key, prompts, texts)
        if found in seen:
            found = Finding("duplicate-pair", "the file has this pair already")
        if isinstance(found, Finding):
            report.findings.append(replace(found, file=file, row=number))
            continue
        seen.add(found)
        at, pair = found
        margin = prompts[at].margin(pair.chosen, pair.rejected)
        report.ties += margin == 0
        if report.keeps(margin, margin > 0 if margin else None):
            pairs[at].append(pair)
    return pairs


def _find_pair(
    values: Any, by_key: Mapping[Any, Sequence[int]], prompts: Sequence[RatedPrompt], texts: Sequence[Mapping[str, int]]
) -> tuple[int, Pair] | Finding:
    """The index of the prompt a pair belongs to, and the pair, or why they were not found."""
    if (problem := _row_problem(values)) is not None:
        return problem
    question, image = values.get("prompt", values.get("question")), values.get("image")
    chosen, rejected = values.get("chosen"), values.get("rejected")
    if not (isinstance(question, str) and isinstance(chosen, str) and isinstance(rejected, str)):
        return Finding("wrong-type", "`prompt`, `chosen` and `rejected` are strings each")
    if not (image is None or isinstance(image, str)):
        return Finding("wrong-type", f"an image is a path, not {shown(image)}", key="image")
    by_id = [i for i in by_key.get(str(values.get("id")), ()) if image is None or image in prompts[i].images]
    same = [*by_id, *by_key.get((plain_question(question), image), ())]
    if not same:
        return Finding("no-such-prompt", f"{RATINGS_FILE} has no usable row with this question and image")
    for i in same:
        better, worse = texts[i].get(chosen.strip()), texts[i].get(rejected.strip())
        if better is not None and better == worse:
            return Finding("equal-responses", "chosen and rejected are the same text")
        if better is not None and worse is not None:
            return i, Pair(better, worse, prompts[i].row, prompts[i].file)
    row = prompts[same[0]].row
    return Finding("no-such-response", f"its texts are not both among the rated responses of {RATINGS_FILE}, row {row}")


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a file of MM-RLHF's. Raises `DataError` if there are none."""
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; `unidpo data fetch mm-rlhf --to {file.parent}` fetches it")
    is_empty = True
    for row in rows_of(file):
        is_empty = False
        yield row
    if is_empty:
        raise DataError(f"{file}: the file holds no rows")


def _folder(folder: str | Path) -> Path:
    folder = Path(folder)
    return folder.parent if folder.name == RATINGS_FILE else folder
