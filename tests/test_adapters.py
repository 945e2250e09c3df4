"""Adapters of every kind over weights of every kind: their reference, what learns, and what is refused."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, TrainingArguments

from test_train import metrics_of, rows_of, unidpo, write_recipe, write_rows
from unidpo.cache.keys import weights_fingerprint
from unidpo.config import LoraSection
from unidpo.errors import ModelError
from unidpo.losses import DPO, SimPO, UniDPO
from unidpo.model.adapters import adds_nothing_yet, lora_config, with_adapter
from unidpo.model.load import load_policy
from unidpo.model.parts import language_linear_layers, parameters_by_part
from unidpo.training.arguments import spelled_for_transformers
from unidpo.training.trainer import PreferenceTrainer
from worlds import GOLDEN, group

LN2 = 0.6931471805599453


def trainer_of(folder, *, lora=None, peft_config=None, loss=None, model=GOLDEN / "model", **options):
    options = spelled_for_transformers(options)
    known = TrainingArguments.__dataclass_fields__.keys() & options.keys()
    usual = {"learning_rate": 1e-2, "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(str(folder / "out"), **usual | quiet | {name: options.pop(name) for name in known})
    if lora is not None:
        model = load_policy(model) if isinstance(model, Path) else model
        torch.manual_seed(0)
        peft_config = lora_config(LoraSection(**{"r": 4} | lora), model)
    groups = [group(responses=(3, 5), seed=i, row=i + 1) for i in range(2)]
    return PreferenceTrainer(
        model,
        loss=loss or UniDPO(),
        args=args,
        train_dataset=groups,
        peft_config=peft_config,
        cache=folder / "cache",
        **options,
    )


def records(trainer):
    trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


def losses(trainer):
    return [record["loss"] for record in records(trainer)]


# --- the reference ----------------------------------------------------------------------------------------------------

KINDS = {
    "lora": {},
    "dora": {"dora": True},
    "every linear layer": {"target_modules": "all-linear"},
    "head and embeddings": {"target_modules": ("lm_head", "embed_tokens")},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # peft: they cannot be merged
def test_the_model_with_the_adapter_off_is_a_frozen_copy_of_the_model(tmp_path, kind):
    """Its log-probabilities computed once, on the way, and by a second model that was never touched."""
    live, stored, copy = (
        records(trainer_of(tmp_path, lora=KINDS[kind], loss=DPO(), reference=reference, max_steps=2))
        for reference in ("live", "stored", str(GOLDEN / "model"))
    )
    differences = [abs(a["loss"] - b["loss"]) for other in (stored, copy) for a, b in zip(live, other, strict=True)]
    assert max(differences) < 1e-6
    assert sum(differences) / len(differences) < 3e-7
    assert abs(live[1]["loss"] - LN2) > 1e-4
    for first in (live[0], stored[0]):
        assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0, "exactly, in the first step"


def test_an_adapter_on_embeddings_that_begins_with_something_is_seen():
    from peft import LoraConfig

    def policy(**options):
        config = LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM", **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft on tied embeddings
            return with_adapter(load_policy(GOLDEN / "model"), config, own_reference=True, mixed_precision=False)

    assert adds_nothing_yet(policy())
    begun = policy()
    with torch.no_grad():
        next(p for name, p in begun.named_parameters() if "lora_embedding_A" in name).add_(0.1)
    assert not adds_nothing_yet(begun)


def test_of_an_adapter_that_is_no_lora_nothing_is_taken_for_granted(tmp_path):
    from peft import IA3Config

    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    trainer = trainer_of(tmp_path, peft_config=config, loss=DPO(), max_steps=2, model=load_policy(GOLDEN / "model"))
    assert not adds_nothing_yet(trainer.model)
    first, second = losses(trainer)
    assert first == pytest.approx(LN2, abs=1e-6)
    assert abs(second - LN2) > 1e-5


def starting_with(start):
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start, task_type="CAUSAL_LM")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_that_changes_the_weights_beneath_it_is_no_reference(start):
    with pytest.raises(ModelError, match=rf"init_lora_weights='{start}'.*name the model as `reference`"):
        with_adapter(load_policy(GOLDEN / "model"), starting_with(start), own_reference=True, mixed_precision=False)


def test_such_an_adapter_trains_against_the_model_itself(tmp_path):
    with pytest.raises(ModelError, match="pissa"):
        trainer_of(tmp_path, peft_config=starting_with("pissa"))
    options = {"peft_config": starting_with("pissa"), "max_steps": 1}
    (first,) = losses(trainer_of(tmp_path, reference=str(GOLDEN / "model"), loss=DPO(), **options))
    assert first == pytest.approx(LN2, abs=1e-5)
    losses(trainer_of(tmp_path, loss=SimPO(), **options))  # needs no reference


def test_an_adapter_of_prompts_is_refused(tmp_path):
    from peft import PromptTuningConfig

    with pytest.raises(ModelError, match="PROMPT_TUNING"):
        trainer_of(tmp_path, peft_config=PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


# --- what learns ------------------------------------------------------------------------------------------------------


def test_all_linear_reaches_the_vision_tower_and_its_adapter_learns(tmp_path):
    trainer = trainer_of(tmp_path, lora={"target_modules": "all-linear"}, max_steps=2)
    trainer.train()
    learned = {name for name, p in trainer.model.named_parameters() if "lora_B" in name and p.any()}
    assert any("visual.blocks" in name for name in learned)
    assert any("visual.merger" in name for name in learned)
    assert not any("lm_head" in name for name in learned)


def test_nothing_of_the_vision_tower_learns_by_default_whatever_is_frozen(tmp_path):
    trainer = trainer_of(tmp_path, lora={}, frozen=())
    assert not any("visual" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


def test_dora_learns_the_lengths_too(tmp_path):
    trainer = trainer_of(tmp_path, lora={"dora": True})
    lengths = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora_magnitude" in n and p.requires_grad}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert len(lengths) == len(language_linear_layers(load_policy(GOLDEN / "model")))
    assert all(not torch.equal(now[name], before) for name, before in lengths.items())


def test_rslora_scales_by_the_root_of_the_rank():
    model = load_policy(GOLDEN / "model")
    for rslora, scale in ((False, 8.0), (True, 16.0)):
        config = lora_config(LoraSection(r=4, alpha=32, rslora=rslora, target_modules=("q_proj",)), model)
        policy = with_adapter(load_policy(GOLDEN / "model"), config, own_reference=True, mixed_precision=False)
        layer = policy.get_base_model().model.language_model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == scale


def test_a_layer_that_is_not_there_is_named_though_others_are():
    with pytest.raises(ModelError, match=r"has no layer 'q_porj'; did you mean `q_proj`\?"):
        lora_config(LoraSection(target_modules=("v_proj", "q_porj")), load_policy(GOLDEN / "model"))


def test_dropout_reaches_the_adapter():
    model = load_policy(GOLDEN / "model")
    config = lora_config(LoraSection(dropout=0.25), model)
    policy = with_adapter(model, config, own_reference=True, mixed_precision=False)
    dropouts = {module.p for name, module in policy.named_modules() if name.endswith("lora_dropout.default")}
    assert dropouts == {0.25}


@pytest.mark.parametrize("frozen", [("vision",), ("projector",), ("vision", "language"), ("language",), ()])
def test_any_part_may_be_frozen_though_embeddings_are_tied(tmp_path, frozen):
    model = load_policy(GOLDEN / "model")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer_of(tmp_path, model=model, frozen=frozen, max_steps=1, attention="sdpa").train()
    for part, parameters in parameters_by_part(model).items():
        changed = any(not torch.equal(p, before[name]) for name, p in parameters)
        assert changed == (part not in frozen), part
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("layout", "lora", "kwargs"),
    [
        ("sdpa", {}, {"use_reentrant": True}),
        ("padded", {}, {"use_reentrant": True}),
        ("sdpa", None, {"every_n_layers": 2}),
    ],
    ids=["reentrant, packs", "reentrant, padded", "every second layer"],
)
def test_checkpointing_changes_no_step(tmp_path, layout, lora, kwargs):
    """The usual kind is tested with the trainer."""

    def train(**more):
        return records(trainer_of(tmp_path, lora=lora, attention=layout, learning_rate=1e-4, **more))

    off, on = train(), train(activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
    for plain, checkpointed in zip(off, on, strict=True):
        assert checkpointed["loss"] == pytest.approx(plain["loss"], abs=1e-6)
        assert checkpointed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


# --- quantized weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.fixture(params=[("nf4", True), ("nf4", False), ("int8", False)], ids=["nf4, avx512_bf16", "nf4", "int8"])
def quantize(bitsandbytes, monkeypatch, request):
    """How weights are quantized, on a CPU that has avx512_bf16 or has not, as far as bitsandbytes knows."""
    name, avx512_bf16 = request.param
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: avx512_bf16)
    return name


def test_only_the_language_model_is_quantized_and_the_fingerprint_knows(bitsandbytes):
    plain = load_policy(GOLDEN / "model")
    expected = set(language_linear_layers(plain))
    prints = {weights_fingerprint(plain)}
    for kind in ("nf4", "int8"):
        model = load_policy(GOLDEN / "model", quantize=kind)
        assert {n for n, m in model.named_modules() if type(m).__module__.startswith("bitsandbytes")} == expected
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert weights_fingerprint(model) == weights_fingerprint(load_policy(GOLDEN / "model", quantize=kind))
        prints.add(weights_fingerprint(model))
    assert len(prints) == 3


def test_an_adapter_over_quantized_weights_through_the_command(tmp_path, quantize):
    recipe = write_recipe(tmp_path, data=write_rows(tmp_path, rows_of(4)), model={"quantize": quantize}, lora={"r": 4})
    code, printed = unidpo("train", recipe, "train.num_train_epochs=2")
    assert code == 0, printed
    assert "packs do not work" not in printed
    assert "MatMul8bitLt" not in printed
    first, second = metrics_of(tmp_path / "run")
    assert first["rewards/margins"] == 0 < second["rewards/margins"]
    settings = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(GOLDEN / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model")
    assert any("lora_B" in name and p.any() for name, p in model.named_parameters())


def test_the_reference_of_quantized_weights_is_the_quantized_model(tmp_path, quantize):
    def train(name, **options):
        model = load_policy(GOLDEN / "model", quantize=name)
        torch.manual_seed(0)
        config = lora_config(LoraSection(r=4), model)
        return records(trainer_of(tmp_path, model=model, peft_config=config, max_steps=2, **options))

    # 8 bits round the inputs as well, in another pack otherwise.
    tolerance = 1e-6 if quantize == "nf4" else 5e-3
    stored, live = train(quantize, learning_rate=1e-3), train(quantize, learning_rate=1e-3, reference="live")
    assert [record["loss"] for record in stored] == pytest.approx([r["loss"] for r in live], abs=tolerance)
    whole = train(None)
    assert abs(whole[0]["logps/ref_chosen"] - stored[0]["logps/ref_chosen"]) > 1e-3


def test_weights_repacked_for_generating_text_are_refused(bitsandbytes, monkeypatch):
    model = load_policy(GOLDEN / "model", quantize="nf4")
    layer = next(m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
    # What a pass without gradient does on a CPU with avx512_bf16.
    monkeypatch.setattr(layer.weight.quant_state, "packing_format_for_cpu", True, raising=False)
    with pytest.raises(ModelError, match="load the model again"):
        with_adapter(model, lora_config(LoraSection(r=4), model), own_reference=False, mixed_precision=False)


def test_dora_over_4_bits_learns(bitsandbytes, tmp_path):
    model = load_policy(GOLDEN / "model", quantize="nf4", dtype=torch.bfloat16)
    config = lora_config(LoraSection(r=4, dora=True), model)
    first, _, last = losses(trainer_of(tmp_path, model=model, peft_config=config, loss=DPO(), bf16=True))
    assert first == pytest.approx(LN2, abs=1e-6)
    assert last < first


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # an adapter has none, says peft
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
def test_an_adapter_on_tied_embeddings_is_not_merged_into_both(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with_adapter(load_policy(GOLDEN / "model"), config, own_reference=True, mixed_precision=False).save_pretrained(
        tmp_path
    )
    with pytest.raises(ModelError, match="share their weights"):
        load_policy(tmp_path)


def test_an_adapter_cannot_be_quantized_as_if_it_were_a_model(bitsandbytes, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(GOLDEN / "model")}))
    with pytest.raises(ModelError, match="save the merged model"):
        load_policy(tmp_path, quantize="nf4")


def test_quantizing_without_the_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("unidpo.model.load.importlib.util.find_spec", lambda name: None)
    code, printed = unidpo("train", write_recipe(tmp_path, model={"quantize": "nf4"}, lora={"r": 4}))
    assert code == 2
    assert "pip install 'unidpo[quantize]'" in printed


@pytest.mark.parametrize(
    ("lora", "quantize", "expected"),
    [
        (None, "nf4", "add a `lora` section"),
        ({"dora": True}, "int8", "use nf4, or plain LoRA"),
        ({}, "int4", "of nf4"),
    ],
)
def test_quantizing_what_cannot_be(tmp_path, lora, quantize, expected):
    code, printed = unidpo("train", write_recipe(tmp_path, model={"quantize": quantize}, lora=lora))
    assert code == 2
    assert expected in printed


# --- arithmetic and optimizers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "lora"), [("fp16", {}), ("bf16", None)], ids=["float16, lora", "bfloat16, full"])
def test_half_the_bits_follow_the_whole(tmp_path, name, lora):
    """The loss is computed in float32; only the log-probabilities that enter it are coarser."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    options = {"lora": lora, "learning_rate": 1e-4}
    whole = losses(trainer_of(tmp_path, **options))
    half = losses(trainer_of(tmp_path, model=load_policy(GOLDEN / "model", dtype=dtype), **options, **{name: True}))
    assert half[0] == pytest.approx(whole[0], abs=1e-3)
    assert half[0] != whole[0]
    assert half[0] > half[1] > half[2]


def test_the_older_name_of_checkpointing_is_taken_without_a_word(tmp_path):
    recipe = write_recipe(tmp_path, data=write_rows(tmp_path, rows_of(2)), lora={"r": 4})
    code, printed = unidpo("train", recipe, "train.gradient_checkpointing=true")  # a warning would be an error here
    assert code == 0, printed
    code, printed = unidpo(
        "recipe", "check", recipe, "train.gradient_checkpointing=true", "train.activation_checkpointing=false"
    )
    assert code == 2
    assert "another name of `activation_checkpointing`" in printed


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "adamw_8bit", "paged_adamw_8bit", "lion_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_an_optimizer_by_name(tmp_path, optim):
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes")
    first, *_, last = losses(trainer_of(tmp_path, loss=SimPO(), optim=optim, learning_rate=1e-4))
    assert last < first


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("paged_ademamix_8bit", "cannot be used"),
        ("grokadamw", "pip install grokadamw"),
        ("adamw_9bit", "the nearest are adamw_8bit"),
    ],
)
def test_an_optimizer_that_cannot_be_had(tmp_path, optim, expected):
    if optim == "paged_ademamix_8bit" and (torch.cuda.is_available() or not pytest.importorskip("bitsandbytes")):
        pytest.skip("works here")
    code, printed = unidpo(
        "train", write_recipe(tmp_path, data=write_rows(tmp_path, rows_of(2))), f"train.optim={optim}"
    )
    assert code == 2, printed
    assert expected in printed
    assert "Traceback" not in printed
