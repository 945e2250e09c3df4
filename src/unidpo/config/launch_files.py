"""Other tools' configurations as they lie on disk: YAML, or a shell script, which is read and never run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from unidpo.config.neighbours.table import Neighbour
from unidpo.config.reading import read_yaml
from unidpo.errors import Finding, RecipeError
from unidpo.files.regular import read_regular

_YAML = (".yaml", ".yml", ".json")
_SUBSTITUTION = re.compile(r"\$\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|`[^`]*`")
_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_ENDS = re.compile(r"[|&;]+|\d*[<>].*")
_COUNTS = ("num_gpus", "nproc_per_node", "nproc", "num_processes")
_GLUE = "\x1f"
"""Stands for white space within `$(...)`, which is one word to a shell."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Keys and values of a configuration, and the number of processes it is started with, where it says so."""

    values: Mapping[str, Any]
    processes: int | None = None


def read_launch(path: Path, neighbour: Neighbour, overrides: Sequence[str] = ()) -> Launch:
    """What a configuration of another tool says.

    Args:
        path: its YAML, or a shell script that starts it. Of a script the assignments of plain words are put in where
            they are used; everything else with a `$` stays as it is written.
        overrides: `KEY=VALUE`, keys of that tool, laid over it.

    Raises:
        RecipeError: it cannot be read, or no line of the script starts the tool.
    """
    if path.suffix.lower() in _YAML:
        values = _flattened(read_yaml(path, what="configuration"))
        counts = [values[name] for name in ("NPROC_PER_NODE", "num_processes") if isinstance(values.get(name), int)]
        found = Launch(values, counts[0] if counts else None)
    else:
        found = _read_script(path, neighbour)
    given = dict(found.values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"{override}: an override is written key=value, with a key of {neighbour.name}")
        given[key.strip()] = _value(text)
    return Launch(given, found.processes)


def _flattened(config: Any) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(config, resolve=False)
    environment = values.pop("ENV", None)
    return {
        str(key): value
        for key, value in ({**environment, **values} if isinstance(environment, dict) else values).items()
    }


def _read_script(path: Path, neighbour: Neighbour) -> Launch:
    try:
        text = read_regular(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise _wrong(path, "there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(path, f"cannot be read as text ({error})") from error
    variables: dict[str, str] = {}
    best: tuple[int, Launch] = (0, Launch({}))
    for words in _lines(text):
        if launch := _launch(words, variables, path, neighbour):
            best = max(
                best, (sum(neighbour.row(key) is not None for key in launch.values), launch), key=lambda one: one[0]
            )
        elif len(words) == 1 and (assigned := _ASSIGNMENT.fullmatch(words[0])):
            variables[assigned[1]] = _filled(assigned[2], variables)
    if not best[0]:
        programs = " or ".join(f"`{name}`" for name in neighbour.programs)
        raise _wrong(path, f"no line of it starts {neighbour.name} ({programs}, or a Python file) with arguments")
    return best[1]


def _lines(text: str) -> Iterator[list[str]]:
    """The words of each line, those that end with a backslash joined with the next; other than plain ones left out."""
    joined = re.sub(r"\\\r?\n", " ", text)
    for line in joined.splitlines():
        glued = _SUBSTITUTION.sub(lambda found: re.sub(r"\s", _GLUE, found[0]), line)
        lexer = shlex.shlex(glued, posix=True, punctuation_chars=False)
        lexer.whitespace_split, lexer.commenters = True, ""
        try:
            words = [word.replace(_GLUE, " ") for word in lexer]
        except ValueError:  # a quote that ends on another line
            continue
        comment = next((index for index, word in enumerate(words) if word.startswith("#")), len(words))
        if words[:comment]:
            yield words[:comment]


def _launch(words: list[str], variables: Mapping[str, str], path: Path, neighbour: Neighbour) -> Launch | None:
    """The arguments of a line that starts the tool."""
    end = next((index for index, word in enumerate(words) if _ENDS.fullmatch(word)), len(words))
    words = [_filled(word, variables) for word in words[:end]]
    starts = [i for i, word in enumerate(words) if word.endswith(".py") or Path(word).name in neighbour.programs]
    if not starts:
        return None
    start = max(starts)
    arguments = words[start + 1 :]
    values: dict[str, Any] = {}
    while arguments and not arguments[0].startswith("--"):  # `train`, a file, key=value
        word = arguments.pop(0)
        if word.endswith(_YAML):
            values |= _flattened(read_yaml(_beside(word, path), what="configuration"))
        elif "=" in word:
            key, _, text = word.partition("=")
            values[key] = _value(text)
    options = dict(_options(arguments))
    if "config" in options and isinstance(options["config"], str):
        values |= _flattened(read_yaml(_beside(options.pop("config"), path), what="configuration"))
    environment = {found[1]: found[2] for word in words[:start] if (found := _ASSIGNMENT.fullmatch(word))}
    known = {name: _value(text) for name, text in environment.items() if neighbour.row(name) is not None}
    return Launch({**known, **values, **options}, _processes(words[:start], {**variables, **environment}))


def _options(arguments: list[str]) -> Iterator[tuple[str, Any]]:
    """`--key`, `--key value`, `--key=value`, `--key value value ...`."""
    while arguments:
        key, equals, text = arguments.pop(0).removeprefix("--").partition("=")
        found = [text] if equals else []
        while not equals and arguments and not arguments[0].startswith("--"):
            found.append(arguments.pop(0))
        values = [_value(word) for word in found]
        yield key.replace("-", "_"), True if not values else values[0] if len(values) == 1 else values


def _processes(words: Collection[str], environment: Mapping[str, str]) -> int | None:
    """How many processes a launcher starts on one machine, where that is written."""
    options = dict(_options([word for word in words if not _ASSIGNMENT.fullmatch(word)][1:]))
    nodes = options.get("nnodes", 1)
    counted = next(
        (options[name] for name in _COUNTS if name in options), _value(environment.get("NPROC_PER_NODE", ""))
    )
    if isinstance(options.get("include"), str) and "$" not in options["include"]:
        counted = sum(len(host.partition(":")[2].split(",")) for host in options["include"].split("@"))
    return counted * nodes if isinstance(counted, int) and isinstance(nodes, int) and counted > 0 else None


def _filled(word: str, variables: Mapping[str, str]) -> str:
    """A word with the variables whose values are plain words; a default (`${NAME:-word}`) is not taken."""

    def plain(found: re.Match[str]) -> str:
        value = variables.get(found[1] or found[2])
        return found[0] if value is None or "$" in value or "`" in value else value

    return word if "$(" in word else _VARIABLE.sub(plain, word)


def _value(text: str) -> Any:
    """A word of a command line as YAML reads it, which knows numbers, truth values, lists and mappings."""
    if "$" in text or "`" in text or not text:
        return text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index, call-overload]
    except Exception:
        return text


def _beside(name: str, script: Path) -> Path:
    """A file that a script names: from the working directory, else from the script's folder."""
    return Path(name) if Path(name).exists() else script.parent / name


def _wrong(path: Path, reason: str) -> RecipeError:
    finding = Finding("bad-script", reason, file=path)
    return RecipeError(str(finding), findings=[finding])
