"""One row while it is read: checked values out, everything that is wrong with it written down."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import PIL.Image

from unidpo.data.formats.dataset_info import PLAIN, ColumnNames
from unidpo.data.formats.files import json_type
from unidpo.data.formats.texts import Content, encodable, is_visible, joined, marked
from unidpo.data.pairs import IMAGE, ImageMark, ImageSource, Message, Pair, PromptGroup, Response
from unidpo.errors import Finding, shown

_MAX_SCORE = 1e38
"""Beyond it a margin is infinite in the float32 the losses are computed in."""
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", re.IGNORECASE)
"""How what is no path begins."""
IMAGE_COLUMNS = ("images", "image")
PATH_COLUMN = "img_path"
"""What VLFeedback calls it."""
IMAGE_KEYS = ("image", "path", "url", "image_url")
"""Where an image part of a message may name its image."""
PAIR_COLUMNS = ("chosen", "rejected", "score_chosen", "score_rejected", *IMAGE_COLUMNS)
_TURNS: tuple[Literal["user", "assistant"], ...] = ("user", "assistant")
DATA_URI = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


@dataclass(slots=True)
class Row:
    """One row while it is read: hands out checked values, and writes down everything that is wrong with them.

    A bad value is returned as an empty one, so that one reading finds all errors of a row.

    Attributes:
        given: the row as it stands in the file.
        number: from 1.
        file: what it stands in.
        root: the folder relative image paths start from.
        require_scores: whether a pair without scores is an error.
        columns: how the file names its columns.
        shared: images embedded in the file; equal ones become one object.
        weights: how much each rating counts in a score, where the user says so.
        values: its columns under the layout's own names, once the layout is known.
        findings: what is wrong with it, or worth knowing.
        images: those it names, with their keys.
        lost: keys that hold something a prompt group has no place for, below the columns of the layout.
        layout: the name of its layout, once known.
        group: what was read, or ``None`` with at least one error among the findings.
    """

    given: Any
    number: int
    file: str | Path | None
    root: Path
    require_scores: bool = False
    columns: ColumnNames = PLAIN
    shared: dict[bytes, bytes] = field(default_factory=dict)
    weights: Mapping[str, float] | None = None
    values: dict[str, Any] = field(default_factory=dict, init=False)
    findings: list[Finding] = field(default_factory=list, init=False)
    images: list[tuple[str, ImageSource]] = field(default_factory=list, init=False)
    lost: list[str] = field(default_factory=list, init=False)
    layout: str | None = field(default=None, init=False)
    group: PromptGroup | None = field(default=None, init=False)
    _inline: list[tuple[str, Any]] = field(default_factory=list, init=False)

    def rename(self, **names: str) -> None:
        """Read columns that this row has under other names: the layout's name of each, and the file's."""
        self.columns = replace(self.columns, names={**self.columns.names, **names})
        self.values |= {name: self.given[column] for name, column in names.items() if column in self.given}

    @property
    def is_bad(self) -> bool:
        """Whether the row cannot be used, as far as it was read."""
        return any(finding.severity == "error" for finding in self.findings)

    def error(self, kind: str, key: str | None, problem: str) -> None:
        """Note something for which the row cannot be used."""
        self.findings.append(Finding(kind, problem, self.file, self.number, self._key_in_file(key), "error"))

    def warn(self, kind: str, key: str | None, problem: str) -> None:
        """Note something worth knowing about a row that can be used."""
        self.findings.append(Finding(kind, problem, self.file, self.number, self._key_in_file(key), "warning"))

    def text(self, value: Any, key: str) -> str:
        """A string that can be tokenised, or "" with an error."""
        if value is None:
            self.error("missing-key", key, "the key is missing or null; a string is expected")
        elif not isinstance(value, str):
            self.error("wrong-type", key, f"a string is expected, not {json_type(value)}")
        elif not encodable(value):
            self.error("bad-text", key, "the text holds half a surrogate pair, which is no character; remove it")
        else:
            return value
        return ""

    def optional_text(self, key: str) -> str:
        """The string under a key, "" where there is none."""
        return "" if self.values.get(key) is None else self.text(self.values[key], key)

    def system(self) -> list[Message]:
        """The message of the `system` column; none where that is empty."""
        text = self.optional_text("system")
        return [Message("system", (text,))] if text else []

    def score(self, value: Any, key: str) -> float | None:
        """A finite number, or ``None``: where there is none, and with an error where there is something else."""
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and abs(value) <= _MAX_SCORE:
            return float(value)
        if value is not None:
            problem = f"{shown(value)} is no score; a score is a finite number, higher is better, without quotes"
            self.error("bad-score", key, problem)
        return None

    def response(self, value: Any, key: str, read: Callable[[Any, str], str] | None = None) -> str:
        """The text of a response: a string, or a list of one assistant message, or what a layout's own ``read`` finds.

        An empty one is an error.
        """
        before = len(self.findings)
        text = (read or self._plain_response)(value, key)
        if all(finding.severity == "warning" for finding in self.findings[before:]) and not is_visible(text):
            self.error("empty-response", key, "the response is empty; give its text or remove the row")
        return text

    def _plain_response(self, value: Any, key: str) -> str:
        if not isinstance(value, list):
            return self.text(value, key)
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != "assistant":
            problem = "a response is a string or one assistant message; several answers go under `responses`"
            self.error("wrong-type", key, problem)
            return ""
        self.note_lost(value[0], f"{key}[0]", "role", "content")
        content = self.content(value[0].get("content"), f"{key}[0].content", marks=False)
        if IMAGE in content:
            self.error("wrong-type", key, "a response holds text only, no image")
        return "".join(part for part in content if isinstance(part, str))

    def content(self, value: Any, key: str, *, marks: bool = True) -> Content:
        """A message's content. In a string ``<image>`` marks an image, in a list of parts the image parts do."""
        if not isinstance(value, list):
            text = self.text(value, key)
            return marked(text) if marks else joined([text])
        parts: list[str | ImageMark] = []
        for i, part in enumerate(value):
            at = f"{key}[{i}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "image" or kind == "image_url":
                parts.append(IMAGE)
                self.note_lost(part, at, "type", *IMAGE_KEYS)
                given = [name for name in IMAGE_KEYS if part.get(name) is not None]
                self._inline += [(f"{at}.{name}", part[name]) for name in given[:1]]
            elif kind == "text":
                parts.append(self.text(part.get("text"), f"{at}.text"))
                self.note_lost(part, at, "type", "text")
            else:
                problem = 'a part is {"type": "text", "text": ...} or {"type": "image"}'
                self.error("wrong-type", at, f"{problem}, not {shown(part)}")
        return joined(parts)

    def messages(self, value: Any, key: str) -> list[Message]:
        """A prompt: a string, or messages of which the last is the user's."""
        if not isinstance(value, list):
            return [Message("user", marked(self.text(value, key)))]
        messages = []
        for i, item in enumerate(value):
            role = item.get("role") if isinstance(item, dict) else None
            if role == "system" or role == "user" or role == "assistant":
                content = self.content(item.get("content"), f"{key}[{i}].content", marks=role != "system")
                messages.append(Message(role, content))
                self.note_lost(item, f"{key}[{i}]", "role", "content")
            elif not isinstance(item, dict):
                self.error("wrong-type", f"{key}[{i}]", f"a message has `role` and `content`, not {json_type(item)}")
            else:
                problem = f"the role is system, user or assistant, not {shown(role)}"
                self.error("bad-role", f"{key}[{i}].role", problem)
        self.require_user_last(messages, value, key)
        return messages

    def require_user_last(self, messages: Sequence[Message], given: Sequence[Any], key: str) -> None:
        """What holds of every prompt in messages."""
        if not given:
            self.error("empty-prompt", key, "the prompt has no message")
        elif messages and messages[-1].role != "user":
            self.error("bad-role", key, "a prompt ends with a message of the user, which the responses answer")

    def prompt(self, messages: list[Message], key: str, *, place_marks: bool) -> list[Message]:
        """Bring a prompt and the row's images together. Comes before the responses are read.

        With ``place_marks``, images of a prompt without any mark go before the first user's text.
        """
        readable = not self.is_bad
        images = self._images()
        marks = sum(part is IMAGE for message in messages for part in message.content)
        if not readable or (self.is_bad and self._inline):
            return messages  # what else could be said of it would only follow from that error
        if place_marks and not marks:
            first = next(i for i, message in enumerate(messages) if message.role == "user")
            messages[first] = Message("user", (IMAGE,) * images + messages[first].content)
        elif marks != images:
            problem = f"`<image>` marks in the prompt: {marks}, images in the row: {images}; make them equal"
            self.error("image-marks", key, problem)
        if not any(part is IMAGE or is_visible(str(part)) for m in messages for part in m.content):
            self.error("empty-prompt", key, "the prompt is empty; give its text")
        elif len(messages) > 1:
            self._warn_of_odd_turns(messages, key)
        return messages

    def _warn_of_odd_turns(self, messages: Sequence[Message], key: str) -> None:
        """Note turns that most models were never trained on, and some templates refuse."""
        roles = [message.role for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        if any(role != _TURNS[i % 2] for i, role in enumerate(turns)):
            expected = "after at most one system message, user and assistant take turns"
            self.warn("role-order", key, f"the roles are out of order ({', '.join(roles[:9])}); {expected}")
        for i, message in enumerate(messages):
            if not message.content and message.role != "system":
                self.warn("empty-message", key, f"message {i + 1} of the prompt, of the {message.role}, is empty")

    def make_group(self, messages: Sequence[Message], responses: Sequence[Response], pairs: Sequence[Pair]) -> None:
        """Make the group, unless anything was wrong."""
        if not self.is_bad:
            images = tuple(source for _, source in self.images)
            self.group = PromptGroup(tuple(messages), images, tuple(responses), tuple(pairs))

    def make_pair(self, messages: Sequence[Message], chosen: str, rejected: str) -> None:
        """Make the group of an ordinary pair, whose scores stand beside it."""
        if chosen == rejected != "":
            self.error("equal-responses", "rejected", "chosen and rejected are the same text; remove the row")
        keys = "score_chosen", "score_rejected"
        missing = [key for key in keys if self.values.get(key) is None]
        if len(missing) == 1 or (missing and self.require_scores):
            problem = "there is no score; a pair has both `score_chosen` and `score_rejected`, a number each"
            self.error("missing-score", missing[0], problem)
        scores = [self.score(self.values.get(key), key) for key in keys]
        self.compare(scores[0], scores[1], "score_chosen")
        responses = Response(chosen, scores[0]), Response(rejected, scores[1])
        self.make_group(messages, responses, [Pair(0, 1, self.number, self.file)])

    def compare(self, chosen: float | None, rejected: float | None, key: str) -> None:
        """Note scores that do not prefer the chosen response."""
        if chosen is None or rejected is None or chosen > rejected:
            return
        if chosen == rejected:
            self.warn("tied-scores", key, f"both responses have the score {chosen:g}")
        else:
            self.warn("reversed-scores", key, f"the chosen response scores {chosen:g}, the rejected one {rejected:g}")

    def note_lost(self, value: dict[Any, Any], key: str, *known: str) -> None:
        """Remember what an object holds besides the keys that are read."""
        if len(value) > len(known) or not value.keys() <= set(known):
            self.lost += [f"{self._key_in_file(key)}.{k}" for k, v in value.items() if k not in known and v is not None]

    def _images(self) -> int:
        """Read the row's images into ``images``, with their keys, and say how many it names."""
        given = [key for key in IMAGE_COLUMNS if self.values.get(key) is not None]
        if len(given) > 1:
            self.error("wrong-type", "image", "both `images` and `image` are given; keep one of them")
        entries: list[tuple[str, Any]] = []
        for column in given[:1]:
            value = self.values[column]
            listed = isinstance(value, list)
            entries = [(f"{column}[{i}]", entry) for i, entry in enumerate(value)] if listed else [(column, value)]
            for key, _ in self._inline if entries else ():
                problem = f"the row names images under `{column}` too; keep one of them"
                self.error("inline-image", key.rpartition(".")[0], problem)
        read = [(key, self._image(entry, key)) for key, entry in entries or self._inline]
        self.images = [(key, source) for key, source in read if source is not None]
        return len(read)

    def _image(self, value: Any, key: str) -> ImageSource | None:
        """A path joined to the image folder, encoded bytes, or a decoded image. The disk is not touched."""
        if isinstance(value, PIL.Image.Image):
            return value
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, dict) and value.get("bytes") is not None:
            value = value["bytes"]
            if isinstance(value, str):
                return self._decoded(value, key)
        elif isinstance(value, dict):
            value = value.get("path") if value.get("path") is not None else value.get("url")
        if isinstance(value, bytes):
            return self.shared.setdefault(value, value)
        if not isinstance(value, str) or not value.strip():
            self.error("wrong-type", key, f'an image is a path or {{"bytes": base64}}, not {shown(value)}')
        elif match := DATA_URI.match(value):
            return self._decoded(value[match.end() :], key)
        elif ADDRESS.match(value):
            problem = 'addresses are not fetched; give a path, or {"bytes": base64}'
            self.error("remote-image", key, f"{shown(value)} is an address; {problem}")
        elif not encodable(value):
            self.error("bad-text", key, "the path holds half a surrogate pair, which is no character")
        else:
            return self.root / value
        return None

    def _decoded(self, text: str, key: str) -> bytes | None:
        try:
            data = base64.b64decode(text, validate=True)
        except ValueError:
            self.error("broken-image", key, "the image is not valid base64; encode the file again")
            return None
        return self.shared.setdefault(data, data)

    def _key_in_file(self, key: str | None) -> str | None:
        """A key as the file spells it, where its columns have other names."""
        if key is None or not self.columns.names:
            return key
        head = re.split(r"[.\[]", key, maxsplit=1)[0]
        return self.columns.names.get(head, head) + key[len(head) :]


def pair_rows(group: PromptGroup, prompt: dict[str, Any], respond: Callable[[str], Any]) -> list[dict[str, Any]]:
    """A row for each pair of a group: the prompt's columns, both responses as ``respond`` gives them, their scores."""
    rows = []
    for pair in group.pairs:
        row = dict(prompt)
        for name, index in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            response = group.responses[index]
            row[name] = respond(response.text)
            if response.score is not None:
                row[f"score_{name}"] = response.score
        rows.append(row)
    return rows
