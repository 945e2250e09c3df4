"""A small random model of each family, and packs and padded rows of it against separate stock passes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma2Config,
    Gemma3Config,
    Gemma3Processor,
    InternVLConfig,
    InternVLProcessor,
    LlamaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from unidpo.data.pairs import IMAGE, Message, Pair, PromptGroup, Response
from unidpo.model.attention import PACK_ATTENTION, set_text_attention
from unidpo.model.encode import CHATML, Encoder, prompt_positions
from unidpo.model.load import compose_processor, load_policy, load_processor, save_model
from unidpo.model.logps import response_logps
from unidpo.model.packs import pack, pad
from unidpo.model.parts import freeze, language_linear_layers
from worlds import GOLDEN, SMALL, picture, sentence

Tuning = Literal["full", "LoRA"]
QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"

MROPE = SMALL | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
SIGLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
SQUARE = {"height": 28, "width": 28}
GRID = [[28, 28], [28, 56], [56, 28], [56, 56]]


@dataclass(frozen=True)
class Family:
    """How to make a small model of a family.

    Attributes:
        config: made of the ids of the tokens that the tokenizer gets, by name.
        tokens: special tokens that the family's processor asks its tokenizer for by name.
        mark: what stands for an image in the chat template.
        processor: made of a tokenizer; `None` for a text model.
        refuses: what the model's attention has that packs refuse; `None` where packs work.
    """

    name: str
    config: Callable[[Mapping[str, int]], PreTrainedConfig]
    tokens: Mapping[str, str] = field(default_factory=dict)
    mark: str = QWEN_MARK
    processor: Callable[[Any], Any] | None = None
    refuses: str | None = None


def _qwen_vision(**more: Any) -> dict[str, Any]:
    return {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, **more}


def _qwen_ids(ids: Mapping[str, int]) -> dict[str, int]:
    return {
        "image_token_id": 2060,
        "video_token_id": 2061,
        "vision_start_token_id": 2057,
        "vision_end_token_id": 2058,
    }


def _qwen_processor(cls: Any, patch_size: int = 14) -> Callable[[Any], Any]:
    return lambda tokenizer: compose_processor(
        cls,
        Qwen2VLImageProcessorPil(patch_size=patch_size, size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112}),
        tokenizer,
    )


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "Qwen2-VL",
            lambda ids: Qwen2VLConfig(
                text_config=MROPE,
                vision_config=_qwen_vision(embed_dim=32, hidden_size=64, mlp_ratio=2),
                **_qwen_ids(ids),
            ),
            processor=_qwen_processor(Qwen2VLProcessor),
        ),
        Family(
            "Qwen2.5-VL",
            lambda ids: Qwen2_5_VLConfig(
                text_config=MROPE,
                vision_config=_qwen_vision(
                    hidden_size=32, intermediate_size=48, out_hidden_size=64, window_size=56, fullatt_block_indexes=[1]
                ),
                **_qwen_ids(ids),
            ),
            processor=_qwen_processor(Qwen2_5_VLProcessor),
        ),
        Family(
            "Qwen3-VL",
            lambda ids: Qwen3VLConfig(
                text_config=MROPE | {"head_dim": 16},
                vision_config=_qwen_vision(
                    hidden_size=32,
                    intermediate_size=48,
                    out_hidden_size=64,
                    num_position_embeddings=16,
                    deepstack_visual_indexes=[0, 1],
                )
                | {"patch_size": 16},
                **_qwen_ids(ids),
                tie_word_embeddings=True,
            ),
            processor=_qwen_processor(Qwen3VLProcessor, patch_size=16),
        ),
        Family(
            "LLaVA-OneVision",
            lambda ids: LlavaOnevisionConfig(
                text_config=Qwen2Config(**SMALL),
                vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP},
                image_token_index=ids["image_token"],
                video_token_index=ids["video_token"],
                image_grid_pinpoints=GRID,
            ),
            tokens={"image_token": "<image>", "video_token": "<video>"},
            mark="<image>\n",
            processor=lambda tokenizer: compose_processor(
                LlavaOnevisionProcessor,
                LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=GRID),
                tokenizer,
                settings={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
            ),
        ),
        Family(
            "InternVL3",
            lambda ids: InternVLConfig(
                text_config=Qwen2Config(**SMALL),
                vision_config=SIGLIP | {"image_size": [28, 28], "patch_size": [14, 14]},
                image_token_id=ids["context_image_token"],
                image_seq_length=1,
                tie_word_embeddings=False,
            ),
            tokens={
                "context_image_token": "<IMG_CONTEXT>",
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "video_token": "<video>",
            },
            mark="<IMG_CONTEXT>\n",
            processor=lambda tokenizer: compose_processor(
                InternVLProcessor,
                GotOcr2ImageProcessorPil(size=SQUARE, max_patches=4),
                tokenizer,
                settings={"image_seq_length": 1},
            ),
        ),
        Family(
            "SmolVLM2",
            lambda ids: SmolVLMConfig(
                text_config=LlamaConfig(**SMALL),
                vision_config=SIGLIP,
                image_token_id=ids["image_token"],
                scale_factor=2,
            ),
            tokens={
                "image_token": "<image>",
                "fake_image_token": "<fake_token_around_image>",
                "global_image_token": "<global-img>",
                "end_of_utterance_token": "<end_of_utterance>",
                "first_tile": "<row_1_col_1>",
            },
            mark="<image>",
            processor=lambda tokenizer: compose_processor(
                SmolVLMProcessor,
                SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
                tokenizer,
                settings={"image_seq_len": 1},
            ),
        ),
        Family(
            "Gemma-3",
            lambda ids: Gemma3Config(
                text_config=SMALL
                | {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
                vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SIGLIP},
                mm_tokens_per_image=4,
                image_token_index=ids["image_token"],
                boi_token_index=ids["boi_token"],
                eoi_token_index=ids["eoi_token"],
            ),
            tokens={
                "image_token": "<image_soft_token>",
                "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
            },
            mark="<start_of_image>",
            processor=lambda tokenizer: Gemma3Processor(
                Gemma3ImageProcessorPil(size=SQUARE),
                tokenizer,
                chat_template=tokenizer.chat_template,
                image_seq_length=4,
            ),
            refuses="a sliding window",
        ),
        Family("Qwen2.5", lambda ids: Qwen2Config(**SMALL, tie_word_embeddings=True)),
        Family("Qwen3", lambda ids: Qwen3Config(**SMALL, head_dim=16)),
        Family("Llama-3", lambda ids: LlamaConfig(**SMALL)),
        Family(
            "Gemma-2",
            lambda ids: Gemma2Config(**SMALL, head_dim=16, sliding_window=8, final_logit_softcapping=2.0),
            refuses="a sliding window",
        ),
    )
}


def save_family(family: Family, folder: Path) -> Path:
    """A random model with its processor, as a run leaves them."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "model", extra_special_tokens=dict(family.tokens))
    tokenizer.chat_template = CHATML.replace(QWEN_MARK, family.mark)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in family.tokens.items()}
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if family.processor is None else AutoModelForImageTextToText
    model = auto.from_config(family.config(ids))
    with torch.no_grad():
        # Large enough that each image and each word before a response shows in its log-probability.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.02))
    processor = tokenizer if family.processor is None else family.processor(tokenizer)
    save_model(model, processor, folder, dtype=torch.float32)
    return folder


@dataclass
class World:
    """A family's model in float64, loaded from its folder as users load one."""

    model: PreTrainedModel
    processor: Any
    encoder: Encoder


def load_family(folder: Path, tuning: Tuning = "full") -> World:
    """All weights learn, the vision tower's too; with LoRA an adapter that is not zero on the language model."""
    model = load_policy(folder, dtype=torch.float64)
    processor = load_processor(folder)
    encoder = Encoder(processor, prompt_positions(model))
    freeze(model, ())
    if tuning == "LoRA":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        adapter = LoraConfig(r=2, target_modules=language_linear_layers(model), init_lora_weights=False)
        get_peft_model(model, adapter)  # puts its layers into the model
    return World(model, processor, encoder)


def prompts(*, images: bool) -> list[PromptGroup]:
    """Groups without an image, with a wide one, with a square one and two in one prompt; two to four responses."""
    rng = random.Random(0)
    shapes: list[tuple[tuple[int, int], ...]] = [(), ((112, 56),), ((56, 56),), ((56, 84), (84, 56))]
    groups = []
    for row, (sizes, responses) in enumerate(zip(shapes, ((3, 5, 2), (4, 2), (1, 6), (2, 7, 3, 5)), strict=True), 1):
        pictures = tuple(noise(rng, size) for size in sizes) if images else ()
        content = [part for _ in pictures for part in (IMAGE, sentence(rng, 2) + " ")]
        texts = tuple(Response(sentence(rng, words)) for words in responses)
        message = Message("user", (*content, sentence(rng, 6)))
        groups.append(PromptGroup((message,), pictures, texts, (Pair(0, 1, row),)))
    return groups


def noise(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    return picture(rng).resize(size)


class Float64(TorchFunctionMode):
    """Models compute norms, rotations and softmax in float32 whatever their type; within this they use float64.

    What is left between two ways to compute the same is then of the size of float64's rounding.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            func = Tensor.double
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*wide, **named)


@contextmanager
def pack_attention(model: PreTrainedModel) -> Iterator[None]:
    own = model.config.get_text_config()._attn_implementation
    set_text_attention(model, PACK_ATTENTION)
    try:
        yield
    finally:
        set_text_attention(model, own)


def separate_logps(world: World, groups: Sequence[PromptGroup]) -> Tensor:
    """Each response in a forward of its own: the processor's output for the whole text straight into the model."""
    logps = []
    for group in groups:
        prompt = world.encoder.prompt_text(group.messages)
        for response in group.responses:
            answer = world.encoder.response_ids(response)
            inputs = _stock_inputs(world, prompt + world.encoder.tokenizer.decode(answer), group.images)
            assert inputs["input_ids"][0, -len(answer) :].tolist() == answer
            logits = world.model(**inputs).logits[0, -len(answer) - 1 : -1].double()
            logps.append(torch.log_softmax(logits, -1)[torch.arange(len(answer)), answer].sum())
    return torch.stack(logps)


def _stock_inputs(world: World, text: str, images: Sequence[Any]) -> Any:
    options: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": False}
    if not images:
        return world.encoder.tokenizer([text], **options)
    return world.processor(text=[text], images=[list(images)], **options)


def pack_logps(world: World, groups: Sequence[PromptGroup]) -> Tensor:
    with pack_attention(world.model):
        return response_logps(world.model, pack([world.encoder.encode(group) for group in groups]))


def padded_logps(world: World, groups: Sequence[PromptGroup]) -> Tensor:
    pad_token = world.encoder.tokenizer.pad_token_id
    return response_logps(world.model, pad([world.encoder.encode(group) for group in groups], pad_token_id=pad_token))


LAYOUTS = {"packs": pack_logps, "padded": padded_logps}


@dataclass(frozen=True)
class Measured:
    """Log-probabilities (nats, summed over a response) and the gradient of each weight that has one."""

    logps: Tensor
    gradients: Mapping[str, Tensor]


def measure(
    world: World, groups: Sequence[PromptGroup], layout: Callable[[World, Sequence[PromptGroup]], Tensor]
) -> Measured:
    """Run a layout, or `separate_logps`, in float64 with gradients."""
    world.model.zero_grad()
    with Float64():
        logps = layout(world, groups)
        # A different weight for each response, so that a swap would show.
        (logps * torch.linspace(0.5, 1.5, len(logps), dtype=torch.float64)).sum().backward()
    found = {name: p.grad.clone() for name, p in world.model.named_parameters() if p.grad is not None}
    return Measured(logps.detach(), found)


@dataclass(frozen=True)
class Difference:
    """Largest differences of two measurements.

    Attributes:
        logps: nats.
        gradients: of an entry of any weight's gradient, as a fraction of the largest entry of all.
    """

    logps: float
    gradients: float


def difference(found: Measured, expected: Measured) -> Difference:
    assert found.gradients.keys() == expected.gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    apart = max(float((found.gradients[name] - gradient).abs().max()) for name, gradient in expected.gradients.items())
    return Difference(float((found.logps - expected.logps).abs().max()), apart / largest)
