"""The objective and its baselines: pure functions of tensors with one entry per pair.

A loss is a frozen dataclass of hyper-parameters. Called with `PairLogps` it returns `LossTerms`, every term kept for
logging; the training loss is the mean of `LossTerms.loss` over the pairs of the global batch. Everything is computed
in float32, or in float64 where the inputs are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
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
    """

    chosen_logps: Pairs
    rejected_logps: Pairs
    ref_chosen_logps: Pairs | None = None
    ref_rejected_logps: Pairs | None = None
    chosen_scores: Pairs | None = None
    rejected_scores: Pairs | None = None

    def in_full_precision(self) -> PairLogps:
        """float64 stays float64, anything narrower becomes float32; references and scores lose their graph."""
        dtype = torch.float64 if self.chosen_logps.dtype == torch.float64 else torch.float32
        values: dict[str, Tensor | None] = {field.name: getattr(self, field.name) for field in fields(self)}
        constants = {name: None if v is None else v.detach().to(dtype) for name, v in values.items()}
        return replace(
            self,
            **constants | {n: values[n].to(dtype) for n in ("chosen_logps", "rejected_logps")},  # type: ignore[union-attr]
        )


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss of each pair and the terms it is made of, each with one entry per pair.

    Attributes:
        loss: what is averaged and differentiated; the only attribute that carries a gradient.
        preference: `-log sigmoid` term before any weight.
        quality_weight, performance_weight: in (0, 1); 1 for losses that do not weight.
        nll: the calibrated NLL term as added to the loss, ≥ 0; 0 for losses without one.
        nll_gate: 1 where the NLL term is on, else 0.
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


@runtime_checkable
class PreferenceLoss(Protocol):
    """A loss over pairs. A new one is a frozen dataclass with these members; register it in `LOSSES`."""

    @property
    def length_normalized(self) -> bool:
        """Whether log-probabilities are averaged over the response's tokens."""

    needs_reference: ClassVar[bool]
    needs_scores: ClassVar[bool]

    def __call__(self, pairs: PairLogps) -> LossTerms: ...


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
class UniDPO:
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

    length_normalized: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True

    def __call__(self, pairs: PairLogps) -> LossTerms:
        """The terms of each pair. Raises `ValueError` without reference log-probabilities or scores."""
        pairs = pairs.in_full_precision()
        ref_chosen, ref_rejected = _reference(pairs)
        if pairs.chosen_scores is None or pairs.rejected_scores is None:
            raise ValueError("Uni-DPO needs the scores of both responses")
        quality = quality_weight(pairs.chosen_scores, pairs.rejected_scores, quality_eta=self.quality_eta)
        performance = performance_weight(
            pairs.chosen_logps,
            pairs.rejected_logps,
            beta=self.beta,
            tau_ref=self.tau_ref,
            perf_gamma=self.perf_gamma,
        )
        if self.detach_performance_weight:
            performance = performance.detach()
        preference, chosen_reward, rejected_reward = _dpo_preference(pairs, ref_chosen, ref_rejected, beta=self.beta)
        gate = nll_gate(pairs.chosen_logps, ref_chosen, pairs.chosen_scores, tau_good=self.tau_good)
        nll = -self.nll_weight * gate * pairs.chosen_logps
        return LossTerms(
            loss=quality * performance * preference + nll,
            preference=preference.detach(),
            quality_weight=quality,
            performance_weight=performance.detach(),
            nll=nll.detach(),
            nll_gate=gate,
            chosen_reward=chosen_reward,
            rejected_reward=rejected_reward,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DPO:
    """DPO (arXiv:2305.18290, eq. 7), with label smoothing (cDPO) and optional averaging over tokens.

    Attributes:
        beta: > 0.
        label_smoothing: probability in [0, 0.5) that a label is flipped.
        length_normalized: nats per token instead of nats (the reference's baseline averages; the paper sums).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    length_normalized: bool = False

    needs_reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = False

    def __call__(self, pairs: PairLogps) -> LossTerms:
        """The terms of each pair. Raises `ValueError` without reference log-probabilities."""
        pairs = pairs.in_full_precision()
        ref_chosen, ref_rejected = _reference(pairs)
        preference, chosen_reward, rejected_reward = _dpo_preference(
            pairs, ref_chosen, ref_rejected, beta=self.beta, label_smoothing=self.label_smoothing
        )
        return _unweighted(preference, chosen_reward, rejected_reward)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimPO:
    """SimPO (arXiv:2405.14734, eq. 6): `−log σ(β(π_w − π_l) − γ)` in nats per token, without a reference.

    Attributes:
        beta: > 0.
        gamma: target reward margin, in units of reward (the paper's γ; the margin of the log-ratio is γ/β).
    """

    beta: float = 2.0
    gamma: float = 1.0

    length_normalized: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = False

    def __call__(self, pairs: PairLogps) -> LossTerms:
        """The terms of each pair."""
        pairs = pairs.in_full_precision()
        policy_logratio = pairs.chosen_logps - pairs.rejected_logps
        return _unweighted(
            -F.logsigmoid(self.beta * policy_logratio - self.gamma),
            self.beta * pairs.chosen_logps.detach(),
            self.beta * pairs.rejected_logps.detach(),
        )


LOSSES: Mapping[str, type[UniDPO] | type[DPO] | type[SimPO]] = {"uni_dpo": UniDPO, "dpo": DPO, "simpo": SimPO}
"""Losses by the name a recipe gives them."""


def make_loss(name: str, **hyper_parameters: Any) -> PreferenceLoss:
    """The loss a recipe's `loss` section describes. Raises `KeyError` for a name that is not in `LOSSES`."""
    return LOSSES[name](**hyper_parameters)


def _reference(pairs: PairLogps) -> tuple[Pairs, Pairs]:
    if pairs.ref_chosen_logps is None or pairs.ref_rejected_logps is None:
        raise ValueError("this loss needs reference log-probabilities of both responses")
    return pairs.ref_chosen_logps, pairs.ref_rejected_logps


def _dpo_preference(
    pairs: PairLogps, ref_chosen: Pairs, ref_rejected: Pairs, *, beta: float, label_smoothing: float = 0.0
) -> tuple[Pairs, Pairs, Pairs]:
    """Preference term, chosen reward, rejected reward."""
    delta = (pairs.chosen_logps - pairs.rejected_logps) - (ref_chosen - ref_rejected)
    preference = -F.logsigmoid(beta * delta)
    if label_smoothing:
        preference = (1 - label_smoothing) * preference - label_smoothing * F.logsigmoid(-beta * delta)
    chosen_reward = beta * (pairs.chosen_logps - ref_chosen).detach()
    rejected_reward = beta * (pairs.rejected_logps - ref_rejected).detach()
    return preference, chosen_reward, rejected_reward


def _unweighted(preference: Pairs, chosen_reward: Pairs, rejected_reward: Pairs) -> LossTerms:
    one, zero = torch.ones_like(chosen_reward), torch.zeros_like(chosen_reward)
    return LossTerms(
        loss=preference,
        preference=preference.detach(),
        quality_weight=one,
        performance_weight=one,
        nll=zero,
        nll_gate=zero,
        chosen_reward=chosen_reward,
        rejected_reward=rejected_reward,
    )
