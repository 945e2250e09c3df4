"""Kernels of CUDA that a CPU build has not, in plain arithmetic, and what the attention kernels compute."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten

_PINNED: dict[int, Any] = {}  # storages of pinned memory


def pin(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, or the tensor where it lies there."""
    if is_pinned(tensor):
        return tensor
    pinned = tensor.clone()
    storage = pinned.untyped_storage()
    key = storage._cdata
    _PINNED[key] = weakref.ref(storage, lambda _: _PINNED.pop(key, None))
    return pinned


def is_pinned(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.untyped_storage()._cdata in _PINNED


def _hidden(queries: int, keys: int, *, bottom_right: bool) -> Tensor:
    """Which keys a query does not see, causally: aligned at the first query and key, or at the last."""
    return torch.ones(queries, keys, dtype=torch.bool).triu(1 + (keys - queries if bottom_right else 0))


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * (query @ key.mT)
    return scores if bias is None else scores + bias


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """Keys or values, each repeated for the heads of queries that share it; the heads are third from behind."""
    return key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    scores = _scores(query, _grouped(query, key), bias, scale)
    return scores.softmax(-1) @ _grouped(query, value), scores.logsumexp(-1)


def _attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = _grouped(query, key), _grouped(query, value)
    weights = _scores(query, keys, bias, scale).softmax(-1)
    of_weights = grad @ values.mT
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
    of_scores = of_scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    groups = (*key.shape[:-2], query.shape[-3] // key.shape[-3], *key.shape[-2:])
    of_key, of_value = ((each.mT @ other).view(groups).sum(-3) for each, other in ((of_scores, query), (weights, grad)))
    return of_scores @ keys, of_key, of_value


def _flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, is_causal: bool = False, *_: Any, **more: Any
) -> Any:
    none = torch.empty(0, dtype=torch.int32)
    seed = torch.empty(2, dtype=torch.int64)
    sizes = (query.shape[2], key.shape[2])
    if query.is_meta:
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
    else:
        out, sums = _attend(query, key, value, _causal_bias(query, key, is_causal), more.get("scale"))
    return _like(out, query), sums, none, none, *sizes, seed, seed.clone(), none


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
    is_causal = rest[7]
    if query.is_meta:
        return tuple(map(torch.empty_like, (query, key, value)))
    return _attend_backward(grad, query, key, value, _causal_bias(query, key, is_causal), more.get("scale"))


def _efficient(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any, **more: Any) -> Any:
    seed = torch.empty((), dtype=torch.int64)
    if query.is_meta:
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
    else:
        out, sums = _attend(query, key, value, bias, more.get("scale"))
    return _like(out, query), sums, seed, seed.clone()


def _efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, *rest: Any, **more: Any
) -> Any:
    if query.is_meta:
        return *map(torch.empty_like, (query, key, value)), torch.empty(0, device="meta")
    return *_attend_backward(grad, query, key, value, bias, more.get("scale")), torch.empty(0)


def _varlen(query: Tensor, key: Tensor, value: Tensor, of_q: Tensor, of_k: Tensor, *rest: Any, **more: Any) -> Any:
    out, sums = torch.empty_like(query), query.new_empty(query.shape[1::-1], dtype=torch.float32)
    if not query.is_meta:
        for q, k in _sequences(of_q, of_k):
            own = [each.transpose(0, 1) for each in (query[q], key[k], value[k])]
            seen, sums[:, q] = _attend(*own, _bottom_right(*own[:2]), _scale(rest, 3))
            out[q] = seen.transpose(0, 1)
    return out, sums, torch.empty(2, dtype=torch.uint64)


def _varlen_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
    found = tuple(map(torch.zeros_like, (query, key, value)))
    if not query.is_meta:
        for q, k in _sequences(*rest[2:4]):
            own = [each.transpose(0, 1) for each in (grad[q], query[q], key[k], value[k])]
            parts = _attend_backward(*own, _bottom_right(*own[1:3]), _scale(rest, 8))
            for into, at, part in zip(found, (q, k, k), parts, strict=True):
                into[at] += part.transpose(0, 1)
    return found


def _scale(rest: Any, place: int) -> float | None:
    return rest[place] if len(rest) > place else None


def _sequences(of_q: Tensor, of_k: Tensor) -> Iterator[tuple[slice, slice]]:
    starts = of_q.tolist(), of_k.tolist()
    for place in range(len(starts[0]) - 1):
        q, k = (slice(each[place], each[place + 1]) for each in starts)
        yield q, k


def _bottom_right(query: Tensor, key: Tensor) -> Tensor:
    hidden = _hidden(query.shape[-2], key.shape[-2], bottom_right=True)
    return torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf)


def _causal_bias(query: Tensor, key: Tensor, is_causal: bool) -> Tensor | None:
    if not is_causal:
        return None
    hidden = _hidden(query.shape[-2], key.shape[-2], bottom_right=False)
    return torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, -torch.inf)


def _like(made: Tensor, other: Tensor) -> Tensor:
    """Laid out in memory as the kernels do: as the queries are."""
    return torch.empty_like(other).copy_(made) if not other.is_meta else made


def _pairs(query: Tensor, key: Tensor, is_causal: bool) -> float:
    """Of a query and a key that it sees, in all heads."""
    heads, queries, keys = query.shape[0] * query.shape[1], query.shape[2], key.shape[2]
    return heads * (queries * (queries + 1) / 2 if is_causal else queries * keys)


def _varlen_pairs(query: Tensor, of_q: Tensor, of_k: Tensor) -> float:
    seen = 0.0
    for q, k in _sequences(of_q, of_k):
        queries, keys = q.stop - q.start, k.stop - k.start
        seen += queries * (keys - queries) + queries * (queries + 1) / 2
    return seen * query.shape[1]


KERNELS: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
}
"""Operation → what it gives, of tensors with numbers or without."""

WORK: dict[Any, Callable[..., float]] = {
    # Two products forward, five backward; a multiplication with an addition is two.
    aten._scaled_dot_product_flash_attention.default: lambda q, k, v, p=0.0, causal=False, *_, **__: (
        4 * q.shape[-1] * _pairs(q, k, causal)
    ),
    aten._scaled_dot_product_flash_attention_backward.default: lambda g, q, k, v, *rest, **__: (
        10 * q.shape[-1] * _pairs(q, k, rest[7])
    ),
    aten._scaled_dot_product_efficient_attention.default: lambda q, k, *_, **__: 4 * q.shape[-1] * _pairs(q, k, False),
    aten._scaled_dot_product_efficient_attention_backward.default: lambda g, q, k, *_, **__: (
        10 * q.shape[-1] * _pairs(q, k, False)
    ),
    aten.addmm_.default: lambda own, left, right, **_: 2 * left.shape[0] * left.shape[1] * right.shape[1],
}
"""Operation → its floating-point work, where torch's own counter knows none or counts what a causal mask hides."""


def _add_varlen() -> None:
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return
    forward, backward = (getattr(torch.ops.torch_attn, f"_varlen_attn{end}").default for end in ("", "_backward"))
    KERNELS.update({forward: _varlen, backward: _varlen_backward})
    WORK[forward] = lambda q, k, v, of_q, of_k, *_, **__: 4 * q.shape[-1] * _varlen_pairs(q, of_q, of_k)
    WORK[backward] = lambda g, q, k, v, out, sums, of_q, of_k, *_, **__: 10 * q.shape[-1] * _varlen_pairs(q, of_q, of_k)


_add_varlen()
