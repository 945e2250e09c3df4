"""The kernels that compute a pack's attention: a function each, registered with what it needs, the fastest first."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from unidpo.model.attention.registry import HALF, KeyValue, Query, Seen, backend
from unidpo.model.attention.table import SegmentTable


def _varlen_missing(device: torch.device) -> str | None:
    if _varlen_attn() is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen with grouped heads; 2.12 has"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 (Ampere) or above"
    return None


def _flash_missing(device: torch.device) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed (pip install flash-attn --no-build-isolation)"
    return None


def _flex_missing(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed, which torch compiles it with"
    return None


@backend(missing=_varlen_missing)
def varlen(
    query: Query, key: KeyValue, value: KeyValue, segments: SegmentTable, scale: float | None, dropout: float
) -> Seen:
    """Torch's own variable-length FlashAttention, one call for the whole pack."""
    if dropout:
        raise ValueError("varlen_attn knows no dropout")
    output = _varlen_attn()(
        *_sequences(query, key, value, segments),
        scale=scale,
        window_size=(-1, 0),  # causal, aligned bottom-right
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None]  # type: ignore[no-any-return]


@backend(dropout=True, missing=_flash_missing)
def flash(
    query: Query, key: KeyValue, value: KeyValue, segments: SegmentTable, scale: float | None, dropout: float
) -> Seen:
    """The flash-attn package's variable-length kernel, one call for the whole pack."""
    output = importlib.import_module("flash_attn").flash_attn_varlen_func(
        *_sequences(query, key, value, segments),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,  # aligned bottom-right
    )
    return output[None]  # type: ignore[no-any-return]


@backend(dtypes=(*HALF, torch.float32), missing=_flex_missing)
def flex(
    query: Query, key: KeyValue, value: KeyValue, segments: SegmentTable, scale: float | None, dropout: float
) -> Seen:
    """FlexAttention, one compiled kernel for the whole pack."""
    if dropout:
        raise ValueError("FlexAttention knows no dropout")
    grouped = query.shape[1] != key.shape[1]
    output = _compiled_flex()(query, key, value, block_mask=segments.block_mask, scale=scale, enable_gqa=grouped)
    return output.transpose(1, 2).contiguous()


@backend(cuda=False, dtypes=None, dropout=True)
def sdpa(
    query: Query, key: KeyValue, value: KeyValue, segments: SegmentTable, scale: float | None, dropout: float
) -> Seen:
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


def _sequences(query: Query, key: KeyValue, value: KeyValue, segments: SegmentTable) -> tuple[Tensor | int, ...]:
    """What variable-length kernels take first: queries, keys and values (tokens, heads, dim), and `Sequences`.

    A prompt's gradient is the sum over the sequences that it is part of.
    """
    table = segments.sequences
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return (
        queries.contiguous(),
        keys.index_select(0, table.keys),
        values.index_select(0, table.keys),
        table.query_starts,
        table.key_starts,
        table.longest_queries,
        table.longest_keys,
    )


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
