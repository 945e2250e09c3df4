"""Some pairs of some groups → what one forward pass takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from unidpo.data.lost_rows import lost_rows
from unidpo.data.pairs import Pair, PromptGroup
from unidpo.errors import Finding, ImageError, UserError
from unidpo.model.encode import EncodedGroup, GroupEncoder
from unidpo.model.packs import Collate, Pack, PaddedRows, PairIndex, index_pairs, pack, used_responses

Share: TypeAlias = tuple[int, tuple[int, ...]]
"""A group by its index, and which of its pairs take part, by their places."""
RefLogps: TypeAlias = Sequence[Float[Tensor, " _"] | None]
"""For each group the stored reference log-probabilities of its responses, in nats; `None` where it could not be read
when they were computed."""


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
class BatchMaker:
    """Makes batches of a data set's pairs: reads images and tokenizes, in the loader's worker processes.

    Attributes:
        groups: the data set.
        encoder: what encodes groups.
        collate: how groups become a batch.
        ref_logps: `None` where no numbers are stored.
        dummy_group: a small group, with an image where the data has any, that joins batches without an image and makes
            up those without anything; no pair refers to it. Processes that train together then all go through the same
            modules in each micro-batch. `None` for a process on its own.
    """

    groups: Sequence[PromptGroup]
    encoder: GroupEncoder
    collate: Collate = pack
    ref_logps: RefLogps | None = None
    dummy_group: EncodedGroup | None = None

    def between(self, start: int, stop: int | None) -> BatchMaker:
        """The same for some of the groups."""
        stored = None if self.ref_logps is None else self.ref_logps[start:stop]
        return replace(self, groups=self.groups[start:stop], ref_logps=stored)

    def batch(self, shares: Sequence[Share]) -> tuple[Batch | None, list[Finding]]:
        """A batch, `None` where nothing is left of it, and the rows that cannot be read any more.

        These are no exception, which would lose its findings on the way out of a worker.
        """
        encoded: list[EncodedGroup] = []
        taken: list[tuple[PromptGroup, list[Pair]]] = []
        ref_logps: list[Tensor] = []
        lost: list[Finding] = []
        for index, places in shares:
            group = self.groups[index]
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
            taken.append((group, pairs))
        if self.dummy_group is not None and not any(group.has_images for group in encoded):
            encoded.append(self.dummy_group)
            if self.ref_logps is not None:
                ref_logps.append(torch.zeros(len(self.dummy_group.response_ids), dtype=torch.float64))
        if not encoded:
            return None, lost
        return Batch(self.collate(encoded), index_pairs(taken), torch.cat(ref_logps) if ref_logps else None), lost
