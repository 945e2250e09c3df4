"""Losses that take the scores of a pair: Uni-DPO, MM-DPO, ODPO, RPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from unidpo.losses.terms import (
    Bounded,
    LossTerms,
    PairLogps,
    Pairs,
    combine,
    implicit_rewards,
    logratio_margin,
    reference_of,
    score_margin,
)


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
    return torch.exp(perf_gamma * F.logsigmoid(tau_ref - beta * (chosen_logps - rejected_logps)))


def nll_gate(chosen_logps: Pairs, ref_chosen_logps: Pairs, chosen_scores: Pairs, *, tau_good: float) -> Pairs:
    """1 where a good response (`S_w ≥ τ_good`) became less likely than under the reference (`ρ_w > π_w`), else 0.

    Strict in the log-probabilities, so it is off while policy and reference are equal. No gradient.
    """
    fell = ref_chosen_logps > chosen_logps.detach()
    return (fell & (chosen_scores >= tau_good)).to(chosen_logps.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class UniDPO(Bounded):
    """Uni-DPO (arXiv:2506.10054): `w_quality · w_performance · (−log σ(βΔ)) + calibrated NLL`.

    `Δ = (π_w − π_l) − (ρ_w − ρ_l)`, all in nats per token. The performance weight is differentiated through, as in
    the reference implementation; `detach_performance_weight` treats it as a constant instead.

    Attributes:
        beta: > 0, scale of the log-ratios in the preference term and in the performance weight.
        quality_eta: ≥ 0, steepness of the quality weight per unit of score margin.
        tau_ref: log-ratio (times beta) at which the performance weight is `2^-perf_gamma`.
        perf_gamma: ≥ 0, focusing exponent; 0 switches the performance weight off.
        nll_weight: ≥ 0, weight of the calibrated NLL term, in loss per nat per token.
        tau_good: score from which a chosen response is guarded by the NLL term.
    """

    beta: float = 2.0
    quality_eta: float = 0.7
    tau_ref: float = 2.0
    perf_gamma: float = 3.0
    nll_weight: float = 0.001
    tau_good: float = 2.5
    detach_performance_weight: bool = False

    name: ClassVar[str] = "uni_dpo"
    length_normalized: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True
    needs_collisions: ClassVar[bool] = False
    needs_reward_shift: ClassVar[bool] = False

    def __call__(self, pairs: PairLogps) -> LossTerms:
        """The terms of each pair. Raises `ValueError` without reference log-probabilities or scores."""
        pairs = pairs.in_full_precision()
        ref_chosen, _ = reference_of(pairs)
        if pairs.chosen_scores is None or pairs.rejected_scores is None:
            raise ValueError("Uni-DPO needs the scores of both responses")
        performance = performance_weight(
            pairs.chosen_logps,
            pairs.rejected_logps,
            beta=self.beta,
            tau_ref=self.tau_ref,
            perf_gamma=self.perf_gamma,
        )
        gate = nll_gate(pairs.chosen_logps, ref_chosen, pairs.chosen_scores, tau_good=self.tau_good)
        return combine(
            -F.logsigmoid(self.beta * logratio_margin(pairs)),
            implicit_rewards(pairs, self.beta),
            quality_weight=quality_weight(pairs.chosen_scores, pairs.rejected_scores, quality_eta=self.quality_eta),
            performance_weight=performance.detach() if self.detach_performance_weight else performance,
            nll=-self.nll_weight * gate * pairs.chosen_logps,
            nll_gate=gate,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MMDPO(Bounded):
    """MM-DPO (arXiv:2502.10391, dynamic reward scaling): DPO with `β(δ) = β₀ (1 + w (1 − e^(−kδ)))` per pair.

    δ is the score margin. The paper's β(δ) lies in [β₀, (1 + w) β₀], which holds for δ ≥ 0; a reversed pair, whose
    margin is negative, is taken as a tie: β₀. Log-probabilities are summed. The rewards are those the pair is compared
    by, with its own β(δ).

    Attributes:
        beta: > 0, β₀.
        w: ≥ 0, share by which β grows at most; 0 gives DPO.
        k: ≥ 0, how fast it grows, per unit of score margin; 0 gives DPO.
    """

    beta: float = 0.1
    w: float = 0.5
    k: float = 0.5

    name: ClassVar[str] = "mm_dpo"
    length_normalized: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True
    needs_collisions: ClassVar[bool] = False
    needs_reward_shift: ClassVar[bool] = False

    def __call__(self, pairs: PairLogps) -> LossTerms:
        """The terms of each pair. Raises `ValueError` without reference log-probabilities or scores."""
        pairs = pairs.in_full_precision()
        beta = self.beta * (1 - self.w * torch.expm1(-self.k * score_margin(pairs).clamp(min=0)))
        return combine(-F.logsigmoid(beta * logratio_margin(pairs)), implicit_rewards(pairs, beta))


@dataclass(frozen=True, slots=True, kw_only=True)
class ODPO(Bounded):
    """DPO with an offset (arXiv:2402.10571): `−log σ(βΔ − α log(S_w − S_l))`.

    The offset is negative for margins below 1 and falls without bound towards a tie, where loss and gradient vanish.
    So they do for a reversed pair, where the paper's logarithm does not exist. Log-probabilities are summed.

    Attributes:
        beta: > 0.
        alpha: ≥ 0, size of the offset; 0 gives DPO, for ties and reversed pairs too.
    """

    beta: float = 0.1
    alpha: float = 1.0

    name: ClassVar[str] = "odpo"
    length_normalized: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True
    needs_collisions: ClassVar[bool] = False
    needs_reward_shift: ClassVar[bool] = False

    def __call__(self, pairs: PairLogps) -> LossTerms:
        """The terms of each pair. Raises `ValueError` without reference log-probabilities or scores."""
        pairs = pairs.in_full_precision()
        margin = score_margin(pairs).clamp(min=0)
        offset = torch.xlogy(torch.full_like(margin, self.alpha), margin)  # 0 where alpha is, else -inf at a tie
        return combine(
            -F.logsigmoid(self.beta * logratio_margin(pairs) - offset),
            implicit_rewards(pairs, self.beta),
        )


def bernoulli_kl(p: Pairs, q: Pairs) -> Pairs:
    """`KL(Bernoulli(σ(p)) ‖ Bernoulli(σ(q)))` in nats, ≥ 0; finite with finite gradients for any finite logits."""
    return torch.sigmoid(p) * (F.logsigmoid(p) - F.logsigmoid(q)) + torch.sigmoid(-p) * (
        F.logsigmoid(-p) - F.logsigmoid(-q)
    )


Distance = Literal["bwd_kl", "fwd_kl", "sq"]
DISTANCES: Mapping[Distance, Callable[[Pairs, Pairs], Pairs]] = {
    "bwd_kl": lambda implicit, explicit: bernoulli_kl(explicit, implicit),
    "fwd_kl": lambda implicit, explicit: bernoulli_kl(implicit, explicit),
    "sq": lambda implicit, explicit: (implicit - explicit) ** 2,
}
"""Distances of `RPO` between the implicit and the explicit reward difference, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RPO(Bounded):
    """Reward-aware preference optimization (arXiv:2502.00203): `D[βΔ ‖ η(S_w − S_l)]`.

    The difference of the implicit rewards is fitted to that of the scores instead of growing without bound; a reversed
    pair teaches its reverse. Distances as NeMo-Aligner computes them: `bwd_kl` and `fwd_kl` between the Bernoulli
    distributions with these logits (`bwd_kl` has the scores' in front), `sq` the square without a factor 1/2.
    Log-probabilities are summed. Not TRL's `rpo_alpha`, which adds an NLL term to DPO.

    Attributes:
        beta: > 0.
        eta: > 0, nats of reward per unit of score margin.
        distance: `bwd_kl`, `fwd_kl` or `sq`. With `bwd_kl` the gradient is DPO's where the margin goes to infinity.
    """

    beta: float = 0.1
    eta: float = 1.0
    distance: Distance = "bwd_kl"

    name: ClassVar[str] = "rpo"
    length_normalized: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True
    needs_collisions: ClassVar[bool] = False
    needs_reward_shift: ClassVar[bool] = False

    def __call__(self, pairs: PairLogps) -> LossTerms:
        """The terms of each pair. Raises `ValueError` without reference log-probabilities or scores."""
        pairs = pairs.in_full_precision()
        distance = DISTANCES[self.distance](self.beta * logratio_margin(pairs), self.eta * score_margin(pairs))
        return combine(distance, implicit_rewards(pairs, self.beta))
