"""Which pairs make an optimizer step, and how they are dealt into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch.utils.data import Sampler

from unidpo.data.pairs import GroupTokens, PromptGroup
from unidpo.model.batches import Share
from unidpo.model.packs import used_responses

ShareTokens: TypeAlias = Callable[[Share], int]
"""How many tokens a share takes in a micro-batch."""


class StepSampler(Sampler[list[Share]]):
    """Optimizer steps of exactly `pairs_per_step` pairs; the last of an epoch has what is left.

    Groups are taken in the file's order or, shuffled, in an order made of seed and epoch alone. A group that does not
    fit into a step continues in the next one.

    Args:
        pair_counts: pairs of each group.
        pairs_per_step: over all processes.
    """

    def __init__(self, pair_counts: Sequence[int], *, pairs_per_step: int, shuffle: bool, seed: int) -> None:
        self.pairs = sum(pair_counts)
        self._pair_counts = list(pair_counts)
        self._pairs_per_step = pairs_per_step
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-self.pairs // self._pairs_per_step)

    def __iter__(self) -> Iterator[list[Share]]:
        step: list[Share] = []
        room = self._pairs_per_step
        for index in self._order():
            pairs = tuple(range(self._pair_counts[index]))
            while pairs:
                step.append((index, pairs[:room]))
                pairs, room = pairs[room:], room - len(step[-1][1])
                if room == 0:
                    yield step
                    step, room = [], self._pairs_per_step
        if step:
            yield step

    def _order(self) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._pair_counts)))
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return torch.randperm(len(self._pair_counts), generator=generator).tolist()


def share_tokens(groups: Sequence[PromptGroup], tokens: Sequence[GroupTokens], *, packs: bool) -> ShareTokens:
    """The sizes of shares in packs, or in padded rows, which repeat the prompt for each response."""

    def size(share: Share) -> int:
        index, places = share
        used = used_responses([groups[index].pairs[place] for place in places])
        return tokens[index].in_batch(used, packs=packs)

    return size


@dataclass(frozen=True, slots=True)
class Dealer:
    """Deals the pairs of a step into micro-batches.

    Whole shares are in a micro-batch together while they have at most `max_pairs` pairs; the pairs of one prompt are
    never parted. With a limit on tokens, micro-batches are filled first-fit by length up to it instead; a share above
    it has its own.

    Several processes get micro-batches of about equal work. Every process has equally many, because their wrappers wait
    for each other in each of them: who has fewer gets empty ones.

    Attributes:
        max_tokens: takes the place of `max_pairs`.
        rank, world_size: which of how many processes this is.
    """

    max_pairs: int
    max_tokens: int | None = None
    rank: int = 0
    world_size: int = 1

    def deal(self, step: Sequence[Share], tokens: ShareTokens) -> list[list[Share]]:
        """The micro-batches of this process."""

        def size(shares: Sequence[Share]) -> int:
            return sum(map(tokens, shares))

        micro_batches = self._by_pairs(step) if self.max_tokens is None else _by_tokens(step, tokens, self.max_tokens)
        if self.world_size == 1:
            return micro_batches
        each = -(-len(micro_batches) // self.world_size)
        dealt: list[list[list[Share]]] = [[] for _ in range(self.world_size)]
        work = [0] * self.world_size
        # The longest first, each to the process with the least to do that still has a place.
        for shares in sorted(micro_batches, key=size, reverse=True):
            taker = min((r for r in range(self.world_size) if len(dealt[r]) < each), key=lambda r: work[r])
            dealt[taker].append(shares)
            work[taker] += size(shares)
        mine = dealt[self.rank]
        return [*mine, *[[]] * (each - len(mine))]

    def _by_pairs(self, step: Sequence[Share]) -> list[list[Share]]:
        micro_batches: list[list[Share]] = []
        room = 0
        for share in step:
            if not micro_batches or len(share[1]) > room:
                micro_batches.append([])
                room = self.max_pairs
            micro_batches[-1].append(share)
            room -= len(share[1])
        return micro_batches


def _by_tokens(step: Sequence[Share], tokens: ShareTokens, limit: int) -> list[list[Share]]:
    micro_batches: list[list[Share]] = []
    rooms: list[int] = []
    for share in sorted(step, key=tokens, reverse=True):
        size = tokens(share)
        place = next((place for place, room in enumerate(rooms) if room >= size), None)
        if place is None:
            place = len(micro_batches)
            micro_batches.append([])
            rooms.append(limit)
        micro_batches[place].append(share)
        rooms[place] -= size
    return micro_batches
