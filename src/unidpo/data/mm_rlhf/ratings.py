"""One row of MM-RLHF's `data.jsonl`: a prompt, the responses of some models, and what people thought of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from unidpo.data.formats.files import json_type
from unidpo.data.formats.ratings import rating_of, weighted_mean
from unidpo.data.formats.texts import encodable, marked
from unidpo.data.pairs import IMAGE, Message, Response
from unidpo.errors import Finding, Severity, shown

SUBSETS = ("long", "short", "mcq", "safety", "video")
DEFAULT_SUBSETS = ("long", "short", "mcq")
_LOWEST, _HIGHEST = 1.0, 5.0
_NAME = re.compile(r"[a-z]+")


@dataclass(frozen=True, slots=True)
class RatedPrompt:
    """What is usable of a row.

    Attributes:
        file: the file.
        row: its number in the file, from 1.
        id: as in the file, "" where it has none.
        question: the text, as `plain_question` gives it.
        message: the text with its image marks, as a user's message.
        images: as the file names them.
        responses: those with a text and all ratings asked for, scored by the weighted mean of these.
        ranks: each response's place in the final ranking, as in the file; ``None`` for one without.
    """

    file: Path
    row: int
    id: str
    question: str
    message: Message
    images: tuple[str, ...]
    responses: tuple[Response, ...]
    ranks: tuple[float | None, ...]

    def margin(self, chosen: int, rejected: int) -> float:
        """How much more one response scores than another."""
        return (self.responses[chosen].score or 0.0) - (self.responses[rejected].score or 0.0)


def subset_of(values: Mapping[str, Any]) -> str | None:
    """Which part of MM-RLHF a row belongs to: the first folder of its image that is one, else how its id begins."""
    images = values.get("image")
    image = images[0] if isinstance(images, list) and images else images
    if isinstance(image, str):
        for part in PurePosixPath(image.replace("\\", "/")).parts:
            if part in SUBSETS:
                return part
    elif values.get("video"):
        return "video"
    prefix = _NAME.match(str(values.get("id") or "").lower())
    return prefix[0] if prefix and prefix[0] in SUBSETS else None


def plain_question(question: str) -> str:
    """A question without image marks and with single spaces: what it is recognised by."""
    return " ".join(question.replace(IMAGE.value, " ").split())


@dataclass(slots=True)
class RatedRow:
    """Reads one row, and writes down everything that is wrong with it.

    An error means that the row is left out, a warning that something of it is: a response, or its place in the
    ranking.

    Args:
        values: the row.
        number: its number in the file, from 1.
        file: for the findings.
    """

    values: Mapping[str, Any]
    number: int
    file: Path
    findings: list[Finding] = field(default_factory=list)

    def read(self, weights: Mapping[str, float]) -> RatedPrompt | None:
        """What is usable of the row, or ``None`` with at least one error among the findings."""
        images = self._images()
        message = self._message(len(images))
        outputs = self.values.get("models_output")
        if not isinstance(outputs, list) or not outputs:
            found = "an empty one" if outputs == [] else json_type(outputs)
            self._note("bad-outputs", "models_output", f"a list of responses is expected, not {found}")
            return None
        columns = {name: self._column(name, len(outputs)) for name in weights}
        if any(finding.severity == "error" for finding in self.findings):
            return None
        ranking = self._ranking(len(outputs))
        responses: list[Response] = []
        ranks: list[float | None] = []
        for i, output in enumerate(outputs):
            is_usable = self._is_usable(output, i, responses)
            ratings = {name: self._rating(column[i], f"{name}[{i}]") for name, column in columns.items()}
            # A mean over some of the ratings would be on another scale.
            given = {name: rating for name, rating in ratings.items() if rating is not None}
            if is_usable and len(given) == len(weights):
                responses.append(Response(output, weighted_mean(given, weights)))
                ranks.append(ranking[i])
        if len(responses) < 2:
            problem = f"{len(responses)} of {len(outputs)} responses can be used, and a preference needs two"
            self._note("too-few-responses", "models_output", problem)
            return None
        identity = self.values.get("id")
        return RatedPrompt(
            self.file,
            self.number,
            "" if identity is None else str(identity),
            plain_question(message.text),
            message,
            images,
            tuple(responses),
            tuple(ranks),
        )

    def _note(self, kind: str, key: str, problem: str, severity: Severity = "error") -> None:
        self.findings.append(Finding(kind, problem, self.file, self.number, key, severity))

    def _images(self) -> tuple[str, ...]:
        value = self.values.get("image")
        images = value if isinstance(value, list) else [] if value is None else [value]
        if not images and self.values.get("video"):
            self._note("video-row", "video", "the prompt is about a video, and only images are read")
        elif not images:
            self._note("missing-image", "image", "the row names no image")
        elif not all(isinstance(image, str) and image.strip() and encodable(image) for image in images):
            self._note("wrong-type", "image", f"an image is a path, not {shown(value)}")
        else:
            return tuple(images)
        return ()

    def _message(self, images: int) -> Message:
        """The question with its image marks; where it has none, the images come first."""
        value = self.values.get("question")
        if not isinstance(value, str) or not encodable(value) or not plain_question(value):
            self._note("missing-question", "question", "the row has no question, or one that is no text")
            return Message("user", ())
        content = marked(value)
        marks = content.count(IMAGE)
        if not marks:
            content = (IMAGE,) * images + content
        elif images and marks != images:
            self._note("image-marks", "question", f"`<image>` marks in the question: {marks}, images: {images}")
        return Message("user", content)

    def _column(self, name: str, count: int) -> Sequence[Any]:
        """A rating of every response."""
        value = self.values.get(name)
        if value is None or value == []:
            self._note("missing-rating", name, "nobody rated the responses; the row is left out")
        elif not isinstance(value, list):
            self._note("wrong-type", name, f"a list of ratings is expected, not {json_type(value)}")
        elif len(value) != count:
            problem = f"{len(value)} ratings of {count} responses: it is unknown which belongs to which"
            self._note("misaligned-rating", name, problem)
        else:
            return value
        return ()

    def _ranking(self, count: int) -> Sequence[float | None]:
        value = self.values.get("final_ranking")
        if not isinstance(value, list) or len(value) != count:
            found = f"{len(value)} places" if isinstance(value, list) else json_type(value)
            problem = f"{found} for {count} responses; the ratings are not compared with a ranking"
            self._note("missing-ranking", "final_ranking", problem, "warning")
            return [None] * count
        ranks = [rating_of(place) for place in value]
        if None in ranks:
            problem = "not every response has a place; the ratings of those without are not compared with it"
            self._note("missing-ranking", "final_ranking", problem, "warning")
        return ranks

    def _is_usable(self, output: Any, i: int, before: Sequence[Response]) -> bool:
        key = f"models_output[{i}]"
        if not isinstance(output, str) or not output.strip() or not encodable(output):
            self._note("bad-response", key, "the response is empty or no text; it is left out", "warning")
        elif any(output == response.text for response in before):
            self._note("duplicate-response", key, "the row has this text already; it is left out", "warning")
        else:
            return True
        return False

    def _rating(self, value: Any, key: str) -> float | None:
        number = rating_of(value)
        if number is None or not _LOWEST <= number <= _HIGHEST:
            problem = f"{shown(value)} is no rating from {_LOWEST:g} to {_HIGHEST:g}; the response is left out"
            self._note("missing-rating", key, problem, "warning")
            return None
        return number
