"""Which layout a row is in, what it says in it, and which of its columns are not read."""

from __future__ import annotations

import difflib
import functools
import re
from typing import Any

from unidpo.data.formats.dataset_info import PLAIN
from unidpo.data.formats.files import json_type
from unidpo.data.formats.layouts import LAYOUTS, READ_LAYOUTS
from unidpo.data.formats.row import IMAGE_COLUMNS, Row
from unidpo.errors import Finding, shown

_UNSUPPORTED = ("videos", "video", "audios", "audio", "tools")
_MEDIA = re.compile(
    r"(im(a)?ge?s?|pic(ture)?s?|photos?|pixel[_-]?values|videos?|audios?)"
    r"([_-]?(paths?|files?|file_?names?|names?|ur[li]s?|src|list|bytes|data|b(ase)?64))?",
    re.IGNORECASE,
)
_SCORES = {"score_chosen", "score_rejected"}
_MEANS_SCORE = {"rating", "reward", "grade", "point", "mark", "rank"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


def read_row(row: Row, layout: str | None = None) -> None:
    """Read a row into ``row.group``, or leave it ``None`` with at least one error among the findings."""
    if not isinstance(row.given, dict):
        row.error("wrong-type", None, f"a row is an object with keys, not {json_type(row.given)}")
        return
    if not _is_declared(row, layout):
        row.columns = PLAIN
    row.layout = layout or row.columns.layout or detect(row.given)
    if row.layout is None:
        keys = shown(sorted(map(str, row.given))[:20], most=400)
        expected = " or ".join(f"`{layout.main}` ({name})" for name, layout in LAYOUTS.items())
        row.error("unknown-layout", None, f"the keys {keys} are of no known layout; a row has {expected}")
        return
    names = row.columns.names
    if row.weights and row.layout != "rated":
        row.error("missing-rating", None, "`--score` weighs ratings, and this row has none; leave it out")
        return
    columns = READ_LAYOUTS[row.layout].columns
    row.values = {name: row.given[key] for name in columns if (key := names.get(name, name)) in row.given}
    try:
        for key in _UNSUPPORTED:
            if row.given.get(names.get(key, key)):
                row.error("unsupported", key, f"{key} cannot be trained on; remove the row, or the column")
        READ_LAYOUTS[row.layout].read(row)
        _warn_of_unread_columns(row, columns)
    except RecursionError:
        row.error("wrong-type", None, "the values are nested too deeply to be a row")


def detect(given: dict[str, Any]) -> str | None:
    """The layout a row of these columns is read as. In a table every row has every column; null ones say nothing."""
    filled = {key: value for key, value in given.items() if value is not None}
    for name, layout in READ_LAYOUTS.items():
        is_prompted = not layout.main or layout.main in filled or isinstance(filled.get("chosen"), list)
        is_answered = "chosen" in filled or "rejected" in filled or "chosen" not in layout.columns
        if is_prompted and is_answered and layout.fits(filled):
            return name
    return next((name for name, layout in READ_LAYOUTS.items() if layout.fits(given)), None)


def extra_columns(row: Row) -> dict[str, Any]:
    """The columns of a row that its layout does not read, nulls left out."""
    if row.layout is None:
        return {}
    known = {row.columns.names.get(name, name) for name in READ_LAYOUTS[row.layout].columns}
    return {key: value for key, value in row.given.items() if key not in known and value is not None}


def _is_declared(row: Row, layout: str | None) -> bool:
    """Whether what is declared of the file's columns is true of this row."""
    declared = row.columns.layout
    if declared is None or layout not in (None, declared):
        return False
    main = LAYOUTS[declared].main
    return row.columns.names.get(main, main) in row.given


def _warn_of_unread_columns(row: Row, columns: tuple[str, ...]) -> None:
    """Note columns that look misspelled, or as if something of the row were left out."""
    names = row.columns.names
    known = {names.get(name, name) for name in (*columns, *_UNSUPPORTED)}
    unread = [key for key, value in row.given.items() if key not in known and value is not None]
    absent = frozenset(name for name in columns if row.values.get(name) is None) if unread else frozenset()
    for key in sorted(key for key in unread if isinstance(key, str)):
        if (meant := _meant(key, absent)) is not None:
            problem = f"this column is not read; if it is `{meant}`, name it so, or declare it in dataset_info.json"
        elif not names and any(key in layout.columns for layout in LAYOUTS.values()):
            problem = "this column is of another layout and is not read in this row; remove it, or mend the others"
        elif absent.issuperset(IMAGE_COLUMNS) and _MEDIA.fullmatch(key.strip()):
            problem = "this column is not read, and the row has no image; if it names one, call it `images`"
        else:
            continue
        row.findings.append(Finding("unread-column", problem, row.file, row.number, key, "warning"))


@functools.lru_cache(maxsize=1024)  # most rows of a file have the same columns
def _meant(key: str, absent: frozenset[str]) -> str | None:
    """Which of the columns that a row leaves out is probably meant by a name."""
    words = _words(key)
    if absent >= _SCORES and words in (["score"], ["margin"]):
        return "score_chosen` and `score_rejected"
    same = sorted(column for column in absent if _words(column) == words)
    return next(iter(same or difflib.get_close_matches(key.strip().lower(), absent, n=1, cutoff=0.85)), None)


def _words(key: str) -> list[str]:
    """The words of a name in order of the alphabet, in the singular: `scoresChosen` and `chosen_score` are alike."""
    singular = (word.lower().removesuffix("s") for word in _WORD.findall(key))
    return sorted("score" if word in _MEANS_SCORE else word for word in singular)
