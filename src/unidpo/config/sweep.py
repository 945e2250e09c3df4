"""Sweeps: several recipes, each with a grid of values, as one validated list of runs."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from unidpo.config.loading import Problems, load_recipe
from unidpo.config.reading import read_yaml
from unidpo.config.schema import Recipe, Sweep
from unidpo.errors import Finding, RecipeError


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One run of a sweep: the name of its folder, and what `unidpo train` is given."""

    name: str
    recipe_file: Path
    overrides: tuple[str, ...]
    recipe: Recipe


def is_sweep(path: str | Path) -> bool:
    """Whether a YAML file is a sweep rather than a recipe. Raises `RecipeError` where it cannot be read."""
    return "methods" in read_yaml(Path(path))


def load_sweep(path: str | Path, overrides: Sequence[str] = (), *, look: bool = False) -> list[SweepRun]:
    """The runs of a sweep file, each with its recipe.

    Args:
        path: YAML with the keys of `config.schema.Sweep`.
        overrides: `section.key=value` for every run; `output=FOLDER` moves the whole sweep.
        look: as for `load_recipe`.

    Raises:
        RecipeError: the file, an override, or the recipe of a run is wrong; all problems at once.
    """
    config = read_yaml(Path(path), what="sweep")
    if "methods" not in config:
        raise RecipeError(f"{path}: this is a recipe, not a sweep; train it without `--sweep`")
    values: Any = OmegaConf.to_container(config, resolve=False)
    given = {text.partition("=")[0].strip(): text for text in overrides}
    if "output" in given:
        values["output"] = given.pop("output").partition("=")[2].strip()
    problems = Problems(str(path), what="sweep")
    sweep = problems.validated(Sweep, values)
    runs: list[SweepRun] = []
    for method in sweep.methods:
        for combination in itertools.product(*method.grid.values()):
            changed = dict(zip(method.grid, combination, strict=True))
            name = _name(method.name or method.recipe.stem, changed)
            fixed = sweep.overrides | method.overrides | changed
            output = {"output": str(sweep.output / name)}
            laid_over = (*_overrides(fixed), *given.values(), *_overrides(output))
            problems.found += [
                Finding("bad-override", f"a grid varies this key; change it in {path}", file="override", key=given[key])
                for key in given.keys() & changed.keys()
            ]
            try:
                recipe = load_recipe(method.recipe, laid_over, look=look)
                runs.append(SweepRun(name, method.recipe, laid_over, recipe))
            except RecipeError as error:
                problems.found += error.findings
    names = [run.name for run in runs]
    for name in {name for name in names if names.count(name) > 1}:
        problems.add("methods", "same-name", f"several runs would be called {name}; give each method a `name`")
    if problems.found:
        problems.found = list(dict.fromkeys(problems.found))  # runs of a grid have most of them in common
        raise problems.error()
    return runs


def _overrides(values: Mapping[str, Any]) -> list[str]:
    """As a command line takes them: JSON is YAML on one line."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]


def _name(method: str, changed: Mapping[str, Any]) -> str:
    """A run's folder, such as ``dpo-learning_rate=1e-06``."""
    words = {key.rpartition(".")[2]: re.sub(r"[^\w.+-]+", "_", str(value)) for key, value in changed.items()}
    return "-".join([method, *(f"{key}={word.strip('_')}" for key, word in words.items())])
