"""Benchmarks that a model takes while it trains."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


class Midway:
    """A recipe's benchmarks, taken by the model in memory; the results lie in `benchmarks/step-<n>/` of the run.

    Args:
        benchmarks: what is asked.
        section: the recipe's `eval`.
        folder: the run's.
        on_progress: told how far it is.
    """

    def __init__(
        self,
        benchmarks: Sequence[Benchmark],
        section: EvalSection,
        folder: Path,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self._benchmarks = benchmarks
        self._section = section
        self._folder = folder
        self._on_progress = on_progress

    @property
    def names(self) -> list[str]:
        """What the metrics are called."""
        return [benchmark.name for benchmark in self._benchmarks]

    def take(self, model: PreTrainedModel, processor: Processor, step: int) -> dict[str, float]:
        """The main metric of each benchmark by its name. Raises `TrainingError` where one fails."""
        backend = HuggingFace(model, processor, batch_size=self._section.batch_size)
        out = self._folder / "benchmarks" / f"step-{step}"
        shutil.rmtree(out, ignore_errors=True)  # of a run that was broken off and goes on from before
        result = evaluate(
            backend,
            self._benchmarks,
            out,
            limit=self._section.limit,
            on_progress=self._on_progress,
            model=f"step {step}",
        )
        if result.failed:
            reasons = "; ".join(str(failed.failure) for failed in result.failed)
            raise TrainingError(f"a benchmark failed at step {step}: {reasons}")
        return {each.name: each.value for each in result.benchmarks}


@contextmanager
def midway(
    section: EvalSection | None, folder: Path, on_progress: Callable[[str, int, int], None] | None = None
) -> Iterator[Midway | None]:
    """The benchmarks of a recipe, looked at before anything is trained; `None` where it has none.

    Raises:
        UserError: a benchmark is unknown or cannot be read.
    """
    if section is None:
        yield None
        return
    with Worker() as worker:
        benchmarks = select(section.benchmarks, data=data_folder(), worker=worker)
        yield Midway(benchmarks, section, folder, on_progress)
