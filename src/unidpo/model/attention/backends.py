"""The kernels that compute a pack's attention, and what each of them needs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from unidpo.model.attention.shared_prefix import shared_prefix_attention
from unidpo.model.attention.table import SegmentTable

Backend: TypeAlias = Literal["varlen", "flash", "flex", "sdpa"]
Attend: TypeAlias = Callable[
    [
        Float[Tensor, "1 heads tokens dim"],
        Float[Tensor, "1 kv_heads tokens dim"],
        Float[Tensor, "1 kv_heads tokens dim"],
        SegmentTable,
        float | None,
        float,
    ],
    Float[Tensor, "1 tokens heads dim"],
]
"""Query, key, value, segments, scale of the scores (`None` for `dim ** -0.5`), dropout → what the queries see."""

_HALF = (torch.bfloat16, torch.float16)


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentTable, scale: float | None, dropout: float
) -> Tensor:
    """On a CPU `shared_prefix_attention`, elsewhere and with dropout `masked_sdpa`."""
    if query.device.type == "cpu" and not dropout:
        return shared_prefix_attention(query, key, value, segments.spans, scale)
    return masked_sdpa(query, key, value, segments, scale, dropout)


def masked_sdpa(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentTable, scale: float | None, dropout: float
) -> Tensor:
    """`scaled_dot_product_attention`, one call per prompt and one per response: the reference for all others."""
    # With a mask, grouped heads would take the kernel that holds all scores; repeated heads do not.
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    attend = functools.partial(F.scaled_dot_product_attention, scale=scale, dropout_p=dropout)
    outputs = []
    for span in segments.spans:
        prompt = span.prompt
        outputs.append(attend(query[:, :, prompt], key[:, :, prompt], value[:, :, prompt], is_causal=True))
        for response in span.responses:
            queries = query[:, :, response]
            keys = torch.cat([key[:, :, prompt], key[:, :, response]], dim=2)
            values = torch.cat([value[:, :, prompt], value[:, :, response]], dim=2)
            mask = segments.mask(queries.shape[2], keys.shape[2])
            outputs.append(attend(queries, keys, values, attn_mask=mask))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentTable, scale: float | None, dropout: float
) -> Tensor:
    """Torch's own variable-length FlashAttention, one call for the whole pack."""
    if dropout:
        raise ValueError("varlen_attn knows no dropout")
    table, (queries, keys, values) = segments.sequences, _as_sequences(query, key, value, segments)
    output = _varlen_attn()(
        queries,
        keys,
        values,
        table.query_starts,
        table.key_starts,
        table.longest_queries,
        table.longest_keys,
        scale=scale,
        window_size=(-1, 0),  # causal, aligned bottom-right
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    return output[None]  # type: ignore[no-any-return]


def flash(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentTable, scale: float | None, dropout: float
) -> Tensor:
    """The flash-attn package's variable-length kernel, one call for the whole pack."""
    table, (queries, keys, values) = segments.sequences, _as_sequences(query, key, value, segments)
    output = importlib.import_module("flash_attn").flash_attn_varlen_func(
        queries,
        keys,
        values,
        table.query_starts,
        table.key_starts,
        table.longest_queries,
        table.longest_keys,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,  # aligned bottom-right
    )
    return output[None]  # type: ignore[no-any-return]


def _as_sequences(query: Tensor, key: Tensor, value: Tensor, segments: SegmentTable) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, heads, dim), keys and values where `Sequences.keys` says.

    A prompt's gradient is the sum over the sequences that it is part of.
    """
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    places = segments.sequences.keys
    return queries.contiguous(), keys.index_select(0, places), values.index_select(0, places)


def flex(
    query: Tensor, key: Tensor, value: Tensor, segments: SegmentTable, scale: float | None, dropout: float
) -> Tensor:
    """FlexAttention, one compiled kernel for the whole pack."""
    if dropout:
        raise ValueError("FlexAttention knows no dropout")
    grouped = query.shape[1] != key.shape[1]
    output = _compiled_flex()(query, key, value, block_mask=segments.block_mask, scale=scale, enable_gqa=grouped)
    return output.transpose(1, 2).contiguous()


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    # Packs differ in length. Sizes left open from the start, or each new length would be compiled anew at first.
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _varlen_attn() -> Any:
    """Torch's function, or `None` where it knows no bottom-right causal mask or no grouped heads yet."""
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return function if {"window_size", "enable_gqa"} <= inspect.signature(function).parameters.keys() else None


BACKENDS: dict[Backend, Attend] = {"varlen": varlen, "flash": flash, "flex": flex, "sdpa": sdpa}
"""The fastest first."""


def missing(backend: Backend, *, device: torch.device, dtype: torch.dtype, dropout: float = 0.0) -> str | None:
    """Why a backend cannot be used here, or `None`.

    Args:
        dtype: what the model computes in.
        dropout: of the model's attention weights, in training.
    """
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA GPU, and the model is on {device.type}"
    types = (*_HALF, torch.float32) if backend == "flex" else _HALF
    if dtype not in types:
        names = [str(allowed).removeprefix("torch.") for allowed in types]
        return f"it computes in {' or '.join(names)}, not in {str(dtype).removeprefix('torch.')}"
    if dropout and backend != "flash":
        return "it knows no dropout of attention weights, and the model's attention_dropout is not 0"
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    if backend == "flex" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed, which torch compiles it with"
    if backend == "varlen" and _varlen_attn() is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen with grouped heads; 2.12 has"
    if backend == "varlen" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or above"
    return None
