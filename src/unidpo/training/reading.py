"""Reads optimizer steps ahead of the training: each micro-batch is made on its own, in worker processes or here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from unidpo.errors import Finding
from unidpo.model.batches import Batch, BatchMaker, Share
from unidpo.model.transfer import Parcel, copies_beside, opened
from unidpo.training.steps import Dealer, ShareTokens, StepSampler


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step, as far as this process makes it.

    Attributes:
        batches: its micro-batches.
        lost: rows that could be read when the data was checked and cannot any more.
    """

    batches: list[Batch]
    lost: list[Finding]

    @property
    def pairs(self) -> int:
        """Pairs in all micro-batches."""
        return sum(len(batch.pairs.rows) for batch in self.batches)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What the loader gives at a time.

    Attributes:
        batch: `None` where nothing is left of it.
        lost: as of a `Step`.
        ends_step: whether it is the last of its step.
    """

    batch: Batch | None
    lost: list[Finding]
    ends_step: bool


@dataclass(frozen=True, slots=True)
class StepReader:
    """Makes steps of the shares that are in them.

    Attributes:
        batches: makes micro-batches; copied into each worker process.
        dealer: decides what is in a micro-batch, by `tokens`.
        device: where the batches will go; they are put into pinned memory for it where `pinned`.
        workers: processes that make micro-batches; 0 for this one.
        prefetch: micro-batches that each worker makes ahead; where `None`, so many that they make a whole step, because
            a step begins when all of it is there.
    """

    batches: BatchMaker
    dealer: Dealer
    tokens: ShareTokens
    device: torch.device
    workers: int = 0
    prefetch: int | None = None
    pinned: bool = True

    def read(self, steps: Iterable[Sequence[Share]]) -> Iterator[Step]:
        """Steps in order, each from the shares in it. Workers end with the iterator."""
        dealt = (self.dealer.deal(step, self.tokens) for step in steps)
        first = next(dealt, [])
        loader: DataLoader[Any] = DataLoader(
            _MicroBatches(self.batches),
            batch_size=None,
            sampler=(
                (shares, place == len(step)) for step in chain([first], dealt) for place, shares in enumerate(step, 1)
            ),
            # One buffer, in place of twenty tensors that would each take an open file on the way.
            collate_fn=_as_it_is if self.device.type == "cpu" and not self.workers else Parcel.of,
            num_workers=self.workers,
            prefetch_factor=(self.prefetch or max(2, -(-len(first) // self.workers))) if self.workers else None,
            pin_memory=self.pinned and copies_beside(self.device),
            generator=torch.Generator(),  # else it would draw from the one that dropout draws from
        )
        batches: list[Batch] = []
        lost: list[Finding] = []
        for item in loader:
            made: MicroBatch = opened(item)
            batches += [] if made.batch is None else [made.batch]
            lost += made.lost
            if made.ends_step:
                yield Step(batches, lost)
                batches, lost = [], []


@dataclass(frozen=True, slots=True)
class _MicroBatches(Dataset[MicroBatch]):
    """Shares in, a micro-batch out."""

    maker: BatchMaker

    def __getitem__(self, dealt: tuple[Sequence[Share], bool]) -> MicroBatch:
        shares, ends_step = dealt
        return MicroBatch(*self.maker.batch(shares), ends_step)


class StepLoader(DataLoader[Sequence[Share]]):
    """What transformers' loop asks for its length, skips in, and draws from: the shares of each step, nothing read yet.

    Args:
        sampler: the steps.
    """

    def __init__(self, sampler: StepSampler) -> None:
        super().__init__(_Pairs(sampler.pairs), batch_sampler=sampler, collate_fn=_as_it_is)
        self._sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers' loop before each epoch."""
        self._sampler.set_epoch(epoch)


@dataclass(frozen=True, slots=True)
class _Pairs(Dataset[Sequence[Share]]):
    """As long as there are pairs, in which transformers reports speed; gives what is drawn from it."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, shares: Sequence[Share]) -> Sequence[Share]:
        return shares


def _as_it_is(item: Any) -> Any:
    return item
