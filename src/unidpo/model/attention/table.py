"""Who sees whom in a pack, in the forms that attention kernels ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Int32
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from unidpo.model.packs import Segment

BLOCK = 128  # edge of a FlexAttention block, in tokens


@dataclass(frozen=True, slots=True)
class Span:
    """A prompt with its responses, as slices of the pack's tokens. None is empty."""

    prompt: slice
    responses: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Sequences:
    """A pack as sequences of a variable-length kernel: every prompt and every response, in the pack's order.

    The queries of the sequences, one after another, are the tokens of the pack. The keys of a prompt are its own, those
    of a response its prompt's and then its own: causal, the last query of each sequence seeing its last key.

    Attributes:
        keys: the token whose key stands at each place.
        query_starts, key_starts: where each sequence begins, and the end of the last.
        longest_queries, longest_keys: tokens of the longest sequence.
    """

    keys: Int[Tensor, " keys"]
    query_starts: Int32[Tensor, " starts"]
    key_starts: Int32[Tensor, " starts"]
    longest_queries: int
    longest_keys: int

    @property
    def extents(self) -> tuple[Tensor, Tensor, int, int]:
        """What variable-length kernels take behind queries, keys and values."""
        return self.query_starts, self.key_starts, self.longest_queries, self.longest_keys


class SegmentTable:
    """The segments of a pack on their way to every attention layer; each form is made once, when first asked for.

    No dataclass and no container: wrappers of a model (FSDP, DDP, DeepSpeed) copy those on their way through, and a
    copy knows nothing of what was made before.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        self._segments = tuple(segments)
        self._device = device
        self._masks: dict[tuple[int, int], Tensor] = {}

    @property
    def tokens(self) -> int:
        """Of the whole pack."""
        return self._segments[-1].stop

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """One per segment."""
        return tuple(_span(segment) for segment in self._segments)

    def mask(self, queries: int, keys: int) -> Bool[Tensor, "{queries} {keys}"]:
        """Which keys each query sees, causally, the last query seeing the last key."""
        if (queries, keys) not in self._masks:
            ones = torch.ones(queries, keys, dtype=torch.bool, device=self._device)
            self._masks[queries, keys] = ones.tril(diagonal=keys - queries)
        return self._masks[queries, keys]

    @cached_property
    def sequences(self) -> Sequences:
        """For kernels that take sequences of different lengths."""
        seen: list[list[slice]] = []  # the keys of each sequence
        for span in self.spans:
            seen += [[span.prompt], *([span.prompt, response] for response in span.responses)]
        queries = [_length(parts[-1]) for parts in seen]
        keys = [sum(map(_length, parts)) for parts in seen]
        places = torch.cat([torch.arange(part.start, part.stop) for parts in seen for part in parts])
        return Sequences(
            keys=places.to(self._device),
            query_starts=self._starts(queries),
            key_starts=self._starts(keys),
            longest_queries=max(queries),
            longest_keys=max(keys),
        )

    def _starts(self, lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(self._device, torch.int32)

    @cached_property
    def block_mask(self) -> BlockMask:
        """For FlexAttention. Made from the segments, so that no (tokens, tokens) mask is ever held."""
        blocks = -(-self.tokens // BLOCK)
        some = torch.zeros(blocks, blocks, dtype=torch.bool)
        every = torch.zeros_like(some)
        part = torch.empty(self.tokens, dtype=torch.int32)  # a number of its own for each prompt and each response
        prompt = torch.empty_like(part)  # that of each token's prompt
        number = 0
        for span in self.spans:
            first = number
            for queries in (span.prompt, *span.responses):
                part[queries], prompt[queries] = number, first
                for keys in {(span.prompt.start, span.prompt.stop), (queries.start, queries.stop)}:
                    some[_touched(queries), _touched(slice(*keys))] = True
                    every[_within(queries), _within(slice(*keys))] = True
                number += 1
        # Blocks on the diagonal are causal inside; above it nothing is seen.
        every = every.tril(diagonal=-1)
        some = some.tril() & ~every
        part, prompt = part.to(self._device), prompt.to(self._device)

        return BlockMask.from_kv_blocks(
            *self._listed(some),
            *self._listed(every),
            BLOCK_SIZE=BLOCK,
            mask_mod=lambda batch, head, query, key: (
                (key <= query) & ((part[key] == part[query]) | (part[key] == prompt[query]))
            ),
            seq_lengths=(self.tokens, self.tokens),
        )

    def _listed(self, blocks: Bool[Tensor, "rows columns"]) -> tuple[Tensor, Tensor]:
        """How many columns of each row are marked, and the columns, the marked ones first."""
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        counts = blocks.sum(dim=1)
        # batch and heads in front; their kernels take int32
        return tuple(listed[None, None].to(self._device, torch.int32) for listed in (counts, order))  # type: ignore[return-value]


def _span(segment: Segment) -> Span:
    at = segment.start + segment.prompt
    prompt = slice(segment.start, at)
    responses = []
    for length in filter(None, segment.responses):
        responses.append(slice(at, at + length))
        at += length
    return Span(prompt, tuple(responses))


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _touched(part: slice) -> slice:
    """The blocks that hold a token of it."""
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _within(part: slice) -> slice:
    """The blocks that hold nothing else."""
    return slice(-(-part.start // BLOCK), part.stop // BLOCK)
