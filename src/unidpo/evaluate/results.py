"""Results, and their files: `results.json` of a benchmark or a model, `judged.jsonl` and `scorer.csv`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unidpo.evaluate.benchmarks import Judged, Score, Statistic
from unidpo.evaluate.judge import Rulings
from unidpo.files.writing import write_atomically, write_json
from unidpo.generate.questions import EMPTY_PROMPT, UNREADABLE_IMAGE, Answer

RESULTS, JUDGED, TABLE, PAGE = "results.json", "judged.jsonl", "scorer.csv", "results.md"


@dataclass(frozen=True, slots=True)
class Counts:
    """Questions, and what was odd about them.

    Attributes:
        questions: asked of this model, or refused.
        generated: answered by this call; the others were on disk.
        unmatched: answers in which nothing could be made out, by the scorer or by a judge.
        judged: answers in which the scorer could make out nothing, and that a judge was asked about.
        not_judged: answers that the judge should have been asked about, and that it could not be.
        truncated: answers cut at the longest length allowed.
        empty_prompts: questions that the prompt style renders to nothing; scored as an empty answer.
        unreadable_images: questions not asked because of an image; scored as an empty answer.
    """

    questions: int
    generated: int
    unmatched: int
    judged: int
    not_judged: int
    truncated: int
    empty_prompts: int
    unreadable_images: int

    @classmethod
    def of(cls, answers: Mapping[str, Answer], score: Score, generated: int, rulings: Rulings) -> Counts:
        """Count what happened to some questions."""
        problems = [answer.problem for answer in answers.values()]
        return cls(
            questions=len(answers),
            generated=generated,
            unmatched=score.unmatched,
            judged=len(rulings.choices),
            not_judged=rulings.failed,
            truncated=sum(answer.truncated for answer in answers.values()),
            empty_prompts=problems.count(EMPTY_PROMPT),
            unreadable_images=problems.count(UNREADABLE_IMAGE),
        )


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """One benchmark with one model.

    Attributes:
        name: of the benchmark.
        metric: name of the main metric; "" where it failed.
        value: the main metric, on the scale the benchmark is published on.
        best: what a perfect model gets.
        parts: further numbers by name.
        counts: what happened to the questions.
        statistic: how `value` follows from the judged answers.
        limit: the `--limit` it ran under.
        identity: all the answers and their score depend on.
        failure: why there is no result; `None` where there is one.
    """

    name: str
    metric: str = ""
    value: float = 0.0
    best: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    counts: Counts | None = None
    statistic: Statistic = "mean"
    limit: int | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class ModelResult:
    """All benchmarks with one model.

    Attributes:
        label: a short name of the model, unique among those compared.
        model: as the user named it.
        folder: where its results are.
        benchmarks: in the order they were asked for.
    """

    label: str
    model: str
    folder: Path
    benchmarks: Sequence[BenchmarkResult]

    @property
    def failed(self) -> list[BenchmarkResult]:
        """Benchmarks without a result."""
        return [result for result in self.benchmarks if result.failure is not None]

    @property
    def complete(self) -> bool:
        """Whether every benchmark has a result, and no judge failed."""
        return not self.failed and not any(each.counts and each.counts.not_judged for each in self.benchmarks)


def delete_results(folder: Path) -> None:
    """Delete whatever an earlier call concluded, so that no score outlives what it was made of."""
    for name in (RESULTS, JUDGED, TABLE, PAGE):
        (folder / name).unlink(missing_ok=True)


def write_benchmark_result(folder: Path, result: BenchmarkResult, score: Score) -> None:
    """Write `judged.jsonl`, the scorer's own table, and last `results.json`."""
    lines = [json.dumps(asdict(each)) for each in score.judged]
    write_atomically(folder / JUDGED, "".join(f"{line}\n" for line in lines).encode())
    if score.table:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(score.table)
        write_atomically(folder / TABLE, text.getvalue().encode())
    write_json(folder / RESULTS, asdict(result))


def read_judged(folder: Path) -> list[Judged]:
    """What `write_benchmark_result` wrote of each answer."""
    return [Judged(**json.loads(line)) for line in (folder / JUDGED).read_text("utf-8").splitlines()]


def write_model_result(result: ModelResult) -> None:
    """Write a model's `results.json`."""
    record = {"model": result.model, "label": result.label, "benchmarks": [asdict(each) for each in result.benchmarks]}
    write_json(result.folder / RESULTS, record)
