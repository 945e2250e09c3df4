"""Computes, without loading weights, what the Qwen2-VL-2B recipes for one 24 GB card hold in memory.

    python scripts/recipe_memory.py

Nothing here is measured. The CUDA context, kernels' workspaces and fragmentation come on top: leave 2 GB for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from unidpo.config import Recipe, load_recipe
from unidpo.logps import LOGITS_CHUNK_BYTES
from unidpo.models import language_linear_layers

RECIPES = Path(__file__).parents[1] / "recipes" / "qwen2_vl_2b"
NAMES = ("uni_dpo", "lora", "qlora")
# config.json of Qwen/Qwen2-VL-2B.
TEXT = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
# Bits per weight: 4, an 8-bit constant for 64 of them, a 32-bit one for 256 of these (arXiv:2305.14314, section 3).
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
# Of a weight that learns: itself, its gradient and AdamW's two moments in float32, and autocast's copy in 16 bits.
LEARNING_BYTES = 4 + 4 + 8 + 2
PROMPT_TEXT, RESPONSE = 98, 100  # tokens of an average row of MM-RLHF's images, beside those of the image


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes held at the peak of a step with gradient checkpointing."""

    frozen: float  # weights, 16 bits or what they are quantized to
    learning: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.frozen + self.learning + self.activations + self.logits


def qwen2_vl_2b() -> Qwen2VLForConditionalGeneration:
    config = Qwen2VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True)
    with torch.device("meta"):
        return Qwen2VLForConditionalGeneration(config)


def memory(recipe: Recipe, tokens: int) -> Memory:
    """What a recipe holds while a pack of `tokens` tokens goes through it."""
    model = qwen2_vl_2b()
    weights = sum(parameter.numel() for parameter in model.parameters())
    vision = sum(parameter.numel() for parameter in model.model.visual.parameters())
    linear = [model.get_submodule(name) for name in language_linear_layers(model)]
    if recipe.lora is None:
        learning, frozen = weights - vision, 2 * vision
    else:
        learning = sum(recipe.lora.r * (layer.in_features + layer.out_features) for layer in linear)
        # Quantized: the linear layers that get an adapter. Embeddings, norms and the vision tower stay in 16 bits.
        quantized = sum(layer.weight.numel() for layer in linear) if recipe.model.quantize == "nf4" else 0
        frozen = 2 * (weights - quantized) + quantized * NF4_BITS / 8
    # Kept: each layer's input. At its peak: one layer computed again, all of whose linear layers keep input and output,
    # in 16 bits, and for the gradient of that layer once more.
    hidden, layers = TEXT["hidden_size"], TEXT["num_hidden_layers"]
    one_layer = sum(layer.in_features + layer.out_features for layer in linear) / layers
    activations = tokens * 2 * (layers * hidden + 2 * one_layer)
    # float32: a chunk, its log-softmax and its gradient.
    return Memory(frozen, LEARNING_BYTES * learning, activations, 3 * LOGITS_CHUNK_BYTES)


def average_tokens(recipe: Recipe) -> int:
    """Of a pair: an image of the largest size a recipe lets through, and average text."""
    return recipe.data.max_pixels // 28**2 + PROMPT_TEXT + 2 * RESPONSE


def longest_tokens(recipe: Recipe) -> int:
    """Of a pair: a short prompt, and two responses that reach the limit."""
    return PROMPT_TEXT + 2 * (recipe.data.max_length - PROMPT_TEXT)


def main() -> None:
    print("| recipe | pack | frozen weights | learning weights | activations | logits | sum |")
    print("|---|---|---|---|---|---|---|")
    for name in NAMES:
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        for title, tokens in (("average", average_tokens(recipe)), ("longest", longest_tokens(recipe))):
            found = memory(recipe, tokens)
            parts = (found.frozen, found.learning, found.activations, found.logits, found.total)
            cells = " | ".join(f"{part / 1e9:.1f}" for part in parts)
            print(f"| `{name}` | {title}, {tokens} tokens | {cells} |")


if __name__ == "__main__":
    main()
