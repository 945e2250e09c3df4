"""Whether two ways to compute a small batch agree, in its log-probabilities and in the gradients of some weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from unidpo.model.packs import Pack, PaddedRows
from unidpo.model.policy import Policy


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest difference that rounding explains.

    Attributes:
        logps: of a log-probability, in nats per token.
        gradients: of the gradient's direction and length, as a part of its norm.
    """

    logps: float
    gradients: float


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a batch gives: log-probabilities in nats per token, and gradients of their sum."""

    logps: Float[Tensor, " responses"]
    gradients: list[Tensor]


def numbers(policy: Policy, batch: Pack | PaddedRows, weights: Sequence[Tensor]) -> Numbers:
    """Of a batch on the model's device, in the mode the model is in; without gradients where no weights are named.

    Gradients are taken outside of the model's wrapper, and no weight's `.grad` is touched: DDP and DeepSpeed reduce
    gradients that are.
    """
    if not weights:
        with policy.measuring():
            return Numbers(policy.response_logps(batch) / batch.response_tokens, [])
    logps = replace(policy, wrapped=policy.model).response_logps(batch) / batch.response_tokens
    gradients = torch.autograd.grad(logps.sum(), list(weights), allow_unused=True)
    return Numbers(logps.detach(), [gradient for gradient in gradients if gradient is not None])


def difference(expected: Numbers, found: Numbers, *, tolerance: Tolerance) -> str | None:
    """What is apart by more than a tolerance; `None` where nothing is."""
    of_logps = float((expected.logps - found.logps).abs().max())
    if not of_logps <= tolerance.logps:
        return f"log-probabilities differ by {of_logps:.2g} nats per token"
    if len(expected.gradients) != len(found.gradients):
        return f"of {len(expected.gradients)} weights with a gradient {len(found.gradients)} have one"
    if not expected.gradients:
        return None
    apart = _norm([a - b for a, b in zip(expected.gradients, found.gradients, strict=True)])
    of_gradients = apart / max(_norm(expected.gradients), torch.finfo(torch.float32).tiny)
    return None if of_gradients <= tolerance.gradients else f"gradients differ by {of_gradients:.2g} of their norm"


def _norm(tensors: list[Tensor]) -> float:
    wide = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return float(torch.linalg.vector_norm(torch.stack(wide)))
