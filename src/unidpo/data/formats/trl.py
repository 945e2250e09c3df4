"""The layouts whose prompts are strings or role messages: TRL's preference pairs, and ranked responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from unidpo.data.formats.files import json_type
from unidpo.data.formats.rows import Row
from unidpo.data.formats.texts import joined
from unidpo.data.pairs import IMAGE, Message, Pair, PromptGroup, Response, ranked_pairs
from unidpo.errors import shown

Form: TypeAlias = Literal["text", "messages", "parts"]
"""What a prompt is in a file: a string, messages of strings, or messages of typed parts. One for all of its rows, or
tools that infer a column's type could not load it."""


def read_trl(row: Row) -> None:
    """TRL's preference layout: `prompt`, `chosen`, `rejected` as strings or message lists, the prompt at times
    only as what both lists begin with.
    """
    prompt, chosen, rejected = (row.values.get(key) for key in ("prompt", "chosen", "rejected"))
    prompt_key = "prompt"
    label: Any = None
    if isinstance(chosen, list) and isinstance(rejected, list):
        start: Any = prompt if isinstance(prompt, list) else chosen[: _shared_start(chosen, rejected)]
        if start and not isinstance(prompt, list):
            # As in TRL: beside whole conversations a prompt string is a label.
            prompt, prompt_key, label = start, "chosen", prompt
        if chosen[: len(start)] == start == rejected[: len(start)]:
            chosen, rejected = chosen[len(start) :], rejected[len(start) :]
    messages = row.prompt(row.messages(prompt, prompt_key), prompt_key, place_marks=True)
    if label is not None and messages and label != messages[-1].text:
        row.lost.append("prompt")
    row.pair(messages, chosen, rejected)


def _shared_start(first: list[Any], second: list[Any]) -> int:
    """How many messages two conversations begin with alike; the last of each is its response and never counts."""
    most = min(len(first), len(second)) - 1
    return next((i for i in range(most) if first[i] != second[i]), max(most, 0))


def prompt_columns(group: PromptGroup, form: Form) -> dict[str, Any]:
    """The prompt's column of both layouts."""
    if form == "text":
        [message] = group.messages
        return {"prompt": message.text}
    return {"prompt": [{"role": m.role, "content": content_as(form, m)} for m in group.messages]}


def content_as(form: Form, message: Message) -> Any:
    """A message's content as a string with marks, or as parts."""
    if form == "messages":
        return message.text
    parts = joined(message.content)
    return [{"type": "image"} if part is IMAGE else {"type": "text", "text": part} for part in parts]


def read_ranked(row: Row) -> None:
    """Ranked responses: `prompt`, `responses: [{text, score}, ...]`. Every larger score is chosen over a smaller,
    unless `pairs: [[chosen, rejected], ...]` says which of the responses, counted from 0, make pairs.
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
        row.others(item, key, "text", "score")
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
    row.together(messages, responses, pairs)


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
    if (cycle := _cycle(pairs)) is not None:
        order = " over ".join(map(str, cycle))
        row.warn("pair-cycle", "pairs", f"the pairs go round in a circle ({order}), so they contradict; remove one")
    return pairs


def _cycle(pairs: Sequence[Pair]) -> list[int] | None:
    """Responses of which each is chosen over the next, and the last is the first; none where there is an order."""
    below: dict[int, list[int]] = {}
    for pair in pairs:
        below.setdefault(pair.chosen, []).append(pair.rejected)
    done: set[int] = set()
    for start in below:
        path, left = [start], [iter(below[start])]
        while left:
            following = next(left[-1], None)
            if following is None:
                left.pop()
                done.add(path.pop())
            elif following in path:
                return [*path[path.index(following) :], following]
            elif following not in done:
                path.append(following)
                left.append(iter(below.get(following, ())))
    return None


def ranked_columns(group: PromptGroup) -> dict[str, Any]:
    """The responses' columns, and the pairs where they are not simply all that the scores make."""
    columns: dict[str, Any] = {"responses": [{"text": r.text, "score": r.score} for r in group.responses]}
    pairs = [(pair.chosen, pair.rejected) for pair in group.pairs]
    scored = all(response.score is not None for response in group.responses)
    if not scored or pairs != _larger(group.responses):
        columns["pairs"] = [list(pair) for pair in pairs]
    return columns
