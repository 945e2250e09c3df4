"""Sweeps: several recipes, each with a grid of values, as one validated list of runs."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf
from pydantic import BeforeValidator, Field, ValidationError

from unidpo.config.loading import load_recipe
from unidpo.config.reading import read_yaml
from unidpo.config.schema import FilePath, Recipe
from unidpo.config.section import Section
from unidpo.errors import Finding, RecipeError, did_you_mean, from_findings, shown


class MethodSection(Section):
    """One method: a recipe and the values to try."""

    recipe: FilePath
    """Recipe file, relative to the working directory."""
    name: str | None = Field(None, pattern=r"^\w[\w.-]*$")
    """What its runs are called by; null for the recipe's file name."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted recipe keys that are the same in all its runs."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Dotted recipe keys, each with the values to try; every combination is a run."""

    @property
    def title(self) -> str:
        """The name, given or taken from the recipe's file."""
        return self.name or self.recipe.stem


class SweepSection(Section):
    """A sweep file."""

    output: FilePath
    """Folder of the run folders and the summary."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted recipe keys that are the same in all runs; a method's own win over these, and its grid over both."""
    methods: Annotated[
        tuple[MethodSection, ...],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
        Field(min_length=1),
    ]
    """The methods, in the order in which they run."""


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: of its run folder, such as ``dpo-learning_rate=1e-06``.
        method: the method's name.
        recipe_file: the method's recipe.
        changed: the grid's values of this run, by dotted key.
        overrides: all that is laid over the recipe, `output` included, as a command line takes it.
        recipe: the resolved recipe.
    """

    name: str
    method: str
    recipe_file: Path
    changed: Mapping[str, Any]
    overrides: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Sweep:
    """A validated sweep: its file, its output folder and its runs in order."""

    file: Path
    output: Path
    runs: tuple[SweepRun, ...]


def is_sweep(path: str | Path) -> bool:
    """Whether a YAML file is a sweep rather than a recipe. Raises `RecipeError` where it cannot be read."""
    return "methods" in read_yaml(Path(path))


def load_sweep(path: str | Path, overrides: Sequence[str] = (), *, look: bool = False) -> Sweep:
    """Read a sweep file and resolve the recipe of every run.

    Args:
        path: YAML with the keys of `SweepSection`.
        overrides: `section.key=value` for every run; `output=FOLDER` moves the whole sweep. They win over the file,
            and so may not set what a grid varies.
        look: as for `load_recipe`.

    Raises:
        RecipeError: the file, an override, or the recipe of a run is wrong; all problems at once.
    """
    path = Path(path)
    values: Any = OmegaConf.to_container(read_yaml(path, what="sweep"), resolve=False)
    from_line = [text for text in overrides if text.partition("=")[0].strip() != "output"]
    moved = [text.partition("=")[2].strip() for text in overrides if text not in from_line]
    if moved:
        values["output"] = moved[-1]
    try:
        section = SweepSection.model_validate(values)
    except ValidationError as error:
        raise _errors(path, [_explain(path, detail) for detail in error.errors(include_url=False)]) from None
    found = list(_conflicts(path, section, from_line))
    runs = []
    for method, changed in _combinations(section):
        name = _name(method.title, changed)
        output = {"output": str(section.output / name)}
        fixed = section.overrides | method.overrides
        laid_over = (*_overrides(fixed | changed), *from_line, *_overrides(output))
        try:
            recipe = load_recipe(method.recipe, laid_over, look=look)
        except RecipeError as error:
            found += [_in_sweep(finding, path, from_line) for finding in error.findings]
        else:
            runs.append(SweepRun(name, method.title, method.recipe, changed, laid_over, recipe))
    if found:
        raise _errors(path, found)
    return Sweep(path, section.output, tuple(runs))


def _combinations(section: SweepSection) -> Iterator[tuple[MethodSection, dict[str, Any]]]:
    for method in section.methods:
        for values in itertools.product(*method.grid.values()):
            yield method, dict(zip(method.grid, values, strict=True))


def _overrides(values: Mapping[str, Any]) -> list[str]:
    """As a command line takes them: JSON is YAML on one line."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _name(method: str, changed: Mapping[str, Any]) -> str:
    """A run's folder: the last part of each key, the whole key where that says too little."""
    short = Counter(key.rpartition(".")[2] for key in changed)
    parts = [method]
    for key, value in changed.items():
        last = key.rpartition(".")[2]
        word = re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")
        parts.append(f"{last if short[last] == 1 else key}={word}")
    return "-".join(parts)


def _conflicts(path: Path, section: SweepSection, from_line: Sequence[str]) -> Iterator[Finding]:
    """What only the sweep as a whole can get wrong."""
    titles = Counter(method.title for method in section.methods)
    for title in [title for title, count in titles.items() if count > 1]:
        yield Finding("same-name", f"several methods are called {title}; give each a `name`", file=path, key="methods")
    names = Counter((method.title, _name(method.title, changed)) for method, changed in _combinations(section))
    for (title, name), count in names.items():
        if count > 1 and titles[title] == 1:
            yield Finding("same-name", f"{count} runs would be called {name}; drop repeated values", file=path)
    given = [section.overrides, *(values for method in section.methods for values in (method.overrides, method.grid))]
    if any("output" in values for values in given):
        yield Finding("bad-key", "every run gets its own from the sweep's; take it out", file=path, key="output")
    varied = {key for method in section.methods for key in method.grid}
    for text in from_line:
        key = text.partition("=")[0].strip()
        hit = sorted(k for k in varied if key == k or key.startswith(f"{k}.") or k.startswith(f"{key}."))
        if hit:
            message = f"a grid varies `{hit[0]}`; change it in {path}"
            yield Finding("bad-override", message, file="command line", key=text)


def _in_sweep(finding: Finding, path: Path, from_line: Sequence[str]) -> Finding:
    """A recipe's finding, said of the sweep where the sweep's values are at fault."""
    if finding.file != "command line" or any(text in f"{finding.key} {finding.message}" for text in from_line):
        return finding
    return Finding(finding.kind, finding.message, file=path, key=finding.key)


def _errors(path: Path, findings: Sequence[Finding]) -> RecipeError:
    distinct = list({str(finding): finding for finding in findings}.values())
    count = len(distinct)
    return from_findings(RecipeError, f"{path}: {count} problem{'s' if count > 1 else ''} in this sweep", distinct)


def _explain(path: Path, detail: Any) -> Finding:
    """One validation error of the sweep's own keys."""
    key = re.sub(r"\.(\d+)", r"[\1]", ".".join(str(part) for part in detail["loc"]))
    section = MethodSection if key.startswith("methods[") else SweepSection
    match detail["type"]:
        case "missing":
            return Finding("missing-key", "is required", file=path, key=key)
        case "extra_forbidden":
            word = str(detail["loc"][-1])
            what = "a method" if section is MethodSection else "a sweep"
            hint = did_you_mean(word, section.model_fields)
            return Finding("unknown-key", f"is not a key of {what}{hint}", file=path, key=key)
        case "too_short":
            return Finding("bad-value", "must not be empty", file=path, key=key)
        case "string_pattern_mismatch":
            return Finding("bad-value", "may hold letters, digits and `_.-`: it names folders", file=path, key=key)
    words = {"dict_type": "a mapping", "list_type": "a list", "tuple_type": "a list", "model_type": "a mapping"}
    wanted = words.get(detail["type"], detail["msg"].removeprefix("Input should be "))
    return Finding("bad-value", f"must be {wanted}, not {shown(detail['input'], most=60)}", file=path, key=key)
