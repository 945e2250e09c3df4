"""Attention of a pack: prompts see themselves, each response sees its prompt and itself, all causally.

Each backend is registered with transformers under its name in `PACK_ATTENTIONS`; the forward pass hands a
`SegmentTable` through its keyword arguments. No mask function is registered under these names, so transformers builds
no mask.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from unidpo.model.attention.backends import BACKENDS, Attend, Backend, missing
from unidpo.model.attention.table import SegmentTable

__all__ = [
    "BACKENDS",
    "PACK_ATTENTION",
    "PACK_ATTENTIONS",
    "Backend",
    "PackAttentionError",
    "SegmentTable",
    "missing",
    "pack_attention",
    "set_text_attention",
]

# transformers takes every name with "flash" in it for one of its own.
PACK_ATTENTIONS: dict[Backend, str] = {
    "varlen": "unidpo_pack_varlen",
    "flash": "unidpo_pack_fa",
    "flex": "unidpo_pack_flex",
    "sdpa": "unidpo_pack",
}
PACK_ATTENTION = PACK_ATTENTIONS["sdpa"]


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
    segments: SegmentTable | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    attend: Attend = BACKENDS["sdpa"],
    **_: Any,
) -> tuple[Float[Tensor, "1 tokens heads dim"], None]:
    """Shared-prefix attention over the segments of a pack, as transformers calls it; gradients flow.

    Args:
        scaling: of the scores; `None` for `dim ** -0.5`.
        dropout: probability that a weight is dropped.
        attend: the backend.

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
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        # Rotary angles in float32 have widened queries and keys. torch's own attention narrows them again by itself,
        # kernels that are called directly do not.
        narrow = torch.get_autocast_dtype(device)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    return attend(query, key, value, segments, scaling, dropout), None


def set_text_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the language model's attention; a vision tower keeps its own."""
    config = model.config
    composite = config.get_text_config() is not config
    model.set_attn_implementation({"text_config": name} if composite else name)


for _backend, _name in PACK_ATTENTIONS.items():
    AttentionInterface.register(_name, functools.partial(pack_attention, attend=BACKENDS[_backend]))
