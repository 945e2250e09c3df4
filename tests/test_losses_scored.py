"""MM-DPO, ODPO and RPO against their formulas retyped with `math`, and by their properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retyped import neg_log_sigmoid, one_pair, pair_logps, sigmoid
from unidpo.losses import DPO, MMDPO, ODPO, RPO

LOGPS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
logps = st.fixed_dictionaries(dict.fromkeys(LOGPS, st.floats(-60, 0)))
betas = st.floats(0.02, 2)
margins = st.floats(0.01, 8)


def scored(values, margin, rejected=1.0):
    return {**values, "chosen_scores": rejected + margin, "rejected_scores": rejected}


def delta(values):
    pi_w, pi_l, rho_w, rho_l = (values[name] for name in LOGPS)
    return (pi_w - pi_l) - (rho_w - rho_l)


def close(value, expected):
    return value == pytest.approx(expected, rel=1e-9, abs=1e-12)


# --- MM-DPO -----------------------------------------------------------------------------------------------------------


@given(logps, margins, betas, st.floats(0, 2), st.floats(0, 2))
def test_mm_dpo_equals_the_retyped_formula(values, margin, beta, w, k):
    terms, by_chosen, by_rejected = one_pair(MMDPO(beta=beta, w=w, k=k), **scored(values, margin))
    own = beta * (1 + w * (1 - math.exp(-k * ((1.0 + margin) - 1.0))))
    assert close(terms.loss.item(), neg_log_sigmoid(own * delta(values)))
    assert close(by_chosen, -own * sigmoid(-own * delta(values)))
    assert by_rejected == -by_chosen
    assert close(terms.chosen_reward.item(), own * (values["chosen_logps"] - values["ref_chosen_logps"]))
    assert close(terms.rejected_reward.item(), own * (values["rejected_logps"] - values["ref_rejected_logps"]))


@given(logps, margins, margins, st.floats(0.1, 2), st.floats(0.1, 2))
def test_mm_dpo_trusts_a_clearer_pair_more_and_stays_in_the_papers_range(values, margin, more, w, k):
    def reward_scale(score_margin):
        terms, _, _ = one_pair(MMDPO(beta=0.1, w=w, k=k), **scored(values | {"chosen_logps": 1.0}, score_margin))
        return terms.chosen_reward.item() / (1.0 - values["ref_chosen_logps"])

    assert 0.1 * (1 - 1e-9) <= reward_scale(margin) <= reward_scale(margin + more) * (1 + 1e-9)
    assert reward_scale(margin + more) <= 0.1 * (1 + w) * (1 + 1e-9)


@given(logps, st.floats(-8, 8), st.sampled_from([{"w": 0.0}, {"k": 0.0}]))
def test_mm_dpo_without_scaling_is_dpo(values, margin, off):
    ours, dpo = one_pair(MMDPO(beta=0.3, **off), **scored(values, margin)), one_pair(DPO(beta=0.3), **values)
    assert ours[0].loss == dpo[0].loss
    assert ours[1:] == dpo[1:]


@given(logps, st.floats(-1e6, 0))
def test_mm_dpo_takes_a_tie_and_a_reversed_pair_with_the_smallest_beta(values, margin):
    ours, dpo = one_pair(MMDPO(beta=0.3), **scored(values, margin)), one_pair(DPO(beta=0.3), **values)
    assert ours[0].loss == dpo[0].loss


# --- ODPO -------------------------------------------------------------------------------------------------------------


@given(logps, margins, betas, st.floats(0, 3))
def test_odpo_equals_the_retyped_formula(values, margin, beta, alpha):
    terms, by_chosen, by_rejected = one_pair(ODPO(beta=beta, alpha=alpha), **scored(values, margin))
    x = beta * delta(values) - alpha * math.log((1.0 + margin) - 1.0)
    assert close(terms.loss.item(), neg_log_sigmoid(x))
    assert close(by_chosen, -beta * sigmoid(-x))
    assert by_rejected == -by_chosen
    assert close(terms.chosen_reward.item(), beta * (values["chosen_logps"] - values["ref_chosen_logps"]))


@given(logps, margins, st.floats(0.01, 4), st.floats(0.1, 3))
def test_odpo_asks_more_of_a_clearer_pair(values, margin, more, alpha):
    def loss(score_margin):
        return one_pair(ODPO(alpha=alpha), **scored(values, score_margin))[0].loss.item()

    assert loss(margin) <= loss(margin + more)


@given(logps, st.floats(-8, 8))
def test_odpo_without_offset_is_dpo_even_at_ties(values, margin):
    ours, dpo = one_pair(ODPO(beta=0.3, alpha=0.0), **scored(values, margin)), one_pair(DPO(beta=0.3), **values)
    assert ours[0].loss == dpo[0].loss
    assert ours[1:] == dpo[1:]


def test_odpo_is_dpo_at_a_margin_of_1():
    values = dict(zip(LOGPS, (-3.0, -5.0, -4.0, -4.5), strict=True))
    assert one_pair(ODPO(), **scored(values, 1.0))[0].loss == one_pair(DPO(), **values)[0].loss


@pytest.mark.parametrize("margin", [0.0, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odpo_learns_nothing_from_a_tie_or_a_reversed_pair(margin, dtype):
    pairs = pair_logps(
        dtype=dtype,
        chosen_logps=[-900.0, -1.0],
        rejected_logps=[-1.0, -900.0],
        ref_chosen_logps=[-2.0, -2.0],
        ref_rejected_logps=[-2.0, -2.0],
        chosen_scores=[3.0 + margin] * 2,
        rejected_scores=[3.0] * 2,
    )
    terms = ODPO()(pairs)
    terms.loss.sum().backward()
    assert terms.loss.tolist() == [0, 0]
    assert pairs.chosen_logps.grad.tolist() == pairs.rejected_logps.grad.tolist() == [0, 0]


@given(logps)
def test_odpo_reaches_a_tie_smoothly(values):
    assert one_pair(ODPO(beta=0.1), **scored(values, 1e-12, rejected=0.0))[0].loss.item() < 1e-6


# --- RPO --------------------------------------------------------------------------------------------------------------


def retyped_kl(p, q):
    """KL of two Bernoulli distributions given by their logits, and its derivatives by each."""
    value = sigmoid(p) * (neg_log_sigmoid(q) - neg_log_sigmoid(p))
    value += sigmoid(-p) * (neg_log_sigmoid(-q) - neg_log_sigmoid(-p))
    return value, sigmoid(p) * sigmoid(-p) * (p - q), sigmoid(q) - sigmoid(p)


def retyped_rpo(implicit, explicit, distance):
    """Distance, and its derivative by the implicit difference."""
    if distance == "bwd_kl":
        value, _, slope = retyped_kl(explicit, implicit)
    elif distance == "fwd_kl":
        value, slope, _ = retyped_kl(implicit, explicit)
    else:
        value, slope = (implicit - explicit) ** 2, 2 * (implicit - explicit)
    return value, slope


distances = st.sampled_from(["bwd_kl", "fwd_kl", "sq"])


@given(logps, st.floats(-8, 8), betas, st.floats(0.1, 3), distances)
def test_rpo_equals_the_retyped_formula(values, margin, beta, eta, distance):
    terms, by_chosen, by_rejected = one_pair(RPO(beta=beta, eta=eta, distance=distance), **scored(values, margin))
    value, slope = retyped_rpo(beta * delta(values), eta * ((1.0 + margin) - 1.0), distance)
    assert terms.loss.item() == pytest.approx(value, rel=1e-7, abs=1e-9)
    assert by_chosen == pytest.approx(beta * slope, rel=1e-7, abs=1e-9)
    assert by_rejected == -by_chosen
    assert close(terms.rejected_reward.item(), beta * (values["rejected_logps"] - values["ref_rejected_logps"]))


@given(st.floats(-8, 8), betas, st.floats(0.1, 3), distances)
def test_rpo_is_zero_and_at_rest_where_both_differences_agree(margin, beta, eta, distance):
    values = dict.fromkeys(LOGPS, 0.0) | {"chosen_logps": eta * ((1.0 + margin) - 1.0) / beta}
    terms, by_chosen, _ = one_pair(RPO(beta=beta, eta=eta, distance=distance), **scored(values, margin))
    assert terms.loss.item() == pytest.approx(0, abs=1e-12)
    assert by_chosen == pytest.approx(0, abs=1e-9)


@given(logps, st.floats(-8, 8), distances)
def test_rpo_is_the_same_with_the_pair_the_other_way_round(values, margin, distance):
    """Which response is called chosen is no news beside the scores."""
    here = scored(values, margin)
    there = {f"{a}{name}": here[f"{b}{name}"] for a, b, name in SWAPPED}
    loss = RPO(distance=distance)
    assert one_pair(loss, **there)[0].loss.item() == pytest.approx(one_pair(loss, **here)[0].loss.item(), abs=1e-9)


SWAPPED = [
    *(("chosen", "rejected", name) for name in ("_logps", "_scores")),
    *(("rejected", "chosen", name) for name in ("_logps", "_scores")),
    ("ref_chosen", "ref_rejected", "_logps"),
    ("ref_rejected", "ref_chosen", "_logps"),
]


@given(logps)
def test_rpo_backward_goes_to_dpo_for_scores_far_apart(values):
    far = one_pair(RPO(beta=0.1, distance="bwd_kl"), **scored(values, 200.0))
    dpo = one_pair(DPO(beta=0.1), **values)
    assert close(far[0].loss.item(), dpo[0].loss.item())
    assert close(far[1], dpo[1])
