"""Hidden states, head and target tokens → log-probabilities, with one chunk of logits in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

# Bytes of float32 logits held at a time; the head's extra memory is a small multiple of this, whatever the batch.
LOGITS_CHUNK_BYTES = 256 * 2**20
# Of the elementwise steps over a chunk, so that what these need besides is small; a CPU's stay in its cache.
STEP_BYTES, _CPU_STEP_BYTES = 32 * 2**20, 4 * 2**20


def target_logps(
    logits: Float[Tensor, "targets vocabulary"], targets: Int[Tensor, " targets"]
) -> Float[Tensor, " targets"]:
    """Log-probability of each target, in nats; float32, or float64 where the logits are."""
    logits = _full_precision(logits)
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def token_logps(
    hidden: Float[Tensor, "targets hidden"],
    head: torch.nn.Module,
    targets: Int[Tensor, " targets"],
    *,
    weight: Float[Tensor, "vocabulary hidden"] | None = None,
    soft_cap: float | None = None,
) -> Float[Tensor, " targets"]:
    """Log-probability of each target token, in nats, given the hidden state that predicts it.

    Logits are made in chunks of `LOGITS_CHUNK_BYTES`; where there are several, those of a chunk are computed again in
    the backward pass instead of being kept.

    Args:
        weight: of `for_head`; with it `linear_logps` does the work.
        soft_cap: logits `x` become `soft_cap * tanh(x / soft_cap)`, as in Gemma 2 (arXiv:2408.00118 section 2).
    """

    def of_chunk(hidden: Tensor, targets: Tensor) -> Tensor:
        return target_logps(capped(head(hidden), soft_cap), targets)

    of_head: Tensor = head.weight  # type: ignore[assignment]
    # A weight that ZeRO-3 has sharded has no rows until the head is called.
    rows: int = getattr(of_head, "ds_shape", of_head.shape)[0]
    size = max(1, LOGITS_CHUNK_BYTES // (4 * rows))
    if weight is not None and soft_cap is None:
        return linear_logps(hidden, weight, targets, size)
    if len(targets) <= size:
        return of_chunk(hidden, targets)
    chunks = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    return torch.cat([checkpoint(of_chunk, h, t, use_reentrant=False) for h, t in chunks])


def capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    """Logits within the bound, as given to `token_logps`."""
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def _full_precision(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@contextlib.contextmanager
def for_head(model: PreTrainedModel) -> Iterator[Tensor | None]:
    """The weight to multiply by in place of calling the head; `None` where the call does more or less than that.

    Where the head is the table of word embeddings too, the lookups within the context give that weight's gradient as
    the rows that were read, and these are added to the head's gradient. Otherwise every micro-batch would add another
    gradient as large as the vocabulary, nearly all of it zeros.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not _is_matrix(head):
        yield None
        return
    if type(table) is not torch.nn.Embedding or table.weight is not head.weight or table.max_norm is not None:
        yield head.weight
        return
    of_lookup, of_head = _TwoUses.apply(table.weight, table.padding_idx)  # type: ignore[no-untyped-call]

    def look_up(table: torch.nn.Embedding, arguments: tuple[Tensor], _: Tensor) -> Tensor:
        return F.embedding(*arguments, of_lookup, sparse=True)

    # Before hooks of others (NEFTune's noise, adapters that want an input with gradient), which see what it returns.
    hook = table.register_forward_hook(look_up, prepend=True)
    try:
        yield of_head
    finally:
        hook.remove()


def _is_matrix(head: torch.nn.Module | None) -> bool:
    """Whether calling the head does nothing but multiply by its weight: no adapter, quantization or wrapper's hook."""
    # By `type`, because wrappers and quantized layers are subclasses.
    if head is None or type(head) is not torch.nn.Linear:
        return False
    hooked = head._forward_hooks or head._forward_pre_hooks
    return getattr(head, "bias", None) is None and not hasattr(head.weight, "ds_shape") and not hooked


class _TwoUses(torch.autograd.Function):
    """A weight as two, one to look up in and one to multiply by; looking up `padding_idx` gives it no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, padding_idx: int | None) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.padding_idx, ctx.shape = padding_idx, weight.shape
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_lookup: Tensor | None, of_head: Tensor | None) -> tuple[Tensor | None, None]:
        if of_lookup is None:
            return of_head, None
        rows = of_lookup._values()
        # The head's gradient was made for this alone.
        total = rows.new_zeros(ctx.shape) if of_head is None else of_head
        kept = None if ctx.padding_idx is None else total[ctx.padding_idx].clone()
        # Unlike adding a sparse tensor, on a GPU too in an order that is always the same.
        total.index_put_((of_lookup._indices()[0],), rows, accumulate=True)
        if kept is not None:
            total[ctx.padding_idx] = kept
        return total, None


def linear_logps(
    hidden: Float[Tensor, "targets hidden"],
    weight: Float[Tensor, "vocabulary hidden"],
    targets: Int[Tensor, " targets"],
    chunk: int,
) -> Float[Tensor, " targets"]:
    """`log_softmax(hidden @ weight.T)` at the targets, in nats; float32, or float64 where `hidden` is.

    The logits of `chunk` targets are in memory at a time, once: backward writes their gradient over them. It begins
    with the chunk that forward ended with, so that this one is not computed again. Under autocast the products are of
    its type. The weight's gradient is summed over the chunks in one float32 tensor (or float64); where the products
    have 16 bits, one of them is in memory beside it, half as large.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    logps: Tensor = _LinearLogps.apply(hidden, weight, targets, chunk, dtype)  # type: ignore[no-untyped-call]
    return logps


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
        # Narrowed here, so that the gradients are not: autograd gives them the types that come in.
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        logits = hidden.new_empty(min(chunk, len(targets)), len(weight))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps, normalizers = (hidden.new_empty(len(targets), dtype=wide) for _ in range(2))
        for part in _slices(len(targets), chunk):
            own = torch.mm(hidden[part], weight.T, out=logits[: part.stop - part.start])
            for rows in _slices(len(own), _rows_at_a_time(own)):
                normalizers[part][rows] = own[rows].to(wide).logsumexp(-1)
            logps[part] = own.gather(1, targets[part, None])[:, 0] - normalizers[part]
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.last_logits, ctx.chunk = logits, chunk
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        logits, ctx.last_logits = ctx.last_logits, None
        at_hand = logits is not None  # not in a second backward pass through the same graph
        if not at_hand:
            logits = hidden.new_empty(min(ctx.chunk, len(targets)), len(weight))
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = None
        for part in reversed(list(_slices(len(targets), ctx.chunk))):
            own = logits[: part.stop - part.start]
            if not at_hand:
                torch.mm(hidden[part], weight.T, out=own)
            at_hand = False
            _to_gradient(own, targets[part, None], normalizers[part, None], grad[part, None])
            if of_hidden is not None:
                torch.mm(own, weight, out=of_hidden[part])
            if ctx.needs_input_grad[1]:
                if of_weight is None:
                    of_weight = (own.T @ hidden[part]).to(normalizers.dtype)
                elif of_weight.dtype == own.dtype:
                    of_weight.addmm_(own.T, hidden[part])
                else:  # a sum in 16 bits would lose what is small against it
                    of_weight += own.T @ hidden[part]
        return of_hidden, of_weight, None, None, None


def _to_gradient(logits: Tensor, targets: Tensor, normalizers: Tensor, grad: Tensor) -> None:
    """Overwrite logits (targets, vocabulary) with the gradient `grad * (onehot - softmax)`; the others are columns."""
    for rows in _slices(len(logits), _rows_at_a_time(logits)):
        wide = logits[rows].to(normalizers.dtype)
        wide.sub_(normalizers[rows]).exp_().mul_(-grad[rows]).scatter_add_(1, targets[rows], grad[rows])
        if wide.dtype != logits.dtype:  # else it was the rows themselves
            logits[rows] = wide


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _rows_at_a_time(logits: Tensor) -> int:
    step = _CPU_STEP_BYTES if logits.device.type == "cpu" else STEP_BYTES
    return max(1, step // (4 * logits.shape[1]))
