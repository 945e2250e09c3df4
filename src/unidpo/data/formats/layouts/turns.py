"""What layouts share when they write: prompts as turns, and a row for each pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from unidpo.data.formats.texts import spells_mark
from unidpo.data.pairs import IMAGE, Message, PromptGroup


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
