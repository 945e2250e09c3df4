"""LLaMA-Factory's two layouts of pairs: alpaca ranking, which the reference uses, and sharegpt ranking."""

from __future__ import annotations

from typing import Any, Literal

from unidpo.data.formats.files import json_type
from unidpo.data.formats.rows import Row
from unidpo.data.formats.texts import joined, marked, texts_of
from unidpo.data.pairs import IMAGE, Message, PromptGroup
from unidpo.errors import shown


def read_alpaca(row: Row) -> None:
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
            messages.append(Message("user", marked(row.text(turn[0], f"history[{i}][0]"))))
            messages.append(Message("assistant", marked(row.text(turn[1], f"history[{i}][1]"))))
        else:
            row.error("wrong-type", f"history[{i}]", f"a turn is [user, assistant], not {shown(turn)}")
    question = [row.text(row.values.get("instruction"), "instruction"), row.optional_text("input")]
    messages.append(Message("user", marked("\n".join(filter(None, question)))))
    messages = row.prompt(messages, "instruction", place_marks=False)
    row.pair(messages, row.values.get("chosen"), row.values.get("rejected"))


def alpaca_prompt(group: PromptGroup) -> dict[str, Any]:
    """The prompt's columns. Raises `ValueError` for one that the layout cannot hold."""
    system, turns = _turns(group)
    if system is not None and not system:
        raise ValueError("an empty system message; use the trl or ranked layout")
    history = [[turns[i], turns[i + 1]] for i in range(0, len(turns) - 1, 2)]
    columns = {"instruction": turns[-1], "system": system, "history": history or None}
    return {name: value for name, value in columns.items() if value is not None}


def read_sharegpt(row: Row) -> None:
    """LLaMA-Factory's sharegpt ranking: `conversations` of tagged turns, `system`, `chosen` and `rejected` turns."""
    tags = row.columns.tags
    roles: dict[Any, Literal["system", "user", "assistant"]] = {
        tags["system_tag"]: "system",
        tags["user_tag"]: "user",
        tags["observation_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["function_tag"]: "assistant",
    }
    messages = []
    if system := row.optional_text("system"):
        messages.append(Message("system", (system,)))
    items = row.values.get("conversations")
    if not isinstance(items, list):
        row.error("wrong-type", "conversations", f"a list of turns is expected, not {json_type(items)}")
    for i, item in enumerate(items if isinstance(items, list) else ()):
        key = f"conversations[{i}]"
        tag, text = row.tagged(item, key)
        role = roles.get(tag)
        if role == "system" and system:
            row.error("bad-role", key, "the row has a `system` column too; keep one of them")
        elif role is not None:
            messages.append(Message(role, marked(text) if role != "system" else joined([text])))
        elif tag is not None:
            row.error("bad-role", key, f"{shown(tag)} is no role; the roles are {', '.join(map(str, roles))}")
    if isinstance(items, list):
        row.ends_with_user(messages, items, "conversations")
    messages = row.prompt(messages, "conversations", place_marks=False)
    row.pair(messages, row.values.get("chosen"), row.values.get("rejected"))


def sharegpt_prompt(group: PromptGroup) -> dict[str, Any]:
    """The prompt's columns. Raises `ValueError` for one that the layout cannot hold."""
    system, turns = _turns(group)
    items = [] if system is None else [{"from": "system", "value": system}]
    items += [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"conversations": items}


def _turns(group: PromptGroup) -> tuple[str | None, list[str]]:
    """System text, if any, and the turns that follow as strings, the user's first and last.

    Raises:
        ValueError: the messages are in another order, or a text would be read as an image mark.
    """
    has_system = group.messages[0].role == "system"
    rest = group.messages[1:] if has_system else group.messages
    if [m.role for m in rest] != ["user", "assistant"] * (len(rest) // 2) + ["user"]:
        raise ValueError("a prompt in which user and assistant do not take turns; use the trl or ranked layout")
    if has_system and IMAGE in group.messages[0].content:
        raise ValueError("an image in the system message; use the trl or ranked layout")
    if any(IMAGE.value in text for text in texts_of(rest)):
        raise ValueError("the text `<image>`, which it reads as an image; use the trl or ranked layout")
    return group.messages[0].text if has_system else None, [message.text for message in rest]
