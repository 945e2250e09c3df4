"""What every benchmark is to the rest: questions to ask, and a way to score the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from unidpo.errors import UserError

Part: TypeAlias = "str | Path | bytes"
"""A piece of a question in the order it is read: text, or an image as a file or the bytes of one."""
Statistic: TypeAlias = Literal["mean", "f1", "mme"]
"""How the metric follows from the judged answers; see `unidpo.evaluate.comparing`."""


class EvaluationError(UserError):
    """A benchmark, a folder of results or an option of an evaluation cannot be used."""


class EvaluationFailed(UserError):
    """A benchmark could not be finished although nothing was wrong with what the user gave."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask.

    Attributes:
        index: names the question within its benchmark.
        parts: texts and images in the order they are read.
        choices: what an answer can mean, and what stands behind it: letters and their options, or yes and no. Empty
            where answers are free.
    """

    index: str
    parts: tuple[Part, ...]
    choices: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All its text."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[Path | bytes, ...]:
        """Its images in order."""
        return tuple(part for part in self.parts if not isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Generation:
    """How answers are generated; always greedily.

    Attributes:
        max_new_tokens: an answer that is longer is cut, and counted as truncated.
        min_pixels: images with less width times height are enlarged; `None` for the model's own limit.
        max_pixels: images with more are scaled down; `None` for the model's own limit.
    """

    max_new_tokens: int = 2048
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of one answer.

    Attributes:
        index: of the question.
        unit: questions of one unit are right or wrong together, and are drawn together by the bootstrap.
        value: credit in [0, 1].
        matched: whether an answer could be made out in what the model wrote.
        category: of the question; "" without one.
        truth: "yes" or "no" where the statistic is F1, else "".
        said: what was made out.
    """

    index: str
    unit: str
    value: float
    matched: bool = True
    category: str = ""
    truth: str = ""
    said: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """What a scorer made of all answers.

    Attributes:
        metric: name of the main metric.
        value: the main metric.
        best: what a perfect model gets.
        parts: further numbers by name, e.g. the metric per category.
        judged: each answer.
        statistic: how `value` follows from `judged`.
        table: the scorer's own table, as rows of a CSV file; empty where it has none.
    """

    metric: str
    value: float
    best: float
    judged: Sequence[Judged]
    statistic: Statistic = "mean"
    parts: Mapping[str, float] = field(default_factory=dict)
    table: Sequence[Sequence[str]] = ()

    @property
    def unmatched(self) -> int:
        """Answers in which nothing could be made out."""
        return sum(not each.matched for each in self.judged)


class Benchmark(Protocol):
    """Questions, and the rule that scores answers to them."""

    @property
    def name(self) -> str:
        """Of its folder in the results."""

    @property
    def generation(self) -> Generation:
        """How its answers are generated."""

    def identity(self) -> dict[str, Any]:
        """What answers and scores depend on besides the model: checksum of the data, wording, version of the scorer."""

    def questions(self, limit: int | None = None) -> list[Question]:
        """The questions, or about the first `limit` of them: questions that are scored together stay together."""

    def score(self, answers: Mapping[str, str]) -> Score:
        """Score answers by index of the question. Questions without an answer here are left out altogether."""


def plain(value: Generation | Judged) -> dict[str, Any]:
    """As JSON holds it."""
    return asdict(value)
