"""What can be wrong with something a user gave us, and how it is said.

Every message names what is wrong, where (file, row, key) and what to do. Rows count from 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

E = TypeVar("E", bound="UserError")
Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found in an input.

    Attributes:
        kind: a short stable name, e.g. ``missing-image``; findings are grouped and counted by it.
        message: what is wrong and what to do, one sentence, no location.
        file: the file it stands in.
        row: row within the file, counted from 1; ``None`` if the whole file is meant.
        key: the column or recipe key, dotted where nested.
        severity: ``error`` means the row (or file) cannot be used, ``warning`` that it can.
    """

    kind: str
    message: str
    file: str | Path | None = None
    row: int | None = None
    key: str | None = None
    severity: Severity = "error"

    def __str__(self) -> str:
        """One printable line, whatever the file, its keys and its values hold; the fields stay exact."""
        where = [printable(str(self.file), most=500)] if self.file is not None else []
        if self.row is not None:
            where.append(f"row {self.row}")
        if self.key is not None:
            where.append(f"`{printable(self.key, most=200)}`")
        message = printable(self.message)
        return f"{', '.join(where)}: {message}" if where else message


class UserError(Exception):
    """An input that cannot be used. The command line prints it without a traceback and exits with `exit_code`."""

    exit_code: int = 2

    def __init__(self, message: str, *, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)

    def __str__(self) -> str:
        """The message in printable lines. All but the first are indented, so that a line break in a file's name
        cannot pass for a line of ours.
        """
        first, *more = super().__str__().split("\n")
        return "\n".join([printable(first), *(f"  {printable(line.strip())}" for line in more)])


class DataError(UserError):
    """A data file, or rows of it, cannot be used."""


class ImageError(UserError):
    """An image cannot be found, opened or decoded."""


class RecipeError(UserError):
    """A recipe, or an override of one, cannot be used."""


class ModelError(UserError):
    """A model folder or hub id cannot be used for what was asked."""


class TrainingError(UserError):
    """The work failed although nothing in the input was wrong to read: the loss is no number, say."""

    exit_code = 1


class Interrupted(UserError):
    """The work was asked to stop by a signal, did so in good order, and can be resumed.

    Args:
        exit_code: 128 and the signal's number; SIGTERM's where it is not given.
    """

    def __init__(self, message: str, *, exit_code: int = 143) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RunError(UserError):
    """A run folder is not in the state the command needs."""


class FolderInUse(UserError):
    """Another process is at work in a folder that only one may write."""


def from_findings(error: type[E], title: str, findings: Sequence[Finding], *, most: int = 20) -> E:
    """Build one error out of many findings: all of them are kept, the first ``most`` are printed."""
    lines = [title, *(f"  {finding}" for finding in findings[:most])]
    if len(findings) > most:
        lines.append(f"  ... and {len(findings) - most} more")
    return error("\n".join(lines), findings=findings)


def printable(text: str, *, most: int = 2000) -> str:
    """Foreign text as it may be shown in a message: on one line, at most about ``most`` long, and without a character
    that a terminal would obey or hide. Line breaks, escape sequences, and marks that turn the direction of writing
    are written as in a Python string.
    """
    if len(text) > most:
        text = f"{text[: most // 2]}...{text[-(most // 2) :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object, *, most: int = 120) -> str:
    """A value of the user's as it may be shown in a message: as `printable`, and quoted."""
    try:
        text = repr(str(value) if isinstance(value, Path) else value)
    except (ValueError, RecursionError):  # a number of too many digits, a list in a list in a list ...
        text = f"<{type(value).__name__}>"
    return printable(text, most=most)


def require_known(where: str, what: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise `DataError` for a name that is not among the known ones of its kind."""
    for name in names:
        if name not in known:
            there = f"there are {', '.join(known)}{did_you_mean(name, known)}"
            raise DataError(f"{where}: there is no {what} {shown(name)}; {there}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A closing hint such as ``; did you mean `beta`?``, or an empty string where nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""
