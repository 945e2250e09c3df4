"""Small prompt groups and models for the tests that need tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from unidpo.encode import Encoder, prompt_positions
from unidpo.models import load_policy, load_processor
from unidpo.pairs import IMAGE, Message, Pair, PromptGroup, Response, ranked_pairs

GOLDEN = Path(__file__).parent / "golden"
WORDS = ["red", "blue", "green", "circle", "square", "left", "right", "two", "three", "bright", "dark"]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def picture(rng: random.Random, side: int = 56) -> Image.Image:
    image = Image.new("RGB", (side, side), tuple(rng.randrange(256) for _ in range(3)))
    image.paste(tuple(rng.randrange(256) for _ in range(3)), (8, 8, 30, 40))
    return image


def group(
    *, images: int = 1, responses: Sequence[int] = (4, 7), seed: int = 0, row: int = 1, side: int = 56
) -> PromptGroup:
    """A prompt with so many images and responses of so many words, scored 5, 4, 3, ... in order."""
    rng = random.Random(seed)
    content = [IMAGE] * images + ["\n" * bool(images) + sentence(rng, 5)]
    texts = [Response(sentence(rng, words), float(5 - i)) for i, words in enumerate(responses)]
    return PromptGroup(
        messages=(Message("user", tuple(content)),),
        images=tuple(picture(rng, side) for _ in range(images)),
        responses=tuple(texts),
        pairs=ranked_pairs(texts, row) if len(texts) > 1 else (Pair(0, 1, row),),
    )


def tiny_policy(dtype: torch.dtype = torch.float32):
    """The golden random Qwen2-VL with its processor and encoder."""
    model = load_policy(GOLDEN / "model", dtype=dtype)
    processor = load_processor(GOLDEN / "model")
    return model, processor, Encoder(processor, prompt_positions(model))
