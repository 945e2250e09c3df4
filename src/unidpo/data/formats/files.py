"""From a JSON, JSONL or Parquet file to its rows, and from rows to a JSON file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from unidpo.data.formats import tables
from unidpo.data.formats.writing import new_data_file
from unidpo.errors import DataError, Finding, shown
from unidpo.files.places import missing_here
from unidpo.files.regular import open_regular

LINE_SUFFIXES = (".jsonl", ".ndjson")
_PARQUET = b"PAR1"
_BOMS = (b"\xff\xfe", b"\xfe\xff")
_PACKED = {b"\x1f\x8b": "gunzip", b"PK\x03\x04": "unzip", b"\x28\xb5\x2f\xfd": "unzstd"}
_GIT_LFS = b"version https://git-lfs"


class RepeatedKey(ValueError):
    """An object has a key twice. Readers of JSON take the last one, silently, and which was meant nobody knows.

    Attributes:
        path: where it stands below the value that was read, ``responses[0].text``.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"the key {shown(path)} stands twice in one object, so it is unknown which is meant; keep one")
        self.path = path


class _WithRepeat(dict[str, Any]):
    """An object in which a key stood twice, and that key."""

    repeated_key = ""


def rows_of(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a JSON, JSONL or Parquet file and their numbers from 1.

    A row that cannot be read, such as a line that is no JSON, comes as a `Finding`. Only one JSON value as a whole is
    held in memory; lines and tables are read piece by piece.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or is not JSON as a whole.
    """
    try:
        with open_regular(path) as file:
            yield from rows_in(file, path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: {missing_here(path, 'file') or 'there is no such file'}") from error
    except IsADirectoryError as error:
        raise DataError(f"{path}: this is a folder; give the data file in it") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the file cannot be read: {getattr(error, 'strerror', None) or error}") from error


def rows_in(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    """The same for an open file. The path is for the messages and its suffix. Raises `DataError` as `rows_of`."""
    head = file.read(32)
    file.seek(0)
    if not head.startswith(_PARQUET):
        _refuse_other_kinds(path, head)
    if head.startswith(_PARQUET) or path.suffix == ".parquet":
        yield from enumerate(tables.parquet_rows(file, path), start=1)
    elif path.suffix in LINE_SUFFIXES and _first_letter(file) != b"[":
        yield from _rows_of_lines(file)
    else:
        yield from _rows_of_json(file, path)


def is_parquet(path: Path) -> bool:
    """Whether a file is read as Parquet. Raises `OSError`."""
    with open_regular(path) as file:
        return path.suffix == ".parquet" or file.read(4) == _PARQUET


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file that exists."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def loads(text: str, **options: Any) -> Any:
    """A JSON value; the options are those of `json.loads`.

    Raises:
        RepeatedKey: an object in it has a key twice.
        ValueError: it is no JSON, or a number has too many digits.
        RecursionError: it is nested too deeply.
    """
    value, has_repeats = _loads_marked(text, **options)
    if has_repeats and (repeat := _repeated_key(value)) is not None:
        raise repeat
    return value


def write_json_rows(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write rows as a JSON list, or a row per line if the path ends in ``.jsonl``; bytes as ``{"bytes": base64}``.

    The file appears complete or not at all.

    Raises:
        DataError: a row holds a value JSON has no word for, or the file cannot be written.
    """
    before, between, after = (b"", b"\n", b"\n") if path.suffix in LINE_SUFFIXES else (b"[\n", b",\n", b"\n]\n")
    with new_data_file(path) as file:
        file.write(before)
        for number, row in enumerate(rows):
            file.write((between if number else b"") + json_bytes(row, path))
        file.write(after)


def json_bytes(value: Any, path: Path, *, indent: int | None = None) -> bytes:
    """A value as JSON text in UTF-8. Raises `DataError` for a value JSON has no word for."""
    try:
        text = json.dumps(value, ensure_ascii=False, indent=indent, default=_json_default)
    except (TypeError, RecursionError) as error:
        problem = f"JSON cannot hold a value ({error}); write Parquet, or leave the column out"
        raise DataError(f"{path}: {problem}") from error
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a surrogate pair in a column nobody trains on: JSON can still spell it
        return json.dumps(value, indent=indent, default=_json_default).encode()


def json_type(value: Any) -> str:
    """A value's type in the words of JSON, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    names |= {bytes: "binary data", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    """Raise `DataError` for a file that by its suffix, or by how it begins, is of a kind that is not read."""
    if head.startswith(_BOMS):
        raise DataError(f"{path}, line 1: the file is not UTF-8 text but UTF-16 or UTF-32; save it as UTF-8")
    if head.startswith(_GIT_LFS):
        raise DataError(f"{path}: this is a pointer of Git LFS, not the data; fetch what it points to: git lfs pull")
    if command := next((command for magic, command in _PACKED.items() if head.startswith(magic)), None):
        raise DataError(f"{path}: packed files are not read; unpack it first, with {command}")
    if path.suffix.lower() in tables.OTHER_SUFFIXES:
        raise DataError(f"{path}: {path.suffix} files are not read; unpack it, or convert it to JSONL, JSON or Parquet")


def _rows_of_json(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    text = _text(file.read(), path)
    start = text.lstrip()[:1]
    if not start:
        return
    try:
        value, has_repeats = _loads_marked(text)
    except (ValueError, RecursionError) as error:
        # A second value after the first one: rows by line, whatever the file is called.
        by_line = start == "{" or path.suffix in LINE_SUFFIXES
        if by_line and isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            yield from _rows_of_lines(io.BytesIO(text.encode()))
            return
        raise DataError(f"{path}: {_json_problem(error)}") from error
    del text
    if isinstance(value, dict):
        lists = [key for key, inner in value.items() if isinstance(inner, list)]
        remedy = f"save the list under {shown(lists[0])} by itself" if lists else "put the rows into [ ]"
        raise DataError(f"{path}: the file is one JSON object, but a list of rows is expected; {remedy}")
    if not isinstance(value, list):
        raise DataError(f"{path}: the file holds {json_type(value)}, but a list of rows is expected")
    for i, row in enumerate(value):
        value[i] = None  # what has been read can go
        repeat = _repeated_key(row) if has_repeats else None
        yield i + 1, row if repeat is None else Finding("repeated-key", str(repeat), key=repeat.path)


def _rows_of_lines(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    # Not text mode: U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(file, start=1):
        try:
            text = line.rstrip(b"\n").decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield number, loads(text)
        except RepeatedKey as error:
            yield number, Finding("repeated-key", str(error), key=error.path)
        except UnicodeDecodeError as error:
            problem = f"byte {error.start + 1} of the line is not UTF-8 text; save the file as UTF-8"
            yield number, Finding("wrong-encoding", problem)
        except (ValueError, RecursionError) as error:
            yield number, Finding("broken-json", f"the line is {_json_problem(error, line=False)}")


def _loads_marked(text: str, **options: Any) -> tuple[Any, bool]:
    """A JSON value, and whether an object in it has a key twice. Such an object is a `_WithRepeat`."""
    has_repeats = False

    def to_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal has_repeats
        values = dict(pairs)
        if len(values) != len(pairs):
            has_repeats, values = True, _WithRepeat(values)
            keys = [key for key, _ in pairs]
            values.repeated_key = next(key for i, key in enumerate(keys) if key in keys[:i])
        return values

    return json.loads(text, object_pairs_hook=to_object, **options), has_repeats


def _repeated_key(value: Any) -> RepeatedKey | None:
    """The error of a value of `_loads_marked` in which a key stands twice."""
    left = [("", value)]
    while left:
        path, value = left.pop()
        if isinstance(value, _WithRepeat):
            return RepeatedKey(f"{path}.{value.repeated_key}".removeprefix("."))
        if isinstance(value, dict):
            left += [(f"{path}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(f"{path}[{i}]", inner) for i, inner in enumerate(value)]
    return None


def _first_letter(file: BinaryIO) -> bytes:
    """The first byte that is neither white space nor byte-order mark."""
    first = b""
    for line in file:
        if first := line.removeprefix(b"\xef\xbb\xbf").strip()[:1]:
            break
    file.seek(0)
    return first


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: the file is not UTF-8 text; save it as UTF-8") from error


def _json_default(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    raise TypeError(f"a {type(value).__name__}")


def _json_problem(error: Exception, *, line: bool = True) -> str:
    if isinstance(error, json.JSONDecodeError):
        where = f"line {error.lineno}, column {error.colno}" if line else f"column {error.colno}"
        return f"not valid JSON: {error.msg} at {where}"
    reason = "nested too deeply" if isinstance(error, RecursionError) else "it holds a number of too many digits"
    return f"not usable JSON: {reason}"
