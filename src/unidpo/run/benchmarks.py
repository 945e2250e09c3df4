"""Benchmarks during training."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from unidpo.config import EvalSection
from unidpo.errors import TrainingError
from unidpo.evaluate.benchmarks import Benchmark
from unidpo.evaluate.running import evaluate
from unidpo.evaluate.selection import select
from unidpo.evaluate.vlmeval import Worker, data_folder
from unidpo.generate.hugging_face import HuggingFace
from unidpo.model.load import Processor
from unidpo.progress import OnProgress


@dataclass(frozen=True, slots=True)
class TrainingBenchmarks:
    """A recipe's benchmarks, put to the model in memory; the results lie in `benchmarks/step-<n>/` of the run.

    Attributes:
        benchmarks: what is asked.
        section: the recipe's `eval`.
        folder: the run's.
        on_progress: called with a stage, how many are done and how many there are.
    """

    benchmarks: Sequence[Benchmark]
    section: EvalSection
    folder: Path
    on_progress: OnProgress | None = None

    @property
    def names(self) -> list[str]:
        """What the metrics are called."""
        return [benchmark.name for benchmark in self.benchmarks]

    def run(self, model: PreTrainedModel, processor: Processor, step: int) -> dict[str, float]:
        """The main metric of each benchmark by its name. Raises `TrainingError` where one fails."""
        answerer = HuggingFace(model, processor, batch_size=self.section.batch_size)
        out, label, limit = self.folder / "benchmarks" / f"step-{step}", f"step {step}", self.section.limit
        shutil.rmtree(out, ignore_errors=True)  # of an interrupted run that resumed from an earlier step
        result = evaluate(answerer, self.benchmarks, out, model=label, limit=limit, on_progress=self.on_progress)
        if result.failed:
            reasons = "; ".join(str(failed.failure) for failed in result.failed)
            raise TrainingError(f"a benchmark failed at step {step}: {reasons}")
        return {each.name: each.value for each in result.benchmarks}


@contextlib.contextmanager
def open_benchmarks(
    section: EvalSection | None, folder: Path, on_progress: OnProgress | None = None
) -> Iterator[TrainingBenchmarks | None]:
    """The benchmarks of a recipe, read before anything is trained; `None` where it has none.

    Raises:
        UserError: a benchmark is unknown or cannot be read.
    """
    if section is None:
        yield None
        return
    with Worker() as worker:
        benchmarks = select(section.benchmarks, data=data_folder(), worker=worker)
        yield TrainingBenchmarks(benchmarks, section, folder, on_progress)
