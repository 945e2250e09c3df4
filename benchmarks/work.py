"""Floating-point work that a training step needs, counted from lengths: a multiplication and an addition are two.

Padding, and what a masked-out half of an attention matrix costs, are not counted: nobody needs them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from benchmarks.settings import Setting
from benchmarks.shapes import Shape
from benchmarks.variants import VARIANTS, Variant, pairs_of, prompts_of
from unidpo.model.encode import Encoder, plain_positions
from unidpo.model.lengths import TokenCounter
from unidpo.model.load import load_processor

PATCHES_PER_TOKEN = 4
PATCH_VALUES = 3 * 2 * 14 * 14


def step_work(setting: Setting, name: str) -> float:
    """Work of one step of a variant, with its live reference where it has one and without a stored one's pass."""
    variant = VARIANTS[name]
    encoder = Encoder(load_processor(setting.model), plain_positions, template="chatml")
    groups = prompts_of(setting) if variant.layout == "prompts" else pairs_of(setting)
    counter = TokenCounter(encoder)
    total = 0.0
    for group in groups[: len(groups) // (setting.steps + 1)]:
        tokens = counter.one(group)
        total += group_work(
            setting.shape, variant, image=sum(tokens.images), prompt=tokens.prompt, responses=tokens.responses
        )
    return total


def group_work(shape: Shape, variant: Variant, *, image: int, prompt: int, responses: Sequence[int]) -> float:
    """Work of one group in a step. Lengths in tokens; `prompt` includes the image."""
    rows = [[response] for response in responses] if variant.layout == "rows" else [responses]
    language = sum(_language(shape, variant, prompt, row) for row in rows)
    vision = variant.vision * len(rows) * _vision(shape, image)
    # Backward costs twice what forward does; the frozen vision tower has none. A live reference computes all of it
    # again, but in packs takes the features that the policy's pass made.
    towers = 1 + (variant.live and variant.layout == "rows")
    return (3 + variant.live) * language + towers * vision


def _language(shape: Shape, variant: Variant, prompt: int, responses: Sequence[int]) -> float:
    """Forward of a prompt and the responses that share it."""
    hidden, (queries, keys) = shape.hidden, shape.heads
    layer = 2 * hidden**2 * (1 + keys / queries) + 3 * hidden * shape.intermediate
    tokens = prompt + sum(responses)
    seen = prompt * (prompt + 1) / 2 + sum(length * prompt + length * (length + 1) / 2 for length in responses)
    scored = tokens if variant.all_logits else sum(responses)
    return shape.layers * (2 * layer * tokens + 4 * hidden * seen) + 2 * hidden * shape.vocabulary * scored


def _vision(shape: Shape, tokens: int) -> float:
    """Forward of an image."""
    width, depth, _ = shape.vision
    patches = PATCHES_PER_TOKEN * tokens
    tower = 2 * patches * width * (12 * width * depth + PATCH_VALUES) + 4 * width * depth * patches**2
    merged = PATCHES_PER_TOKEN * width
    return tower + 2 * tokens * (merged**2 + merged * shape.hidden)


def matmul_rate(shape: Shape, side: int | None = None) -> float:
    """Operations per second of a plain square matrix product in the shape's type: what the machine can do."""
    side = side or (8192 if shape.device == "cuda" else 1024)
    left, right = (torch.randn(side, side, dtype=shape.dtype, device=shape.device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = _finished(shape)
        left @ right
        best = min(best, _finished(shape) - start)
    return 2 * side**3 / best


def _finished(shape: Shape) -> float:
    if shape.device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
