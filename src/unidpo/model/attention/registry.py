"""The attention backends by name, and how transformers calls them for a pack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface

from unidpo.model.attention.table import Segment, SegmentTable

Query: TypeAlias = Float[Tensor, "1 heads tokens dim"]
KeyValue: TypeAlias = Float[Tensor, "1 kv_heads tokens dim"]
Seen: TypeAlias = Float[Tensor, "1 tokens heads dim"]
Attend: TypeAlias = Callable[[Query, KeyValue, KeyValue, SegmentTable, float | None, float], Seen]
"""Query, key, value, segments, scale of the scores (`None` for `dim ** -0.5`), dropout → what the queries see."""

Table: TypeAlias = Callable[[Sequence[Segment]], Any]

HALF = (torch.bfloat16, torch.float16)


class PackAttentionError(RuntimeError):
    """The model asks its attention for something a pack cannot give; the padded path can."""


def _nothing(device: torch.device) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to compute a pack's attention, and what it needs.

    Attributes:
        attention: the name by which transformers knows it.
        cuda: whether it needs a CUDA GPU.
        dtypes: it computes in; `None` for all.
        dropout: whether it can drop attention weights.
        table: what it reads of a pack, made of the segments where the pack is made, so that no layer waits for it: a
            dataclass of tensors, which reaches `attend` as `segments.kernel`; `None` where the segments are enough.
        missing: says what else is not there for a device, or `None`.
    """

    attend: Attend
    attention: str
    cuda: bool = True
    dtypes: tuple[torch.dtype, ...] | None = HALF
    dropout: bool = False
    table: Table | None = None
    missing: Callable[[torch.device], str | None] = _nothing


BACKENDS: dict[str, Backend] = {}
"""By the name in a recipe, the fastest first: `model.attention=auto` takes the first that is there and agrees."""


def backend(**needs: Any) -> Callable[[Attend], Attend]:
    """Register a function as a backend under its own name; `config.schema.Attention` lists the names.

    Args:
        needs: fields of `Backend`.
    """

    def register(attend: Attend) -> Attend:
        name: str = attend.__name__
        # transformers takes every name with "flash" or "sdpa" in it for one of its own.
        attention = "unidpo_pack_" + name.replace("flash", "fa").replace("sdpa", "dot_product")
        BACKENDS[name] = Backend(attend, attention, **needs)
        # No mask function has this name, so transformers builds no mask.
        # No two packs have the same segments, so that where a layer is compiled this stays as it is.
        whole = torch.compiler.disable(partial(pack_attention, attend=attend))  # type: ignore[no-untyped-call]
        AttentionInterface.register(attention, whole)
        return attend

    return register


def missing(name: str, *, device: torch.device, dtype: torch.dtype, dropout: float = 0.0) -> str | None:
    """Why a backend cannot be used here, or `None`.

    Args:
        dtype: what the model computes in.
        dropout: of the model's attention weights, in training.
    """
    found = BACKENDS[name]
    if found.cuda and device.type != "cuda":
        return f"it needs a CUDA GPU, and the model is on {device.type}"
    if found.dtypes is not None and dtype not in found.dtypes:
        allowed = " or ".join(str(each).removeprefix("torch.") for each in found.dtypes)
        return f"it computes in {allowed}, not in {str(dtype).removeprefix('torch.')}"
    if dropout and not found.dropout:
        return "it knows no dropout of attention weights, and the model's attention_dropout is not 0"
    return found.missing(device)


def pack_attention(
    module: torch.nn.Module,
    query: Query,
    key: KeyValue,
    value: KeyValue,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: SegmentTable | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    attend: Attend,
    **_: Any,
) -> tuple[Seen, None]:
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
