"""Small prompt groups and models for the tests that need tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, PreTrainedConfig, Qwen2Config

from unidpo.data.pairs import IMAGE, Message, Pair, PromptGroup, Response, ranked_pairs
from unidpo.model.encode import Encoder, prompt_positions
from unidpo.model.load import load_policy, load_processor

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


SMALL: dict[str, Any] = {
    "vocab_size": 2096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 2048,
    "eos_token_id": 2050,
    "pad_token_id": 2048,
}
"""A language model for the golden tokenizer, with room for the special tokens of other families."""


def save_text_model(folder: Path, config: PreTrainedConfig | None = None) -> Path:
    """A random language model with the golden tokenizer, as `save_pretrained` leaves one. Output is not tied."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config or Qwen2Config(**SMALL, tie_word_embeddings=False)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(GOLDEN / "model").save_pretrained(folder)
    return folder


def save_gemma2(folder: Path) -> Path:
    """A language model whose attention is more than causal: windows of 8 tokens and a soft cap."""
    return save_text_model(folder, Gemma2Config(**SMALL, head_dim=16, sliding_window=8))
