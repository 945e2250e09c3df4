"""From one row to a prompt group, in every layout people keep scored pairs in.

A row says by its keys which layout it is in, so one file may mix them. Each layout is one function from `Row` to
a `PromptGroup`; a new one is a function more, and a line in `_layout`.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from unidpo.errors import Finding, shown
from unidpo.pairs import IMAGE, ImageMark, Message, Pair, PromptGroup, Response, ranked_pairs
from unidpo.sources.files import json_type

Content: TypeAlias = tuple[str | ImageMark, ...]
_EXPECTED = (
    "`instruction`, `chosen`, `rejected` (LLaMA-Factory), `prompt`, `chosen`, `rejected` (TRL) "
    "or `prompt`, `responses` (ranked)"
)
_MAX_SCORE = 1e38
"""Beyond it a margin is infinite in the float32 the losses are computed in."""


class Row:
    """One row while it is read: hands out checked values, and writes down everything that is wrong with them.

    Whoever asks for a bad value gets an empty one and goes on, so that one reading finds all errors of a row.
    """

    def __init__(self, values: Any, number: int, file: str | Path, root: Path, require_scores: bool) -> None:
        self.values = values
        self.number = number
        self.file = file
        self.root = root
        self.require_scores = require_scores
        self.findings: list[Finding] = []
        self.sources: list[tuple[str, Path | bytes]] = []

    def read(self) -> PromptGroup | None:
        """The row's group, or ``None`` with at least one error among the findings."""
        if not isinstance(self.values, dict):
            self.error("wrong-type", None, f"a row is an object with keys, not {json_type(self.values)}")
            return None
        layout = _layout(self.values)
        if layout is None:
            keys = shown(sorted(self.values)[:20], most=400)
            self.error("unknown-layout", None, f"the keys {keys} are of no known layout; expected {_EXPECTED}")
            return None
        try:
            return layout(self)
        except RecursionError:
            self.error("wrong-type", None, "the values are nested too deeply to be a row")
            return None

    @property
    def is_bad(self) -> bool:
        """Whether the row cannot be used, as far as it was read."""
        return any(finding.severity == "error" for finding in self.findings)

    def error(self, kind: str, key: str | None, problem: str) -> None:
        """Note something for which the row cannot be used."""
        self.findings.append(Finding(kind, problem, self.file, self.number, key, "error"))

    def warn(self, kind: str, key: str | None, problem: str) -> None:
        """Note something worth knowing about a row that can be used."""
        self.findings.append(Finding(kind, problem, self.file, self.number, key, "warning"))

    def text(self, value: Any, key: str) -> str:
        """A string that can be tokenised, or "" with an error."""
        if value is None:
            self.error("missing-key", key, "the key is missing or null; a string is expected")
        elif not isinstance(value, str):
            self.error("wrong-type", key, f"a string is expected, not {json_type(value)}")
        else:
            try:
                value.encode()
                return value
            except UnicodeEncodeError:
                self.error("bad-text", key, "the text holds half a surrogate pair, which is no character; remove it")
        return ""

    def optional_text(self, key: str) -> str:
        """The string under a key, "" where there is none."""
        return "" if self.values.get(key) is None else self.text(self.values[key], key)

    def response(self, value: Any, key: str) -> str:
        """The text of a response: a string, or one assistant message."""
        before = len(self.findings)
        if isinstance(value, list):
            if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
                problem = "a response is a string or one assistant message; what comes before it is the prompt"
                self.error("wrong-type", key, problem)
                return ""
            content = self.content(value[0].get("content"), f"{key}[0].content", marks=False)
            if IMAGE in content:
                self.error("wrong-type", key, "a response holds text only, no image")
            text = "".join(part for part in content if isinstance(part, str))
        else:
            text = self.text(value, key)
        if len(self.findings) == before and not text.strip():
            self.error("empty-response", key, "the response is empty; give its text or remove the row")
        return text

    def score(self, value: Any, key: str) -> float | None:
        """A finite number, or ``None``: where there is none, and with an error where there is something else."""
        remedy = "a score is a finite number, higher is better"
        if value is None:
            return None
        if isinstance(value, str):
            self.error("bad-score", key, f"{shown(value)} is a string; {remedy}, written without quotes")
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            self.error("bad-score", key, f"{shown(value)} is no number; {remedy}")
        else:
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if abs(number) <= _MAX_SCORE:
                return number
            self.error("bad-score", key, f"{number} cannot be used; {remedy}")
        return None

    def content(self, value: Any, key: str, *, marks: bool = True) -> Content:
        """A message's content. In a string ``<image>`` marks an image, in a list of parts the image parts do."""
        if not isinstance(value, list):
            text = self.text(value, key)
            return _marked(text) if marks else (text,)
        parts: list[str | ImageMark] = []
        for i, part in enumerate(value):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image":
                parts.append(IMAGE)
                if any(part.get(name) is not None for name in ("image", "path", "url")):
                    self.error("inline-image", f"{key}[{i}]", "name the image under `images`, not inside the message")
            elif kind == "text":
                parts.append(self.text(part.get("text"), f"{key}[{i}].text"))
            else:
                problem = 'a part is {"type": "text", "text": ...} or {"type": "image"}'
                self.error("wrong-type", f"{key}[{i}]", f"{problem}, not {shown(part)}")
        return _joined(parts)

    def messages(self, value: Any, key: str) -> list[Message]:
        """A prompt: a string, or messages of which the last is the user's."""
        if not isinstance(value, list):
            return [Message("user", _marked(self.text(value, key)))]
        messages = []
        for i, item in enumerate(value):
            role = item.get("role") if isinstance(item, dict) else None
            if role == "system" or role == "user" or role == "assistant":
                content = self.content(item.get("content"), f"{key}[{i}].content", marks=role != "system")
                messages.append(Message(role, content))
            elif not isinstance(item, dict):
                self.error("wrong-type", f"{key}[{i}]", f"a message has `role` and `content`, not {json_type(item)}")
            else:
                problem = f"the role is system, user or assistant, not {shown(role)}"
                self.error("bad-role", f"{key}[{i}].role", problem)
        if not value:
            self.error("empty-prompt", key, "the prompt has no message")
        elif messages and messages[-1].role != "user":
            self.error("bad-role", key, "a prompt ends with a message of the user, which the responses answer")
        return messages

    def images(self) -> int:
        """Read the row's images into ``sources``, with their keys, and say how many it names."""
        given = [key for key in ("images", "image") if self.values.get(key) is not None]
        if not given:
            return 0
        if len(given) > 1:
            self.error("wrong-type", "image", "both `images` and `image` are given; keep one of them")
        value = self.values[given[0]]
        entries = (
            [(f"{given[0]}[{i}]", entry) for i, entry in enumerate(value)]
            if isinstance(value, list)
            else [(given[0], value)]
        )
        read = [(key, self.image(entry, key)) for key, entry in entries]
        self.sources = [(key, source) for key, source in read if source is not None]
        return len(entries)

    def image(self, value: Any, key: str) -> Path | bytes | None:
        """A path joined to the image folder, or encoded bytes. The disk is not touched."""
        if isinstance(value, dict) and isinstance(value.get("bytes"), str):
            try:
                return base64.b64decode(value["bytes"], validate=True)
            except ValueError:
                self.error("broken-image", key, "`bytes` is not valid base64; encode the file again")
                return None
        path = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else value
        if not isinstance(path, str) or not path.strip():
            self.error("wrong-type", key, f'an image is a path or {{"bytes": base64}}, not {shown(value)}')
        elif path.startswith(("http://", "https://", "data:")):
            problem = 'addresses are not fetched; give a path, or {"bytes": base64}'
            self.error("remote-image", key, f"{shown(path)} is an address; {problem}")
        else:
            return self.root / path
        return None

    def prompt(self, messages: list[Message], key: str, *, place_marks: bool) -> list[Message]:
        """Bring a prompt and the row's images together. Comes before the responses are read.

        With ``place_marks``, images of a prompt without any mark go before the first user's text.
        """
        readable = not self.is_bad
        images = self.images()
        marks = sum(part is IMAGE for message in messages for part in message.content)
        if not readable:
            return messages  # what else could be said of it would only follow from that error
        if place_marks and not marks:
            first = next(i for i, message in enumerate(messages) if message.role == "user")
            messages[first] = Message("user", (IMAGE,) * images + messages[first].content)
        elif marks != images:
            problem = f"`<image>` marks in the prompt: {marks}, images in the row: {images}; make them equal"
            self.error("image-marks", key, problem)
        if not any(part is IMAGE or str(part).strip() for m in messages for part in m.content):
            self.error("empty-prompt", key, "the prompt is empty; give its text")
        return messages

    def group(self, messages: list[Message], responses: list[Response], pairs: list[Pair]) -> PromptGroup | None:
        """The row put together, or ``None`` if anything was wrong with it."""
        if self.is_bad:
            return None
        images = tuple(source for _, source in self.sources)
        return PromptGroup(tuple(messages), images, tuple(responses), tuple(pairs))


def _marked(text: str) -> Content:
    """Text in which ``<image>`` marks an image."""
    parts: list[str | ImageMark] = []
    for i, piece in enumerate(text.split(IMAGE.value)):
        parts += [IMAGE, piece] if i else [piece]
    return _joined(parts)


def _joined(parts: Sequence[str | ImageMark]) -> Content:
    """The same content with neighbouring texts joined and empty ones gone: equal prompts compare equal."""
    joined: list[str | ImageMark] = []
    for is_text, run in itertools.groupby(parts, key=lambda part: isinstance(part, str)):
        if not is_text:
            joined += run
        elif text := "".join(map(str, run)):
            joined.append(text)
    return tuple(joined)


def _layout(values: dict[str, Any]) -> Callable[[Row], PromptGroup | None] | None:
    if "responses" in values:
        return _ranked
    if "instruction" in values and not isinstance(values.get("chosen"), list):
        return _instruction
    if "prompt" in values or ("chosen" in values and "rejected" in values and "conversations" not in values):
        return _preference
    return None


def _instruction(row: Row) -> PromptGroup | None:
    """LLaMA-Factory's alpaca ranking: `instruction`, `input`, `system`, `history`, `chosen`, `rejected`."""
    messages = []
    if system := row.optional_text("system"):
        messages.append(Message("system", (system,)))
    history = row.values.get("history") or []
    if not isinstance(history, list):
        row.error("wrong-type", "history", f"a list of turns is expected, not {json_type(history)}")
        history = []
    for i, turn in enumerate(history):
        if isinstance(turn, list) and len(turn) == 2:
            messages.append(Message("user", _marked(row.text(turn[0], f"history[{i}][0]"))))
            messages.append(Message("assistant", _marked(row.text(turn[1], f"history[{i}][1]"))))
        else:
            row.error("wrong-type", f"history[{i}]", f"a turn is [user, assistant], not {shown(turn)}")
    question = [row.text(row.values["instruction"], "instruction"), row.optional_text("input")]
    messages.append(Message("user", _marked("\n".join(filter(None, question)))))
    messages = row.prompt(messages, "instruction", place_marks=False)
    responses = _two_responses(row, row.values.get("chosen"), row.values.get("rejected"))
    return row.group(messages, responses, [Pair(0, 1, row.number)])


def _preference(row: Row) -> PromptGroup | None:
    """TRL's preference layout: `prompt`, `chosen`, `rejected` as strings or message lists, the prompt at times
    only as what both lists begin with.
    """
    prompt, chosen, rejected = (row.values.get(key) for key in ("prompt", "chosen", "rejected"))
    prompt_key = "prompt"
    if isinstance(chosen, list) and isinstance(rejected, list):
        start = prompt if isinstance(prompt, list) else chosen[: _shared_start(chosen, rejected)]
        if start and not isinstance(prompt, list):
            prompt, prompt_key = start, "chosen"  # as in TRL: beside whole conversations a prompt string is a label
        if chosen[: len(start)] == start == rejected[: len(start)]:
            chosen, rejected = chosen[len(start) :], rejected[len(start) :]
    messages = row.prompt(row.messages(prompt, prompt_key), prompt_key, place_marks=True)
    responses = _two_responses(row, chosen, rejected)
    return row.group(messages, responses, [Pair(0, 1, row.number)])


def _ranked(row: Row) -> PromptGroup | None:
    """Ranked responses: `prompt`, `responses: [{text, score}, ...]`. Every larger score is chosen over a smaller."""
    messages = row.prompt(row.messages(row.values.get("prompt"), "prompt"), "prompt", place_marks=True)
    items = row.values["responses"]
    if not isinstance(items, list) or len(items) < 2:
        row.error("too-few-responses", "responses", 'two or more {"text": ..., "score": ...} are expected')
        items = []
    responses: list[Response] = []
    for i, item in enumerate(items):
        key = f"responses[{i}]"
        if not isinstance(item, dict):
            row.error("wrong-type", key, f'a response is {{"text": ..., "score": ...}}, not {json_type(item)}')
            continue
        text = row.response(item.get("text"), f"{key}.text")
        if item.get("score") is None:
            row.error("missing-score", f"{key}.score", "the score is missing; ranked responses need a number each")
        if text and any(text == other.text for other in responses):
            row.warn("duplicate-response", f"{key}.text", "this text stands in the row before; the two make no pair")
        responses.append(Response(text, row.score(item.get("score"), f"{key}.score")))
    pairs: list[Pair] = []
    if not row.is_bad:
        every = ranked_pairs(responses, row.number)
        pairs = [pair for pair in every if responses[pair.chosen].text != responses[pair.rejected].text]
        if not pairs:
            row.error("no-pair", "responses", "all scores are equal, so nothing is preferred; remove the row")
    return row.group(messages, responses, pairs)


def _shared_start(first: list[Any], second: list[Any]) -> int:
    """How many messages two conversations begin with alike; the last of each is its response and never counts."""
    most = min(len(first), len(second)) - 1
    return next((i for i in range(most) if first[i] != second[i]), max(most, 0))


def _two_responses(row: Row, chosen: Any, rejected: Any) -> list[Response]:
    texts = row.response(chosen, "chosen"), row.response(rejected, "rejected")
    if texts[0] == texts[1] != "":
        row.error("equal-responses", "rejected", "chosen and rejected are the same text; remove the row")
    keys = "score_chosen", "score_rejected"
    missing = [key for key in keys if row.values.get(key) is None]
    if len(missing) == 1 or (missing and row.require_scores):
        problem = "there is no score; a pair has both `score_chosen` and `score_rejected`, a number each"
        row.error("missing-score", missing[0], problem)
    scores = [row.score(row.values.get(key), key) for key in keys]
    if scores[0] is not None and scores[1] is not None:
        if scores[0] == scores[1]:
            row.warn("tied-scores", "score_chosen", f"both responses have the score {scores[0]:g}")
        elif scores[0] < scores[1]:
            problem = f"the chosen response scores {scores[0]:g}, the rejected one {scores[1]:g}"
            row.warn("reversed-scores", "score_chosen", problem)
    return [Response(text, score) for text, score in zip(texts, scores, strict=True)]
