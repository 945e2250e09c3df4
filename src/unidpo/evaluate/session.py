"""`unidpo eval`: models by name, one after the other, through the same benchmarks."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from unidpo.errors import UserError
from unidpo.evaluate.benchmarks import Benchmark, EvaluationError
from unidpo.evaluate.comparing import Difference, compare, write_differences
from unidpo.evaluate.judge import Judge
from unidpo.evaluate.results import PAGE, BenchmarkResult, ModelResult, page, table
from unidpo.evaluate.running import Progress, evaluate
from unidpo.files.locks import locked
from unidpo.files.writing import write_atomically
from unidpo.generate.loading import open_backend
from unidpo.generate.questions import LoadOptions
from unidpo.run_folder.folder import RunFolder


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to evaluate.

    Attributes:
        given: as the user named it.
        name: the folder or hub id that is loaded.
        label: short, unique among those evaluated together, fit for a folder's name.
    """

    given: str
    name: str
    label: str


def candidates(names: Sequence[str]) -> list[Candidate]:
    """Model folders behind names: run folders hold theirs in `model/`.

    Raises:
        EvaluationError: a run is not finished, or a model is named twice.
    """
    found: list[Candidate] = []
    for given in names:
        name = _model_of(given)
        if name in {each.name for each in found}:
            raise EvaluationError(f"{given}: this model is named twice")
        label = base = _label(name)
        number = 2
        while label in {each.label for each in found}:
            label, number = f"{base}-{number}", number + 1
        found.append(Candidate(given, name, label))
    return found


def _model_of(given: str) -> str:
    folder = RunFolder(given)
    if folder.finished:
        return str(folder.model)
    if folder.path.is_dir() and folder.environment.is_file():
        checkpoint = folder.last_checkpoint
        remedy = f"finish it with `--resume`, or name {checkpoint}" if checkpoint else "finish it with `--resume`"
        raise EvaluationError(f"{given}: this run has no model yet; {remedy}")
    return given


def _label(name: str) -> str:
    parts = [part for part in Path(name).parts if part not in ("/", "..", ".")] or ["model"]
    if len(parts) > 1 and parts[-1] == "model":
        parts.pop()
    label = "-".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]
    return re.sub(r"[^\w.-]", "-", label).lstrip(".-") or "model"


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

    def page(self) -> str:
        """As Markdown."""
        lines = [page(self.models)]
        if self.differences:
            lines += ["## Differences", "", "With the interval that holds 95 % of resampled differences.", ""]
            lines += table(
                ["benchmark", "models", "difference", "from", "to", "wrong to right", "right to wrong", "questions"],
                [
                    [
                        each.benchmark,
                        f"{each.after} - {each.before}",
                        *(f"{value:+.1f}" for value in (each.value, each.low, each.high)),
                        *(f"{count:,}" for count in (each.gained, each.lost, each.questions)),
                    ]
                    for each in self.differences
                ],
            )
            lines.append("")
        return "\n".join(lines)

    def render(self, console: Console) -> None:
        """Print the page, and where the files are."""
        console.print(self.page(), markup=False, highlight=False, soft_wrap=True)
        for model in self.models:
            if len(model.failed) == len(model.benchmarks):
                continue  # what lies there may be of an earlier evaluation
            console.print(f"{model.label}: {model.folder / PAGE}", markup=False, highlight=False, soft_wrap=True)
        if len(self.models) > 1:
            console.print(f"all: {self.models[0].folder.parent / PAGE}", markup=False, highlight=False, soft_wrap=True)


def evaluate_all(
    models: Sequence[Candidate],
    benchmarks: Sequence[Benchmark],
    out: Path,
    options: LoadOptions,
    *,
    limit: int | None = None,
    judge: Judge | None = None,
    on_progress: Progress | None = None,
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
        on_progress: told how far it is.

    Raises:
        UserError: the only model cannot be used, results of another one are in its folder, or another process works
            there.
    """
    transformers.logging.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(out))
        except OSError as error:
            raise EvaluationError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
        return _evaluate_each(models, benchmarks, out, options, limit=limit, judge=judge, on_progress=on_progress)


def _evaluate_each(
    models: Sequence[Candidate],
    benchmarks: Sequence[Benchmark],
    out: Path,
    options: LoadOptions,
    *,
    limit: int | None,
    judge: Judge | None,
    on_progress: Progress | None,
) -> Evaluation:
    found: list[ModelResult] = []
    several = len(models) > 1
    for model in models:
        folder = out / model.label if several else out
        tell = on_progress and _named(on_progress, model.label if several else "")
        _free_memory()
        try:
            found.append(_evaluate_one(model, benchmarks, folder, options, limit=limit, judge=judge, on_progress=tell))
        except UserError as error:
            if not several:
                raise
            failed = [BenchmarkResult(benchmark.name, failure=str(error)) for benchmark in benchmarks]
            found.append(ModelResult(model.label, model.given, folder, failed))
    evaluation = Evaluation(found, [each for other in found[1:] for each in compare(found[0], other)])
    if several:
        write_differences(evaluation.differences, out)
        write_atomically(out / PAGE, evaluation.page().encode())
    return evaluation


def _evaluate_one(
    model: Candidate, benchmarks: Sequence[Benchmark], folder: Path, options: LoadOptions, **settings: Any
) -> ModelResult:
    with open_backend(model.name, options) as backend:
        return evaluate(backend, benchmarks, folder, model=model.given, label=model.label, **settings)


def _free_memory() -> None:
    """Of the model before, which nothing holds any more: two may not fit."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _named(on_progress: Progress, label: str) -> Progress:
    """Progress of one model among several."""
    return lambda stage, done, total: on_progress(f"{label} {stage}".lstrip(), done, total)
