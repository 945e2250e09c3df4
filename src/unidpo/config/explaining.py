"""What is wrong with a key or a value, in words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from unidpo.config.hf_arguments import OWNED_BY_RECIPE
from unidpo.config.neighbours import NEIGHBOURS
from unidpo.config.schema import (
    DataSection,
    EvalSection,
    LoraSection,
    MethodSection,
    ModelSection,
    Recipe,
    Section,
    SourceSection,
    TrainSection,
)
from unidpo.errors import Finding, did_you_mean, shown
from unidpo.losses import LOSSES

_SECTIONS: Mapping[str, type[BaseModel]] = {
    "model": ModelSection,
    "data": DataSection,
    "data.path": SourceSection,
    "lora": LoraSection,
    "train": TrainSection,
    "eval": EvalSection,
    "methods": MethodSection,
}
_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dictionary": "a mapping",
    "None": "null",
    "an instance of Path": "a path",
}
_MOST_WORDS = 16
"""Of a list in a message."""
_ALSO_SAID = {
    "rank": "lora.r",
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "batch_size": "train.per_device_train_batch_size",
    "optimizer": "train.optim",
}


def findings_of(error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]) -> list[Finding]:
    """What pydantic says of these values, in our words."""
    found = (_explained(detail, model, values) for detail in error.errors(include_url=False))
    return [Finding(kind, message, key=key or None) for key, kind, message in found]


def _explained(detail: ErrorDetails, model: type[BaseModel], values: Mapping[str, Any]) -> tuple[str, str, str]:
    """Dotted key, kind and message of one validation error of these values."""
    key = _key(detail, values)
    context: Mapping[str, Any] = detail.get("ctx", {})
    given = "null" if detail["input"] is None else shown(detail["input"], most=60)
    match detail["type"]:
        case "extra_forbidden":
            return key, "unknown-key", _unknown(key, model, values)
        case "missing":
            return key, "missing-key", "is required"
        case "union_tag_not_found":
            return f"{key}.name", "missing-key", f"is required: one of {', '.join(LOSSES)}"
        case "union_tag_invalid":
            return f"{key}.name", "bad-value", f"must be {_one_of(list(LOSSES), context['tag'])}"
        case "model_type" | "model_attributes_type":
            return key, "bad-value", f"is a section with keys of its own, not {given}"
        case "value_error":
            return key, "bad-value", str(context["error"])
        case "literal_error":
            words = re.findall("'(.*?)'", context["expected"]) or [context["expected"]]
            return key, "bad-value", f"must be {_one_of(words, detail['input'])}"
        case "string_pattern_mismatch":
            return key, "bad-value", f"must match {context['pattern']}, not {given}"
        case "too_short" | "string_too_short":
            return key, "bad-value", "must not be empty"
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return key, "bad-value", f"must be {_KINDS.get(expected, expected)}, not {given}"


def _key(detail: ErrorDetails, values: Mapping[str, Any]) -> str:
    """The dotted key of what is wrong. Parts that name an alternative of a union are no keys of the values."""
    key = ""
    inside: Any = values
    for part in detail["loc"]:
        if isinstance(inside, Mapping) and part in inside:
            key, inside = f"{key}.{part}", inside[part]
        elif isinstance(inside, list) and isinstance(part, int):
            key, inside = f"{key}[{part}]", inside[part]
    if detail["type"] == "missing":
        key = f"{key}.{detail['loc'][-1]}"
    return key.removeprefix(".")


def _one_of(words: Sequence[str], value: object) -> str:
    given = shown(value, most=60)
    if len(words) > _MOST_WORDS:
        close = difflib.get_close_matches(str(value), words, n=8, cutoff=0)
        return f"one of {len(words)} words, not {given}; the nearest are {', '.join(close)}"
    return f"one of {', '.join(words)}, not {given}{did_you_mean(str(value), words)}"


def _unknown(key: str, model: type[BaseModel], values: Mapping[str, Any]) -> str:
    """What to say of a key that does not exist."""
    section, _, word = re.sub(r"\[\d+\]", "", key).rpartition(".")
    if section == "train" and word in OWNED_BY_RECIPE:
        return OWNED_BY_RECIPE[word]
    known = _SECTIONS.get(section, model).model_fields
    if section == "loss":
        loss = values["loss"]["name"]
        known = LOSSES[loss].model_fields
        if owners := [name for name, other in LOSSES.items() if word in other.model_fields]:
            return (
                f"is a key of the loss {' and '.join(owners)}, not of {loss}; to change the loss, replace the whole "
                f"section: loss={{name: {loss}}}"
            )
    elsewhere = [dotted for dotted in dotted_keys() if dotted.endswith(f".{word}")]
    hint = did_you_mean(word, known)
    is_recipe = issubclass(model, Section)
    if is_recipe and word in FOREIGN:
        hint = f"; did you mean `{FOREIGN[word].removeprefix(f'{section}.')}`?"
    elif is_recipe and elsewhere and not hint:
        hint = f"; did you mean `{elsewhere[0]}`?"
    elif is_recipe and (reason := _without_equal(word)):
        hint = reason
    return f"is not a key{f' of `{section}`' if section else ''}{hint}"


def dotted_keys() -> Iterator[str]:
    """Every key of a recipe's sections."""
    for name, section in [*_SECTIONS.items(), *(("loss", loss) for loss in LOSSES.values())]:
        yield from (f"{name}.{key}" for key in section.model_fields)


_OURS = {*Recipe.model_fields, *(key.rpartition(".")[2] for key in dotted_keys())} - {"batch_size"}  # it is of `eval`
FOREIGN: Mapping[str, str] = _ALSO_SAID | {
    key: row.ours
    for neighbour in [*NEIGHBOURS.values()][::-1]
    for key, row in neighbour.rows.items()
    if row.ours and key not in _OURS and "*" not in key
}
"""What other trainers call a key of ours."""


def _without_equal(word: str) -> str:
    """Why a key of another trainer has none here, or an empty string."""
    for neighbour in NEIGHBOURS.values():
        row = neighbour.row(word)
        if row is not None and row.note and not row.ours:
            return f"; that of {neighbour.name} has no equal here: {row.note}"
    return ""
