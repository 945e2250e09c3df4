"""Who is called while a training is set up and runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from unidpo.model.load import Processor
from unidpo.training.metrics import Columns


@dataclass(frozen=True, slots=True)
class Hooks:
    """What `unidpo train` adds to a training; all of it is called in the main process.

    Attributes:
        on_digests: called with digests of the weights (`model`), of processor and template (`processor`) and, later, of
            the weights of another `reference`; refuses them by raising `UserError`.
        on_progress: called with a stage that comes before the first step, what is done of it, and what is to do.
        benchmark: called at each evaluation with the model in its own attention, the processor and the step; gives
            further metrics by name.
    """

    on_digests: Callable[[Mapping[str, str]], None] | None = None
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None
    benchmark: Callable[[PreTrainedModel, Processor, int], Mapping[str, float]] | None = None


class PairsCallback(TrainerCallback):  # type: ignore[misc]
    """A callback that also gets the pairs of each optimizer step, in the main process."""

    def on_pairs(self, columns: Columns) -> None:
        """Take the pairs of a step, of all processes: `step`, `epoch`, and what `metrics.PairColumns` has."""
        raise NotImplementedError


class BeforeFirstStep(TrainerCallback):  # type: ignore[misc]
    """Calls back when the model is in its wrapper."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._call()
