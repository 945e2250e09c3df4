"""TRL's preference layout: `prompt`, `chosen`, `rejected` as strings or message lists."""

from __future__ import annotations

from typing import Any

from unidpo.data.formats.row import PAIR_COLUMNS, Row, pair_rows
from unidpo.data.formats.texts import Form, plainest_form, written
from unidpo.data.pairs import Message, PromptGroup

COLUMNS = ("prompt", *PAIR_COLUMNS)


def fits(given: dict[str, Any]) -> bool:
    """Whether a row is of this layout. The prompt may stand at the beginning of both responses."""
    return "prompt" in given or ("chosen" in given and "rejected" in given)


def read(row: Row) -> None:
    """`prompt`, `chosen`, `rejected`, the prompt at times only as what both lists begin with."""
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
    row.make_pair(messages, row.response(chosen, "chosen"), row.response(rejected, "rejected"))


def _shared_start(first: list[Any], second: list[Any]) -> int:
    """How many messages two conversations begin with alike; the last of each is its response and never counts."""
    most = min(len(first), len(second)) - 1
    return next((i for i in range(most) if first[i] != second[i]), max(most, 0))


def form(group: PromptGroup) -> Form:
    """The form of its prompt: always messages, and for images always parts."""
    return "parts" if group.images or plainest_form(group) == "parts" else "messages"


def write(group: PromptGroup, form: Form) -> list[dict[str, Any]]:
    """A row for each pair."""
    return pair_rows(
        group,
        {"prompt": written(group.messages, form)},
        lambda text: written([Message("assistant", (text,))], form),
    )
