"""Which pairs make an optimizer step, and how they are laid into forward passes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from unidpo.data.pairs import Pair, PromptGroup
from unidpo.distributed import is_main
from unidpo.errors import DataError, Finding, ImageError, UserError, from_findings
from unidpo.model.encode import EncodedGroup, GroupEncoder
from unidpo.model.packs import Layout, Pack, PaddedRows, PairIndex, index_pairs, pack, used_responses

_LOG = logging.getLogger(__name__)
_Share: TypeAlias = tuple[int, tuple[int, ...]]
"""A group by its index, and places among its pairs."""
_Row: TypeAlias = tuple[str | Path | None, int | None]
"""A data file and a row of it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One forward pass before anything is read: groups by index, each with the pairs of it that take part.

    Attributes:
        shares: (index of the group, indices into its pairs).
    """

    shares: tuple[_Share, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass.

    Attributes:
        responses: what the model takes.
        pairs: the pairs among them.
        ref_logps: of each response under the stored reference, in nats; `None` where none is stored.
    """

    responses: Pack | PaddedRows
    pairs: PairIndex
    ref_logps: Float[Tensor, " responses"] | None


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step.

    Attributes:
        batches: its forward passes.
        lost: rows that could be read when the data was checked and cannot any more.
    """

    batches: list[Batch]
    lost: list[Finding]

    @property
    def pairs(self) -> int:
        """Pairs in all batches of this process."""
        return sum(len(batch.pairs.rows) for batch in self.batches)


class StepSampler(Sampler[list[Plan]]):
    """Optimizer steps of exactly `pairs_per_step` pairs; the last of an epoch has what is left.

    Groups are taken in the file's order or, shuffled, in an order made of seed and epoch alone. A group that does not
    fit into a step goes on in the next one. Within a step whole groups share a forward pass while they have at most
    `pairs_per_pack` pairs together; the pairs of one prompt are never spread over several passes of a step.

    With a limit on tokens, passes are filled first-fit by length up to it instead; a group above it has its own.

    With several processes the passes of a step are dealt so that all have about equal work. Every process makes equally
    many, because their wrappers wait for each other in each of them: who has fewer gets empty plans.

    Args:
        pair_counts: pairs of each group.
        tokens: what some pairs of a group, by their places, take in a pass.
        pairs_per_step: over all processes.
        tokens_per_pack: takes the place of `pairs_per_pack`.
        rank, world_size: which of how many processes this is.
    """

    def __init__(
        self,
        pair_counts: Sequence[int],
        tokens: Callable[[int, Sequence[int]], int],
        *,
        pairs_per_step: int,
        pairs_per_pack: int,
        tokens_per_pack: int | None = None,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._pair_counts = list(pair_counts)
        self._tokens = tokens
        self._pairs_per_step = pairs_per_step
        self._pairs_per_pack = pairs_per_pack
        self._tokens_per_pack = tokens_per_pack
        self._shuffle = shuffle
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return -(-sum(self._pair_counts) // self._pairs_per_step)

    def __iter__(self) -> Iterator[list[Plan]]:
        step: list[_Share] = []
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

    def _plans(self, step: Sequence[_Share]) -> list[Plan]:
        by_pairs = self._tokens_per_pack is None
        packs = self._packs_by_pairs(step) if by_pairs else self._packs_by_tokens(step, self._tokens_per_pack or 0)
        if self._world_size == 1:
            return [Plan(tuple(shares)) for shares in packs]
        each = -(-len(packs) // self._world_size)
        dealt: list[list[list[_Share]]] = [[] for _ in range(self._world_size)]
        work = [0] * self._world_size
        # The longest first, each to whoever has least to do and still has a place.
        for shares in sorted(packs, key=self._size, reverse=True):
            taker = min((r for r in range(self._world_size) if len(dealt[r]) < each), key=lambda r: work[r])
            dealt[taker].append(shares)
            work[taker] += self._size(shares)
        mine = dealt[self._rank]
        return [Plan(tuple(shares)) for shares in [*mine, *[[]] * (each - len(mine))]]

    def _packs_by_pairs(self, step: Sequence[_Share]) -> list[list[_Share]]:
        packs: list[list[_Share]] = []
        room = 0
        for share in step:
            if not packs or len(share[1]) > room:
                packs.append([])
                room = self._pairs_per_pack
            packs[-1].append(share)
            room -= len(share[1])
        return packs

    def _packs_by_tokens(self, step: Sequence[_Share], limit: int) -> list[list[_Share]]:
        packs: list[list[_Share]] = []
        rooms: list[int] = []
        for share in sorted(step, key=lambda share: self._tokens(*share), reverse=True):
            size = self._tokens(*share)
            place = next((place for place, room in enumerate(rooms) if room >= size), None)
            if place is None:
                place = len(packs)
                packs.append([])
                rooms.append(limit)
            packs[place].append(share)
            rooms[place] -= size
        return packs

    def _size(self, shares: Sequence[_Share]) -> int:
        return sum(self._tokens(*share) for share in shares)


class PlannedBatches(Dataset[tuple[Batch | None, list[Finding]]]):
    """Plans in, batches out: reads images and tokenizes, in the loader's worker processes.

    What cannot be read comes out as findings beside the batch, which is `None` where nothing is left of it; an
    exception would lose its findings on the way out of a worker.

    The attributes may be set until the first batch is drawn.

    Attributes:
        encoder: what encodes groups.
        layout: how groups become a batch.
        ref_logps: for each group the stored log-probabilities of its responses, in nats, or `None` where the group
            could not be read when they were computed; `None` where no numbers are stored.
        stand_in: a small group, with an image where the data has any, that joins batches without an image and makes up
            those without anything; no pair refers to it. Processes that train together all go through the same
            modules in each pass then. `None` for a process on its own.
    """

    def __init__(self, groups: Sequence[PromptGroup], encoder: GroupEncoder) -> None:
        self._groups = groups
        self.encoder = encoder
        self.stand_in: EncodedGroup | None = None
        self.layout: Layout = pack
        self.ref_logps: Sequence[Float[Tensor, " _"] | None] | None = None

    def __len__(self) -> int:
        """Pairs in the data set, which is what transformers reports speed in."""
        return sum(len(group.pairs) for group in self._groups)

    def __getitem__(self, plan: Plan) -> tuple[Batch | None, list[Finding]]:
        encoded: list[EncodedGroup] = []
        shares: list[tuple[PromptGroup, list[Pair]]] = []
        ref_logps: list[Tensor] = []
        lost: list[Finding] = []
        for index, places in plan.shares:
            group = self._groups[index]
            pairs = [group.pairs[place] for place in places]
            used = used_responses(pairs)
            try:
                if self.ref_logps is not None:
                    found = self.ref_logps[index]
                    if found is None:
                        raise ImageError("it could not be read when the reference was computed")
                    ref_logps.append(found[used])
                encoded.append(self.encoder.encode(group, used))
            except UserError as error:
                del ref_logps[len(encoded) :]
                lost += lost_rows(pairs, error)
                continue
            shares.append((group, pairs))
        if self.stand_in is not None and not any(group.has_images for group in encoded):
            encoded.append(self.stand_in)
            if self.ref_logps is not None:
                ref_logps.append(torch.zeros(len(self.stand_in.response_ids), dtype=torch.float64))
        if not encoded:
            return None, lost
        stored = torch.cat(ref_logps) if ref_logps else None
        return Batch(self.layout(encoded), index_pairs(shares), stored), lost


def lost_rows(pairs: Sequence[Pair], error: UserError) -> list[Finding]:
    """The rows of some pairs as findings that say why they cannot be used any more."""
    rows = sorted({(pair.row, pair.file) for pair in pairs}, key=str)
    return [Finding("lost-row", str(error), file=file, row=row) for row, file in rows]


class LostRows:
    """What becomes of rows that cannot be read any more: they stop all, or are named once and left out.

    Args:
        groups: by what they are for, such as training.
        stop: whether they stop all.
        max_fraction: share of the pairs of any of `groups` that may be left out; more stop all.
    """

    def __init__(self, groups: Mapping[str, Sequence[PromptGroup]], *, stop: bool, max_fraction: float) -> None:
        self._pairs: dict[str, Counter[_Row]] = {
            purpose: Counter((pair.file, pair.row) for group in its for pair in group.pairs)
            for purpose, its in groups.items()
        }
        self._stop = stop
        self._max_fraction = max_fraction
        self._seen: dict[_Row, Finding] = {}

    def see(self, findings: Sequence[Finding]) -> None:
        """Take in what all processes lost; every process must. Raises `DataError` where it stops all."""
        if findings and self._stop:
            raise from_findings(DataError, f"{len(findings)} rows cannot be read any more", findings)
        new = [finding for finding in findings if _row(finding) not in self._seen]  # once, not in every epoch
        self._seen.update((_row(finding), finding) for finding in new)
        for purpose, pairs in self._pairs.items():
            lost = sum(pairs[row] for row in self._seen)
            if new and lost > self._max_fraction * pairs.total():
                raise from_findings(
                    DataError,
                    f"{lost} of {pairs.total()} {purpose} pairs cannot be read any more, which is more than "
                    f"data.max_lost_fraction={self._max_fraction:g} of them; bring them back, or raise it",
                    list(self._seen.values()),
                )
        if is_main():
            for row in dict.fromkeys(map(_row, new)):
                _LOG.warning("skipped: %s", self._seen[row])

    def warn(self) -> None:
        """Say how many there were, if any."""
        if self._seen:
            _LOG.warning("%d rows could not be read any more and were skipped", len(self._seen))


def _row(finding: Finding) -> _Row:
    return finding.file, finding.row


class StepLoader(DataLoader[Step]):
    """A loader whose items are optimizer steps: the batches of one step, read ahead in worker processes.

    Args:
        prefetch: steps that each worker reads ahead; `None` for torch's default, and where there are no workers.
    """

    def __init__(
        self, batches: PlannedBatches, sampler: StepSampler, *, workers: int = 0, prefetch: int | None = None
    ) -> None:
        super().__init__(
            batches,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=_as_step,
            num_workers=workers,
            prefetch_factor=prefetch,
        )
        self._sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers' loop before each epoch."""
        self._sampler.set_epoch(epoch)


def _as_step(planned: Sequence[tuple[Batch | None, list[Finding]]]) -> Step:
    return Step(
        batches=[batch for batch, _ in planned if batch is not None],
        lost=[finding for _, lost in planned for finding in lost],
    )
