"""Attention of a pack: prompts see themselves, each response sees its prompt and itself, all causally.

Each backend is registered with transformers under a name of its own; the forward pass hands a `SegmentTable` through
its keyword arguments.
"""

from transformers import PreTrainedModel

from unidpo.model.attention import backends
from unidpo.model.attention.registry import (
    BACKENDS,
    Attend,
    Backend,
    PackAttentionError,
    Table,
    backend,
    missing,
    pack_attention,
)
from unidpo.model.attention.table import Segment, SegmentTable

__all__ = [
    "BACKENDS",
    "PACK_ATTENTION",
    "Attend",
    "Backend",
    "PackAttentionError",
    "Segment",
    "SegmentTable",
    "Table",
    "backend",
    "backends",
    "missing",
    "pack_attention",
    "set_text_attention",
]

PACK_ATTENTION = BACKENDS["sdpa"].attention


def set_text_attention(model: PreTrainedModel, name: str) -> None:
    """Switch the language model's attention; a vision tower keeps its own."""
    config = model.config
    composite = config.get_text_config() is not config
    model.set_attn_implementation({"text_config": name} if composite else name)
