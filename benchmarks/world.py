"""Prompts with images and scored responses, of given lengths, as MM-RLHF has them: generated, the same for a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.shapes import Lengths
from unidpo.data.pairs import IMAGE, Message, Pair, PromptGroup, Response

TOKEN_SIDE = 28  # pixels of an image that become one token: 2 x 2 patches of 14 x 14


def make_prompts(tokenizer: Any, lengths: Lengths, count: int, folder: Path, *, seed: int) -> list[PromptGroup]:
    """`count` prompts with one image each, written to `folder` as PNG, and all pairs of their responses.

    Lengths stand at evenly spaced quantiles of their distribution instead of being drawn from it, so that a few
    prompts have the mean of many: images and questions uniform in their range, responses uniform in the logarithm
    of their length (mean 90 of 5 to 400 tokens; MM-RLHF's mean is about 100), each prompt with short and long ones.
    """
    rng = random.Random(seed)
    words = _single_token_words(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    images = _shuffled(rng, [_uniform(lengths.image, (i + 0.5) / count) for i in range(count)])
    questions = _shuffled(rng, [_uniform(lengths.prompt, (i + 0.5) / count) for i in range(count)])
    total = count * lengths.responses
    answers = [_log_uniform(lengths.response, (i + 0.5) / total) for i in range(total)]
    # Each prompt gets one of the shortest, one of the next, ...
    ranks = [_shuffled(rng, answers[at : at + count]) for at in range(0, total, count)]
    prompts = []
    for i in range(count):
        path = folder / f"{seed}-{i}.png"
        _picture(rng, images[i], lengths.image).save(path)
        texts = [_text(rng, words, rank[i]) for rank in ranks]
        scores = _shuffled(rng, [float(score) for score in range(1, lengths.responses + 1)])
        responses = tuple(Response(text, score) for text, score in zip(texts, scores, strict=True))
        message = Message("user", (IMAGE, _text(rng, words, questions[i])))
        first_row = 1 + i * math.comb(lengths.responses, 2)
        prompts.append(PromptGroup((message,), (path,), responses, _pairs(responses, first_row)))
    return prompts


def as_pairs(prompts: Sequence[PromptGroup], per_prompt: int | None = None) -> list[PromptGroup]:
    """A group of its own for each pair, as a file of pairs has them, or for the first pairs of each prompt."""
    return [prompt.keep_pairs([pair]) for prompt in prompts for pair in prompt.pairs[:per_prompt]]


def _pairs(responses: Sequence[Response], first_row: int) -> tuple[Pair, ...]:
    """All pairs, in rounds in which every response plays once: the first rounds stand for all lengths."""
    pairs = []
    for row, (i, j) in enumerate(_rounds(len(responses)), start=first_row):
        better = responses[i].score > responses[j].score  # type: ignore[operator]
        pairs.append(Pair(*((i, j) if better else (j, i)), row))
    return tuple(pairs)


def _rounds(players: int) -> list[tuple[int, int]]:
    """Round robin by the circle method: one player stays, the others move on."""
    circle = list(range(players + players % 2))  # with an odd number somebody pauses
    meetings = []
    for _ in circle[1:]:
        half = len(circle) // 2
        facing = zip(circle[:half], reversed(circle[half:]), strict=True)
        meetings += [(min(pair), max(pair)) for pair in facing if max(pair) < players]
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return meetings


def _single_token_words(tokenizer: Any) -> list[str]:
    words = sorted(w[1:] for w in tokenizer.get_vocab() if w.startswith("Ġ") and w[1:].isascii() and w[1:].isalpha())
    return [word for word in words if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1]


def _text(rng: random.Random, words: Sequence[str], count: int) -> str:
    return "".join(f" {rng.choice(words)}" for _ in range(count))


def _picture(rng: random.Random, tokens: int, limits: tuple[int, int]) -> Image.Image:
    """Coloured squares, about three wide for two high, of about so many tokens and within the limits."""
    sizes = [
        (width, height)
        for height in range(1, 1 + limits[1])
        for width in range(height, 1 + min(2 * height, limits[1] // height))
        if width * height >= limits[0]
    ]
    width, height = min(sizes, key=lambda s: (abs(s[0] * s[1] - tokens), abs(s[0] / s[1] - 1.5)))
    coarse = Image.frombytes("RGB", (8, 8), rng.randbytes(3 * 64))
    return coarse.resize((width * TOKEN_SIDE, height * TOKEN_SIDE), Image.Resampling.NEAREST)


def _uniform(limits: tuple[int, int], quantile: float) -> int:
    return round(limits[0] + quantile * (limits[1] - limits[0]))


def _log_uniform(limits: tuple[int, int], quantile: float) -> int:
    return round(limits[0] * (limits[1] / limits[0]) ** quantile)


def _shuffled(rng: random.Random, values: Sequence[Any]) -> list[Any]:
    return rng.sample(values, len(values))
