"""Clocks and memory of one training, and processes of their own to measure in."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback

T = TypeVar("T")
MIB = 2**20
# Pairs of the published setting's optimizer step, over which the cost of its update is spread.
GLOBAL_BATCH = 128


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of the process on all its threads, and of the clock on the wall."""

    cpu: float
    wall: float

    @classmethod
    def now(cls) -> Seconds:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return cls(time.process_time(), time.perf_counter())

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.cpu + other.cpu, self.wall + other.wall)

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.cpu - other.cpu, self.wall - other.wall)


class Clock(TrainerCallback):
    """Takes the time at the seams of optimizer steps, as a callback of `Trainer` or called by a loop.

    The passes of a step include reading and preparing its data and the norm of its gradient; its update is apart.

    Args:
        watch: entered for the passes of the second step.
    """

    def __init__(self, watch: AbstractContextManager[Any] | None = None) -> None:
        self.passes: list[Seconds] = []
        self.updates: list[Seconds] = []
        self._watch = watch

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._last = Seconds.now()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.passes.append(self._since_last())
        if self._watch and len(self.passes) == 2:
            self._watch.__exit__(None, None, None)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.updates.append(self._since_last())
        if self._watch and len(self.updates) == 1:
            self._watch.__enter__()
            self._last = Seconds.now()

    def _since_last(self) -> Seconds:
        before, self._last = self._last, Seconds.now()
        return self._last - before


@dataclass(frozen=True, slots=True)
class First:
    """What the first step computed: its loss, the norm of its gradient, and mean log-probabilities in nats.

    The means are over the pairs that all variants have in their first step.
    """

    loss: float
    grad_norm: float
    chosen_logps: float
    rejected_logps: float


@dataclass(frozen=True, slots=True)
class Taken:
    """One variant in one run.

    Attributes:
        pairs: in each optimizer step.
        passes, update: of one step after the first; mean over those measured. `None` where there was only one step.
        reference: of the pass that stores the reference, once, for all pairs of the run; `None` without one.
        reference_pairs: how many these were.
        second_loss: of the step after the first update.
        peak: the most bytes held at a time in the whole run, libraries included; of the device's memory where there is
            one.
    """

    pairs: int
    first: First
    second_loss: float | None
    passes: Seconds | None
    update: Seconds | None
    reference: Seconds | None
    reference_pairs: int
    peak: int

    def per_pair(self) -> Seconds:
        """With a pair's share of the update of a global batch."""
        assert self.passes is not None
        assert self.update is not None
        passes, update = self.passes, self.update
        return Seconds(
            passes.cpu / self.pairs + update.cpu / GLOBAL_BATCH, passes.wall / self.pairs + update.wall / GLOBAL_BATCH
        )


def taken(
    clock: Clock,
    first: First,
    losses: list[float],
    pairs: int,
    *,
    reference: Seconds | None = None,
    reference_pairs: int = 0,
) -> Taken:
    """What a clock and the memory say after a training."""
    later = (_mean(clock.passes[1:]), _mean(clock.updates[1:])) if clock.passes[1:] else (None, None)
    second = losses[1] if len(losses) > 1 else None
    return Taken(pairs, first, second, *later, reference, reference_pairs, peak())


def _mean(seconds: list[Seconds]) -> Seconds:
    return Seconds(fmean(each.cpu for each in seconds), fmean(each.wall for each in seconds))


def peak() -> int:
    """The most bytes this process has held."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(function: Callable[..., T], *arguments: Any, device: str) -> T:
    """`function(*arguments)` in a fresh process, so that its peak memory is its own.

    It is forked, which spares the imports. A process that will use CUDA is started anew.
    """
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_quietly, function, *arguments).result()


def _quietly(function: Callable[..., T], *arguments: Any) -> T:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    gc.freeze()  # a trainer collects garbage, and would walk through all that the libraries hold
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments)
