"""Ranked responses, our own layout, which can hold every group: `prompt`, `responses: [{text, score}, ...]`."""

from __future__ import annotations

import graphlib
from collections.abc import Sequence
from typing import Any

from unidpo.data.formats.files import json_type
from unidpo.data.formats.row import IMAGE_COLUMNS, Row
from unidpo.data.formats.texts import Form, written
from unidpo.data.pairs import Pair, PromptGroup, Response, ranked_pairs
from unidpo.errors import shown

COLUMNS = ("prompt", "responses", "pairs", *IMAGE_COLUMNS)


def fits(given: dict[str, Any]) -> bool:
    """Whether a row is of this layout."""
    return "responses" in given


def read(row: Row) -> None:
    """Every larger score is chosen over a smaller, unless `pairs: [[chosen, rejected], ...]` says which of the
    responses, counted from 0, make pairs.
    """
    messages = row.prompt(row.messages(row.values.get("prompt"), "prompt"), "prompt", place_marks=True)
    items, given = row.values.get("responses"), row.values.get("pairs")
    if not isinstance(items, list) or len(items) < 2:
        row.error("too-few-responses", "responses", 'two or more {"text": ..., "score": ...} are expected')
        items = []
    responses: list[Response] = []
    for i, item in enumerate(items):
        key = f"responses[{i}]"
        if not isinstance(item, dict):
            row.error("wrong-type", key, f'a response is {{"text": ..., "score": ...}}, not {json_type(item)}')
            continue
        row.note_lost(item, key, "text", "score")
        text = row.response(item.get("text"), f"{key}.text")
        if item.get("score") is None and (given is None or row.require_scores):
            row.error("missing-score", f"{key}.score", "the score is missing; ranked responses need a number each")
        if text and any(text == other.text for other in responses):
            row.warn("duplicate-response", f"{key}.text", "this text stands in the row before; the two make no pair")
        responses.append(Response(text, row.score(item.get("score"), f"{key}.score")))
    pairs: list[Pair] = []
    if not row.is_bad:
        if given is None:
            pairs = [Pair(chosen, rejected, row.number, row.file) for chosen, rejected in _larger(responses)]
        else:
            pairs = _given_pairs(row, responses, given)
        if not pairs and not row.is_bad:
            row.error("no-pair", "responses", "all scores are equal, so nothing is preferred; remove the row")
    row.make_group(messages, responses, pairs)


def _larger(responses: Sequence[Response]) -> list[tuple[int, int]]:
    """Chosen and rejected wherever one scores more; a text that stands there twice makes no pair with itself."""
    every = ((pair.chosen, pair.rejected) for pair in ranked_pairs(responses, row=0))
    return [(i, j) for i, j in every if responses[i].text != responses[j].text]


def _given_pairs(row: Row, responses: Sequence[Response], given: Any) -> list[Pair]:
    pairs = []
    for i, indices in enumerate(given if isinstance(given, list) else [given]):
        key = f"pairs[{i}]"
        whole = isinstance(indices, list) and len(indices) == 2 and all(type(index) is int for index in indices)
        if not whole or not all(0 <= index < len(responses) for index in indices) or indices[0] == indices[1]:
            row.error("bad-pair", key, f"a pair is the numbers of two of the responses, from 0, not {shown(indices)}")
            continue
        chosen, rejected = (responses[index] for index in indices)
        if chosen.text == rejected.text:
            row.error("equal-responses", key, "chosen and rejected are the same text; remove the pair")
        if (chosen.score is None) != (rejected.score is None):
            row.error("missing-score", key, "one of the two responses has no score; a pair has both or none")
        row.compare(chosen.score, rejected.score, key)
        pair = Pair(indices[0], indices[1], row.number, row.file)
        if pair in pairs:
            row.warn("duplicate-pair", key, f"this pair stands in the row before, so it counts twice: {shown(indices)}")
        pairs.append(pair)
    better: dict[int, set[int]] = {}
    for pair in pairs:
        better.setdefault(pair.rejected, set()).add(pair.chosen)
    try:
        graphlib.TopologicalSorter(better).prepare()
    except graphlib.CycleError as error:
        order = " over ".join(map(str, error.args[1]))
        row.warn("pair-cycle", "pairs", f"the pairs go round in a circle ({order}), so they contradict; remove one")
    return pairs


def write(group: PromptGroup, form: Form) -> list[dict[str, Any]]:
    """One row; with `pairs` where they are not simply all that the scores make."""
    row: dict[str, Any] = {"prompt": written(group.messages, form)}
    row["responses"] = [{"text": response.text, "score": response.score} for response in group.responses]
    pairs = [(pair.chosen, pair.rejected) for pair in group.pairs]
    scored = all(response.score is not None for response in group.responses)
    if not scored or pairs != _larger(group.responses):
        row["pairs"] = [list(pair) for pair in pairs]
    return [row]
