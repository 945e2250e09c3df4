"""`unidpo eval`: ask, score, write and compare, one model after the other. One that fails stops no other."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers

from unidpo.devices import empty_cache
from unidpo.errors import UserError
from unidpo.evaluate.benchmarks import Benchmark, EvaluationError, EvaluationFailed
from unidpo.evaluate.comparing import Difference, compare
from unidpo.evaluate.judge import Judge, Rulings, consult
from unidpo.evaluate.page import page
from unidpo.evaluate.predictions import Predictions
from unidpo.evaluate.results import (
    PAGE,
    BenchmarkResult,
    Counts,
    ModelResult,
    delete_results,
    write_benchmark_result,
    write_model_result,
)
from unidpo.evaluate.selection import Candidate
from unidpo.files.locks import locked
from unidpo.files.writing import write_atomically
from unidpo.generate.loading import open_answerer
from unidpo.generate.questions import Answerer, LoadOptions
from unidpo.progress import OnProgress

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of all models.

    Attributes:
        models: their results, in the order they were named.
        differences: of each model to the first one.
    """

    models: Sequence[ModelResult]
    differences: Sequence[Difference]

    @property
    def failed(self) -> bool:
        """Whether a benchmark, or the judge of its answers, failed with a model."""
        return not all(model.complete for model in self.models)

    def __str__(self) -> str:
        """The page of all models, and where the files are."""
        lines = [page(self.models, self.differences)]
        # Of a model that failed in all, what lies there may be of an earlier evaluation.
        some = [model for model in self.models if len(model.failed) < len(model.benchmarks)]
        lines += [f"{model.label}: {model.folder / PAGE}" for model in some]
        if len(self.models) > 1:
            lines.append(f"all: {self.models[0].folder.parent / PAGE}")
        return "\n".join(lines)


def evaluate_all(
    models: Sequence[Candidate],
    benchmarks: Sequence[Benchmark],
    out: Path,
    options: LoadOptions,
    *,
    limit: int | None = None,
    judge: Judge | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Run all benchmarks with one model after the other, and compare each with the first.

    One model's results go to `out` itself, those of several to a folder each. A model that cannot be loaded fails in
    all benchmarks; the next one still runs.

    Args:
        models: see `candidates`.
        benchmarks: what is asked.
        out: folder of the results.
        options: how models are loaded.
        limit: ask about so many questions of each benchmark.
        judge: see `evaluate`.
        on_progress: called with a stage, how many are done and how many there are.

    Raises:
        UserError: the only model cannot be used, results of another one are in its folder, or another process works
            there.
    """
    transformers.logging.disable_progress_bar()
    found: list[ModelResult] = []
    several = len(models) > 1
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(out))
        except OSError as error:
            raise EvaluationError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
        for model in models:
            folder, label = (out / model.label, f"{model.label} ") if several else (out, "")
            tell = functools.partial(_tell, on_progress, label)
            try:
                result = _evaluate_one(model, benchmarks, folder, options, limit=limit, judge=judge, on_progress=tell)
            except UserError as error:
                if not several:
                    raise
                failed = [BenchmarkResult(benchmark.name, failure=str(error)) for benchmark in benchmarks]
                result = ModelResult(model.label, model.given, folder, failed)
            found.append(result)
        if not several:
            return Evaluation(found, ())
        evaluation = Evaluation(found, compare(found, out))
        write_atomically(out / PAGE, page(found, evaluation.differences).encode())
        return evaluation


def _tell(on_progress: OnProgress | None, label: str, stage: str, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(f"{label}{stage}", done, total)


def _evaluate_one(
    model: Candidate, benchmarks: Sequence[Benchmark], folder: Path, options: LoadOptions, **settings: Any
) -> ModelResult:
    gc.collect()  # the model before, which nothing holds any more: two may not fit
    empty_cache()
    with open_answerer(model.name, options) as answerer:
        return evaluate(answerer, benchmarks, folder, model=model.given, label=model.label, **settings)


def evaluate(
    answerer: Answerer,
    benchmarks: Sequence[Benchmark],
    out: Path,
    *,
    model: str = "model",
    label: str | None = None,
    limit: int | None = None,
    judge: Judge | None = None,
    on_progress: OnProgress | None = None,
) -> ModelResult:
    """Run benchmarks with one model, and write its results.

    A call that was interrupted is resumed; answers that are there already are not generated again. A benchmark that
    fails has its reason in the result, and the others still run.

    Args:
        answerer: what answers; for a model in memory `unidpo.generate.hugging_face.HuggingFace`.
        benchmarks: what is asked.
        out: receives a folder per benchmark, `results.json` and `results.md`.
        model: what the results call the model.
        label: a shorter name for tables.
        limit: ask about so many questions of each benchmark.
        judge: reads answers in which no rule found a choice; see `unidpo.evaluate.judge`.
        on_progress: called with a stage, how many are done and how many there are.

    Raises:
        EvaluationError: `out` holds answers that something else gave; nothing is generated then.
    """
    opened = [_predictions(answerer, benchmark, out) for benchmark in benchmarks]
    delete_results(out)
    found = [
        _run(answerer, benchmark, kept, limit=limit, judge=judge, on_progress=on_progress)
        if isinstance(kept, Predictions)
        else kept
        for benchmark, kept in zip(benchmarks, opened, strict=True)
    ]
    result = ModelResult(label or model, model, out, found)
    out.mkdir(parents=True, exist_ok=True)
    write_model_result(result)
    write_atomically(out / PAGE, page([result]).encode())
    return result


def _predictions(answerer: Answerer, benchmark: Benchmark, out: Path) -> Predictions | BenchmarkResult:
    """Where its answers go; a failure where the benchmark itself has one. Raises `EvaluationError`."""
    try:
        generation = {**asdict(benchmark.generation), "decoding": "greedy"}
        identity = {**answerer.identity(), **benchmark.identity(), "generation": generation}
        return Predictions(out / benchmark.name, identity)
    except EvaluationFailed as error:
        _LOG.error("%s failed: %s", benchmark.name, error)
        return BenchmarkResult(benchmark.name, failure=str(error))


def _run(
    answerer: Answerer,
    benchmark: Benchmark,
    kept: Predictions,
    *,
    limit: int | None,
    judge: Judge | None,
    on_progress: OnProgress | None,
) -> BenchmarkResult:
    name = benchmark.name
    try:
        delete_results(kept.folder)
        questions = benchmark.questions(limit)
        tell = functools.partial(_tell, on_progress, f"{name}, ")
        generated = kept.ask(questions, answerer, benchmark.generation, tell)
        answers = {question.index: kept.answers[question.index] for question in questions}
        texts = {index: answer.text for index, answer in answers.items()}
        score, rulings = benchmark.score(texts), Rulings()
        if judge is not None:
            rulings = consult(judge, score, questions, texts, kept.folder, tell)
        if rulings.decided:
            score = benchmark.score({**texts, **rulings.decided})
        result = BenchmarkResult(
            name=name,
            metric=score.metric,
            value=score.value,
            best=score.best,
            parts=score.parts,
            counts=Counts.of(answers, score, generated, rulings),
            statistic=score.statistic,
            limit=limit,
            identity={**kept.identity, "judge": "none" if judge is None else judge.identity()},
        )
        write_benchmark_result(kept.folder, result, score)
    except UserError as error:
        _LOG.error("%s failed: %s", name, error)
        return BenchmarkResult(name, failure=str(error), identity=kept.identity)
    except Exception as error:  # the other benchmarks still run
        _LOG.exception("%s failed", name)
        return BenchmarkResult(name, failure=f"{type(error).__name__}: {error}", identity=kept.identity)
    return result
