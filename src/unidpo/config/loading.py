"""From a recipe file and overrides to a `Recipe`, or to everything that is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from unidpo.config.explaining import findings_of
from unidpo.config.named import missing_things
from unidpo.config.reading import lay_over, read_yaml, reason_of, secrets
from unidpo.config.schema import Recipe
from unidpo.errors import Finding, RecipeError, from_findings
from unidpo.redaction import redacted

M = TypeVar("M", bound=BaseModel)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, look: bool = False) -> Recipe:
    """Read a recipe file and lay overrides over it.

    Args:
        path: YAML; `${oc.env:NAME}` stands for an environment variable, `${section.key}` for another value.
            Relative paths in a recipe start from the working directory, wherever the recipe lies.
        overrides: `section.key=value`, the value in YAML. Later ones win; a section given as a value replaces the
            whole section.
        look: also look for the files and folders that the recipe names.

    Raises:
        RecipeError: the file cannot be read, or something in it or in an override is wrong. All wrong values are
            named at once; what is wrong between values, and files that are missing, once each value is right.
    """
    config = read_yaml(Path(path))
    if "loss" not in config:  # written out, so that an override of one of its keys has a loss to belong to
        config["loss"] = {"name": "uni_dpo"}
    problems = Problems(str(path))
    for override in overrides:
        if reason := lay_over(config, override):
            problems.found.append(Finding("bad-override", reason, file="override", key=override))
        else:
            problems.overrides[override.partition("=")[0].strip()] = override
    return _recipe(problems.values_of(config), problems, look=look)


def recipe_from(values: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
    """The recipe that plain values describe, such as `Recipe.resolved()` of an earlier run.

    Raises:
        RecipeError: as `load_recipe`, naming `name` as the file.
    """
    return _recipe(values, Problems(name))


def _recipe(values: Mapping[str, Any], problems: Problems, *, look: bool = False) -> Recipe:
    recipe = problems.validated(Recipe, values)
    for key, message in recipe.conflicts():
        problems.add(key, "bad-value", message)
    if look:
        for key, message in missing_things(recipe):
            problems.add(key, "missing-file", message)
    if problems.found:
        raise problems.error()
    return recipe


@dataclass(slots=True)
class Problems:
    """What is wrong so far with a file, each with the file or the override it comes from."""

    file: str
    what: str = "recipe"
    overrides: dict[str, str] = field(default_factory=dict)
    found: list[Finding] = field(default_factory=list)

    def add(self, key: str, kind: str, message: str) -> None:
        """Note a problem; the first of each key counts."""
        if any(finding.key == key for finding in self.found):
            return
        for name, override in reversed(self.overrides.items()):
            if key == name or key.startswith((f"{name}.", f"{name}[")):
                if override.endswith("=") and kind == "bad-value":
                    message = "is empty; give a value behind the `=`"
                self.found.append(Finding(kind, f"{message} (from {redacted(override)})", file="override", key=key))
                return
        self.found.append(Finding(kind, message, file=self.file, key=key or None))

    def values_of(self, config: DictConfig) -> dict[str, Any]:
        """Plain values, interpolations resolved; what cannot be resolved is noted and becomes null."""
        for key, message in secrets(config):
            self.add(key, "secret", message)
        while True:
            try:
                values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
                return dict(values)
            except RecursionError:
                self.add("", "unresolved", "a `${...}` leads back to itself")
                raise self.error() from None
            except OmegaConfBaseException as error:
                message = "is left open (`???`); give it a value here or in an override"
                if not isinstance(error, MissingMandatoryValue):
                    message = reason_of(error).rpartition("interpolation: ")[2].strip('"')
                key, known = str(error.full_key), len(self.found)
                self.add(key, "unresolved", message)
                if len(self.found) == known:  # not even null helps
                    raise self.error() from None
                OmegaConf.update(config, key, None, force_add=True)

    def validated(self, model: type[M], values: Mapping[str, Any]) -> M:
        """The values as a model. Raises `RecipeError` with all that is wrong, and what was noted before."""
        try:
            valid = model.model_validate(values)
            if not self.found:
                return valid
        except ValidationError as error:
            for finding in findings_of(error, model, values):
                self.add(finding.key or "", finding.kind, finding.message)
        raise self.error()

    def error(self) -> RecipeError:
        """All that is wrong as one error."""
        count = len(self.found)
        title = f"{self.file}: {count} problem{'s' if count > 1 else ''} in this {self.what}"
        return from_findings(RecipeError, title, self.found)
