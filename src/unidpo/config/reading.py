"""From YAML to a configuration: a file, the overrides put on top of it, and the secrets in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unidpo.errors import Finding, RecipeError, did_you_mean, printable
from unidpo.files.regular import read_regular
from unidpo.redaction import holds_a_secret, names_a_secret

MAY_USE_ENVIRONMENT = (
    *("output", "model.name", "reference", "data.path", "data.images", "data.template", "eval.benchmarks"),
    *("train.deepspeed", "train.fsdp_config", "train.accelerator_config"),
)
"""Keys that may take a part of their value from the environment."""
_MOST_PARTS = 9
"""Of a dotted key."""
_VARIABLE = re.compile(r"oc\.env\s*:\s*([^,}]*)")
# PyYAML's own constructors raise these where a tag such as `!!int` stands before something else.
_YAML_ERRORS = (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError)


def read_yaml(path: Path, *, what: str = "recipe") -> DictConfig:
    """The mapping in a YAML file, nothing resolved. Raises `RecipeError`, which calls the file `what`."""
    kind = "missing-file"
    try:
        text = read_regular(path).decode("utf-8-sig")
        kind = "broken-yaml"
        config = OmegaConf.create(text)
        reason = f"a {what} is a mapping of sections"
    except IsADirectoryError:
        reason = f"this is a folder, not a {what}"
    except FileNotFoundError:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.y*ml"))) if path.parent.is_dir() else ""
        reason = f"there is no such {what}{near}"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text (byte {error.start})"
    except _YAML_ERRORS as error:
        reason = f"is not valid YAML: {reason_of(error)}"
    else:
        if isinstance(config, DictConfig):
            return config
    finding = Finding(kind, reason, file=path)
    raise RecipeError(str(finding), findings=[finding])


def lay_over(config: DictConfig, override: str) -> str | None:
    """Lay one override over the config, in place; returns the reason where that cannot be done."""
    key, equals, text = override.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or not all(part.strip() for part in parts) or len(parts) > _MOST_PARTS:
        return "an override is written section.key=value"
    try:
        value = OmegaConf.from_dotlist([f"value={text}"])._get_node("value")
        section = key.rpartition(".")[0]
        parent = OmegaConf.select(config, section) if section else config
        if parent is not None and not OmegaConf.is_dict(parent):
            return f"`{section}` is a single value and has no keys"
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    except _YAML_ERRORS as error:
        return f"cannot be read: {reason_of(error)}"
    return None


def secrets(config: DictConfig) -> Iterator[tuple[str, str]]:
    """Keys whose values would write a secret into the run folder and onto the model card, each with a message."""
    for key, text in _texts(OmegaConf.to_container(config, resolve=False)):
        if holds_a_secret(text):
            yield key, "holds a token or password, which the run folder and the model card would show; take it out"
        for variable in _VARIABLE.findall(text):
            if names_a_secret(variable) or not re.fullmatch(r"\s*\w+\s*", variable):
                yield (
                    key,
                    f"takes `{variable}` from the environment, and what a recipe holds is written down in the run "
                    "folder and the model card; a secret has no place in it (log in with `hf auth login`)",
                )
            elif re.sub(r"\[.*", "", key) not in MAY_USE_ENVIRONMENT:
                yield (
                    key,
                    "cannot come from the environment, which only says where things are "
                    f"({', '.join(MAY_USE_ENVIRONMENT)}): what a recipe holds is written down; give the value itself",
                )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The strings below a value with their keys, those of lists as `key[0]`."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _texts(inner, f"{key}[{index}]")


def reason_of(error: Exception) -> str:
    """What is wrong with a YAML text, on one line, with the place where it is known."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        return (f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else "") + error.problem
    reason = printable(str(error).strip().partition("\n")[0] or type(error).__name__, most=200)
    known = isinstance(error, yaml.YAMLError | OmegaConfBaseException | RecursionError)
    return reason if known else f"a value does not fit its tag ({reason})"
