"""From a recipe file and overrides to a `Recipe`, or to everything that is wrong with them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from unidpo.config.explaining import explained
from unidpo.config.named import missing_things
from unidpo.config.reading import lay_over, plain_values, read_yaml, secrets
from unidpo.config.schema import Recipe
from unidpo.config.section import Conflicts
from unidpo.errors import Finding, RecipeError, from_findings
from unidpo.redaction import redacted

_ROUNDS = 5
"""Of looking for what is wrong behind what is wrong."""


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, look: bool = False) -> Recipe:
    """Read a recipe file and lay overrides over it.

    Args:
        path: YAML; `${oc.env:NAME}` stands for an environment variable, `${section.key}` for another value.
            Relative paths in a recipe start from the working directory, wherever the recipe lies.
        overrides: `section.key=value`, the value in YAML. Later ones win; a section given as a value replaces the
            whole section.
        look: also look for the files, folders and layers that the recipe names.

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
    return _validate(plain_values(config, problems), problems, look=look)


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
            if key == name or key.startswith((f"{name}.", f"{name}[")):
                if override.endswith("=") and kind == "bad-value":
                    message = "is empty; give a value behind the `=`"
                self.found.append(Finding(kind, f"{message} (from {redacted(override)})", file="command line", key=key))
                return
        self.found.append(Finding(kind, message, file=self.file, key=key or None))


def _validate(values: Mapping[str, Any], problems: _Problems, *, look: bool = False) -> Recipe:
    mended, recipe = copy.deepcopy(dict(values)), None
    for _ in range(_ROUNDS):
        try:
            recipe = Recipe.model_validate(mended)
            break
        except ValidationError as error:
            # What is wrong is taken out, so that what can only be seen behind it is seen, too.
            for detail in error.errors(include_url=False):
                for path, missing in _found(detail, problems):
                    _take_out(mended, path, missing=missing)
    if recipe is not None and look:
        wrong = [finding.key or "" for finding in problems.found]
        for key, message in missing_things(recipe):
            if not any(key.startswith(f"{known}.") for known in wrong):  # a section that was taken out has no names
                problems.add(key, "missing-file", message)
    if recipe is None or problems.found:
        count = len(problems.found)
        title = f"{problems.file}: {count} problem{'s' if count > 1 else ''} in this recipe"
        raise from_findings(RecipeError, title, problems.found)
    return recipe


def _found(detail: ErrorDetails, problems: _Problems) -> Iterator[tuple[Sequence[str | int], bool]]:
    """Notes one validation error; yields the paths of the values at fault, each with whether it is a missing one."""
    conflict = detail.get("ctx", {}).get("error")
    if isinstance(conflict, Conflicts):
        for name, message in conflict.found:
            path = [*detail["loc"], *name.split(".")]
            problems.add(".".join(map(str, path)), "bad-value", message)
            yield path, False
        return
    problems.add(*explained(detail))
    yield detail["loc"], detail["type"] == "missing"


def _take_out(values: dict[str, Any], path: Sequence[str | int], *, missing: bool) -> None:
    """Delete a value, or put something in for a missing one.

    Inside a union a path also names the alternative that was tried, which the values do not have.
    """
    inside: Any = values
    place: tuple[Any, Any] | None = None
    for part in path:
        known: Any = inside if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
        if part in known:
            place = inside, part
            inside = inside[part]
    if missing and isinstance(inside, dict):
        inside[str(path[-1])] = {"model": {"name": "?"}, "data": {"path": "?"}}.get(str(path[-1]), "?")
    elif place is not None:
        del place[0][place[1]]
