"""The trainer's wiring: references, adapters, layouts, fallbacks, and what it reports."""

import functools
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from trainers import arguments, lora, some_groups, trainer_of
from unidpo.cache.keys import weights_fingerprint
from unidpo.cache.reference import ReferencePass
from unidpo.data.pairs import Pair, Response, merge_by_prompt
from unidpo.errors import DataError, ModelError, TrainingError
from unidpo.losses import DPO, SimPO, UniDPO
from unidpo.model.attention import PACK_ATTENTION
from unidpo.model.batches import Batch
from unidpo.model.load import load_policy
from unidpo.model.logps import response_logps
from unidpo.model.packs import Pack, index_pairs, pack, pad
from unidpo.run_folder.records import LEDGER_COLUMNS
from unidpo.training.metrics import PairColumns
from unidpo.training.trainer import PreferenceTrainer
from worlds import GOLDEN, group, save_gemma2, tiny_policy

# peft asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LN2 = 0.6931471805599453


@pytest.fixture
def make(tmp_path):
    return functools.partial(trainer_of, tmp_path / "out")


def records(trainer):
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


def losses(trainer):
    return [record["loss"] for record in records(trainer)]


def attention_of(trainer):
    return trainer.policy.attention


@pytest.fixture
def stored_elsewhere(monkeypatch):
    """Stored numbers as another machine rounds them. Here the pass and the first step are equal to the bit."""
    exact = ReferencePass.logps

    def rounded(self, *args, **options):
        return [logps * (1 - 1e-6) for logps in exact(self, *args, **options)]

    monkeypatch.setattr(ReferencePass, "logps", rounded)


# --- policy and reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["stored", "live"])
def test_the_first_dpo_step_is_ln_2(make, reference):
    first, second = losses(make(loss=DPO(), batch=(4, 1), reference=reference))
    assert first == pytest.approx(LN2, abs=1e-7)
    assert abs(second - LN2) > 1e-4


def test_until_an_update_the_policy_is_its_own_reference(make, stored_elsewhere):
    """Rounding between the stored pass and the step must not open the gate."""
    first, second = records(make(loss=UniDPO(nll_weight=0.1), batch=(4, 1)))
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["nll/gate_rate"] == 0
    assert second["rewards/chosen"] != 0


@pytest.mark.parametrize("loss", [DPO(), UniDPO(nll_weight=0.1)], ids=["dpo", "uni_dpo"])
def test_a_first_update_with_learning_rate_0_changes_nothing(make, loss, stored_elsewhere):
    """Warm-up makes it; rounding between the stored pass and the step must not open the gate at step 2 either."""
    first, second, third = records(make(loss=loss, batch=(4, 1), warmup_steps=2, max_steps=3))
    assert first["learning_rate"] == 0 < second["learning_rate"]
    for record in (first, second):
        assert record["rewards/chosen"] == record["rewards/rejected"] == record["nll/gate_rate"] == 0
    assert second["loss"] == pytest.approx(first["loss"], abs=1e-6)
    assert third["rewards/chosen"] != 0


def test_after_an_update_the_reference_stays_what_it_was(make):
    seen = []
    trainer = make(some_groups(1), batch=(1, 1), on_pairs=seen.append)
    trainer.train()
    first, second = seen
    for response in ("chosen", "rejected"):
        assert first[f"ref_{response}_logps"] == first[f"{response}_logps"]
        assert second[f"ref_{response}_logps"] == pytest.approx(first[f"{response}_logps"], abs=1e-6)
        assert abs(second[f"{response}_logps"][0] - first[f"{response}_logps"][0]) > 1e-3


def test_stored_and_live_reference_agree_over_two_shuffled_epochs(make):
    options = {"groups": some_groups(6), "num_train_epochs": 2, "max_steps": -1, "shuffle": True}
    stored, live = (losses(make(reference=reference, **options)) for reference in ("stored", "live"))
    assert len(stored) == 4
    assert stored == pytest.approx(live, abs=1e-6)


def test_a_second_trainer_finds_the_reference(make, caplog):
    caplog.set_level("INFO", "unidpo")
    make().train()
    make(loss=DPO()).train()
    make(max_length=500).train()
    counted = [r.getMessage().split(" responses")[0] for r in caplog.records if r.getMessage().startswith("reference")]
    computed = [r.getMessage().rsplit(", ", 1)[1] for r in caplog.records if r.getMessage().startswith("reference")]
    assert counted == ["reference: 0", "reference: 8", "reference: 0"]
    assert computed == ["8 to compute", "0 to compute", "8 to compute"]


def test_another_model_as_reference(make, tmp_path):
    other = load_policy(GOLDEN / "model")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    seen = []
    trainer = make(batch=(4, 1), max_steps=1, reference=str(tmp_path / "other"), on_pairs=seen.append, shuffle=False)
    trainer.train()
    with torch.no_grad():
        rows = pad([trainer.encoder.encode(one) for one in some_groups()], pad_token_id=0)
        expected = (response_logps(other, rows) / rows.response_tokens).tolist()
    assert seen[0]["ref_chosen_logps"] == pytest.approx(expected[0::2], abs=1e-5)
    assert seen[0]["ref_rejected_logps"] == pytest.approx(expected[1::2], abs=1e-5)
    assert seen[0]["chosen_reward"][0] != 0


def test_each_reference_has_a_store_of_its_own(make, tmp_path):
    others = [tmp_path / name for name in ("one", "two")]
    for folder, factor in zip(others, (1.5, 0.5), strict=True):
        other = load_policy(GOLDEN / "model")
        with torch.no_grad():
            other.lm_head.weight.mul_(factor)
        other.save_pretrained(folder)
    found = []
    for reference in ("stored", *map(str, others), "stored"):
        make(some_groups(1), reference=reference, max_steps=1, on_pairs=(seen := []).append).train()
        found.append(seen[0]["ref_chosen_logps"][0])
    assert found[3] == found[0]
    assert all(abs(a - b) > 1e-3 for a, b in itertools.combinations(found[:3], 2))


def test_each_precision_has_a_store_of_its_own(make, caplog):
    """The weights that learn are float32 with autocast and without; what is computed of them is not."""
    caplog.set_level("INFO", "unidpo")
    for precision in ({}, {"bf16": True}, {"fp16": True}, {}):
        make(some_groups(1), max_steps=1, **precision).train()
    computed = [message.rsplit(", ", 1)[1] for message in caplog.messages if message.startswith("reference")]
    assert computed == ["2 to compute"] * 3 + ["0 to compute"]


def test_a_reference_that_is_no_model(make, tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        make(reference=str(tmp_path / "nowhere")).train()


def test_simpo_makes_no_reference_pass(make, tmp_path):
    trainer = make(loss=SimPO(), cache=tmp_path / "cache", on_pairs=(seen := []).append)
    assert "logps/ref_chosen" not in records(trainer)[0]
    assert not (tmp_path / "cache").exists()
    assert seen[0]["ref_chosen_logps"] == [None] * 4


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_learns_and_the_weights_stay(make):
    model = load_policy(GOLDEN / "model")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = make(model=model, peft_config=lora())
    assert {name.split(".")[-2] for name, p in trainer.model.named_parameters() if p.requires_grad} == {"default"}
    trainer.train()
    weights = dict(trainer.model.get_base_model().named_parameters())
    for name, value in before.items():
        inside = name.replace("_proj.", "_proj.base_layer.") if name not in weights else name
        assert torch.equal(weights[inside], value), name
    adapter = [p for name, p in weights.items() if "lora_B" in name]
    assert len(adapter) == 6
    assert all(p.abs().sum() > 0 for p in adapter)


def test_with_an_adapter_stored_and_live_reference_agree(make):
    stored, live = (
        losses(
            make(
                model=load_policy(GOLDEN / "model"),
                peft_config=lora(),
                reference=reference,
                max_steps=3,
                learning_rate=1e-2,
            )
        )
        for reference in ("stored", "live")
    )
    assert stored == pytest.approx(live, abs=1e-6)
    assert abs(stored[2] - stored[0]) > 1e-4


def test_an_adapter_that_fits_nowhere(make):
    config = lora()
    config.target_modules = {"no_such_layer"}
    with pytest.raises(ModelError, match="no_such_layer"):
        make(peft_config=config)


def test_an_adapter_shares_the_reference_of_its_model(make, tmp_path):
    for options in ({}, {"peft_config": lora()}):
        make(model=load_policy(GOLDEN / "model"), cache=tmp_path / "cache", **options).train()
    assert len([*(tmp_path / "cache" / "reference").iterdir()]) == 1


def test_weights_in_another_type_have_a_reference_of_their_own(make, tmp_path):
    """What learns is widened to float32, and the same weights in bfloat16 under an adapter round otherwise."""

    def stored(cache, **options):
        model = load_policy(GOLDEN / "model", dtype=torch.bfloat16)
        trainer = make(model=model, bf16=True, max_steps=1, cache=tmp_path / cache, **options)
        trainer.train()
        return [value for group_logps in trainer.setup.train.batches.ref_logps for value in group_logps.tolist()]

    full, adapted = stored("shared"), stored("shared", peft_config=lora())
    assert adapted == stored("own", peft_config=lora())
    assert adapted != full


@pytest.mark.parametrize("reference", ["stored", "live"])
def test_the_reference_of_an_adapter_that_begins_with_something_is_the_model_without_it(make, tmp_path, reference):
    plain, adapted = [], []
    # A cache of its own, or the adapter's run would find all of the reference in it.
    make(max_steps=1, shuffle=False, on_pairs=plain.append, cache=tmp_path / "plain").train()
    adapter = lora(init_lora_weights=False)
    make(max_steps=1, shuffle=False, peft_config=adapter, reference=reference, on_pairs=adapted.append).train()
    assert adapted[0]["ref_chosen_logps"] == pytest.approx(plain[0]["chosen_logps"], abs=1e-5)
    assert abs(adapted[0]["chosen_logps"][0] - plain[0]["chosen_logps"][0]) > 1e-3


# --- layouts ----------------------------------------------------------------------------------------------------------


def first_step(make, groups, **options):
    """Loss and gradient norm of one step over all pairs."""
    pairs = sum(len(one.pairs) for one in groups)
    (record,) = records(make(groups, batch=(pairs, 1), max_steps=1, reference="live", **options))
    return record["loss"], record["grad_norm"]


def test_pairs_that_share_a_prompt_give_the_same_step_grouped_or_not(make):
    ranked = [group(images=1, responses=(3, 6, 4, 5), seed=seed, row=seed) for seed in (1, 2)]
    apart = [one.keep_pairs([pair]) for one in ranked for pair in one.pairs]
    together = merge_by_prompt(apart)
    assert (len(apart), len(together)) == (12, 2)
    loss, norm = first_step(make, apart)
    assert first_step(make, together) == (pytest.approx(loss, abs=1e-6), pytest.approx(norm, rel=1e-5))


@pytest.mark.parametrize("loss", [UniDPO(), SimPO(), DPO(length_normalized=False)], ids=["uni_dpo", "simpo", "dpo"])
def test_text_prompts_and_image_prompts_in_one_batch(make, loss):
    groups = some_groups(4, images=lambda i: i % 3)
    packed, norm = first_step(make, groups, loss=loss, attention="sdpa")
    padded = first_step(make, groups, loss=loss, attention="padded")
    assert padded == (pytest.approx(packed, abs=1e-6), pytest.approx(norm, rel=1e-5))


def test_a_text_model_packs(make, text_model):
    groups = some_groups(4, images=lambda i: 0)
    layouts = []
    trainer = make(
        groups,
        model=text_model,
        attention="sdpa",
        max_steps=1,
        on_pairs=lambda _: layouts.append(trainer.setup.train.batches.collate),
    )
    packed = losses(trainer)
    batch = layouts[0]([trainer.encoder.encode(groups[0])])
    assert isinstance(batch, Pack)
    assert packed == pytest.approx(losses(make(groups, model=text_model, attention="padded", max_steps=1)), abs=1e-6)


def test_a_model_whose_attention_is_more_than_causal_takes_the_padded_path(make, gemma2, caplog):
    groups = some_groups(4, images=lambda i: 0)
    trainer = make(groups, model=gemma2)
    found = losses(trainer)
    assert "sliding_attention" in caplog.text
    assert "padded path" in caplog.text
    assert found == pytest.approx(losses(make(groups, model=gemma2, attention="padded")), abs=1e-9)
    with pytest.raises(ModelError, match=r"model\.attention=sdpa.*sliding_attention.*model\.attention=padded"):
        make(groups, model=gemma2, attention="sdpa").train()


def test_a_soft_cap_alone_takes_the_padded_path_too(make, tmp_path, caplog):
    folder = save_gemma2(tmp_path / "gemma")
    settings = json.loads((folder / "config.json").read_text())
    settings["layer_types"] = ["full_attention"] * 2
    (folder / "config.json").write_text(json.dumps(settings))
    make(some_groups(2, images=lambda i: 0), model=folder, max_steps=1).train()
    assert "soft cap" in caplog.text


def test_packs_that_disagree_are_not_used(make, monkeypatch, caplog):
    def wrong(model, batch):
        return response_logps(model, batch) + (0.01 if isinstance(batch, Pack) else 0.0)

    monkeypatch.setattr("unidpo.model.policy.response_logps", wrong)
    trainer = make(max_steps=1)
    trainer.train()
    assert "differ by" in caplog.text
    assert not isinstance(trainer.setup.train.batches.collate([trainer.encoder.encode(some_groups()[0])]), Pack)
    trainer = make(attention="sdpa")
    with pytest.raises(ModelError, match="differ by"):
        trainer.train()
    assert attention_of(trainer) == "sdpa"


def test_the_model_keeps_its_own_attention(make, tmp_path, gemma2):
    during = []
    trainer = make(max_steps=1, on_pairs=lambda _: during.append(attention_of(trainer)))
    before = attention_of(trainer)
    trainer.train()
    assert during == [PACK_ATTENTION]
    assert attention_of(trainer) == before != PACK_ATTENTION
    text = make(some_groups(2, images=lambda i: 0), model=gemma2, attention="sdpa")
    before = attention_of(text)
    with pytest.raises(ModelError):
        text.train()
    assert attention_of(text) == before


@pytest.mark.parametrize("loss", [UniDPO(nll_weight=0.1), DPO(), SimPO()], ids=["uni_dpo", "dpo", "simpo"])
def test_a_micro_batch_without_pairs_gives_every_trainable_weight_a_gradient_of_0(make, loss):
    """Wrappers wait for the gradient of each; an optimizer passes over weights that have none."""
    trainer = make(loss=loss)
    trainer._apply_setup()
    batch = Batch(pack([trainer.encoder.encode(group(seed=9))]), index_pairs([]), None)
    pairs, terms = trainer.evaluate_pairs(batch)
    total = terms.loss.sum()
    assert total.item() == 0
    total.backward()
    learning = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all(gradient is not None and not gradient.any() for gradient in learning.values())
    columns = PairColumns()
    columns.add(batch, pairs, terms)
    assert columns.take() == {}


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"peft": True}, {"attention": "padded"}], ids=["packs", "adapter", "padded"])
def test_gradient_checkpointing_changes_no_step(make, options):
    def train(**more):
        peft = {"peft_config": lora()} if "peft" in options else options
        trainer = make(model=load_policy(GOLDEN / "model"), max_steps=2, reference="live", **peft, **more)
        trainer._apply_setup()  # packs are tried with gradients, too
        passes = []
        layer = trainer.policy.plain.model.language_model.layers[1]
        layer.self_attn.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
        return records(trainer), sum(passes)

    (off, once), (on, twice) = train(), train(activation_checkpointing=True)
    assert twice == 2 * once
    for plain, checkpointed in zip(off, on, strict=True):
        assert checkpointed["loss"] == pytest.approx(plain["loss"], abs=1e-6)
        assert checkpointed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_bf16_computes_in_bfloat16_and_stays_near_float32(make):
    def train(**options):
        model = load_policy(GOLDEN / "model")
        types = set()
        model.model.language_model.layers[1].mlp.down_proj.register_forward_hook(lambda m, i, out: types.add(out.dtype))
        return losses(make(model=model, **options)), types

    full, in_full = train()
    mixed, in_mixed = train(bf16=True)
    # In the reference pass as in the steps.
    assert (in_full, in_mixed) == ({torch.float32}, {torch.bfloat16})
    assert mixed == pytest.approx(full, abs=0.02)
    assert mixed[1] != full[1]


def test_a_live_reference_computes_in_the_precision_of_the_policy(make):
    trainer = make(model=load_policy(GOLDEN / "model"), bf16=True, reference="live")
    trainer._apply_setup()
    types = set()
    layer = trainer.setup.objective.live_reference.plain.model.language_model.layers[1]
    layer.mlp.down_proj.register_forward_hook(lambda module, inputs, out: types.add(out.dtype))
    trainer.train()
    assert types == {torch.bfloat16}


def test_another_model_as_reference_is_held_in_the_policys_dtype(make, tmp_path):
    model = load_policy(GOLDEN / "model", dtype=torch.bfloat16)
    make(some_groups(1), model=model, reference=str(GOLDEN / "model"), max_steps=1, cache=tmp_path / "cache").train()
    (folder,) = (tmp_path / "cache" / "reference").iterdir()
    assert folder.name.startswith(weights_fingerprint(load_policy(GOLDEN / "model", dtype=torch.bfloat16)))


def test_with_checkpointing_no_gradient_passes_through_a_frozen_vision_tower(make):
    trainer = make(loss=SimPO(), batch=(4, 1), max_steps=1, activation_checkpointing=True)
    trainer._apply_setup()
    differentiable = []
    trainer.policy.plain.model.visual.merger.register_forward_hook(lambda *given: differentiable.append(given[2]))
    trainer.train()
    assert [features.requires_grad for features in differentiable] == [False]


def test_bfloat16_keeps_what_learns_in_float32(make):
    seen = []
    model = load_policy(GOLDEN / "model", dtype=torch.bfloat16)
    trainer = make(model=model, bf16=True, max_steps=3, learning_rate=1e-6, on_pairs=seen.append)
    before = trainer.model.lm_head.weight.clone()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert not torch.equal(trainer.model.lm_head.weight, before)  # an update bfloat16 could not hold
    full = []
    make(max_steps=1, on_pairs=full.append).train()
    assert seen[0]["chosen_logps"] == pytest.approx(full[0]["chosen_logps"], abs=0.1)


# --- data -------------------------------------------------------------------------------------------------------------


def without_scores(one):
    return replace(one, responses=tuple(Response(r.text) for r in one.responses))


def test_missing_scores_are_an_error_before_a_model_is_loaded(make, tmp_path):
    groups = [one if i == 1 else without_scores(one) for i, one in enumerate(some_groups())]
    with pytest.raises(DataError, match=r"3 pairs have no scores(.|\n)*row 1\b(.|\n)*row 3\b(.|\n)*row 4\b"):
        make(groups, model=tmp_path / "nowhere")
    with pytest.raises(DataError, match="row 1"):
        make(model=tmp_path / "nowhere", eval_dataset=groups)


@pytest.mark.parametrize("loss", [DPO(), SimPO()], ids=["dpo", "simpo"])
def test_losses_that_need_no_scores_take_pairs_without(make, loss):
    seen = []
    groups = [without_scores(one) for one in some_groups()]
    found = losses(make(groups, loss=loss, on_pairs=seen.append))
    assert all(math.isfinite(each) for each in found)
    assert all(math.isnan(score) for score in seen[0]["chosen_score"])


def test_the_global_batch_counts_pairs(make):
    seen = []
    groups = [group(images=0, responses=(2, 3, 4), seed=i, row=i + 1) for i in range(3)]  # 3 pairs each
    trainer = make(groups, batch=(2, 2), num_train_epochs=1, max_steps=-1, on_pairs=seen.append)
    found = losses(trainer)
    assert [len(step["row"]) for step in seen] == [4, 4, 1]
    for loss, step in zip(found, seen, strict=True):
        assert loss == pytest.approx(sum(step["loss"]) / len(step["loss"]), abs=1e-6)


def test_the_data_seed_alone_makes_the_order(make):
    def order(**seeds):
        seen = []
        make(some_groups(8), loss=SimPO(), batch=(8, 1), max_steps=1, on_pairs=seen.append, **seeds).train()
        return seen[0]["row"]

    assert order(seed=1, data_seed=7) == order(seed=2, data_seed=7) != order(seed=7, data_seed=1)
    assert order(seed=7) == order(seed=1, data_seed=7)


@pytest.mark.parametrize(("attention", "passes"), [("sdpa", 1), ("padded", 2)])
def test_a_limit_on_tokens_counts_the_prompt_of_each_padded_row(make, attention, passes):
    one = group(responses=(3, 3), seed=1)
    encoder = tiny_policy()[2]
    encoded = encoder.encode(one)
    prompt, responses = len(encoded.prompt_ids), sum(map(len, encoded.response_ids))
    groups = [one, replace(one, pairs=(Pair(0, 1, 2),))]
    options = {"attention": attention, "max_tokens_per_pack": 2 * (prompt + responses), "loss": SimPO()}
    trainer = make(groups, batch=(1, 2), max_steps=1, **options)
    trainer._apply_setup()
    (step,) = trainer.read(trainer.get_train_dataloader())
    assert len(step.batches) == passes


def test_on_pairs_has_every_column_of_the_ledger(make):
    seen = []
    groups = some_groups()
    groups[0] = replace(groups[0], pairs=(Pair(1, 0, 1),))
    trainer = make(
        groups, loss=UniDPO(nll_weight=0.1), shuffle=False, num_train_epochs=2, max_steps=-1, on_pairs=seen.append
    )
    trainer.train()
    assert {column.name for column in LEDGER_COLUMNS} <= seen[0].keys()
    assert {len(values) for step in seen for values in step.values()} == {4}
    assert [step["step"] for step in seen] == [[1] * 4, [2] * 4]
    assert [step["epoch"] for step in seen] == [[0.0] * 4, [1.0] * 4]
    first = seen[0]
    assert first["row"] == [1, 2, 3, 4]
    assert (first["chosen"], first["rejected"]) == ([1, 0, 0, 0], [0, 1, 1, 1])
    assert (first["chosen_score"], first["rejected_score"]) == ([4.0, 5.0, 5.0, 5.0], [5.0, 4.0, 4.0, 4.0])
    tokens = [len(trainer.encoder.response_ids(one.responses[one.pairs[0].chosen])) for one in groups]
    assert first["chosen_tokens"] == tokens


def test_what_is_logged_is_the_mean_over_all_pairs_since_the_last_record(make):
    seen = []
    trainer = make(some_groups(6), num_train_epochs=1, max_steps=-1, logging_steps=2, on_pairs=seen.append)
    (record,) = records(trainer)
    pairs = [value for step in seen for value in step["chosen_logps"]]
    assert len(pairs) == 6
    assert record["logps/chosen"] == pytest.approx(sum(pairs) / 6, abs=1e-6)


def test_prompts_that_do_not_fit_are_left_out(make, caplog):
    groups = [*some_groups(3), group(images=3, seed=9, row=40)]
    limit = len(tiny_policy()[2].encode(groups[-1]).prompt_ids)
    trainer = make(groups, batch=(4, 1), max_length=limit, max_steps=1, on_pairs=(seen := []).append)
    trainer.train()
    assert sorted(seen[0]["row"]) == [1, 2, 3]
    assert "rows 40" in caplog.text


def test_the_arguments_given_are_left_alone(tmp_path):
    args = arguments(tmp_path, batch=(1, 4))
    before = args.to_dict()
    PreferenceTrainer(GOLDEN / "model", loss=UniDPO(), args=args, train_dataset=some_groups())
    assert args.to_dict() == before


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_held_out_pairs_are_measured_and_not_learned_from(make):
    held_out = [group(responses=(2, 4), seed=20 + i, row=20 + i) for i in range(3)]
    plain = losses(make(loss=DPO()))
    trainer = make(loss=DPO(), eval_dataset=held_out, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    assert losses(trainer) == pytest.approx(plain, abs=1e-7)
    measured = [record for record in trainer.state.log_history if "eval_loss" in record]
    assert measured[0]["eval_loss"] == pytest.approx(LN2, abs=1e-7)
    assert [record["step"] for record in measured] == [0, 1, 2]
    assert measured[2]["eval_rewards/chosen"] != 0
    assert trainer.model.training


@pytest.mark.parametrize("reference", ["stored", "live", "other"])
def test_an_evaluation_outside_training_measures_the_same(make, tmp_path, reference):
    if reference == "other":
        other = load_policy(GOLDEN / "model")
        with torch.no_grad():
            other.lm_head.weight.mul_(1.5)
        other.save_pretrained(reference := str(tmp_path / "other"))
    held_out = [group(responses=(2, 4), seed=20 + i, row=20 + i) for i in range(3)]
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "per_device_eval_batch_size": 3}
    trainer = make(loss=DPO(), eval_dataset=held_out, reference=reference, **options)
    before = trainer.evaluate()
    trainer.train()
    start, end = ({**record} for record in trainer.state.log_history if "eval_loss" in record)
    assert before | {"step": 0} == pytest.approx(start, abs=1e-6)
    assert trainer.evaluate() | {"step": 2} == pytest.approx(end, abs=1e-6)
    assert attention_of(trainer) != PACK_ATTENTION


def test_held_out_pairs_have_the_reference_of_their_own_responses(make):
    held_out = [group(responses=(2, 4), seed=20 + i, row=20 + i) for i in range(3)]
    trainer = make(eval_dataset=held_out, max_steps=1)
    trainer.train()
    with torch.no_grad():
        rows = pad([trainer.encoder.encode(one) for one in held_out], pad_token_id=0)
        expected = response_logps(load_policy(GOLDEN / "model"), rows) / rows.response_tokens
    measured = trainer.evaluate()
    assert measured["eval_logps/ref_chosen"] == pytest.approx(expected[0::2].mean().item(), abs=1e-5)
    assert measured["eval_logps/ref_rejected"] == pytest.approx(expected[1::2].mean().item(), abs=1e-5)


def test_an_evaluation_takes_its_own_number_of_pairs_into_a_pass(make):
    held_out = [group(responses=(2, 4), seed=20 + i, row=20 + i) for i in range(4)]
    trainer = make(eval_dataset=held_out, batch=(1, 4), per_device_eval_batch_size=2)
    trainer.evaluate()  # the reference too
    passes = []
    trainer.policy.plain.model.language_model.register_forward_pre_hook(lambda *_: passes.append(1))
    trainer.evaluate()
    assert len(passes) == 2


def test_a_loss_that_is_no_number_stops_the_training_and_names_the_pairs(make):
    trainer = make(learning_rate=1e30, num_train_epochs=4)
    with pytest.raises(TrainingError, match=r"row \d+: the loss of this pair is"):
        trainer.train()
