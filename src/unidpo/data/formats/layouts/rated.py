"""Several answers to a prompt, each rated on several axes, as VLFeedback, UltraFeedback and HelpSteer2 are published.

A score is the weighted mean of an answer's ratings, as for MM-RLHF (docs/decisions/0011); each larger score is chosen
over a smaller.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from unidpo.data.formats.files import json_type
from unidpo.data.formats.ratings import rating_of, weighted_mean
from unidpo.data.formats.row import IMAGE_COLUMNS, PATH_COLUMN, Row
from unidpo.data.formats.texts import encodable, is_visible, turns_of
from unidpo.data.pairs import Message, Pair, Response
from unidpo.errors import shown

COLUMNS = ("prompt", "instruction", "completions", PATH_COLUMN, *IMAGE_COLUMNS)


@dataclass(frozen=True, slots=True)
class Axes:
    """What the answers of a data set are rated on.

    Attributes:
        names: of the axes that make the score, of equal weight unless the user gives weights.
        lowest: rating.
        highest: rating.
        overall: a grade beside the axes. A pair that it sees the other way round is left out and counted.
    """

    names: tuple[str, ...]
    lowest: float
    highest: float
    overall: str | None = None


KNOWN: Mapping[str, Axes] = {
    "VLFeedback": Axes(("helpfulness", "visual_faithfulness"), 1, 5),
    "UltraFeedback": Axes(
        ("helpfulness", "honesty", "truthfulness", "instruction_following"), 1, 5, overall="overall_score"
    ),
    "HelpSteer2": Axes(("helpfulness", "correctness"), 0, 4),
}
COUNTED = ("tied-pair", "rating-conflict", "missing-rating", "bad-response", "duplicate-response")
"""Kinds of what is left out of a row that is used."""
_NO_AXES = Axes((), float("-inf"), float("inf"))
_GRADES = ("overall_score", "fine_grained_score")
"""Numbers beside the axes, on other scales than these."""
_HELPSTEER_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def fits(given: dict[str, Any]) -> bool:
    """Whether a row is of this layout: answers as objects, or as an object of lists, which `datasets` makes of them."""
    answers = given.get("completions")
    return isinstance(answers, dict) or (isinstance(answers, list) and all(isinstance(each, dict) for each in answers))


def joined(values: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Numbered rows, of which those that hold one rated answer each (HelpSteer2) become one for each prompt.

    They follow one another in the file. The row has the number of the first.
    """
    waiting: tuple[int, dict[str, Any]] | None = None
    for number, value in values:
        is_one = isinstance(value, dict) and {"prompt", "response", *KNOWN["HelpSteer2"].names} <= value.keys()
        answer = {name: each for name, each in value.items() if name != "prompt"} if is_one else None
        if answer is not None and waiting is not None and waiting[1]["prompt"] == value["prompt"]:
            waiting[1]["completions"].append(answer)
            continue
        if waiting is not None:
            yield waiting
        waiting = None if answer is None else (number, {"prompt": value["prompt"], "completions": [answer]})
        if answer is None:
            yield number, value
    if waiting is not None:
        yield waiting


def read(row: Row) -> None:
    """`prompt` or `instruction`, an image, and `completions` with a `response` and ratings each."""
    if row.values.get("prompt") is None and row.values.get("instruction") is not None:
        row.rename(prompt="instruction")
    if all(row.values.get(name) is None for name in IMAGE_COLUMNS):
        row.rename(image=PATH_COLUMN)
    messages = row.prompt(_prompt(row), "prompt", place_marks=True)
    answers = _answers(row)
    found = dict.fromkeys(name for answer in answers for name in _ratings(answer))
    axes = next((axes for axes in KNOWN.values() if found.keys() >= set(axes.names)), _NO_AXES)
    weights = row.weights or dict.fromkeys(axes.names, 1.0)
    unknown = [name for name in weights if name not in found]
    if answers and (not weights or unknown):
        there = f"there are {', '.join(map(shown, found))}" if found else "there are no ratings"
        problem = f"no answer has the rating {shown(unknown[0])}" if unknown else "the ratings are of no known data set"
        row.error("missing-rating", "completions", f"{problem}; {there}; say with `--score` how they are weighed")
        return
    responses: list[Response] = []
    grades: list[float | None] = []
    for i, answer in enumerate(answers):
        text, ratings = answer.get("response"), _usable_ratings(row, answer, i, axes, weights)
        if not isinstance(text, str) or not encodable(text) or not is_visible(text):
            row.warn("bad-response", _key(row, i), "the answer is empty or no text; it is left out")
        elif any(text == response.text for response in responses):
            row.warn("duplicate-response", _key(row, i), "this answer stands in the row before; it is left out")
        elif ratings is not None:
            responses.append(Response(text, weighted_mean(ratings, weights)))
            second = axes.overall if axes.overall not in weights else None
            grades.append(rating_of(_ratings(answer).get(second)) if second else None)
    if row.is_bad:
        return
    if len(responses) < 2:
        problem = f"{len(responses)} of {len(answers)} answers can be used, and a preference needs two"
        alone = (
            "; where each answer has its own row, those of one prompt follow one another" if len(answers) == 1 else ""
        )
        row.error("too-few-responses", "completions", problem + alone)
        return
    pairs = list(_pairs(row, responses, grades))
    if not pairs:
        row.error("no-pair", "completions", "no answer is rated better than another; remove the row")
    row.make_group(messages, responses, pairs)
    if row.group is not None:
        row.group = row.group.keep_pairs(pairs)


def _prompt(row: Row) -> list[Message]:
    """The prompt; HelpSteer2 has whole conversations in one string."""
    prompt = row.values.get("prompt")
    if isinstance(prompt, str) and _HELPSTEER_TURN.search(prompt):
        prompt = turns_of(prompt, _HELPSTEER_TURN, first="User")
    return row.messages(prompt, "prompt")


def _answers(row: Row) -> list[dict[str, Any]]:
    """The answers as objects."""
    given: Any = row.values.get("completions")
    if not fits({"completions": given}):
        row.error("wrong-type", "completions", f"a list of answers is expected, not {json_type(given)}")
        return []
    if isinstance(given, dict):
        columns = {name: values for name, values in given.items() if isinstance(values, list)}
        if len({len(values) for values in columns.values()}) > 1:
            problem = "the lists differ in length: it is unknown which rating belongs to which answer"
            row.error("misaligned-rating", "completions", problem)
            return []
        given = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    row.lost += sorted({f"completions.{name}" for answer in given for name in answer if name != "response"})
    return list(given)


def _ratings(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer is rated, by the names of axes and grades as they are written in `--score`."""
    axes = answer.get("annotations")
    # Beside the axes, only a number is a grade; without them, every column but the answer may be an axis.
    given = {
        name: value
        for name, value in answer.items()
        if name != "response" and (not isinstance(axes, dict) or isinstance(value, int | float))
    }
    every: dict[Any, Any] = given | (axes if isinstance(axes, dict) else {})
    return {
        re.sub(r"\W+", "_", str(name)).lower(): value.get("Rating") if isinstance(value, dict) else value
        for name, value in every.items()
    }


def _usable_ratings(
    row: Row, answer: Mapping[str, Any], i: int, axes: Axes, weights: Mapping[str, float]
) -> dict[str, float] | None:
    """The ratings that are asked for; none where one of them is missing: the others' mean is on another scale."""
    given, ratings = _ratings(answer), {}
    for name in weights:
        number = rating_of(given.get(name))
        if number is None or (name not in _GRADES and not axes.lowest <= number <= axes.highest):
            scale = "" if axes is _NO_AXES else f" from {axes.lowest:g} to {axes.highest:g}"
            problem = f"{shown(given.get(name))} is no rating{scale}; the answer is left out"
            row.warn("missing-rating", f"{_key(row, i)}.{name}", problem)
        else:
            ratings[name] = number
    return ratings if len(ratings) == len(weights) else None


def _pairs(row: Row, responses: list[Response], grades: list[float | None]) -> Iterator[Pair]:
    """Every pair of different scores, the better first, that the grades do not contradict."""
    for i, j in itertools.permutations(range(len(responses)), 2):
        margin = (responses[i].score or 0.0) - (responses[j].score or 0.0)
        first, second = grades[i], grades[j]
        where = f"answers {i + 1} and {j + 1} of those that can be used"
        if margin == 0 and i < j:
            row.warn("tied-pair", "completions", f"{where} are rated the same and make no pair")
        elif margin > 0 and first is not None and second is not None and first < second:
            problem = f"{where}: the axes prefer the former, the overall grade the latter; they make no pair"
            row.warn("rating-conflict", "completions", problem)
        elif margin > 0:
            yield Pair(i, j, row.number, row.file)


def _key(row: Row, i: int) -> str:
    return f"completions.response[{i}]" if isinstance(row.values.get("completions"), dict) else f"completions[{i}]"
