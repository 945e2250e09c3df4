"""The models and the data that are measured: random weights, and the lengths of the pairs that go through them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from unidpo.model.encode import CHATML

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "model"  # lends its tokenizer
# Ids that the golden tokenizer knows; a larger vocabulary costs as much whichever of its tokens stand in the text.
SPECIAL = {
    "image_token_id": 2060,
    "video_token_id": 2061,
    "vision_start_token_id": 2057,
    "vision_end_token_id": 2058,
}
TOKENS = {"bos_token_id": 2048, "eos_token_id": 2050, "pad_token_id": 2048}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Ranges, both ends included, in tokens; `responses` is their number per prompt."""

    image: tuple[int, int] = (250, 750)
    prompt: tuple[int, int] = (30, 100)
    response: tuple[int, int] = (5, 400)
    responses: int = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen2-VL with random weights, what it computes in and where, and the pairs it meets.

    Attributes:
        heads: of the language model: for queries, for keys and values.
        mrope: how the rotary frequencies of a head are dealt out to time, height and width.
        vision: width, depth, heads.
        pairs_per_pass: of the variants that lay pairs; the one that lays prompts takes as many prompts.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: tuple[int, int]
    mrope: tuple[int, int, int]
    vocabulary: int
    vision: tuple[int, int, int]
    lengths: Lengths = Lengths()
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    pairs_per_pass: int = 1
    gradient_checkpointing: bool = False

    @property
    def config(self) -> Qwen2VLConfig:
        text: dict[str, Any] = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "vocab_size": self.vocabulary,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(self.mrope)},
            "tie_word_embeddings": True,
            **TOKENS,
        }
        width, depth, heads = self.vision
        vision = {"embed_dim": width, "depth": depth, "num_heads": heads, "hidden_size": self.hidden, "mlp_ratio": 4}
        return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **SPECIAL)


SHAPES = {
    # For the tests.
    "tiny": Shape(
        64, 96, 2, (4, 2), (2, 3, 3), 2080, (32, 2, 2), Lengths(image=(4, 16), prompt=(5, 10), response=(3, 20))
    ),
    # For the curves: large enough that arithmetic outweighs what Python does between the layers.
    "small": Shape(256, 1024, 4, (4, 2), (8, 12, 12), 32_768, (128, 2, 2)),
    # About 110 million parameters.
    "cpu": Shape(512, 2048, 8, (8, 2), (8, 12, 12), 151_936, (256, 4, 4)),
    # config.json of Qwen/Qwen2-VL-2B.
    "gpu": Shape(
        1536,
        8960,
        28,
        (12, 2),
        (16, 24, 24),
        151_936,
        (1280, 32, 16),
        device="cuda",
        dtype=torch.bfloat16,
        pairs_per_pass=4,
    ),
}
# Where a prompt is short beside what is said about it, and packs save least.
SHAPES["answers"] = replace(SHAPES["cpu"], lengths=Lengths(image=(16, 64), response=(150, 600)))


def save_model(shape: Shape, folder: Path) -> int:
    """Write a model of this shape with tokenizer and image processor; returns its number of parameters."""
    torch.manual_seed(0)
    with torch.device(shape.device):
        model = Qwen2VLForConditionalGeneration(shape.config).to(shape.dtype)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    shutil.copy(GOLDEN / "preprocessor_config.json", folder)
    return sum(parameter.numel() for parameter in model.parameters())
