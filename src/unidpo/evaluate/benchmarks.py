"""What every benchmark is to the rest: questions to ask, and a way to score the answers."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from unidpo.errors import UserError
from unidpo.files.regular import open_regular
from unidpo.generate.questions import Generation, Question

Statistic: TypeAlias = Literal["mean", "f1", "mme"]
"""How the metric follows from the judged answers; see `unidpo.evaluate.comparing`."""


class EvaluationError(UserError):
    """A benchmark, a folder of results or an option of an evaluation cannot be used."""


class EvaluationFailed(UserError):
    """A benchmark could not be finished although nothing was wrong with what the user gave."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class BenchmarkQuestion(Question):
    """A question of a benchmark.

    Attributes:
        choices: what an answer can mean, and what stands behind it: letters and their options, or yes and no. Empty
            where answers are free.
    """

    choices: Mapping[str, str] = field(default_factory=dict)


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
    """Questions, and the rule that scores answers to them.

    Attributes:
        name: of its folder in the results.
        generation: how its answers are generated.
    """

    name: str
    generation: Generation

    def identity(self) -> dict[str, Any]:
        """What answers and scores depend on besides the model: checksum of the data, wording, version of the scorer."""

    def questions(self, limit: int | None = None) -> list[BenchmarkQuestion]:
        """The questions, or about the first `limit` of them: questions that are scored together stay together."""

    def score(self, answers: Mapping[str, str]) -> Score:
        """Score answers by index of the question. Questions without an answer here are left out altogether."""


def md5_of(path: Path) -> str:
    """Checksum of a file, as VLMEvalKit names its data."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest()
