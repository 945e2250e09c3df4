"""IPO and MPO against their formulas retyped with `math`, by their properties, and against TRL's own loss."""

import copy
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen2Config

from retyped import neg_log_sigmoid, one_pair, pair_logps, sigmoid
from unidpo.losses import DPO, IPO, MPO, PairLogps
from unidpo.model.encode import EncodedGroup
from unidpo.model.logps import response_logps
from unidpo.model.packs import pad
from worlds import SMALL

LOGPS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
logps = st.fixed_dictionaries(dict.fromkeys(LOGPS, st.floats(-60, 0)))
betas = st.floats(0.02, 2)
weights = st.floats(0, 2)
tokens = st.integers(1, 40)


def delta(values):
    pi_w, pi_l, rho_w, rho_l = (values[name] for name in LOGPS)
    return (pi_w - pi_l) - (rho_w - rho_l)


def close(value, expected):
    return value == pytest.approx(expected, rel=1e-9, abs=1e-12)


# --- IPO --------------------------------------------------------------------------------------------------------------


@given(logps, betas)
def test_ipo_equals_the_retyped_formula(values, tau):
    terms, by_chosen, by_rejected = one_pair(IPO(tau=tau), **values)
    distance = delta(values) - 1 / (2 * tau)
    assert close(terms.loss.item(), distance**2)
    assert close(by_chosen, 2 * distance)
    assert by_rejected == -by_chosen
    assert close(terms.chosen_reward.item(), tau * (values["chosen_logps"] - values["ref_chosen_logps"]))


@given(logps, betas, st.floats(0.01, 5))
def test_ipo_is_least_at_its_margin_and_grows_both_ways(values, tau, away):
    def loss(difference):
        policy = values | {"chosen_logps": difference + values["rejected_logps"] + delta_of_reference}
        return one_pair(IPO(tau=tau), **policy)[0].loss.item()

    delta_of_reference = values["ref_chosen_logps"] - values["ref_rejected_logps"]
    target = 1 / (2 * tau)
    assert loss(target) == pytest.approx(0, abs=1e-20)
    assert loss(target + away) == pytest.approx(loss(target - away), rel=1e-6)
    assert loss(target + away) > 0


# --- MPO --------------------------------------------------------------------------------------------------------------


@given(logps, tokens, st.floats(-3, 3), betas, weights, weights, weights)
def test_mpo_equals_the_retyped_formula(values, count, shift, beta, w_p, w_q, w_g):
    loss = MPO(beta=beta, w_p=w_p, w_q=w_q, w_g=w_g)
    terms, by_chosen, by_rejected = one_pair(loss, **values, chosen_tokens=count, reward_shift=shift)
    r_w = beta * (values["chosen_logps"] - values["ref_chosen_logps"])
    r_l = beta * (values["rejected_logps"] - values["ref_rejected_logps"])
    margin = beta * delta(values)
    expected = w_p * neg_log_sigmoid(margin)
    expected += w_q * (neg_log_sigmoid(r_w - shift) + neg_log_sigmoid(-(r_l - shift)))
    nll = w_g * -values["chosen_logps"] / count
    assert close(terms.loss.item(), expected + nll)
    assert close(terms.nll.item(), nll)
    assert close(terms.chosen_reward.item(), r_w)
    assert terms.nll_gate.item() == (w_g > 0)
    pull = -w_p * beta * sigmoid(-margin)
    assert close(by_chosen, pull - w_q * beta * sigmoid(shift - r_w) - w_g / count)
    assert close(by_rejected, -pull + w_q * beta * sigmoid(r_l - shift))


@given(logps, tokens, st.floats(-3, 3))
def test_mpo_of_the_first_term_alone_is_dpo(values, count, shift):
    loss = MPO(beta=0.3, w_p=1.0, w_q=0.0, w_g=0.0)
    ours, dpo = one_pair(loss, **values, chosen_tokens=count, reward_shift=shift), one_pair(DPO(beta=0.3), **values)
    assert close(ours[0].loss.item(), dpo[0].loss.item())
    assert close(ours[1], dpo[1])


def test_mpo_asks_more_of_the_chosen_and_less_of_the_rejected_response_where_the_shift_is_higher():
    values = dict.fromkeys(LOGPS, -5.0)
    loss = MPO(w_p=0.0, w_q=1.0, w_g=0.0)
    (_, low_chosen, low_rejected), (_, high_chosen, high_rejected) = (
        one_pair(loss, **values, chosen_tokens=3, reward_shift=shift) for shift in (0.0, 2.0)
    )
    assert high_chosen < low_chosen < 0 < high_rejected < low_rejected


# --- what they need ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "given", "missing"),
    [
        (IPO(), LOGPS[:2], "reference"),
        (MPO(), LOGPS, "reward shift"),
        (MPO(), (*LOGPS, "chosen_tokens"), "reward shift"),
    ],
)
def test_what_a_loss_needs_is_an_error_where_it_is_missing(loss, given, missing):
    with pytest.raises(ValueError, match=missing):
        loss(pair_logps(**{name: [1.0] for name in given}))


# --- TRL --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    """A random language model, three pairs as rows, and a reference's numbers.

    Chosen responses have 4 tokens each: TRL's SFT term is a mean over the tokens of the batch.
    """
    torch.manual_seed(0)
    config = Qwen2Config(**SMALL | {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    prompts, lengths = [3, 5, 2] * 2, [4, 4, 4, 7, 2, 5]
    groups = [
        EncodedGroup(
            prompt_ids=torch.randint(0, 61, (prompt,)),
            position_ids=torch.arange(prompt)[None],
            mm_token_type_ids=torch.zeros(prompt, dtype=torch.long),
            response_ids=(torch.randint(0, 61, (length,)),),
            cut_tokens=(0,),
            vision={},
        )
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    return SimpleNamespace(
        model=model,
        rows=pad(groups, pad_token_id=0),
        ref_logps=-torch.rand(6) * 20 - 5,
    )


def trl_loss(world, *, beta, loss_types, loss_weights):
    """TRL's loss of the world's pairs, the gradients of it, and what TRL logs."""
    from trl import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    model = copy.deepcopy(world.model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, parallelism_config=None
    )
    # Everything of a trainer that the computation of its loss reads.
    trainer = SimpleNamespace(
        model=model,
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=loss_weights,
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = world.ref_logps.chunk(2)
    inputs = {
        "input_ids": world.rows.input_ids,
        "attention_mask": world.rows.attention_mask,
        "completion_mask": world.rows.is_target.long(),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    loss.backward()
    logged = {name: values[0] for name, values in trainer._metrics["eval" if not model.training else "train"].items()}
    return loss.item(), [p.grad for p in model.parameters()], logged


@pytest.mark.parametrize(
    ("loss", "trl"),
    [
        (DPO(beta=0.2), {"loss_types": ["sigmoid"]}),
        (DPO(beta=0.2, length_normalized=True), {"loss_types": ["sigmoid_norm"]}),
        (IPO(tau=0.2), {"loss_types": ["ipo"]}),
        (MPO(beta=0.2), {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    ],
    ids=["dpo", "dpo averaged", "ipo", "mpo"],
)
def test_losses_gradients_and_rewards_are_those_of_trl(world, loss, trl):
    theirs, their_gradients, logged = trl_loss(world, **{"beta": 0.2, "loss_weights": [1.0]} | trl)
    model, counts = copy.deepcopy(world.model), world.rows.response_tokens
    policy = response_logps(model, world.rows)
    divisor = counts if loss.length_normalized else 1
    (chosen, rejected), (ref_chosen, ref_rejected) = (policy / divisor).chunk(2), (world.ref_logps / divisor).chunk(2)
    chosen_tokens, rejected_tokens = counts.chunk(2)
    terms = loss(
        PairLogps(
            chosen_logps=chosen,
            rejected_logps=rejected,
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
            reward_shift=torch.zeros(()),  # TRL has none
        )
    )
    terms.loss.mean().backward()
    assert terms.loss.mean().item() == pytest.approx(theirs, rel=1e-5)
    for (name, parameter), gradient in zip(model.named_parameters(), their_gradients, strict=True):
        rounding = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=rounding, msg=name)
    # TRL logs rewards of summed log-probabilities whatever the loss.
    if loss.length_normalized:
        rewards = (terms.chosen_reward * chosen_tokens).mean(), (terms.rejected_reward * rejected_tokens).mean()
    else:
        rewards = terms.chosen_reward.mean(), terms.rejected_reward.mean()
    assert [value.item() for value in rewards] == pytest.approx(
        [logged["rewards/chosen"], logged["rewards/rejected"]], rel=1e-4
    )
