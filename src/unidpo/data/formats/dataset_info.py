"""What LLaMA-Factory's ``dataset_info.json`` declares: data sets by their names, and the columns of their files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unidpo.data.formats.files import RepeatedKey, loads
from unidpo.errors import DataError, require_known, shown
from unidpo.files.places import DECLARATION, DECLARED_IN
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
_OPENAI_TAGS = dict(zip(TAGS, ("role", "content", "user", "assistant", "tool", "function", "system"), strict=True))
_SHARED = ("system", "tools", "images", "videos", "audios", "chosen", "rejected", "score_chosen", "score_rejected")
# What LLaMA-Factory calls a column -> what the layout calls it.
_COLUMNS: dict[Any, dict[str, str]] = {
    "alpaca": {"prompt": "instruction", "query": "input", "history": "history"} | {name: name for name in _SHARED},
    "sharegpt": {"messages": "conversations"} | {name: name for name in _SHARED},
}
_COLUMNS["openai"] = _COLUMNS["sharegpt"]
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
_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "script_url", "cloud_file_name")
"""What an entry may say about where its data lies. The files of this name that `datasets` writes have none of them."""
_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True, slots=True)
class Declared:
    """A data set that a ``dataset_info.json`` names.

    Attributes:
        files: where it lies; rows of several are counted on.
        hub: the name of a hub data set, where it is one and there are no files.
        columns: how its columns are called.
        folder: the one that relative image paths start from, as in LLaMA-Factory that of the declaration.
    """

    files: tuple[Path, ...]
    hub: str | None
    columns: ColumnNames
    folder: Path


def declared(path: str | Path) -> Declared | None:
    """The data set meant by a path that is no file: a declared name, alone or as ``folder:name``, or a folder.

    A name alone is looked up in the working directory and in its folder ``data``. A folder is one that declares a
    single data set (of preferences, if any), or one that the declaration beside it names as a data set's files.

    Raises:
        DataError: the declaration cannot be read or has no such name, or what it names cannot be read.
    """
    given = Path(path)
    try:
        is_folder, is_there = given.is_dir(), given.exists()
    except OSError:  # a name too long for a file
        return None
    if is_folder:
        entries = _data_sets(given)
        ranking = [name for name, entry in entries.items() if entry.get("ranking")] or list(entries)
        if len(ranking) > 1:
            problem = f"declares several data sets; give one of them, such as {given}:{ranking[0]}"
            raise DataError(f"{given / DECLARATION}: {problem} (there are {', '.join(ranking)})")
        if ranking:
            return _found(given, ranking[0], entries[ranking[0]])
        about = {name: entry for name, entry in _data_sets(given.parent).items() if _names(entry, given)}
        columns = columns_of(given) if about else PLAIN
        return Declared(_files(given), None, columns, given.parent) if about else None
    folder, _, name = str(path).rpartition(":")
    if is_there or re.search(r"[@/\\]", name) or given.suffix in _SUFFIXES:
        return None
    for place in (folder,) if folder else DECLARED_IN:
        entries = _data_sets(Path(place))
        if folder and entries:
            require_known(str(Path(place, DECLARATION)), "data set", [name], entries)
        if name in entries:
            return _found(Path(place), name, entries[name])
    return None


def _data_sets(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of the declaration in a folder that say where data lies."""
    if (folder / "state.json").is_file():  # what `save_to_disk` left: another kind of file under this name
        return {}
    return {name: entry for name, entry in _entries(folder).items() if any(place in entry for place in _PLACES)}


def _found(folder: Path, name: str, entry: dict[str, Any]) -> Declared:
    where = f"{folder / DECLARATION}, `{name}`"
    columns = _columns(entry, where)
    if hub := entry.get("hf_hub_url"):
        config, split = (entry.get(key) for key in ("subset", "split"))
        return Declared((), f"{hub}{f':{config}' if config else ''}{f'@{split}' if split else ''}", columns, Path())
    if not isinstance(entry.get("file_name"), str):
        raise DataError(f"{where}: neither `file_name` nor `hf_hub_url` is given, and nothing else is read")
    file = folder / entry["file_name"]
    return Declared(_files(file) if file.is_dir() else (file,), None, columns, folder)


def _files(folder: Path) -> tuple[Path, ...]:
    """The data files of a folder that is one data set, by name."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and file.name != DECLARATION)
    if not files:
        raise DataError(f"{folder}: the folder holds no data file ({', '.join(_SUFFIXES)})")
    return tuple(files)


def columns_of(file: Path) -> ColumnNames:
    """What the ``dataset_info.json`` beside a file says about it; `PLAIN` if there is none or it does not name it.

    A column that is not mapped keeps the layout's own name. (LLaMA-Factory takes it for absent.)

    Raises:
        DataError: the declaration cannot be read, is about unknown columns, or says two things about the file.
    """
    info, entries = file.parent / DECLARATION, _entries(file.parent)
    about = {name: entry for name, entry in entries.items() if _names(entry, file)}
    ranking = {name: entry for name, entry in about.items() if entry.get("ranking")}
    found = {name: _columns(entry, f"{info}, `{name}`") for name, entry in (ranking or about).items()}
    declared = list(found.values())
    if any(columns != declared[0] for columns in declared):
        raise DataError(f"{info}: {', '.join(map(shown, found))} name the columns of {file.name} differently; keep one")
    return declared[0] if declared else PLAIN


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of the declaration in a folder; none where there is no such file."""
    info = folder / DECLARATION
    try:
        data = loads(read_regular(info).decode("utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except RepeatedKey as error:
        raise DataError(f"{info}: {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{info}: not readable as JSON; mend it, or move it away from the data") from error
    return {name: entry for name, entry in data.items() if isinstance(entry, dict)} if isinstance(data, dict) else {}


def _names(entry: dict[str, Any], file: Path) -> bool:
    name = entry.get("file_name")
    return isinstance(name, str) and Path(name) == Path(file.name)


def _columns(entry: dict[str, Any], where: str) -> ColumnNames:
    layout = entry.get("formatting", "alpaca")
    if layout not in _COLUMNS:
        raise DataError(f"{where}: `formatting` is one of {', '.join(_COLUMNS)}, not {shown(layout)}")
    known = _COLUMNS[layout]
    columns = _names_of(entry, "columns", known, _UNUSED, where)
    tags = _names_of(entry, "tags", TAGS, set(), where)
    if "formatting" not in entry and not columns:
        return PLAIN  # nothing is said about the columns: the rows speak for themselves
    names = {known[ours]: theirs for ours, theirs in columns.items() if ours in known}
    if layout == "openai":  # sharegpt's turns under OpenAI's names
        return ColumnNames("sharegpt", {"conversations": "messages", **names}, {**_OPENAI_TAGS, **tags})
    return ColumnNames(layout, names, {**TAGS, **tags})


def _names_of(
    entry: dict[str, Any], key: str, known: Mapping[str, str], unused: set[str], where: str
) -> dict[str, str]:
    names = entry.get(key) or {}
    if not isinstance(names, dict) or not all(isinstance(name, str | None) for name in names.values()):
        raise DataError(f"{where}: `{key}` maps names to names")
    require_known(where, key[:-1], names.keys() - unused, known)
    return {ours: theirs for ours, theirs in names.items() if theirs is not None}
