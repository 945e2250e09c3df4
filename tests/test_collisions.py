"""The probability that two draws from the policy agree, beside the log-probabilities: packs, rows, chunks, trainer."""

import pytest
import torch
from transformers import TrainingArguments

import unidpo.model.logps
from unidpo.losses import WPO
from unidpo.model.attention import PACK_ATTENTION, set_text_attention
from unidpo.model.logps import response_logps, response_logps_and_collisions
from unidpo.model.packs import pack, pad
from unidpo.training.trainer import PreferenceTrainer
from worlds import group, tiny_policy

GROUPS = [group(responses=(3, 5), seed=1), group(images=0, responses=(2, 6, 4), seed=2)]


@pytest.fixture(scope="module")
def policy():
    """The random model with a head far from uniform, and each response's numbers from the model's own full logits."""
    model, _, encoder = tiny_policy(torch.float64)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    encoded = [encoder.encode(one) for one in GROUPS]
    expected = []
    with torch.no_grad():
        for one in encoded:
            for response in one.response_ids:
                ids = torch.cat([one.prompt_ids, response])[None]
                extra = dict(one.vision)
                if extra:
                    types = torch.cat([one.mm_token_type_ids, torch.zeros_like(response)])[None]
                    extra["mm_token_type_ids"] = types
                logits = model(input_ids=ids, **extra).logits[0, len(one.prompt_ids) - 1 : -1]
                probabilities = logits.softmax(-1)
                said = probabilities[torch.arange(len(response)), response]
                expected.append((said.log().sum(), (probabilities**2).sum(-1).log().sum()))
    return model, encoded, torch.tensor(expected, dtype=torch.float64).T


@pytest.fixture(params=["packs", "rows", "rows of an unknown head"])
def batch(request, policy, monkeypatch):
    model, encoded, _ = policy
    own = model.config.get_text_config()._attn_implementation
    if request.param == "packs":
        set_text_attention(model, PACK_ATTENTION)
        yield pack(encoded)
        model.set_attn_implementation({"text_config": own})
    else:
        if request.param != "rows":
            monkeypatch.setattr("unidpo.model.logps._head_is_known", lambda model: False)
        yield pad(encoded, pad_token_id=0)


@pytest.mark.parametrize("tokens_per_chunk", [1000, 4])
def test_collisions_are_those_of_the_full_softmax(policy, batch, tokens_per_chunk, monkeypatch):
    model, _, expected = policy
    monkeypatch.setattr("unidpo.model.head.LOGITS_CHUNK_BYTES", 4 * model.lm_head.out_features * tokens_per_chunk)
    found = response_logps_and_collisions(model, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the model's norms are float32
    torch.testing.assert_close(found[0], response_logps(model, batch), rtol=0, atol=1e-12)
    per_token = expected[1] / batch.response_tokens
    assert -4 < per_token.min() < per_token.max() < -1  # neither uniform (-7.6) nor certain (0)


def test_no_gradient_flows_through_collisions(policy, batch):
    model, _, _ = policy
    parameter = model.lm_head.weight
    (expected,) = torch.autograd.grad(response_logps(model, batch).sum(), parameter)
    found = response_logps_and_collisions(model, batch)
    (gradient,) = torch.autograd.grad(found[0].sum() + 7 * found[1].sum(), parameter)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_the_head_meets_a_chunk_at_a_time(policy, monkeypatch):
    model, encoded, _ = policy
    rows = pad(encoded, pad_token_id=0)
    response_logps(model, rows)  # tries the head once
    monkeypatch.setattr("unidpo.model.head.LOGITS_CHUNK_BYTES", 4 * model.lm_head.out_features * 4)
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    response_logps_and_collisions(model, rows)
    hook.remove()
    total = int(rows.response_tokens.sum())
    assert sizes == [4] * (total // 4) + [total % 4] * (total % 4 > 0)


def test_log_probabilities_alone_cost_no_collisions(policy, batch, monkeypatch):
    def never(logits, targets):
        raise AssertionError("collisions were computed")

    monkeypatch.setattr(unidpo.model.logps, "target_logps_and_collisions", never)
    response_logps(policy[0], batch)


def test_wpo_trains_with_its_weights_in_the_ledger(tmp_path):
    args = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=2,
        max_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model, processor, _ = tiny_policy()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    groups = [group(responses=(3, 5), seed=i, row=i + 1) for i in range(2)]
    seen = []
    trainer = PreferenceTrainer(
        model=model,
        loss=WPO(max_weight=None),
        args=args,
        train_dataset=groups,
        processing_class=processor,
        shuffle=False,
        on_pairs=seen.append,
    )
    encoded = [trainer.encoder.encode(one) for one in groups]
    with torch.no_grad():
        rows = pad(encoded, pad_token_id=0)
        logps, collisions = response_logps_and_collisions(model, rows)
        weight = ((logps - collisions) / rows.response_tokens).exp().view(2, 2).prod(1)
    trainer.train()
    assert seen[0]["performance_weight"] == pytest.approx(weight.tolist(), rel=1e-3)
    assert seen[0]["loss"] == pytest.approx([0.6931471805599453 * w for w in weight.tolist()], rel=1e-3)
    assert seen[0]["quality_weight"] == [1, 1]
