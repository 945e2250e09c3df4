"""JSON as it was written: a key that stands twice in an object is a mistake, not the last one's value."""

from __future__ import annotations

import json
from typing import Any

from unidpo.errors import shown


class RepeatedKey(ValueError):
    """An object has a key twice. Readers of JSON take the last one, silently, and which was meant nobody knows.

    Attributes:
        path: where it stands below the value that was read, ``responses[0].text``.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"the key {shown(path)} stands twice in one object, so it is unknown which is meant; keep one")
        self.path = path


class Doubled(dict[str, Any]):
    """An object with a key that stood in it twice.

    Attributes:
        key: the first such key.
    """

    key = ""


def loads(text: str, **options: Any) -> Any:
    """A JSON value; the options are those of `json.loads`.

    Raises:
        RepeatedKey: an object in it has a key twice.
        ValueError: it is no JSON, or a number has too many digits.
        RecursionError: it is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, **options)
    except RepeatedKey as error:
        raise RepeatedKey(repeated_key(loads_with_repeats(text)) or error.path) from None


def loads_with_repeats(text: str) -> Any:
    """The same, but an object with a key that stands twice is `Doubled`."""
    return json.loads(text, object_pairs_hook=_marked)


def repeated_key(value: Any) -> str | None:
    """Where in a value of `loads_with_repeats` a repeated key stands."""
    left = [("", value)]
    while left:
        path, value = left.pop()
        if isinstance(value, Doubled):
            return f"{path}.{value.key}".removeprefix(".")
        if isinstance(value, dict):
            left += [(f"{path}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [(f"{path}[{i}]", inner) for i, inner in enumerate(value)]
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise RepeatedKey(_first_repeated(pairs))
    return values


def _marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        values = Doubled(pairs)
        values.key = _first_repeated(pairs)
    return values


def _first_repeated(pairs: list[tuple[str, Any]]) -> str:
    keys = [key for key, _ in pairs]
    return next(key for i, key in enumerate(keys) if key in keys[:i])
