"""Column names declared in LLaMA-Factory's ``dataset_info.json`` beside a data file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unidpo.data.formats.files import RepeatedKey, loads
from unidpo.errors import DataError, require_known, shown
from unidpo.files.regular import read_regular

TAGS: Mapping[str, str] = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_SHARED = ("system", "tools", "images", "videos", "audios", "chosen", "rejected", "score_chosen", "score_rejected")
# What LLaMA-Factory calls a column -> what the layout calls it.
_COLUMNS: dict[Any, dict[str, str]] = {
    "alpaca": {"prompt": "instruction", "query": "input", "history": "history"} | {name: name for name in _SHARED},
    "sharegpt": {"messages": "conversations"} | {name: name for name in _SHARED},
}
# Columns LLaMA-Factory has for other kinds of data; naming them is no mistake.
_UNUSED = {"response", "kto_tag", "messages", "prompt", "query", "history"}


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """How a file names its columns.

    Attributes:
        layout: the layout the names are for, or ``None`` where nothing is declared.
        names: the layout's name of a column -> the file's, where they differ.
        tags: how roles and contents are tagged in `sharegpt` messages.
    """

    layout: Literal["alpaca", "sharegpt"] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=lambda: TAGS)


PLAIN = ColumnNames()


def columns_of(file: Path) -> ColumnNames:
    """What the ``dataset_info.json`` beside a file says about it; `PLAIN` if there is none or it does not name it.

    A column that is not mapped keeps the layout's own name. (LLaMA-Factory takes it for absent.)

    Raises:
        DataError: the declaration cannot be read, is about unknown columns, or says two things about the file.
    """
    info = file.parent / "dataset_info.json"
    try:
        data = loads(read_regular(info).decode("utf-8-sig"))
    except FileNotFoundError:
        return PLAIN
    except RepeatedKey as error:
        raise DataError(f"{info}: {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{info}: not readable as JSON; mend it, or move it away from {file.name}") from error
    entries = data if isinstance(data, dict) else {}
    about = {name: entry for name, entry in entries.items() if isinstance(entry, dict) and _names(entry, file)}
    ranking = {name: entry for name, entry in about.items() if entry.get("ranking")}
    found = {name: _columns(entry, f"{info}, `{name}`") for name, entry in (ranking or about).items()}
    declared = list(found.values())
    if any(columns != declared[0] for columns in declared):
        raise DataError(f"{info}: {', '.join(map(shown, found))} name the columns of {file.name} differently; keep one")
    return declared[0] if declared else PLAIN


def _names(entry: dict[str, Any], file: Path) -> bool:
    name = entry.get("file_name")
    return isinstance(name, str) and Path(name) == Path(file.name)


def _columns(entry: dict[str, Any], where: str) -> ColumnNames:
    layout = entry.get("formatting", "alpaca")
    if layout not in ("alpaca", "sharegpt"):
        raise DataError(f"{where}: `formatting` is alpaca or sharegpt, not {shown(layout)}")
    known = _COLUMNS[layout]
    columns = _names_of(entry, "columns", known, _UNUSED, where)
    tags = _names_of(entry, "tags", TAGS, set(), where)
    if "formatting" not in entry and not columns:
        return PLAIN  # nothing is said about the columns: the rows speak for themselves
    names = {known[ours]: theirs for ours, theirs in columns.items() if ours in known}
    return ColumnNames(layout, names, {**TAGS, **tags})


def _names_of(
    entry: dict[str, Any], key: str, known: Mapping[str, str], unused: set[str], where: str
) -> dict[str, str]:
    names = entry.get(key) or {}
    if not isinstance(names, dict) or not all(isinstance(name, str | None) for name in names.values()):
        raise DataError(f"{where}: `{key}` maps names to names")
    require_known(where, key[:-1], names.keys() - unused, known)
    return {ours: theirs for ours, theirs in names.items() if theirs is not None}
