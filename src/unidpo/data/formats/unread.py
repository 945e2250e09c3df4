"""Columns that no layout reads, but that look as if one should."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Iterator

_MEDIA = re.compile(
    r"(im(a)?ge?s?|pic(ture)?s?|photos?|pixel[_-]?values|videos?|audios?)"
    r"([_-]?(paths?|files?|file_?names?|names?|ur[li]s?|src|list|bytes|data|b(ase)?64))?",
    re.IGNORECASE,
)
_SCORES = {"score_chosen", "score_rejected"}
_MEANS_SCORE = {"rating", "reward", "grade", "point", "mark", "rank"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


def unread_columns(
    unread: Collection[str], absent: Collection[str], others: Collection[str]
) -> tuple[tuple[str, str], ...]:
    """Columns that look misspelled, or as if something of the row were left out, each with what to do.

    Args:
        unread: columns that the row fills and its layout does not read.
        absent: columns of its layout that the row leaves out or empty.
        others: columns that other layouts read.
    """
    return _found(frozenset(unread), frozenset(absent), frozenset(others))


@functools.lru_cache(maxsize=1024)  # most rows of a file have the same columns
def _found(unread: frozenset[str], absent: frozenset[str], others: frozenset[str]) -> tuple[tuple[str, str], ...]:
    return tuple(_problems(sorted(unread), absent, others))


def _problems(unread: Collection[str], absent: frozenset[str], others: frozenset[str]) -> Iterator[tuple[str, str]]:
    for key in unread:
        meant = _meant(key, absent)
        if meant is not None:
            yield key, f"this column is not read; if it is `{meant}`, name it so, or declare it in dataset_info.json"
        elif key in others:
            yield key, "this column is of another layout and is not read in this row; remove it, or mend the others"
        elif {"images", "image"} <= absent and _MEDIA.fullmatch(key.strip()):
            yield key, "this column is not read, and the row has no image; if it names one, call it `images`"


def _meant(key: str, absent: frozenset[str]) -> str | None:
    words = _words(key)
    if absent >= _SCORES and words in (("score",), ("margin",)):
        return "score_chosen` and `score_rejected"
    same = sorted(column for column in absent if _words(column) == words)
    return next(iter(same or difflib.get_close_matches(key.strip().lower(), absent, n=1, cutoff=0.85)), None)


def _words(key: str) -> tuple[str, ...]:
    """The words of a name in order of the alphabet, in the singular: `scoresChosen` and `chosen_score` are alike."""
    singular = (word.lower().removesuffix("s") for word in _WORD.findall(key))
    return tuple(sorted("score" if word in _MEANS_SCORE else word for word in singular))
