"""From a data file to its rows, whatever JSON it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unidpo.errors import DataError, Finding, shown


def rows_of(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a JSON or JSONL file and their numbers from 1; a line that is no JSON comes as a `Finding`.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is not JSON as a whole.
    """
    text = _text(path)
    start = text.lstrip()[:1]
    by_line = path.suffix in (".jsonl", ".ndjson")
    if not start or (by_line and start != "["):
        yield from _json_lines(text)
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        # A second value after the first one: rows by line, whatever the file is called.
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and (by_line or start == "{"):
            yield from _json_lines(text)
            return
        raise DataError(f"{path}: {_json_problem(error)}") from error
    if isinstance(value, dict):
        lists = [key for key, inner in value.items() if isinstance(inner, list)]
        remedy = f"save the list under {shown(lists[0])} by itself" if lists else "put the rows into [ ]"
        raise DataError(f"{path}: the file is one JSON object, but a list of rows is expected; {remedy}")
    if not isinstance(value, list):
        raise DataError(f"{path}: the file holds {json_type(value)}, but a list of rows is expected")
    yield from enumerate(value, start=1)


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, Finding("broken-json", f"the line is {_json_problem(error, line=False)}")


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: this is a folder; give the data file in it") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the file cannot be read: {getattr(error, 'strerror', error)}") from error
    if data.startswith(b"PAR1"):
        raise DataError(f"{path}: Parquet is not read yet; write the table as JSONL, a row per line")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: the file is not UTF-8 text; save it as UTF-8") from error


def _json_problem(error: Exception, *, line: bool = True) -> str:
    if isinstance(error, json.JSONDecodeError):
        where = f"line {error.lineno}, column {error.colno}" if line else f"column {error.colno}"
        return f"not valid JSON: {error.msg} at {where}"
    reason = "nested too deeply" if isinstance(error, RecursionError) else "it holds a number of too many digits"
    return f"not usable JSON: {reason}"


def json_type(value: Any) -> str:
    """A value's type in the words of JSON, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
