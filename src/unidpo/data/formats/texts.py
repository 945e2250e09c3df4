"""Texts of a row: image marks in them, and what of them can be seen and written."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TypeAlias

from unidpo.data.pairs import IMAGE, ImageMark, Message

Content: TypeAlias = tuple[str | ImageMark, ...]
_VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


def is_visible(text: str) -> bool:
    """Whether a text has a character that can be seen: no white space, control character or mark of width zero."""
    return _VISIBLE.search(text) is not None


def marked(text: str) -> Content:
    """Text in which ``<image>`` marks an image."""
    if IMAGE.value not in text:
        return (text,) if text else ()
    parts: list[str | ImageMark] = []
    for i, piece in enumerate(text.split(IMAGE.value)):
        parts += [IMAGE, piece] if i else [piece]
    return joined(parts)


def joined(parts: Sequence[str | ImageMark]) -> Content:
    """The same content with neighbouring texts joined and empty ones gone: equal prompts compare equal."""
    if len(parts) < 2:
        return tuple(part for part in parts if part != "")
    result: list[str | ImageMark] = []
    for is_text, run in itertools.groupby(parts, key=lambda part: isinstance(part, str)):
        if not is_text:
            result += run
        elif text := "".join(map(str, run)):
            result.append(text)
    return tuple(result)


def texts_of(messages: Sequence[Message]) -> list[str]:
    """The texts of messages in which, were they strings, ``<image>`` would be a mark."""
    return [part for m in messages if m.role != "system" for part in joined(m.content) if isinstance(part, str)]


def encodable(value: str) -> bool:
    """Whether a string can be written as UTF-8, which one with a lone surrogate cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
