"""Pairs as published data sets of the field have them, each read as one of the layouts it nearly is."""

from __future__ import annotations

import re
from typing import Any

from unidpo.data.formats.files import RepeatedKey, json_type, loads
from unidpo.data.formats.layouts import sharegpt, trl
from unidpo.data.formats.ratings import rating_of
from unidpo.data.formats.row import IMAGE_COLUMNS, PAIR_COLUMNS, Row
from unidpo.data.formats.texts import turns_of
from unidpo.errors import shown

# --- RLAIF-V, MMPR: TRL's columns, and the prompt is called `question`

QUESTION_COLUMNS = ("question", *trl.COLUMNS)


def is_question(given: dict[str, Any]) -> bool:
    """Whether a row asks a `question` that a pair answers."""
    return {"question", "chosen", "rejected"} <= given.keys() and not {"prompt", "instruction"} & given.keys()


def read_question(row: Row) -> None:
    """`question`, `chosen`, `rejected`, an image."""
    row.rename(prompt="question")
    trl.read(row)


# --- RLHF-V: all of it as JSON in a column of text

JSON_COLUMNS = ("text", *IMAGE_COLUMNS)


def is_json(given: dict[str, Any]) -> bool:
    """Whether a row's `text` is JSON with a pair in it, as far as one sees without reading it."""
    text = given.get("text")
    return isinstance(text, str) and text.lstrip().startswith("{") and '"rejected"' in text


def read_json(row: Row) -> None:
    """`text` with `question`, `chosen`, `rejected`, and an image beside it."""
    try:
        pair = loads(row.text(row.values.get("text"), "text") or "{}")
    except RepeatedKey as error:
        row.error("repeated-key", f"text.{error.path}", str(error))
        return
    except (ValueError, RecursionError) as error:
        row.error("broken-json", "text", f"the text is not valid JSON ({error}); repair it, or remove the row")
        return
    if not isinstance(pair, dict):
        row.error("wrong-type", "text", f"an object with a pair is expected, not {json_type(pair)}")
        return
    names = {"prompt": "question", "chosen": "chosen", "rejected": "rejected"}
    row.rename(**{name: f"text.{theirs}" for name, theirs in names.items()})
    row.values |= {name: pair.get(theirs) for name, theirs in names.items()}
    row.note_lost(pair, "text", *names.values())
    trl.read(row)


# --- hh-rlhf: whole dialogues, each in a string

DIALOGUE_COLUMNS = PAIR_COLUMNS
_DIALOGUE_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def is_dialogue(given: dict[str, Any]) -> bool:
    """Whether both answers of a row are dialogues in one string."""
    both = (given.get("chosen"), given.get("rejected"))
    return "prompt" not in given and all(isinstance(each, str) and _DIALOGUE_TURN.match(each) for each in both)


def read_dialogue(row: Row) -> None:
    """`chosen` and `rejected`, which differ in their last answer."""
    chosen, rejected = (
        turns_of(row.text(row.values.get(name), name), _DIALOGUE_TURN) for name in ("chosen", "rejected")
    )
    if chosen[:-1] != rejected[:-1]:
        problem = "the two dialogues differ before their last answers, so they answer different prompts; remove the row"
        row.error("different-prompts", "rejected", problem)
        return
    row.rename(prompt="chosen")
    row.values |= {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    trl.read(row)


# --- HelpSteer3, LLaVA-RLHF: two answers, and which of them is preferred

COMPARED_COLUMNS = (
    *("context", "prompt", "response1", "response2", "overall_preference"),
    *("conversations", "output_1", "output_2", "preference", *IMAGE_COLUMNS),
)


def is_compared(given: dict[str, Any]) -> bool:
    """Whether a row has two answers and a preference of one."""
    return any({*answers, preference} <= given.keys() for *answers, preference in _COMPARED)


_COMPARED = (("response1", "response2", "overall_preference"), ("output_1", "output_2", "preference"))


def read_compared(row: Row) -> None:
    """`context` or `prompt`, `response1`, `response2`, `overall_preference` from -3 (the first) to 3; or
    `conversations`, `output_1`, `output_2`, `preference` 1 or 2.
    """
    graded = "overall_preference" in row.values
    first, second, key = _COMPARED[0 if graded else 1]
    number = rating_of(row.values.get(key))
    if number is None or not (abs(number) <= 3 if graded else number in (1, 2)):
        expected = "a number from -3 (the first answer is better) to 3" if graded else "1 or 2"
        row.error("bad-preference", key, f"{shown(row.values.get(key))} says nothing; {expected} is expected")
        return
    if number == 0:
        row.error("no-pair", key, "neither answer is preferred; remove the row")
        return
    first_is_better = number < 0 if graded else number == 1
    chosen, rejected = (first, second) if first_is_better else (second, first)
    row.rename(chosen=chosen, rejected=rejected)
    if graded:
        # How much better, not how good: the rejected answer is the zero.
        row.rename(score_chosen=key)
        row.values |= {"score_chosen": abs(number), "score_rejected": 0.0}
        row.rename(prompt="context" if row.values.get("context") is not None else "prompt")
        trl.read(row)
    else:
        _read_conversation(row)


def _read_conversation(row: Row) -> None:
    """A conversation whose last turn, where it is the model's, gives way to either answer."""
    turns = row.values.get("conversations")
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], list):
        turns = turns[0]
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("from") == "gpt":
        row.values["conversations"] = turns[:-1]
    for name in ("chosen", "rejected"):
        answer = row.values.get(name)
        row.values[name] = answer.get("value") if isinstance(answer, dict) else answer
    sharegpt.read(row)
