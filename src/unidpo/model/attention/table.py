"""Who sees whom in a pack, in the forms that attention kernels ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int32
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128  # edge of a FlexAttention block, in tokens


@dataclass(frozen=True, slots=True)
class Segment:
    """Where a group lies in a pack: prompt, then its responses, one after another. Offsets and lengths in tokens."""

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.prompt + sum(self.responses)


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
        uses: the places where each token's key stands, token after token.
        use_starts: where those of each token begin, and the end of the last.
        query_starts, key_starts: where each sequence begins, and the end of the last.
        longest_queries, longest_keys: tokens of the longest sequence.
    """

    keys: Int32[Tensor, " keys"]
    uses: Int32[Tensor, " keys"]
    use_starts: Int32[Tensor, " token_starts"]
    query_starts: Int32[Tensor, " starts"]
    key_starts: Int32[Tensor, " starts"]
    longest_queries: int
    longest_keys: int

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Sequences:
        seen: list[list[slice]] = []  # the keys of each sequence
        for span in map(_span, segments):
            seen += [[span.prompt], *([span.prompt, response] for response in span.responses)]
        queries = [_length(parts[-1]) for parts in seen]
        keys = [sum(map(_length, parts)) for parts in seen]
        places = torch.cat([torch.arange(part.start, part.stop) for parts in seen for part in parts])
        return cls(
            keys=places.int(),
            uses=places.argsort(stable=True).int(),
            use_starts=_starts(places.bincount()),
            query_starts=_starts(torch.tensor(queries)),
            key_starts=_starts(torch.tensor(keys)),
            longest_queries=max(queries),
            longest_keys=max(keys),
        )

    @property
    def extents(self) -> tuple[Tensor, Tensor, int, int]:
        """What variable-length kernels take behind queries, keys and values."""
        return self.query_starts, self.key_starts, self.longest_queries, self.longest_keys


@dataclass(frozen=True, slots=True)
class Blocks:
    """A pack in the blocks of FlexAttention. Made from the segments, so that no (tokens, tokens) mask is ever held.

    Attributes:
        partly: for each row of blocks how many columns are seen in part, and the columns, these first.
        wholly: the same of those that are seen as a whole.
        part: a number of its own for each prompt and each response, by token.
        prompt: that of each token's prompt.
    """

    partly: tuple[Int32[Tensor, "1 1 rows"], Int32[Tensor, "1 1 rows columns"]]
    wholly: tuple[Int32[Tensor, "1 1 rows"], Int32[Tensor, "1 1 rows columns"]]
    part: Int32[Tensor, " tokens"]
    prompt: Int32[Tensor, " tokens"]

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Blocks:
        tokens = segments[-1].stop
        blocks = -(-tokens // BLOCK)
        some = torch.zeros(blocks, blocks, dtype=torch.bool)
        every = torch.zeros_like(some)
        part = torch.empty(tokens, dtype=torch.int32)
        prompt = torch.empty_like(part)
        number = 0
        for span in map(_span, segments):
            first = number
            for queries in (span.prompt, *span.responses):
                part[queries], prompt[queries] = number, first
                for keys in {(span.prompt.start, span.prompt.stop), (queries.start, queries.stop)}:
                    some[_touched(queries), _touched(slice(*keys))] = True
                    every[_within(queries), _within(slice(*keys))] = True
                number += 1
        # Blocks on the diagonal are causal inside; above it nothing is seen.
        every = every.tril(diagonal=-1)
        return cls(_listed(some.tril() & ~every), _listed(every), part, prompt)

    def mask(self) -> BlockMask:
        """As the kernel takes it."""
        part, prompt = self.part, self.prompt
        return BlockMask.from_kv_blocks(
            *self.partly,
            *self.wholly,
            BLOCK_SIZE=BLOCK,
            mask_mod=lambda batch, head, query, key: (
                (key <= query) & ((part[key] == part[query]) | (part[key] == prompt[query]))
            ),
            seq_lengths=(len(part), len(part)),
        )


class SegmentTable:
    """The segments of a pack on their way to every attention layer.

    No dataclass and no container: wrappers of a model (FSDP, DDP, DeepSpeed) copy those on their way through, and a
    copy knows nothing of what was made before.

    Args:
        device: where the pack is.
        kernel: what the backend's `table` made of the segments, on that device; `None` for one that asks for nothing.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device, kernel: Any = None) -> None:
        self._segments = tuple(segments)
        self._device = device
        self._kernel = kernel
        self._masks: dict[tuple[int, int], Tensor] = {}

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

    @property
    def kernel(self) -> Any:
        """What the backend's kernel reads, from the pack."""
        if self._kernel is None:
            raise ValueError("the pack was made without `pack(table=BACKENDS[name].table)` of this backend")
        return self._kernel

    @cached_property
    def block_mask(self) -> BlockMask:
        """For FlexAttention."""
        mask: BlockMask = self.kernel.mask()
        return mask


def _starts(lengths: Tensor) -> Int32[Tensor, " starts"]:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def _listed(blocks: Bool[Tensor, "rows columns"]) -> tuple[Tensor, Tensor]:
    """How many columns of each row are marked, and the columns, the marked ones first."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    # batch and heads in front; their kernels take int32
    return blocks.sum(dim=1)[None, None].int(), order[None, None].int()


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
