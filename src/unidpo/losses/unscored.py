"""Losses that know only which response was preferred: DPO, SimPO, IPO, MPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from unidpo.losses.base import NotNegative, Positive, PreferenceLoss

if TYPE_CHECKING:
    from unidpo.losses.terms import LossTerms, PairLogps


class DPO(PreferenceLoss):
    """DPO (arXiv:2305.18290, eq. 7), with label smoothing (cDPO) and optional averaging over tokens."""

    name: Literal["dpo"] = "dpo"
    beta: Positive = 0.1
    """Scale of the log-ratios."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Assumed share of pairs whose preference is the wrong way round."""
    length_normalized: bool = False
    """Whether log-probabilities are averaged over a response's tokens (the authors' baseline) or summed (paper)."""

    def compute(self, pairs: PairLogps) -> LossTerms:
        """The preference of each pair."""
        from unidpo.losses import terms

        margin = self.beta * terms.logratio_margin(pairs)
        preference = -terms.log_sigmoid(margin)
        if self.label_smoothing:
            preference = (1 - self.label_smoothing) * preference - self.label_smoothing * terms.log_sigmoid(-margin)
        return terms.combine(preference, terms.implicit_rewards(pairs, self.beta))


class SimPO(PreferenceLoss):
    """SimPO (arXiv:2405.14734, eq. 6): `−log σ(β(π_w − π_l) − γ)` in nats per token, without a reference."""

    name: Literal["simpo"] = "simpo"
    beta: Positive = 2.0
    """Scale of the length-averaged log-probabilities."""
    gamma: NotNegative = 1.0
    """Target reward margin; the margin in nats per token is `gamma / beta`."""

    length_normalized: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False

    def compute(self, pairs: PairLogps) -> LossTerms:
        """The preference of each pair beyond the target margin."""
        from unidpo.losses import terms

        policy_logratio = pairs.chosen_logps - pairs.rejected_logps
        rewards = self.beta * pairs.chosen_logps, self.beta * pairs.rejected_logps
        return terms.combine(-terms.log_sigmoid(self.beta * policy_logratio - self.gamma), rewards)


class IPO(PreferenceLoss):
    """IPO (arXiv:2310.12036, eq. 17): `(Δ − 1/(2τ))²`, in nats per token.

    The paper writes log-probabilities of whole responses; its authors averaged over tokens, says TRL, and so do TRL and
    we. TRL calls τ `beta`, and logs rewards from sums.
    """

    name: Literal["ipo"] = "ipo"
    tau: Positive = 0.1
    """Strength of the regularization: the margin aimed at is `1 / (2 tau)` nats per token."""

    length_normalized: ClassVar[bool] = True

    def compute(self, pairs: PairLogps) -> LossTerms:
        """The squared distance of each pair to the margin aimed at."""
        from unidpo.losses import terms

        return terms.combine(
            (terms.logratio_margin(pairs) - 1 / (2 * self.tau)) ** 2,
            terms.implicit_rewards(pairs, self.tau),
        )


class MPO(PreferenceLoss):
    """Mixed preference optimization (arXiv:2411.10442): `w_p · DPO + w_q · BCO + w_g · NLL of the chosen response`.

    BCO (arXiv:2404.04656) classifies each response by itself: `−log σ(r_w − δ) − log σ(δ − r_l)`, with the implicit
    rewards `r = β(π − ρ)` of summed log-probabilities and δ = `PairLogps.reward_shift`. The NLL is in nats per token of
    its own response; TRL and the paper's code average it over all chosen tokens of a batch instead, which is the same
    for one pair. TRL has no δ.

    In `LossTerms`, `preference` holds the first two terms with their weights and `nll` the third.
    """

    name: Literal["mpo"] = "mpo"
    beta: Positive = 0.1
    """Scale of the log-ratios."""
    w_p: NotNegative = 0.8
    """Weight of the preference term, DPO."""
    w_q: NotNegative = 0.2
    """Weight of the quality term, BCO."""
    w_g: NotNegative = 1.0
    """Weight of the generation term, the chosen response's NLL per token."""

    length_normalized: ClassVar[bool] = False
    needs_reward_shift: ClassVar[bool] = True

    def compute(self, pairs: PairLogps) -> LossTerms:
        """The three terms of each pair. Raises `ValueError` without token counts or reward shift."""
        from unidpo.losses import terms

        shift, tokens = pairs.reward_shift, pairs.chosen_tokens
        if tokens is None or shift is None:
            raise ValueError("MPO needs the chosen responses' token counts and the reward shift")
        chosen_reward, rejected_reward = terms.implicit_rewards(pairs, self.beta)
        quality = -terms.log_sigmoid(chosen_reward - shift) - terms.log_sigmoid(shift - rejected_reward)
        return terms.combine(
            self.w_p * -terms.log_sigmoid(self.beta * terms.logratio_margin(pairs)) + self.w_q * quality,
            (chosen_reward, rejected_reward),
            nll=-self.w_g * pairs.chosen_logps / tokens,
            nll_gate=quality.detach().new_full(quality.shape, float(self.w_g > 0)),
        )
