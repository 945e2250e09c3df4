"""Attention of a pack: prompts see themselves, each response sees its prompt and itself, all causally.

Registered with transformers under `PACK_ATTENTION`; the forward pass hands the segments through its keyword
arguments. No mask function is registered under that name, so transformers builds no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from unidpo.packs import Segment

PACK_ATTENTION = "unidpo_pack"


class PackAttentionError(RuntimeError):
    """The model asks its attention for something a pack cannot give; the padded path can."""


def pack_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[Segment] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 tokens heads dim"], None]:
    """Shared-prefix attention over the segments of a pack, by `scaled_dot_product_attention`.

    Raises:
        PackAttentionError: the model's attention is more than causal (sliding window, soft cap, a mask of its own),
            or no segments came through.
    """
    asked = {"a mask": attention_mask, "a sliding window": sliding_window, "a soft cap on its scores": softcap}
    for what, given in asked.items():
        if given is not None:
            raise PackAttentionError(f"the model's attention uses {what}")
    if segments is None:
        raise PackAttentionError("the model does not hand keyword arguments through to its attention")
    options = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    outputs = []
    for segment in segments:
        prompt = slice(segment.start, segment.start + segment.prompt)
        outputs.append(_attend(query[:, :, prompt], key[:, :, prompt], value[:, :, prompt], **options))
        at = prompt.stop
        for length in segment.responses:
            response = slice(at, at + length)
            outputs.append(
                _attend(
                    query[:, :, response],
                    torch.cat([key[:, :, prompt], key[:, :, response]], dim=2),
                    torch.cat([value[:, :, prompt], value[:, :, response]], dim=2),
                    **options,
                )
            )
            at += length
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Causal attention whose mask is aligned bottom-right: the last query sees every key."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(diagonal=keys - queries)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def set_text_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the language model's attention; a vision tower keeps its own."""
    config = model.config
    composite = config.get_text_config() is not config
    model.set_attn_implementation({"text_config": name} if composite else name)


AttentionInterface.register(PACK_ATTENTION, pack_attention)
