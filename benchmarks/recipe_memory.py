"""Computes, without loading weights, what the Qwen2-VL-2B recipes for one 24 GB card hold in memory.

    python -m benchmarks.recipe_memory

As `unidpo plan` does, for a pair of average length and one of the greatest. Nothing here is measured on a GPU.
"""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen2VLConfig

from unidpo.config import Recipe, load_recipe
from unidpo.model.load import empty_model
from unidpo.plan import setting_of
from unidpo.plan.memory import Memory, peak_memory
from unidpo.plan.shape import shape_of
from unidpo.plan.work import Load, PatchCounter, packed

RECIPES = Path(__file__).parents[1] / "recipes" / "qwen2_vl_2b"
NAMES = ("uni_dpo", "lora", "qlora")
# config.json of Qwen/Qwen2-VL-2B.
TEXT = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
VISION = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
PROMPT_TEXT, RESPONSE = 98, 100  # tokens of an average row of MM-RLHF's images, beside those of the image


def memory(recipe: Recipe, load: Load) -> Memory:
    """What a recipe holds while a pack goes through it."""
    model = empty_model(Qwen2VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True))
    shape = shape_of(model)
    setting = setting_of(recipe, model, shape)
    return peak_memory(shape, setting, load, micro_batches_per_step=recipe.train.global_batch_pairs or 1)


def average(recipe: Recipe) -> Load:
    """A pair with an image of the largest size that a recipe lets through, and average text."""
    image = recipe.data.max_pixels // 28**2
    return packed(PROMPT_TEXT + image, [RESPONSE] * 2, PatchCounter(patches_per_token=4).load([image]))


def longest(recipe: Recipe) -> Load:
    """A pair of two responses to a short prompt that reach the limit."""
    return packed(PROMPT_TEXT, [recipe.data.max_length - PROMPT_TEXT] * 2)


def main() -> None:
    columns = ("weights", "gradients", "optimizer", "copies", "activations", "logits", "margin", "total")
    print(f"| recipe | pack | {' | '.join(columns)} |")
    print("|---" * (2 + len(columns)) + "|")
    for name in NAMES:
        recipe = load_recipe(RECIPES / f"{name}.yaml")
        for title, load in (("average", average(recipe)), ("longest", longest(recipe))):
            found = memory(recipe, load)
            cells = " | ".join(f"{getattr(found, column) / 1e9:.1f}" for column in columns)
            print(f"| `{name}` | {title}, {load.tokens} tokens | {cells} |")


if __name__ == "__main__":
    main()
