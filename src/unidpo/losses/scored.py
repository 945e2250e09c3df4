"""Losses that take the scores of a pair: Uni-DPO, MM-DPO, ODPO, RPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from unidpo.losses.base import NotNegative, Positive, PreferenceLoss

if TYPE_CHECKING:
    from unidpo.losses.terms import LossTerms, PairLogps


class UniDPO(PreferenceLoss):
    """Uni-DPO (arXiv:2506.10054): `w_quality · w_performance · (−log σ(βΔ)) + calibrated NLL`.

    `Δ = (π_w − π_l) − (ρ_w − ρ_l)`, all in nats per token. The performance weight is differentiated through, as in
    the authors' implementation.
    """

    name: Literal["uni_dpo"] = "uni_dpo"
    beta: Positive = 2.0
    """Scale of the log-ratios (per nat per token), in the preference term and in the performance weight."""
    quality_eta: NotNegative = 0.7
    """Steepness of the quality weight, per unit of score margin."""
    tau_ref: float = 2.0
    """β times the log-ratio at which the performance weight is `2^-perf_gamma`."""
    perf_gamma: NotNegative = 3.0
    """Focusing exponent of the performance weight; 0 switches it off."""
    nll_weight: NotNegative = 0.001
    """Weight of the calibrated NLL term (loss per nat per token)."""
    tau_good: float = 2.5
    """Score from which a chosen response is guarded by the NLL term."""
    detach_performance_weight: bool = False
    """Whether the performance weight is a constant to the gradient; the authors differentiate through it."""

    length_normalized: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True

    def compute(self, pairs: PairLogps) -> LossTerms:
        """The weighted preference and the calibrated NLL of each pair."""
        from unidpo.losses import terms

        chosen_scores, rejected_scores = terms.scores_of(pairs)
        ref_chosen, _ = terms.reference_of(pairs)
        performance = terms.performance_weight(
            pairs.chosen_logps,
            pairs.rejected_logps,
            beta=self.beta,
            tau_ref=self.tau_ref,
            perf_gamma=self.perf_gamma,
        )
        gate = terms.nll_gate(pairs.chosen_logps, ref_chosen, chosen_scores, tau_good=self.tau_good)
        return terms.combine(
            -terms.log_sigmoid(self.beta * terms.logratio_margin(pairs)),
            terms.implicit_rewards(pairs, self.beta),
            quality_weight=terms.quality_weight(chosen_scores, rejected_scores, quality_eta=self.quality_eta),
            performance_weight=performance.detach() if self.detach_performance_weight else performance,
            nll=-self.nll_weight * gate * pairs.chosen_logps,
            nll_gate=gate,
        )


class MMDPO(PreferenceLoss):
    """MM-DPO (arXiv:2502.10391, dynamic reward scaling): DPO with `β(δ) = β₀ (1 + w (1 − e^(−kδ)))` per pair.

    δ is the score margin. The paper's β(δ) lies in [β₀, (1 + w) β₀], which holds for δ ≥ 0; a reversed pair, whose
    margin is negative, is taken as a tie: β₀. Log-probabilities are summed. The rewards are those the pair is compared
    by, with its own β(δ).
    """

    name: Literal["mm_dpo"] = "mm_dpo"
    beta: Positive = 0.1
    """Scale of the log-ratios at a tie, β₀."""
    w: NotNegative = 0.5
    """Share by which β grows at most; 0 gives DPO."""
    k: NotNegative = 0.5
    """How fast β grows, per unit of score margin; 0 gives DPO."""

    length_normalized: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = True

    def compute(self, pairs: PairLogps) -> LossTerms:
        """The preference of each pair by its own β."""
        from unidpo.losses import terms

        margin = terms.score_margin(pairs).clamp(min=0)
        beta = self.beta * (1 - self.w * (-self.k * margin).expm1())
        return terms.combine(
            -terms.log_sigmoid(beta * terms.logratio_margin(pairs)), terms.implicit_rewards(pairs, beta)
        )


class ODPO(PreferenceLoss):
    """DPO with an offset (arXiv:2402.10571): `−log σ(βΔ − α log(S_w − S_l))`.

    The offset is negative for margins below 1 and falls without bound towards a tie, where loss and gradient vanish.
    So they do for a reversed pair, where the paper's logarithm does not exist. Log-probabilities are summed.
    """

    name: Literal["odpo"] = "odpo"
    beta: Positive = 0.1
    """Scale of the log-ratios."""
    alpha: NotNegative = 1.0
    """The reward margin asked for is `alpha` times the logarithm of the score margin; 0 gives DPO for every pair."""

    length_normalized: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = True

    def compute(self, pairs: PairLogps) -> LossTerms:
        """The preference of each pair beyond its offset."""
        from unidpo.losses import terms

        margin = terms.score_margin(pairs).clamp(min=0)
        offset = margin.new_tensor(self.alpha).xlogy(margin)  # 0 where alpha is, else -inf at a tie
        preference = -terms.log_sigmoid(self.beta * terms.logratio_margin(pairs) - offset)
        return terms.combine(preference, terms.implicit_rewards(pairs, self.beta))


class RPO(PreferenceLoss):
    """Reward-aware preference optimization (arXiv:2502.00203): `D[βΔ ‖ η(S_w − S_l)]`.

    The difference of the implicit rewards is fitted to that of the scores instead of growing without bound; a reversed
    pair teaches its reverse. Distances as NeMo-Aligner computes them: `bwd_kl` and `fwd_kl` between the Bernoulli
    distributions with these logits (`bwd_kl` has the scores' in front), `sq` the square without a factor 1/2.
    Log-probabilities are summed. Not TRL's `rpo_alpha`, which adds an NLL term to DPO.
    """

    name: Literal["rpo"] = "rpo"
    beta: Positive = 0.1
    """Scale of the log-ratios."""
    eta: Positive = 1.0
    """The reward margin aimed at, in nats per unit of score margin."""
    distance: Literal["bwd_kl", "fwd_kl", "sq"] = "bwd_kl"
    """Between the two margins: Bernoulli KL with the scores' in front, with the policy's in front, or the square.

    With `bwd_kl` the gradient is DPO's where the score margin goes to infinity.
    """

    length_normalized: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = True

    def compute(self, pairs: PairLogps) -> LossTerms:
        """The distance of each pair's two margins."""
        from unidpo.losses import terms

        distance = terms.DISTANCES[self.distance]
        preference = distance(self.beta * terms.logratio_margin(pairs), self.eta * terms.score_margin(pairs))
        return terms.combine(preference, terms.implicit_rewards(pairs, self.beta))
