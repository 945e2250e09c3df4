"""From YAML to plain values: a file, the overrides laid over it, and what `${...}` stands for."""

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

MOST_BYTES, MOST_VALUES, MOST_DEPTH = 1_000_000, 10_000, 32
"""Of a file. Reading YAML takes time and memory that grow with these, aliases written out."""
_MOST_DIGITS = 400
"""No number that anything here takes has more."""
PLACES = ("output", "model.name", "reference", "data.path", "data.images", "data.template", "eval.benchmarks")
"""Keys that may take a part of their value from the environment, with `train.deepspeed` and its like."""
_FILES_OF_TRAIN = ("train.deepspeed", "train.fsdp_config", "train.accelerator_config")
_VARIABLE = re.compile(r"oc\.env\s*:\s*([^,}]*)")
# PyYAML's own constructors raise these where a tag such as `!!int` stands before something else.
_YAML_ERRORS = (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError)


def read_yaml(path: Path, *, what: str = "recipe") -> DictConfig:
    """The mapping in a YAML file, nothing resolved. Raises `RecipeError`, which calls the file `what`."""
    if not path.is_file():
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.y*ml"))) if path.parent.is_dir() else ""
        reason = f"this is a folder, not a {what}" if path.is_dir() else f"there is no such {what}{near}"
        raise _unreadable(path, "missing-file", reason)
    try:
        text = read_regular(path).decode("utf-8-sig")
        _refuse_too_much(text)
        config = OmegaConf.create(text)
    except OSError as error:
        raise _unreadable(path, "missing-file", f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise _unreadable(path, "broken-yaml", f"is not UTF-8 text (byte {error.start})") from error
    except _YAML_ERRORS as error:
        raise _unreadable(path, "broken-yaml", f"is not valid YAML: {reason_of(error)}") from error
    if not isinstance(config, DictConfig):
        keys = "`output:`, `methods:`" if what == "sweep" else "`model:`, `data:`, `loss:`, ..."
        raise _unreadable(path, "broken-yaml", f"a {what} is a mapping of sections ({keys})")
    return config


def lay_over(config: DictConfig, override: str) -> str | None:
    """Lay one override over the config, in place; returns the reason where that cannot be done."""
    key, equals, text = override.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or not all(part.strip() for part in parts):
        return "an override is written section.key=value"
    if len(parts) > MOST_DEPTH:
        return f"a key has at most {MOST_DEPTH} parts"
    try:
        text.encode()
        _refuse_too_much(text)
        value = OmegaConf.from_dotlist([f"value={text}"])._get_node("value")
        section = key.rpartition(".")[0]
        parent = OmegaConf.select(config, section) if section else config
        if parent is not None and not OmegaConf.is_dict(parent):
            return f"`{section}` is a single value and has no keys"
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    except UnicodeEncodeError:
        return "cannot be read: it is not UTF-8 text"
    except _YAML_ERRORS as error:
        return f"cannot be read: {reason_of(error)}"
    return None


def plain_values(config: DictConfig, problems: Any, prefix: str = "") -> dict[str, Any]:
    """Plain values, interpolations resolved; what cannot be resolved is a problem and becomes null.

    Args:
        problems: has `add(key, kind, message)`.
    """
    values: dict[str, Any] = {}
    for name in config:
        key = f"{prefix}{name!s}"
        values[str(name)] = None
        try:
            if OmegaConf.is_missing(config, name):
                problems.add(key, "missing-key", "is left open (`???`); give it a value here or in an override")
                continue
            value = config[name]
            if key.count(".") > MOST_DEPTH:
                raise RecursionError
            if isinstance(value, DictConfig):
                value = plain_values(value, problems, f"{key}.")
            elif OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
            values[str(name)] = value
        except RecursionError:
            problems.add(key[:100], "unresolved", "`${...}` leads back to itself")
        except OmegaConfBaseException as error:
            problems.add(key, "unresolved", reason_of(error).rpartition("interpolation: ")[2].strip('"'))
    return values


def secrets(config: DictConfig) -> Iterator[tuple[str, str]]:
    """Keys whose values would write a secret into the run folder and onto the model card, each with a message."""
    for key, text in _texts(OmegaConf.to_container(config, resolve=False)):
        if holds_a_secret(text):
            yield key, "holds a token or password, which the run folder and the model card would show; take it out"
        for variable in _VARIABLE.findall(text):
            if names_a_secret(variable) or not re.fullmatch(r"\s*\w+\s*", variable):
                yield (
                    key,
                    (
                        f"takes `{variable}` from the environment, and what a recipe holds is written down in the run "
                        "folder and the model card; a secret has no place in it (log in with `hf auth login`)"
                    ),
                )
            elif not any(key == place or key.startswith(f"{place}[") for place in (*PLACES, *_FILES_OF_TRAIN)):
                yield (
                    key,
                    (
                        "cannot come from the environment, which only says where things are "
                        f"({', '.join(PLACES)}): what a recipe holds is written down; give the value itself"
                    ),
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
    lines = str(error).strip().splitlines()
    if isinstance(error, OmegaConfBaseException | yaml.YAMLError) and lines:
        return lines[0]
    return f"a value does not fit its tag ({printable(lines[0], most=100) if lines else type(error).__name__})"


def _refuse_too_much(text: str) -> None:
    """Raise `yaml.YAMLError` for a text that would take very long or very much memory to read."""
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"it is longer than {MOST_BYTES:,} characters")
    depth = count = 0
    opened: list[tuple[str | None, int]] = []
    sizes: dict[str, int] = {}
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = "" if event.start_mark is None else f"line {event.start_mark.line + 1}: "
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            opened.append((event.anchor, count))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            count += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if len(event.value) > _MOST_DIGITS and re.fullmatch(r"[-+]?[\d_]+", event.value) and event.implicit[0]:
                raise yaml.YAMLError(f"{where}a number of {len(event.value):,} digits")
        if depth > MOST_DEPTH:
            raise yaml.YAMLError(f"{where}lists or mappings in one another, more than {MOST_DEPTH} deep")
        if count > MOST_VALUES:
            raise yaml.YAMLError(f"{where}more than {MOST_VALUES:,} values, aliases written out")


def _unreadable(path: Path, kind: str, message: str) -> RecipeError:
    finding = Finding(kind, message, file=path)
    return RecipeError(str(finding), findings=[finding])
