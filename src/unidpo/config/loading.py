"""From a recipe file and overrides to a `Recipe`, or to everything that is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from unidpo.config.hf_arguments import OWNED_BY_RECIPE
from unidpo.config.reading import lay_over, plain_values, read_yaml, secrets
from unidpo.config.schema import (
    LOSS_SECTIONS,
    DataSection,
    LoraSection,
    ModelSection,
    Recipe,
    SourceSection,
    TrainSection,
)
from unidpo.errors import Finding, RecipeError, did_you_mean, from_findings, shown
from unidpo.redaction import redacted

_SECTIONS: Mapping[str, type[BaseModel]] = {
    "model": ModelSection,
    "data": DataSection,
    "data.path": SourceSection,
    "lora": LoraSection,
    "train": TrainSection,
}
_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "tuple": "a list",
    "None": "null",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and lay overrides over it.

    Args:
        path: YAML; `${oc.env:NAME}` stands for an environment variable, `${section.key}` for another value.
            Relative paths in a recipe start from the working directory, wherever the recipe lies.
        overrides: `section.key=value`, the value in YAML. Later ones win; a section given as a value replaces the
            whole section.

    Raises:
        RecipeError: the file cannot be read, or something in it or in an override is wrong; all problems at once.
    """
    config = read_yaml(Path(path))
    problems = _Problems(str(path))
    if "loss" not in config:  # written out, so that an override of one of its keys has a loss to belong to
        config["loss"] = {"name": "uni_dpo"}
    for override in overrides:
        reason = lay_over(config, override)
        if reason:
            problems.found.append(Finding("bad-override", reason, file="command line", key=override))
        else:
            problems.overrides[override.partition("=")[0].strip()] = override
    for key, message in secrets(config):
        problems.add(key, "secret", message)
    return _validate(plain_values(config, problems), problems)


def recipe_from(values: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
    """The recipe that plain values describe, such as `Recipe.resolved()` of an earlier run.

    Raises:
        RecipeError: as `load_recipe`, naming `name` as the file.
    """
    return _validate(values, _Problems(name))


@dataclass(slots=True)
class _Problems:
    """What is wrong so far, each with the file or the override it comes from."""

    file: str
    overrides: dict[str, str] = field(default_factory=dict)
    found: list[Finding] = field(default_factory=list)

    def add(self, key: str, kind: str, message: str) -> None:
        if any(finding.key == key for finding in self.found):
            return
        for name, override in reversed(self.overrides.items()):
            if key == name or key.startswith(f"{name}."):
                self.found.append(Finding(kind, f"{message} (from {redacted(override)})", file="command line", key=key))
                return
        self.found.append(Finding(kind, message, file=self.file, key=key or None))


def _validate(values: Mapping[str, Any], problems: _Problems) -> Recipe:
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            problems.add(*_explain(detail))
    if recipe is None or problems.found:
        count = len(problems.found)
        title = f"{problems.file}: {count} problem{'s' if count > 1 else ''} in this recipe"
        raise from_findings(RecipeError, title, problems.found)
    return recipe


def wrong_values_of_loss(name: str, loss: object) -> list[str]:
    """What a recipe would refuse of a loss's attributes, e.g. "`beta` must be greater than 0, not -1"."""
    section = LOSS_SECTIONS[name]
    try:
        section.model_validate(
            {"name": name} | {key: getattr(loss, key) for key in section.model_fields if key != "name"}
        )
    except ValidationError as error:
        return [f"`{key}` {message}" for key, _, message in map(_explain, error.errors(include_url=False))]
    return []


def _explain(detail: ErrorDetails) -> tuple[str, str, str]:
    """Dotted key, kind and message of one validation error."""
    names = [str(part) for part in detail["loc"]]
    # Inside a union the path goes on with the alternative that was tried; a recipe's keys are two levels deep.
    loss = names.pop(1) if len(names) > 1 and names[0] == "loss" else None
    key = ".".join(names[:2])
    if key == "data.path" and len(names) > 3:  # except for the sources of a mixture: data, path, several, 0, weight
        key = ".".join([f"{key}[{names[3]}]", *names[4:5]])
        names = ["data.path", *names[4:5]]
    kind, context = detail["type"], detail.get("ctx", {})
    given = "null" if detail["input"] is None else shown(detail["input"], most=60)
    match kind:
        case "extra_forbidden":
            return key, "unknown-key", _unknown(names, loss)
        case "missing":
            return key, "missing-key", "is required"
        case "union_tag_not_found":
            return f"{key}.name", "missing-key", f"is required: one of {', '.join(LOSS_SECTIONS)}"
        case "union_tag_invalid":
            known = f"{', '.join(LOSS_SECTIONS)}, not {context['tag']!r}"
            return f"{key}.name", "bad-value", f"must be one of {known}{did_you_mean(context['tag'], LOSS_SECTIONS)}"
        case "model_type" | "model_attributes_type":
            return key, "bad-value", f"is a section with keys of its own, not {given}"
        case "too_short" if key == "data.path":
            return key, "bad-value", "needs at least one source"
        case "tuple_type" if key == "data.path":
            return key, "bad-value", f"must be a path or a list of sources, not {given}"
        case "value_error":
            return key, "bad-value", str(context["error"])
        case "literal_error":
            hint = did_you_mean(str(detail["input"]), context["expected"].split("'")[1::2])
            return key, "bad-value", f"must be {context['expected']}, not {given}{hint}"
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return key, "bad-value", f"must be {_KINDS.get(expected, expected)}, not {given}"


def _unknown(names: Sequence[str], loss: str | None) -> str:
    """What to say of a key that does not exist."""
    word, section = names[-1], _SECTIONS.get(names[0], Recipe) if len(names) > 1 else Recipe
    if section is TrainSection and word in OWNED_BY_RECIPE:
        return OWNED_BY_RECIPE[word]
    if loss is not None:
        section = LOSS_SECTIONS[loss]
        owners = [name for name, other in LOSS_SECTIONS.items() if word in other.model_fields]
        if owners:
            return (
                f"is a key of the loss {' and '.join(owners)}, not of {loss}; to change the loss, replace the whole "
                f"section: loss={{name: {loss}}}"
            )
    hint = did_you_mean(word, section.model_fields)
    elsewhere = [] if hint else [key for key in _dotted_keys() if key.rpartition(".")[2] == word]
    hint = f"; did you mean `{elsewhere[0]}`?" if elsewhere else hint
    return f"is not a key of {f'`{names[0]}`' if len(names) > 1 else 'a recipe'}{hint}"


def _dotted_keys() -> Iterator[str]:
    for name, section in [*_SECTIONS.items(), *(("loss", loss) for loss in LOSS_SECTIONS.values())]:
        yield from (f"{name}.{key}" for key in section.model_fields)
