"""A data set in numbers: distributions, and what an epoch of it costs in tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from unidpo.data.images import MAX_PIXELS
from unidpo.data.pairs import GroupTokens, ImageSource, PromptGroup

_PIXELS_PER_TOKEN = 28 * 28
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Spread:
    """How a quantity is distributed.

    Attributes:
        minimum: the smallest value; the quantiles after it are linear interpolations between neighbours.
        decile: a tenth of the values is smaller.
        median: half of them are.
        ninth_decile: nine tenths are.
        maximum: the largest value.
    """

    minimum: float
    decile: float
    median: float
    ninth_decile: float
    maximum: float


CountTokens: TypeAlias = Callable[[PromptGroup], GroupTokens]
"""How many tokens a group has for a model."""


@dataclass(frozen=True, slots=True)
class EpochTokens:
    """Tokens that pass through language models in one epoch, by how the data is laid out.

    Attributes:
        estimated: whether the lengths were guessed from characters and image sizes, without a model.
        padded_pairs: chosen and rejected as two rows padded to the longer, through policy and reference.
        pair_packs: each pair as its prompt once and two responses, through the policy; the reference is stored.
        prompt_packs: each distinct prompt once with all its distinct responses, through the policy.
    """

    estimated: bool
    padded_pairs: int
    pair_packs: int
    prompt_packs: int


def epoch_tokens(groups: Sequence[PromptGroup], lengths: Sequence[GroupTokens], *, estimated: bool) -> EpochTokens:
    """Count what packing saves; ``lengths`` has one entry per group."""
    distinct: dict[Hashable, int] = {}
    padded = packed = 0
    for group, length in zip(groups, lengths, strict=True):
        key = group.prompt_key()
        distinct.setdefault(key, length.prompt)
        for response, tokens in zip(group.responses, length.responses, strict=True):
            distinct[key, response] = tokens
        for pair in group.pairs:
            chosen, rejected = length.responses[pair.chosen], length.responses[pair.rejected]
            padded += 2 * 2 * (length.prompt + max(chosen, rejected))
            packed += length.prompt + chosen + rejected
    return EpochTokens(estimated, padded, packed, sum(distinct.values()))


def token_estimator(
    sizes: Mapping[ImageSource, tuple[int, int]] | None = None, *, max_pixels: int = MAX_PIXELS
) -> CountTokens:
    """CountTokens without a model: a token for four bytes of UTF-8, and for 28 x 28 pixels of an image once scaled.

    Args:
        sizes: width and height of images; those not in it count as ``max_pixels``.
        max_pixels: what images are scaled down to.
    """
    known = sizes or {}

    def image_tokens(image: ImageSource) -> int:
        size = known.get(image) if isinstance(image, (Path, bytes)) else image.size
        pixels = max_pixels if size is None else min(math.prod(size), max_pixels)
        return max(1, round(pixels / _PIXELS_PER_TOKEN))

    def estimate(group: PromptGroup) -> GroupTokens:
        text = sum(_text_tokens(part) for m in group.messages for part in m.content if isinstance(part, str))
        prompt = text + sum(image_tokens(image) for image in group.images)
        return GroupTokens(prompt, tuple(_text_tokens(response.text) for response in group.responses))

    return estimate


def spread(values: Iterable[float | int]) -> Spread | None:
    """How values are distributed, or ``None`` if there are none."""
    ordered = sorted(values)
    if not ordered:
        return None

    def quantile(fraction: float) -> float:
        rest, below = math.modf(fraction * (len(ordered) - 1))
        low = ordered[int(below)]
        return float(low + rest * (ordered[int(below) + 1] - low) if rest else low)

    return Spread(quantile(0.0), quantile(0.1), quantile(0.5), quantile(0.9), quantile(1.0))


def _text_tokens(text: str) -> int:
    return math.ceil(len(text.encode()) / _BYTES_PER_TOKEN)
