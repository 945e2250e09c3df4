"""The pairs MM-RLHF publishes without scores, scored by its human ratings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unidpo.data.formats.files import json_type
from unidpo.data.mm_rlhf.ratings import RatedPrompt, plain, subset_of
from unidpo.data.mm_rlhf.report import RATINGS_FILE, Progress, RatingsReport, counted_rows
from unidpo.data.pairs import Pair
from unidpo.errors import Finding, shown


def joined_pairs(
    file: Path, prompts: Sequence[RatedPrompt], report: RatingsReport, on_progress: Progress | None
) -> list[list[Pair]]:
    """The pairs of `dpo_pairs.jsonl` for each prompt: the prompt is found by id or question, responses by text."""
    by_key: dict[Any, list[int]] = {}
    for i, prompt in enumerate(prompts):
        # One question is asked about many images; a pair without an image has to do without.
        keys: list[Any] = [("question", prompt.question, image) for image in (*prompt.images, None)]
        for key in [*keys, ("id", prompt.id)] if prompt.id else keys:
            by_key.setdefault(key, []).append(i)
    texts = [{response.text.strip(): i for i, response in enumerate(prompt.responses)} for prompt in prompts]
    pairs: list[list[Pair]] = [[] for _ in prompts]
    seen: set[tuple[int, Pair]] = set()
    report.pair_rows = 0
    for number, values in counted_rows(file, "pairs, rows", on_progress):
        subset = subset_of(values) if isinstance(values, dict) else None
        if subset is not None and subset not in report.scoring.subsets:
            continue
        report.pair_rows += 1
        found = _find_pair(values, by_key, prompts, texts)
        if isinstance(found, Finding):
            report.findings.append(replace(found, file=file, row=number))
            continue
        if found in seen:
            report.findings.append(Finding("duplicate-pair", "this pair stands in the file before", file, number))
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
    if isinstance(values, Finding):
        return values
    if not isinstance(values, dict):
        return Finding("wrong-type", f"a row is an object with keys, not {json_type(values)}")
    question, image = values.get("prompt", values.get("question")), values.get("image")
    chosen, rejected = values.get("chosen"), values.get("rejected")
    if not (isinstance(question, str) and isinstance(chosen, str) and isinstance(rejected, str)):
        return Finding("wrong-type", "`prompt`, `chosen` and `rejected` are strings each")
    if not (image is None or isinstance(image, str)):
        return Finding("wrong-type", f"an image is a path, not {shown(image)}", key="image")
    by_id = [i for i in by_key.get(("id", str(values.get("id"))), ()) if image is None or image in prompts[i].images]
    same = [*by_id, *by_key.get(("question", plain(question), image), ())]
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
