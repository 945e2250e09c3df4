"""Models through benchmarks: ask what is not answered yet, score, write, go on past a benchmark that fails."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from unidpo.errors import UserError
from unidpo.evaluate import results
from unidpo.evaluate.benchmarks import Benchmark, EvaluationFailed, Score
from unidpo.evaluate.judge import Judge, Rulings, consult, unmatched
from unidpo.evaluate.predictions import Predictions
from unidpo.evaluate.results import BenchmarkResult, Counts, ModelResult
from unidpo.generate.questions import Backend

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Work:
    """One benchmark to run with one model: who answers, what is asked, where it is kept, and who judges."""

    benchmark: Benchmark
    backend: Backend
    folder: Path
    limit: int | None = None
    judge: Judge | None = None

    def identity(self) -> dict[str, Any]:
        """All the answers depend on."""
        return {
            **self.backend.identity(),
            **self.benchmark.identity(),
            "generation": {**asdict(self.benchmark.generation), "decoding": "greedy"},
        }


def evaluate(
    backend: Backend,
    benchmarks: Sequence[Benchmark],
    out: Path,
    *,
    model: str = "model",
    label: str | None = None,
    limit: int | None = None,
    judge: Judge | None = None,
    on_progress: Progress | None = None,
) -> ModelResult:
    """Run benchmarks with one model, and write its results.

    A call that was broken off goes on where it was; answers that are there already are not generated again. A
    benchmark that fails has its reason in the result, and the others still run.

    Args:
        backend: what answers; for a model in memory `unidpo.generate.hugging_face.HuggingFace`.
        benchmarks: what is asked.
        out: receives a folder per benchmark, `results.json` and `results.md`.
        model: what the results call the model.
        label: a shorter name for tables.
        limit: ask about so many questions of each benchmark.
        judge: reads answers in which no rule found a choice; see `unidpo.evaluate.judge`.
        on_progress: told how far it is.

    Raises:
        EvaluationError: `out` holds answers that something else gave; nothing is generated then.
    """
    works = [Work(benchmark, backend, out / benchmark.name, limit, judge) for benchmark in benchmarks]
    opened = [_open(work) for work in works]
    results.forget(out)
    found = [
        _run(work, store, on_progress) if isinstance(store, Predictions) else store
        for work, store in zip(works, opened, strict=True)
    ]
    result = ModelResult(label or model, model, out, found)
    results.write_model(result)
    return result


def _open(work: Work) -> Predictions | BenchmarkResult:
    """Where its answers go; a failure where the benchmark itself has one. Raises `EvaluationError`."""
    try:
        return Predictions(work.folder, work.identity())
    except EvaluationFailed as error:
        _LOG.error("%s failed: %s", work.benchmark.name, error)
        return BenchmarkResult(work.benchmark.name, failure=str(error))


def _run(work: Work, store: Predictions, on_progress: Progress | None) -> BenchmarkResult:
    name = work.benchmark.name
    try:
        results.forget(work.folder)
        generated = _answer(work, store, on_progress)
        answers = {question.index: store.answers[question.index] for question in work.benchmark.questions(work.limit)}
        score, rulings = _score(work, {index: given.text for index, given in answers.items()}, on_progress)
        result = BenchmarkResult(
            name=name,
            metric=score.metric,
            value=score.value,
            best=score.best,
            parts=score.parts,
            counts=Counts.of(answers, score, generated, rulings),
            statistic=score.statistic,
            limit=work.limit,
            identity={**store.identity, "judge": "none" if work.judge is None else work.judge.identity()},
        )
        results.write_benchmark(work.folder, result, score)
    except UserError as error:
        _LOG.error("%s failed: %s", name, error)
        return BenchmarkResult(name, failure=str(error), identity=store.identity)
    except Exception as error:  # the other benchmarks still run
        _LOG.exception("%s failed", name)
        return BenchmarkResult(name, failure=f"{type(error).__name__}: {error}", identity=store.identity)
    return result


def _answer(work: Work, store: Predictions, on_progress: Progress | None) -> int:
    """Have the questions answered that are not; gives how many answers that took."""
    questions = work.benchmark.questions(work.limit)
    todo = store.missing(questions)
    stage, total = f"{work.benchmark.name}, answers", len(questions)
    done = total - len(todo)
    if on_progress is not None:
        on_progress(stage, done, total)
    generated = 0
    answered: set[str] = set()
    for batch in work.backend.answer(todo, work.benchmark.generation):
        store.add(batch)
        answered |= batch.keys()
        done += len(batch)
        generated += sum(given.problem is None for given in batch.values())
        if on_progress is not None:
            on_progress(stage, done, total)
    unanswered = [question for question in todo if question.index not in answered]
    if unanswered:
        raise EvaluationFailed(f"{work.benchmark.name}: {len(unanswered)} questions were left without an answer")
    return generated


def _score(work: Work, answers: Mapping[str, str], on_progress: Progress | None) -> tuple[Score, Rulings]:
    """Score answers; where a judge reads a choice in what no rule could match, that choice is scored in its place."""
    score = work.benchmark.score(answers)
    if work.judge is None:
        return score, Rulings({}, 0)
    questions = {question.index: question for question in work.benchmark.questions(work.limit)}
    asked = {index: (questions[index], answers[index]) for index in unmatched(score, questions, answers)}
    tell = None if on_progress is None else functools.partial(on_progress, f"{work.benchmark.name}, judge")
    rulings = consult(work.judge, asked, work.folder, tell)
    return work.benchmark.score({**answers, **rulings.decided}) if rulings.decided else score, rulings
