"""Losses that know only which response was preferred: DPO, SimPO, IPO, MPO, WPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from unidpo.losses.terms import Bounded, LossTerms, PairLogps, combine, implicit_rewards, logratio_margin


@dataclass(frozen=True, slots=True, kw_only=True)
class DPO(Bounded):
    """DPO (arXiv:2305.18290, eq. 7), with label smoothing (cDPO) and optional averaging over tokens.

    Attributes:
        beta: > 0.
        label_smoothing: probability in [0, 0.5) that a label is flipped.
        length_normalized: nats per token instead of nats (the reference's baseline averages; the paper sums).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False

    name: ClassVar[str] = "dpo"
    needs_reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False
    needs_collisions: ClassVar[bool] = False
    needs_reward_shift: ClassVar[bool] = False

    def __call__(self, pairs: PairLogps) -> LossTerms:
        """The terms of each pair. Raises `ValueError` without reference log-probabilities."""
        pairs = pairs.in_full_precision()
        margin = self.beta * logratio_margin(pairs)
        preference = -F.logsigmoid(margin)
        if self.label_smoothing:
            preference = (1 - self.label_smoothing) * preference - self.label_smoothing * F.logsigmoid(-margin)
        return combine(preference, implicit_rewards(pairs, self.beta))


@dataclass(frozen=True, slots=True, kw_only=True)
class SimPO(Bounded):
    """SimPO (arXiv:2405.14734, eq. 6): `−log σ(β(π_w − π_l) − γ)` in nats per token, without a reference.

    Attributes:
        beta: > 0.
        gamma: target reward margin, in units of reward (the paper's γ; the margin of the log-ratio is γ/β).
    """

    beta: float = 2.0
    gamma: float = 1.0

    name: ClassVar[str] = "simpo"
    length_normalized: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False
    needs_collisions: ClassVar[bool] = False
    needs_reward_shift: ClassVar[bool] = False

    def __call__(self, pairs: PairLogps) -> LossTerms:
        """The terms of each pair."""
        pairs = pairs.in_full_precision()
        policy_logratio = pairs.chosen_logps - pairs.rejected_logps
        return combine(
            -F.logsigmoid(self.beta * policy_logratio - self.gamma),
            (self.beta * pairs.chosen_logps, self.beta * pairs.rejected_logps),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class IPO(Bounded):
    """IPO (arXiv:2310.12036, eq. 17): `(Δ − 1/(2τ))²`, in nats per token.

    The paper writes log-probabilities of whole responses; its authors averaged over tokens, says TRL, and so do TRL and
    we. TRL calls τ `beta`, and logs rewards from sums.

    Attributes:
        tau: > 0, strength of the regularization: the margin aimed at is 1/(2τ) nats per token.
    """

    tau: float = 0.1

    name: ClassVar[str] = "ipo"
    length_normalized: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False
    needs_collisions: ClassVar[bool] = False
    needs_reward_shift: ClassVar[bool] = False

    def __call__(self, pairs: PairLogps) -> LossTerms:
        """The terms of each pair. Raises `ValueError` without reference log-probabilities."""
        pairs = pairs.in_full_precision()
        return combine((logratio_margin(pairs) - 1 / (2 * self.tau)) ** 2, implicit_rewards(pairs, self.tau))


@dataclass(frozen=True, slots=True, kw_only=True)
class MPO(Bounded):
    """Mixed preference optimization (arXiv:2411.10442): `w_p · DPO + w_q · BCO + w_g · NLL of the chosen response`.

    BCO (arXiv:2404.04656) classifies each response by itself: `−log σ(r_w − δ) − log σ(δ − r_l)`, with the implicit
    rewards `r = β(π − ρ)` of summed log-probabilities and δ = `PairLogps.reward_shift`. The NLL is in nats per token of
    its own response; TRL and the paper's code average it over all chosen tokens of a batch instead, which is the same
    for one pair. TRL has no δ.

    In `LossTerms`, `preference` holds the first two terms with their weights and `nll` the third.

    Attributes:
        beta: > 0.
        w_p, w_q, w_g: ≥ 0, weights of the preference, quality and generation terms.
    """

    beta: float = 0.1
    w_p: float = 0.8
    w_q: float = 0.2
    w_g: float = 1.0

    name: ClassVar[str] = "mpo"
    length_normalized: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False
    needs_collisions: ClassVar[bool] = False
    needs_reward_shift: ClassVar[bool] = True

    def __call__(self, pairs: PairLogps) -> LossTerms:
        """The terms of each pair. Raises `ValueError` without reference log-probs, token counts or reward shift."""
        pairs = pairs.in_full_precision()
        if pairs.chosen_tokens is None or pairs.reward_shift is None:
            raise ValueError("MPO needs the chosen responses' token counts and the reward shift")
        chosen_reward, rejected_reward = implicit_rewards(pairs, self.beta)
        quality = -F.logsigmoid(chosen_reward - pairs.reward_shift) - F.logsigmoid(pairs.reward_shift - rejected_reward)
        return combine(
            self.w_p * -F.logsigmoid(self.beta * logratio_margin(pairs)) + self.w_q * quality,
            (chosen_reward, rejected_reward),
            nll=-self.w_g * pairs.chosen_logps / pairs.chosen_tokens,
            nll_gate=torch.full_like(quality, float(self.w_g > 0)).detach(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class WPO(Bounded):
    """Weighted preference optimization (arXiv:2406.11827): DPO, weighted by how much the policy would say both.

    A response's weight is `exp(mean over its tokens of log π(y_t) − log Σ_v π(v)²)`, the paper's sampled alignment;
    a pair's is the product of its two, and carries no gradient. Log-probabilities are summed in DPO.

    Attributes:
        beta: > 0.
        max_weight: > 0, bound of a pair's weight: 1 in the paper's code; `None`, as in TRL, for none.
    """

    beta: float = 0.1
    max_weight: float | None = 1.0

    name: ClassVar[str] = "wpo"
    length_normalized: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False
    needs_collisions: ClassVar[bool] = True
    needs_reward_shift: ClassVar[bool] = False

    def __call__(self, pairs: PairLogps) -> LossTerms:
        """The terms of each pair. Raises `ValueError` without reference log-probs, token counts or collisions."""
        pairs = pairs.in_full_precision()
        if (
            pairs.chosen_tokens is None
            or pairs.rejected_tokens is None
            or pairs.chosen_collisions is None
            or pairs.rejected_collisions is None
        ):
            raise ValueError("WPO needs token counts and collisions of both responses")
        chosen = pairs.chosen_logps / pairs.chosen_tokens - pairs.chosen_collisions
        rejected = pairs.rejected_logps / pairs.rejected_tokens - pairs.rejected_collisions
        weight = torch.exp(chosen + rejected).detach()
        return combine(
            -F.logsigmoid(self.beta * logratio_margin(pairs)),
            implicit_rewards(pairs, self.beta),
            performance_weight=weight if self.max_weight is None else weight.clamp(max=self.max_weight),
        )
