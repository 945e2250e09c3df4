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
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import flex_attention

from unidpo.model.attention.registry import HALF, KeyValue, Query, Seen, backend
from unidpo.model.attention.table import Blocks, SegmentTable, Sequences


def _varlen_missing(device: torch.device) -> str | None:
    if _varlen_attn() is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen with window_size; 2.11 has"
    if torch.version.hip is not None:
        return "it is for NVIDIA's GPUs; on AMD's there are flex and sdpa"
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


@backend(table=Sequences.of, missing=_varlen_missing)
def varlen(
    query: Query, key: KeyValue, value: KeyValue, segments: SegmentTable, scale: float | None, dropout: float
) -> Seen:
    """Torch's own variable-length FlashAttention, one call for the whole pack."""
    if dropout:
        raise ValueError("varlen_attn knows no dropout")
    varlen_attn, groups = _varlen_attn(), query.shape[1] // key.shape[1]
    queries, keys, values = _in_sequences(query, key, value, segments)
    grouped = {}
    if groups > 1 and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        grouped["enable_gqa"] = True
    elif groups > 1:  # torch 2.11
        keys, values = (tensor.repeat_interleave(groups, dim=1) for tensor in (keys, values))
    # Causal, aligned bottom-right.
    options = {"scale": scale, "window_size": (-1, 0), **grouped}
    output = varlen_attn(queries, keys, values, *segments.kernel.extents, **options)
    return output[None]  # type: ignore[no-any-return]


@backend(table=Sequences.of, dropout=True, missing=_flash_missing)
def flash(
    query: Query, key: KeyValue, value: KeyValue, segments: SegmentTable, scale: float | None, dropout: float
) -> Seen:
    """The flash-attn package's variable-length kernel, one call for the whole pack."""
    output = importlib.import_module("flash_attn").flash_attn_varlen_func(
        *_in_sequences(query, key, value, segments),
        *segments.kernel.extents,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,  # aligned bottom-right
    )
    return output[None]  # type: ignore[no-any-return]


@backend(table=Blocks.of, dtypes=(*HALF, torch.float32), missing=_flex_missing)
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
    # Heads that share keys stand behind each other and see one copy of these; `enable_gqa` with a mask would take the
    # kernel that holds all scores. One split per tensor, because the gradient of each slice is as large as the pack.
    groups = query.shape[1] // key.shape[1]
    lengths = [part.stop - part.start for span in segments.spans for part in (span.prompt, *span.responses)]
    by_key = query[0].view(-1, groups, *query.shape[2:]), key[0, :, None], value[0, :, None]
    split = zip(*(torch.split(tensor, lengths, dim=2) for tensor in by_key), strict=True)

    def attend(queries: Tensor, keys: Tensor, values: Tensor, **mask: Any) -> Tensor:
        keys, values = (tensor.expand(-1, groups, -1, -1) for tensor in (keys, values))
        seen = F.scaled_dot_product_attention(queries, keys, values, scale=scale, dropout_p=dropout, **mask)
        return seen.permute(2, 0, 1, 3)

    outputs = []
    for span in segments.spans:
        queries, *prompt = next(split)
        outputs.append(attend(queries, *prompt, is_causal=True))
        for _ in span.responses:
            queries, *own = next(split)
            keys, values = (torch.cat(both, dim=2) for both in zip(prompt, own, strict=True))
            outputs.append(attend(queries, keys, values, attn_mask=segments.mask(queries.shape[2], keys.shape[2])))
    return torch.cat(outputs).flatten(1, 2)[None]


def _in_sequences(
    query: Query, key: KeyValue, value: KeyValue, segments: SegmentTable
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `Sequences` as variable-length kernels take them: (tokens, heads, dim)."""
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    keys, values = (_AtPlaces.apply(tensor, segments.kernel) for tensor in (keys, values))  # type: ignore[no-untyped-call]
    return queries.contiguous(), keys, values


class _AtPlaces(torch.autograd.Function):
    """Keys or values at the places of `Sequences`.

    The gradient of a token is the sum over its uses, in their order, in float32 or wider: on a GPU `index_select` would
    add them as they come.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, sequences: Sequences) -> Tensor:
        ctx.sequences = sequences
        return tokens.index_select(0, sequences.keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        uses, starts = ctx.sequences.uses, ctx.sequences.use_starts
        summed = F.embedding_bag(uses, grad.flatten(1), starts, mode="sum", include_last_offset=True)
        return summed.view(-1, *grad.shape[1:]), None


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    # Packs differ in length. Sizes left open from the start, or each new length would be compiled anew at first.
    return torch.compile(flex_attention, dynamic=True)


@functools.cache
def _varlen_attn() -> Any:
    """Torch's function, or `None` where it knows no bottom-right causal mask yet."""
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return function if "window_size" in inspect.signature(function).parameters else None
