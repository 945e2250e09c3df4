"""Which pairs make an optimizer step, and how they are laid into forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from unidpo.encode import EncodedGroup, Encoder
from unidpo.errors import DataError, UserError
from unidpo.packs import Layout, Pack, PaddedRows, PairIndex, index_pairs, used_responses
from unidpo.pairs import PromptGroup


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward pass before anything is read: groups by index, each with the pairs of it that take part.

    Attributes:
        shares: (index of the group, indices into its pairs).
        step_pairs: pairs in the whole optimizer step, by which the sum over this plan's pairs is divided.
    """

    shares: tuple[tuple[int, tuple[int, ...]], ...]
    step_pairs: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass.

    Attributes:
        responses: what the model takes.
        pairs: the pairs among them.
        ref_logps: of each response under the stored reference, in nats; `None` where none is stored.
        step_pairs: see `Plan`.
    """

    responses: Pack | PaddedRows
    pairs: PairIndex
    ref_logps: Float[Tensor, " responses"] | None
    step_pairs: int


class StepSampler(Sampler[list[Plan]]):
    """Optimizer steps of exactly `pairs_per_step` pairs; the last of an epoch has what is left.

    Groups are taken in the file's order or, shuffled, in an order made of seed and epoch alone. A group that does not
    fit into a step goes on in the next one. Within a step whole groups share a forward pass while they have at most
    `pairs_per_pack` pairs together; the pairs of one prompt are never spread over several passes of a step.

    Args:
        pair_counts: pairs of each group.
    """

    def __init__(
        self, pair_counts: Sequence[int], *, pairs_per_step: int, pairs_per_pack: int, shuffle: bool, seed: int
    ) -> None:
        self._pair_counts = list(pair_counts)
        self._pairs_per_step = pairs_per_step
        self._pairs_per_pack = pairs_per_pack
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-sum(self._pair_counts) // self._pairs_per_step)

    def __iter__(self) -> Iterator[list[Plan]]:
        step: list[tuple[int, tuple[int, ...]]] = []
        room = self._pairs_per_step
        for index in self._order():
            pairs = tuple(range(self._pair_counts[index]))
            while pairs:
                step.append((index, pairs[:room]))
                pairs, room = pairs[room:], room - len(step[-1][1])
                if room == 0:
                    yield self._plans(step)
                    step, room = [], self._pairs_per_step
        if step:
            yield self._plans(step)

    def _order(self) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._pair_counts)))
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return torch.randperm(len(self._pair_counts), generator=generator).tolist()

    def _plans(self, step: Sequence[tuple[int, tuple[int, ...]]]) -> list[Plan]:
        packs: list[list[tuple[int, tuple[int, ...]]]] = []
        room = 0
        for share in step:
            if not packs or len(share[1]) > room:
                packs.append([])
                room = self._pairs_per_pack
            packs[-1].append(share)
            room -= len(share[1])
        total = sum(len(pairs) for _, pairs in step)
        return [Plan(tuple(shares), total) for shares in packs]


class PlannedBatches(Dataset[Batch]):
    """Plans in, batches out: reads images and tokenizes, in the loader's worker processes.

    Args:
        ref_logps: for each group the stored log-probabilities of its responses, in nats, or `None`.
    """

    def __init__(
        self,
        groups: Sequence[PromptGroup],
        encoder: Encoder,
        layout: Layout,
        ref_logps: Sequence[Float[Tensor, " _"]] | None,
    ) -> None:
        self._groups = groups
        self._encoder = encoder
        self._layout = layout
        self._ref_logps = ref_logps

    def __len__(self) -> int:
        """Pairs in the data set, which is what transformers reports speed in."""
        return sum(len(group.pairs) for group in self._groups)

    def __getitem__(self, plan: Plan) -> Batch:
        shares = [(i, self._groups[i], [self._groups[i].pairs[p] for p in pairs]) for i, pairs in plan.shares]
        used = [used_responses(pairs) for _, _, pairs in shares]
        encoded = [self._encode(group, keep) for (_, group, _), keep in zip(shares, used, strict=True)]
        stored = self._ref_logps
        return Batch(
            responses=self._layout(encoded),
            pairs=index_pairs([(group, pairs) for _, group, pairs in shares]),
            ref_logps=None
            if stored is None
            else torch.cat([stored[i][keep] for (i, _, _), keep in zip(shares, used, strict=True)]),
            step_pairs=plan.step_pairs,
        )

    def _encode(self, group: PromptGroup, responses: Sequence[int]) -> EncodedGroup:
        try:
            return self._encoder.encode(group, responses)
        except UserError as error:
            # The data was checked before the first step: something went away or changed since.
            raise DataError(f"row {group.pairs[0].row}: {error}", findings=error.findings) from error


class StepLoader(DataLoader[list[Batch]]):
    """A loader whose items are optimizer steps: the batches of one step, read ahead in worker processes."""

    def __init__(self, batches: PlannedBatches, sampler: StepSampler, *, workers: int = 0) -> None:
        super().__init__(
            batches,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=list,
            num_workers=workers,
        )
        self._sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers' loop before each epoch."""
        self._sampler.set_epoch(epoch)
