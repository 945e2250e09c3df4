"""Texts of a row and what they mean: image marks in them, what of them can be seen, how prompts are written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

from unidpo.data.pairs import IMAGE, ImageMark, Message, PromptGroup

Content: TypeAlias = tuple[str | ImageMark, ...]
Form: TypeAlias = Literal["text", "messages", "parts"]
"""What a prompt is in a file: a string, messages of strings, or messages of typed parts. One for all of its rows, or
tools that infer a column's type could not load it."""
_MARK = re.compile(f"({IMAGE.value})")
_VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


def is_visible(text: str) -> bool:
    """Whether a text has a character that can be seen: no white space, control character or mark of width zero."""
    return _VISIBLE.search(text) is not None


def encodable(value: str) -> bool:
    """Whether a string can be written as UTF-8, which one with a lone surrogate cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def marked(text: str) -> Content:
    """Text in which ``<image>`` marks an image."""
    return tuple(IMAGE if part == IMAGE.value else part for part in _MARK.split(text) if part)


def joined(parts: Iterable[str | ImageMark]) -> Content:
    """The same content with neighbouring texts joined and empty ones gone: equal prompts compare equal."""
    result: list[str | ImageMark] = []
    for part in parts:
        if isinstance(part, str) and result and isinstance(result[-1], str):
            result[-1] = f"{result[-1]}{part}"
        elif part != "":
            result.append(part)
    return tuple(result)


def turns_of(text: str, mark: re.Pattern[str], *, first: str = "") -> list[dict[str, str]]:
    """Messages of a dialogue that stands in one string.

    Args:
        text: the dialogue.
        mark: what stands before each turn; its group says whose turn it is.
        first: whose turn it is before the first mark, where there is a text.
    """
    parts = [first, *mark.split(text)]
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [
        {"role": "assistant" if name == "Assistant" else "user", "content": said.strip()}
        for i, (name, said) in enumerate(turns)
        if i or said.strip()
    ]


def spells_mark(messages: Sequence[Message]) -> bool:
    """Whether a text of the prompt says ``<image>`` without meaning one. In a system text it never means one."""
    spoken = [message for message in messages if message.role != "system"]
    return any(isinstance(part, str) and IMAGE.value in part for m in spoken for part in joined(m.content))


def plainest_form(group: PromptGroup) -> Form:
    """The plainest form that can hold the prompt of a group."""
    if spells_mark(group.messages) or any(m.role == "system" and IMAGE in m.content for m in group.messages):
        return "parts"
    return "text" if [message.role for message in group.messages] == ["user"] else "messages"


def written(messages: Sequence[Message], form: Form) -> Any:
    """Messages as a file has them."""
    if form == "text":
        return messages[0].text
    return [{"role": m.role, "content": m.text if form == "messages" else _parts(m)} for m in messages]


def _parts(message: Message) -> list[dict[str, str]]:
    parts = joined(message.content)
    return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]


def system_and_turns(messages: Sequence[Message]) -> tuple[str | None, list[str]]:
    """System text, if any, and the turns that follow as strings, the user's first and last.

    Raises:
        ValueError: the messages are in another order, or a text would be read as an image mark.
    """
    has_system = messages[0].role == "system"
    rest = messages[1:] if has_system else messages
    if [m.role for m in rest] != ["user", "assistant"] * (len(rest) // 2) + ["user"]:
        raise ValueError("a prompt in which user and assistant do not take turns")
    if has_system and IMAGE in messages[0].content:
        raise ValueError("an image in the system message")
    if spells_mark(rest):
        raise ValueError("the text `<image>`, which it reads as an image")
    return messages[0].text if has_system else None, [message.text for message in rest]
