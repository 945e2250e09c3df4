"""The keys of each loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import Field

from unidpo.config.section import Section


class UniDPOSection(Section):
    """Uni-DPO, arXiv:2506.10054."""

    name: Literal["uni_dpo"]
    beta: float = Field(2.0, gt=0)
    """Scale of the log-ratios (per nat per token)."""
    quality_eta: float = Field(0.7, ge=0)
    """Steepness of the quality weight, per unit of score margin."""
    tau_ref: float = 2.0
    """β times the log-ratio at which the performance weight is `2^-perf_gamma`."""
    perf_gamma: float = Field(3.0, ge=0)
    """Focusing exponent of the performance weight; 0 switches it off."""
    nll_weight: float = Field(0.001, ge=0)
    """Weight of the calibrated NLL term (loss per nat per token)."""
    tau_good: float = 2.5
    """Score from which a chosen response is guarded by the NLL term."""
    detach_performance_weight: bool = False
    """Whether the performance weight is a constant to the gradient; the reference differentiates through it."""


class DPOSection(Section):
    """DPO, arXiv:2305.18290."""

    name: Literal["dpo"]
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    """Assumed share of pairs whose preference is the wrong way round."""
    length_normalized: bool = False
    """Whether log-probabilities are averaged over a response's tokens instead of summed."""


class SimPOSection(Section):
    """SimPO, arXiv:2405.14734; needs no reference."""

    name: Literal["simpo"]
    beta: float = Field(2.0, gt=0)
    """Scale of the length-averaged log-probabilities."""
    gamma: float = Field(1.0, ge=0)
    """Target reward margin; the margin in nats per token is `gamma / beta`."""


class MMDPOSection(Section):
    """MM-DPO, arXiv:2502.10391: DPO whose β grows with the score margin."""

    name: Literal["mm_dpo"]
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios at a tie, β₀."""
    w: float = Field(0.5, ge=0)
    """Share by which β grows at most; 0 gives DPO."""
    k: float = Field(0.5, ge=0)
    """How fast β grows, per unit of score margin."""


class ODPOSection(Section):
    """DPO with an offset, arXiv:2402.10571."""

    name: Literal["odpo"]
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios."""
    alpha: float = Field(1.0, ge=0)
    """The reward margin asked for is `alpha` times the logarithm of the score margin; 0 gives DPO."""


class RPOSection(Section):
    """Reward-aware preference optimization, arXiv:2502.00203."""

    name: Literal["rpo"]
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios."""
    eta: float = Field(1.0, gt=0)
    """The reward margin aimed at, per unit of score margin."""
    distance: Literal["bwd_kl", "fwd_kl", "sq"] = "bwd_kl"
    """Between the two margins: Bernoulli KL with the scores' in front, with the policy's in front, or the square."""


class IPOSection(Section):
    """IPO, arXiv:2310.12036."""

    name: Literal["ipo"]
    tau: float = Field(0.1, gt=0)
    """Regularization: the margin aimed at is `1 / (2 tau)` nats per token."""


class MPOSection(Section):
    """Mixed preference optimization, arXiv:2411.10442."""

    name: Literal["mpo"]
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios."""
    w_p: float = Field(0.8, ge=0)
    """Weight of the preference term, DPO."""
    w_q: float = Field(0.2, ge=0)
    """Weight of the quality term, BCO."""
    w_g: float = Field(1.0, ge=0)
    """Weight of the generation term, the chosen response's NLL per token."""


class WPOSection(Section):
    """Weighted preference optimization, arXiv:2406.11827."""

    name: Literal["wpo"]
    beta: float = Field(0.1, gt=0)
    """Scale of the log-ratios."""
    max_weight: float | None = Field(1.0, gt=0)
    """Bound of a pair's weight; null for none."""


LossSection: TypeAlias = Annotated[
    UniDPOSection
    | MMDPOSection
    | ODPOSection
    | RPOSection
    | DPOSection
    | SimPOSection
    | IPOSection
    | MPOSection
    | WPOSection,
    Field(discriminator="name"),
]
LOSS_SECTIONS: Mapping[str, type[Section]] = {
    get_args(section.model_fields["name"].annotation)[0]: section for section in get_args(get_args(LossSection)[0])
}
