"""What a loss takes and gives, and the pieces that several losses are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Pairs: TypeAlias = Float[Tensor, " pairs"]


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What a loss sees of a batch of pairs.

    Attributes:
        chosen_logps, rejected_logps: log-probability of the response under the policy, ≤ 0; nats per token where the
            loss is `length_normalized`, else nats. Gradients flow through these.
        ref_chosen_logps, ref_rejected_logps: the same under the reference, no gradient; `None` where the loss does
            not need them.
        chosen_scores, rejected_scores: the data's scores on any scale, higher is better; `None` likewise.
        chosen_tokens, rejected_tokens: tokens of the response, closing ones included.
        reward_shift: mean of the implicit rewards (`LossTerms.chosen_reward` and `rejected_reward`, taken together)
            over all pairs of all steps before this one; 0 in the first step. The same for every batch of a step and
            for the evaluations after it. `None` unless the loss `needs_reward_shift`.
    """

    chosen_logps: Pairs
    rejected_logps: Pairs
    ref_chosen_logps: Pairs | None = None
    ref_rejected_logps: Pairs | None = None
    chosen_scores: Pairs | None = None
    rejected_scores: Pairs | None = None
    chosen_tokens: Int[Tensor, " pairs"] | None = None
    rejected_tokens: Int[Tensor, " pairs"] | None = None
    reward_shift: Float[Tensor, ""] | None = None

    def in_full_precision(self) -> PairLogps:
        """float64 stays float64, anything narrower becomes float32; only the policy's log-probs keep their graph."""
        dtype = torch.float64 if self.chosen_logps.dtype == torch.float64 else torch.float32
        values: dict[str, Tensor | None] = {field.name: getattr(self, field.name) for field in fields(self)}
        floats = {name: v.to(dtype) for name, v in values.items() if v is not None and v.is_floating_point()}
        differentiable = ("chosen_logps", "rejected_logps")
        return replace(self, **{name: v if name in differentiable else v.detach() for name, v in floats.items()})


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss of each pair and the terms it is made of, each with one entry per pair.

    `loss = quality_weight * performance_weight * preference + nll`, for every loss.

    Attributes:
        loss: what is averaged and differentiated; the only attribute that carries a gradient.
        preference: what is learned from the pair, before the pair's weights: `-log sigmoid` in most losses.
        quality_weight: a weight that depends on the data alone, > 0; 1 for losses without one.
        performance_weight: a weight that depends on the policy, > 0; 1 for losses without one.
        nll: the negative log-likelihood of the chosen response as added to the loss, ≥ 0; 0 for losses without.
        nll_gate: 1 where that term is on, else 0.
        chosen_reward, rejected_reward: the implicit rewards (β times log-ratio to the reference, or β times the
            policy's log-probability where the loss has no reference).
    """

    loss: Pairs
    preference: Pairs
    quality_weight: Pairs
    performance_weight: Pairs
    nll: Pairs
    nll_gate: Pairs
    chosen_reward: Pairs
    rejected_reward: Pairs


def combine(
    preference: Pairs,
    rewards: tuple[Pairs, Pairs],
    *,
    quality_weight: Pairs | None = None,
    performance_weight: Pairs | None = None,
    nll: Pairs | None = None,
    nll_gate: Pairs | None = None,
) -> LossTerms:
    """The loss of its parts; weights that are left out are 1, an NLL term that is left out is 0.

    Gradients of the parts flow into `loss` alone.

    Args:
        rewards: of the chosen and of the rejected response.
    """
    one, zero = torch.ones_like(preference).detach(), torch.zeros_like(preference).detach()
    quality = one if quality_weight is None else quality_weight
    performance = one if performance_weight is None else performance_weight
    term = zero if nll is None else nll
    return LossTerms(
        loss=quality * performance * preference + term,
        preference=preference.detach(),
        quality_weight=quality.detach(),
        performance_weight=performance.detach(),
        nll=term.detach(),
        nll_gate=zero if nll_gate is None else nll_gate,
        chosen_reward=rewards[0].detach(),
        rejected_reward=rewards[1].detach(),
    )


def log_sigmoid(x: Pairs) -> Pairs:
    """`log σ(x)`, ≤ 0, with finite gradients however far out."""
    return F.logsigmoid(x)


def logratio_margin(pairs: PairLogps) -> Pairs:
    """`Δ = (π_w − π_l) − (ρ_w − ρ_l)`. Raises `ValueError` without reference log-probabilities."""
    ref_chosen, ref_rejected = reference_of(pairs)
    return (pairs.chosen_logps - pairs.rejected_logps) - (ref_chosen - ref_rejected)


def implicit_rewards(pairs: PairLogps, beta: float | Pairs) -> tuple[Pairs, Pairs]:
    """`β(π − ρ)` of the chosen and of the rejected response, with gradient; arXiv:2305.18290, section 5.

    Raises `ValueError` without reference log-probabilities.
    """
    ref_chosen, ref_rejected = reference_of(pairs)
    return beta * (pairs.chosen_logps - ref_chosen), beta * (pairs.rejected_logps - ref_rejected)


def score_margin(pairs: PairLogps) -> Pairs:
    """`S_w − S_l`. Raises `ValueError` without scores."""
    chosen, rejected = scores_of(pairs)
    return chosen - rejected


def scores_of(pairs: PairLogps) -> tuple[Pairs, Pairs]:
    """Scores of chosen and rejected. Raises `ValueError` where there are none."""
    if pairs.chosen_scores is None or pairs.rejected_scores is None:
        raise ValueError("this loss needs the scores of both responses")
    return pairs.chosen_scores, pairs.rejected_scores


def reference_of(pairs: PairLogps) -> tuple[Pairs, Pairs]:
    """Reference log-probabilities of chosen and rejected. Raises `ValueError` where there are none."""
    if pairs.ref_chosen_logps is None or pairs.ref_rejected_logps is None:
        raise ValueError("this loss needs reference log-probabilities of both responses")
    return pairs.ref_chosen_logps, pairs.ref_rejected_logps


def quality_weight(chosen_scores: Pairs, rejected_scores: Pairs, *, quality_eta: float) -> Pairs:
    """How clear a pair is: `σ(η (S_w − S_l))`, in (0, 1), 1/2 at a tie. No gradient.

    Source: arXiv:2506.10054, quality weight.
    """
    return torch.sigmoid(quality_eta * (chosen_scores - rejected_scores))


def performance_weight(
    chosen_logps: Pairs, rejected_logps: Pairs, *, beta: float, tau_ref: float, perf_gamma: float
) -> Pairs:
    """How much the policy still has to learn from a pair: `[1 − σ(β(π_w − π_l) − τ_ref)]^γ`, in (0, 1).

    Carries a gradient. Source: arXiv:2506.10054, performance weight. Written `exp(γ log σ(−x))`, which equals the
    power and, unlike it, has finite gradients where `σ(x)` rounds to 1.
    """
    return torch.exp(perf_gamma * log_sigmoid(tau_ref - beta * (chosen_logps - rejected_logps)))


def nll_gate(chosen_logps: Pairs, ref_chosen_logps: Pairs, chosen_scores: Pairs, *, tau_good: float) -> Pairs:
    """1 where a good response (`S_w ≥ τ_good`) became less likely than under the reference (`ρ_w > π_w`), else 0.

    Strict in the log-probabilities, so it is off while policy and reference are equal. No gradient.
    """
    fell = ref_chosen_logps > chosen_logps.detach()
    return (fell & (chosen_scores >= tau_good)).to(chosen_logps.dtype)


def bernoulli_kl(p: Pairs, q: Pairs) -> Pairs:
    """`KL(Bernoulli(σ(p)) ‖ Bernoulli(σ(q)))` in nats, ≥ 0; finite with finite gradients for any finite logits."""
    return torch.sigmoid(p) * (log_sigmoid(p) - log_sigmoid(q)) + torch.sigmoid(-p) * (
        log_sigmoid(-p) - log_sigmoid(-q)
    )


DISTANCES: Mapping[str, Callable[[Pairs, Pairs], Pairs]] = {
    "bwd_kl": lambda implicit, explicit: bernoulli_kl(explicit, implicit),
    "fwd_kl": lambda implicit, explicit: bernoulli_kl(implicit, explicit),
    "sq": lambda implicit, explicit: (implicit - explicit) ** 2,
}
"""Distances of `RPO` between the implicit and the explicit reward difference, by name."""
