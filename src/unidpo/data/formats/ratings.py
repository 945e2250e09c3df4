"""One score from ratings on several axes: their weighted mean, for MM-RLHF and other published data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from unidpo.errors import DataError, shown


def parse_weights(text: str) -> dict[str, float]:
    """Read ``helpfulness=1,faithfulness=2``; a rating without a number weighs 1.

    Raises:
        DataError: a weight is no number, or a rating is named twice.
    """
    weights: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        if name in weights:
            raise DataError(f"--score: {name} is given twice")
        try:
            weights[name] = float(number) if equals else 1.0
        except ValueError:
            raise DataError(f"--score: {shown(number)} is no number; write for example helpfulness=1") from None
    return weights


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise `DataError` for weights that make no mean: none at all, or one that is not above 0."""
    if not weights:
        raise DataError("--score: name at least one rating, such as helpfulness=1")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise DataError(f"--score: the weight of {name} is {weight:g}; give a number above 0, or leave it out")


def weighted_mean(ratings: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """A response's score: the mean of the ratings that have a weight, rounded to six digits."""
    return round(sum(weight * ratings[name] for name, weight in weights.items()) / sum(weights.values()), 6)


def rating_of(value: Any) -> float | None:
    """A finite number, also one in quotes."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
