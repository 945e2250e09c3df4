"""ms-swift's preference data: `messages` up to the chosen answer, and the rejected answer or conversation beside it."""

from __future__ import annotations

import math
from typing import Any

from unidpo.data.formats.files import json_type
from unidpo.data.formats.row import IMAGE_COLUMNS, Row, pair_rows
from unidpo.data.formats.texts import Form, plainest_form, written
from unidpo.data.pairs import Message, PromptGroup

_REJECTED = ("rejected_response", "rejected_messages")
COLUMNS = (
    *("messages", "system", *_REJECTED, "rejected_images", "margin", "score_chosen", "score_rejected"),
    *IMAGE_COLUMNS,
)


def fits(given: dict[str, Any]) -> bool:
    """Whether a row is of this layout, and not one of data without preferences."""
    return "messages" in given and any(name in given for name in _REJECTED)


def read(row: Row) -> None:
    """`messages`, `rejected_response` or `rejected_messages`, `images`, and a `margin` or both scores."""
    items = row.values.get("messages")
    if not isinstance(items, list) or not items:
        found = "an empty one" if items == [] else json_type(items)
        row.error("wrong-type", "messages", f"a list of messages is expected, the last the chosen answer, not {found}")
        return
    prompt, chosen = items[:-1], items[-1:]
    messages = row.system() + row.messages(prompt, "messages")
    messages = row.prompt(messages, "messages", place_marks=True)
    rejected, key = _rejected(row, prompt)
    if row.values.get("rejected_images") not in (None, row.values.get("images")):
        problem = "the rejected answer has images of its own; both answer one prompt, so remove the row"
        row.error("unsupported", "rejected_images", problem)
    _scores(row)
    row.make_pair(messages, row.response(chosen, "messages[-1]"), row.response(rejected, key))


def _rejected(row: Row, prompt: list[Any]) -> tuple[Any, str]:
    """The rejected answer, and the key it stands under."""
    given = [name for name in _REJECTED if row.values.get(name) is not None]
    if len(given) > 1:
        row.error("wrong-type", _REJECTED[1], f"`{_REJECTED[0]}` is given too; keep one of them")
    key = (given or _REJECTED)[0]
    value = row.values.get(key)
    if key == "rejected_response" or not isinstance(value, list):
        return value, key
    if value[:-1] != prompt:
        row.error("different-prompts", key, "the rejected conversation is another one before its last answer; mend it")
    return value[-1:], key


def _scores(row: Row) -> None:
    """Scores of a `margin` alone: the rejected answer is the zero that the chosen one is measured from."""
    margin = row.score(row.values.get("margin"), "margin")
    if margin is None:
        return
    chosen, rejected = (row.values.get(name) for name in ("score_chosen", "score_rejected"))
    if chosen is None and rejected is None:
        row.rename(score_chosen="margin")
        row.values["score_rejected"] = 0.0
    elif isinstance(chosen, int | float) and isinstance(rejected, int | float):
        difference = chosen - rejected
        if not math.isclose(difference, margin, rel_tol=1e-6, abs_tol=1e-9):
            problem = f"the scores differ by {difference:g}, the margin is {margin:g}; the scores are read"
            row.warn("other-margin", "margin", problem)


def form(group: PromptGroup) -> Form:
    """The form of its prompt: always messages."""
    return "parts" if plainest_form(group) == "parts" else "messages"


def write(group: PromptGroup, form: Form) -> list[dict[str, Any]]:
    """A row for each pair. The scores stand beside their margin, which is all that ms-swift reads of them."""
    rows = pair_rows(group, {}, lambda text: text)
    for row in rows:
        row["messages"] = written([*group.messages, Message("assistant", (row.pop("chosen"),))], form)
        row["rejected_response"] = row.pop("rejected")
        if "score_chosen" in row:
            row["margin"] = row["score_chosen"] - row["score_rejected"]
    return rows
