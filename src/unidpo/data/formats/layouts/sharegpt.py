"""LLaMA-Factory's sharegpt ranking: `conversations`, `chosen` and `rejected` as tagged turns."""

from __future__ import annotations

from typing import Any, Literal

from unidpo.data.formats.files import json_type
from unidpo.data.formats.row import PAIR_COLUMNS, Row, pair_rows
from unidpo.data.formats.texts import Form, joined, marked, system_and_turns
from unidpo.data.pairs import Message, PromptGroup
from unidpo.errors import shown

COLUMNS = ("conversations", "system", *PAIR_COLUMNS)


def fits(given: dict[str, Any]) -> bool:
    """Whether a row is of this layout, and not one of data without preferences."""
    return "conversations" in given and ("chosen" in given or "rejected" in given)


def read(row: Row) -> None:
    """`conversations` of tagged turns, `system`, `chosen` and `rejected` turns."""
    tags = row.columns.tags
    roles: dict[Any, Literal["system", "user", "assistant"]] = {
        tags["system_tag"]: "system",
        tags["user_tag"]: "user",
        tags["observation_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["function_tag"]: "assistant",
    }
    messages = row.system()
    has_system = bool(messages)
    items = row.values.get("conversations")
    if isinstance(items, list):
        for i, item in enumerate(items):
            key = f"conversations[{i}]"
            tag, text = _turn(row, item, key)
            role = roles.get(tag)
            if role == "system" and has_system:
                row.error("bad-role", key, "the row has a `system` column too; keep one of them")
            elif role is not None:
                messages.append(Message(role, marked(text) if role != "system" else joined([text])))
            elif tag is not None:
                row.error("bad-role", key, f"{shown(tag)} is no role; the roles are {', '.join(map(str, roles))}")
        row.require_user_last(messages, items, "conversations")
    else:
        row.error("wrong-type", "conversations", f"a list of turns is expected, not {json_type(items)}")
    messages = row.prompt(messages, "conversations", place_marks=False)

    def response(value: Any, key: str) -> str:
        if not isinstance(value, dict):
            return row.text(value, key)
        tag, text = _turn(row, value, key)
        if tag not in (None, tags["assistant_tag"], tags["function_tag"]):
            row.error("bad-role", key, f"a response is a turn of {tags['assistant_tag']}, not {shown(tag)}")
        return text

    row.make_pair(messages, *(row.response(row.values.get(key), key, response) for key in ("chosen", "rejected")))


def _turn(row: Row, item: Any, key: str) -> tuple[str | None, str]:
    """Role tag and text of a turn; no tag with an error."""
    tags = row.columns.tags
    role, content = tags["role_tag"], tags["content_tag"]
    if not isinstance(item, dict) or not isinstance(item.get(role), str):
        row.error("wrong-type", key, f"a turn has `{role}` and `{content}`, both strings")
        return None, ""
    row.note_lost(item, key, role, content)
    if item[role] in (tags["observation_tag"], tags["function_tag"]):
        row.lost.append(f"{key}.{role}")
        row.warn("tool-turn", key, f"{shown(item[role])} is read as plain text, without the marks of a tool")
    return item[role], row.text(item.get(content), f"{key}.{content}")


def write(group: PromptGroup, form: Form) -> list[dict[str, Any]]:
    """A row for each pair. Raises `ValueError` for a prompt that the layout cannot hold."""
    system, turns = system_and_turns(group.messages)
    items = [] if system is None else [{"from": "system", "value": system}]
    items += [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return pair_rows(group, {"conversations": items}, lambda text: {"from": "gpt", "value": text})
