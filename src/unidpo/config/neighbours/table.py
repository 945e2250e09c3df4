"""How a table says what becomes of another tool's key: an equal of ours, an equal with a difference, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

OPEN = "???"
"""The value of a key that the reader has to fill in; a recipe that still holds one is refused, with the key."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Dotted keys of a recipe with their values, and what differs."""

    values: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True, slots=True)
class NoEqual:
    """Without it the run differs: why there is none, and what to do."""

    reason: str
    leaves_open: str | None = None
    """The key of ours that has to be filled in instead."""


@dataclass(frozen=True, slots=True)
class NotNeeded:
    """The run is the same without it, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Given:
    """What a configuration says, and what is known around it.

    Attributes:
        values: its keys, and below them the defaults of its tool.
        processes: how many it is started with, where that is known.
        find_data: the data file or hub name behind the name of a data set, by the folder of its ``dataset_info.json``.
    """

    values: Mapping[str, Any]
    processes: int | None = None
    find_data: Callable[[str, str], str | None] = field(default=lambda name, folder: None)

    def get(self, key: str, otherwise: Any = None) -> Any:
        """The value of another key."""
        value = self.values.get(key)
        return otherwise if value is None else value


Outcome: TypeAlias = Taken | NoEqual | NotNeeded


@dataclass(frozen=True, slots=True)
class Row:
    """What becomes of a key.

    Attributes:
        ours: the dotted key that holds its value; empty where it is a matter of `take`, or where there is none.
        note: what differs, or why there is no equal and what to do.
        needed: without an equal, whether the run differs.
        take: the outcome for a value, or its value here, where it is not the same value.
        null: whether null is a value that says something, and not the same as leaving the key out.
    """

    ours: str = ""
    note: str = ""
    needed: bool = True
    take: Callable[[Any, Given], Any] | None = None
    null: bool = False

    def outcome(self, value: Any, given: Given) -> Outcome:
        """What becomes of the key with this value."""
        if value is None and not self.null:
            return NotNeeded("is null: as if it were left out")
        taken = self.take(value, given) if self.take is not None else value
        if isinstance(taken, Taken | NoEqual | NotNeeded):
            return taken
        if self.ours:
            return Taken({self.ours: taken}, self.note)
        if value in (None, False, 0, "", "no", "none", []):
            return NotNeeded("is off, as it is here")
        return NoEqual(self.note) if self.needed else NotNeeded(self.note)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another tool.

    Attributes:
        name: as its users write it.
        rows: its keys; one with a `*` stands for several.
        defaults: what it takes where a key is left out, if that changes what is learned and is not our default.
        programs: the words after which its arguments stand on a command line, besides names of Python files.
        always: dotted keys of ours whose value follows from the tool itself, each with the value and the reason.
    """

    name: str
    rows: Mapping[str, Row]
    defaults: Mapping[str, Any]
    programs: tuple[str, ...]
    always: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    def row(self, key: str) -> Row | None:
        """The row of a key, or `None` where the tool has no such key."""
        if key in self.rows:
            return self.rows[key]
        return next((row for name, row in self.rows.items() if "*" in name and fnmatchcase(key, name)), None)


def same(ours: str, note: str = "", take: Callable[[Any, Given], Any] | None = None, *, null: bool = False) -> Row:
    """A key with an equal of ours; the note says what differs."""
    return Row(ours, note, take=take, null=null)


def missing(note: str) -> Row:
    """A key without an equal."""
    return Row(note=note)


def not_needed(note: str) -> Row:
    """A key without which the run is the same."""
    return Row(note=note, needed=False)


def by(take: Callable[[Any, Given], Any], ours: str = "", *, null: bool = False) -> Row:
    """A key whose value decides; `ours` is what an error suggests for it."""
    return Row(ours, take=take, null=null)


def several(keys: str, row: Row) -> dict[str, Row]:
    """The same row for keys that stand in one text."""
    return dict.fromkeys(keys.split(), row)


def only_with(
    key: str, word: Any, ours: str, take: Callable[[Any, Given], Any] | None = None, *, null: bool = False
) -> Row:
    """A key that counts only where another one has this value."""

    def taken(value: Any, given: Given) -> Any:
        if given.get(key) != word:
            return NotNeeded(f"goes with `{key}: {str(word).lower()}`")
        return value if take is None else take(value, given)

    return Row(ours, take=taken, null=null)
