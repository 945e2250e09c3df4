"""LLaMA-Factory's alpaca ranking, which the authors use: `instruction`, `chosen`, `rejected` as texts."""

from __future__ import annotations

from typing import Any

from unidpo.data.formats.files import json_type
from unidpo.data.formats.row import PAIR_COLUMNS, Row, pair_rows
from unidpo.data.formats.texts import Form, marked, system_and_turns
from unidpo.data.pairs import Message, PromptGroup
from unidpo.errors import shown

COLUMNS = ("instruction", "input", "system", "history", *PAIR_COLUMNS)


def fits(given: dict[str, Any]) -> bool:
    """Whether a row is of this layout. With an `instruction`, message lists as responses are still TRL's."""
    chosen = given.get("chosen")
    is_conversation = isinstance(chosen, list) and (
        "prompt" in given or (len(chosen) > 1 and all(isinstance(message, dict) for message in chosen))
    )
    return "instruction" in given and not is_conversation


def read(row: Row) -> None:
    """`instruction`, `input`, `system`, `history`, `chosen`, `rejected`."""
    messages = row.system()
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
    row.make_pair(messages, *(row.response(row.values.get(key), key) for key in ("chosen", "rejected")))


def write(group: PromptGroup, form: Form) -> list[dict[str, Any]]:
    """A row for each pair. Raises `ValueError` for a prompt that the layout cannot hold."""
    system, turns = system_and_turns(group.messages)
    if system is not None and not system:
        raise ValueError("an empty system message")
    history = [[turns[i], turns[i + 1]] for i in range(0, len(turns) - 1, 2)]
    columns = {"instruction": turns[-1], "system": system, "history": history or None}
    return pair_rows(group, {name: value for name, value in columns.items() if value is not None}, lambda text: text)
