"""Attention of responses to a prompt they share, on a CPU: nothing masked is computed, no key is copied.

A response's attention over [prompt, response] is put together from its attention over the prompt, which all responses
take in one call without a mask, and its causal attention over itself. Softmax over both parts is each part's own
softmax weighted by the part's share of the sum of exponentials; the kernel gives the logarithm of that sum. In the
backward pass the kernel, given the output and that logarithm over all keys, returns a part's exact contribution to the
gradients. By this step FlashAttention goes from one block of keys to the next (arXiv:2205.14135, sections 3.1 and B.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from unidpo.model.attention.table import Span

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def shared_prefix_attention(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens dim"],
    spans: Sequence[Span],
    scale: float | None = None,
) -> Float[Tensor, "1 tokens heads dim"]:
    """Prompts over themselves, responses over their prompt and themselves, all causally; gradients flow.

    The spans cover the tokens. No more is kept for the backward pass than the arguments, the output and one number per
    head and token.
    """
    # The kernel wants the last axis dense.
    dense = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    output: Tensor = _SharedPrefix.apply(*dense, spans, scale)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2)


class _SharedPrefix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scale: float | None
    ) -> Tensor:
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        logsumexp = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        for span in spans:
            for part in (span.prompt, *span.responses):
                own = (tensor[:, :, part] for tensor in (query, key, value))
                output[:, :, part], logsumexp[:, :, part] = _kernel(*own, is_causal=True, scale=scale)
            if not span.responses:
                continue
            prompt, responses = span.prompt, _responses(span)
            to_prompt, of_prompt = _kernel(query[:, :, responses], key[:, :, prompt], value[:, :, prompt], scale=scale)
            of_own = logsumexp[:, :, responses]
            share = torch.sigmoid(of_prompt - of_own)[..., None]
            output[:, :, responses] = torch.lerp(output[:, :, responses].to(share), to_prompt.to(share), share)
            logsumexp[:, :, responses] = torch.logaddexp(of_prompt, of_own)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.spans, ctx.scale = spans, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grads = tuple(torch.empty_like(tensor) for tensor in (query, key, value))

        def contributions(queries: slice, keys: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            of_queries = (grad[:, :, queries], query[:, :, queries])
            of_keys = (key[:, :, keys], value[:, :, keys])
            seen = (output[:, :, queries], logsumexp[:, :, queries])
            return _kernel_backward(*of_queries, *of_keys, *seen, 0.0, causal, scale=ctx.scale)  # type: ignore[no-any-return]

        for span in ctx.spans:
            for part in (span.prompt, *span.responses):
                for whole, own in zip(grads, contributions(part, part, causal=True), strict=True):
                    whole[:, :, part] = own
            if span.responses:
                prompt, responses = span.prompt, _responses(span)
                shared = contributions(responses, prompt, causal=False)
                for whole, part, more in zip(grads, (responses, prompt, prompt), shared, strict=True):
                    whole[:, :, part] += more
        return *grads, None, None


def _responses(span: Span) -> slice:
    return slice(span.responses[0].start, span.responses[-1].stop)
