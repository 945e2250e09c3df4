"""How an optimizer step is run: forward and backward of its micro-batches; and how held-out pairs are evaluated."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import DistributedType
from jaxtyping import Float
from torch import Tensor

from unidpo.data.lost_rows import LostRows
from unidpo.distributed import gather, is_main, world_size
from unidpo.errors import DataError, Finding, from_findings
from unidpo.losses import LossTerms, PairLogps
from unidpo.model.batches import Batch, Share
from unidpo.model.transfer import ahead
from unidpo.training.callbacks import PairsCallback
from unidpo.training.checkpoints import CheckpointTrainer
from unidpo.training.metrics import Columns, Means, PairColumns, RewardShift, joined, require_finite
from unidpo.training.reading import Step


@dataclass(frozen=True, slots=True)
class StepReport:
    """What each process tells the others before a step: its pairs, rows it lost, and whether it was asked to stop."""

    pairs: int
    lost: list[Finding]
    stop: bool


class StepTrainer(CheckpointTrainer):
    """transformers' `Trainer`, for whose loop one batch is a whole optimizer step; its loss is the mean over pairs.

    The loop draws which pairs are in a step; `get_batch_samples` gives it the step.

    Args:
        lost: what becomes of rows that cannot be read any more.
        policy_is_reference: whether policy and reference are equal until the first update.
        kwargs: for `Trainer`.
    """

    def __init__(self, *, lost: LostRows, policy_is_reference: bool, **kwargs: Any) -> None:
        self.reward_shift = RewardShift()
        self._lost = lost
        self._policy_is_reference = policy_is_reference
        self._means = Means()
        self._stop_requested = self._stopping = False
        self._epoch: Iterator[Sequence[Share]] | None = None
        self._steps: Iterator[Step] = iter([])
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False

    def evaluate_pairs(self, batch: Batch) -> tuple[PairLogps, LossTerms]:
        """Log-probabilities and loss terms of a batch that lies on the model's device."""
        raise NotImplementedError

    def read(self, steps: Iterable[Sequence[Share]]) -> Iterator[Step]:
        """Steps to train on, from the shares in them."""
        raise NotImplementedError

    def request_stop(self) -> None:
        """Let the training end after the current step or the next, with a checkpoint; any process may be asked.

        A training whose last step is done ends as usual.
        """
        self._stop_requested = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Sequence[Share]], num_batches: int, device: torch.device
    ) -> tuple[list[Step], None]:
        """The next step. There is no count of labels beside it: the mean is over pairs, which a step knows itself."""
        if self._epoch is not epoch_iterator:
            self._epoch, self._steps = epoch_iterator, self.read(epoch_iterator)
        return list(itertools.islice(self._steps, num_batches)), None

    def stop_reading(self) -> None:
        """End the processes that read steps ahead."""
        self._epoch, self._steps = None, iter([])

    def training_step(self, model: torch.nn.Module, inputs: Step, num_items_in_batch: Any = None) -> Float[Tensor, ""]:
        """Forward and backward of one optimizer step; returns its loss, the mean over the step's pairs.

        Raises:
            DataError: rows became unreadable since the check, and `on_bad_row` is `"error"`, or too many of them, or
                all of this step.
            TrainingError: the loss is not a finite number; names the pairs.
        """
        reports = gather([StepReport(inputs.pairs, inputs.lost, self._stop_requested)])
        lost = [finding for report in reports for finding in report.lost]
        self._lost.add(lost)
        pairs_of_step = sum(report.pairs for report in reports)
        if not pairs_of_step:
            raise from_findings(DataError, f"step {self.state.global_step + 1}: none of its pairs can be read", lost)
        if any(report.stop for report in reports):
            self._stopping = True
            self.control.should_save = self.control.should_training_stop = True
        model.train()
        total = torch.zeros((), device=self.args.device)
        # Wrappers average gradients over processes; the mean is over pairs, of which processes have unequal numbers.
        weight = world_size() / pairs_of_step
        is_engine = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        columns = PairColumns()
        on_device = ahead(inputs.batches, self.args.device)
        for place, batch in enumerate(inputs.batches, start=1):
            is_last = place == len(inputs.batches)
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            with contextlib.nullcontext() if is_last or is_engine else self.accelerator.no_sync(model):
                pairs, terms = self.evaluate_pairs(next(on_device))
                loss = terms.loss.sum() * weight
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if is_engine else {}))
            total += loss.detach()
            columns.add(batch, pairs, terms)
        self._add_pairs(joined(gather([columns.take()])))
        # A warm-up's first update may be made with learning rate 0 and change nothing.
        if any(group["lr"] > 0 for group in self.optimizer.param_groups):
            self._policy_is_reference = False
        return total

    def _add_pairs(self, columns: Columns) -> None:
        """Add the pairs of a step, of all processes. Raises `TrainingError` where a loss is not finite."""
        require_finite(columns)
        self._means.add(columns)
        self.reward_shift.add(columns)
        if is_main():
            length = len(columns["row"])
            visit = {"step": [self.state.global_step + 1] * length, "epoch": [self.state.epoch or 0.0] * length}
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, PairsCallback):
                    callback.on_pairs({**visit, **columns})

    def held_out_metrics(self, steps: Iterable[Step]) -> dict[str, float]:
        """Loss and the logged means over all pairs of some steps, of all processes; each must call it.

        Raises:
            DataError: rows cannot be read any more, as in `training_step`, or none can.
            TrainingError: a loss is not a finite number; names the pairs.
        """
        columns = PairColumns()
        for step in steps:
            self._lost.add([finding for lost in gather([step.lost]) for finding in lost])
            on_device = ahead(step.batches, self.args.device)
            for batch in step.batches:
                columns.add(batch, *self.evaluate_pairs(next(on_device)))
        seen = joined(gather([columns.take()]))
        if not seen:
            raise DataError("none of the held-out rows can be read any more")
        require_finite(seen)
        means = Means()
        means.add(seen)
        return {"loss": sum(seen["loss"]) / len(seen["loss"])} | means.take()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all pairs since the last record to what transformers logs."""
        super().log(logs | self._means.take() if "loss" in logs else logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: transformers estimates this from padded token counts, which packs do not have."""
        return 0
