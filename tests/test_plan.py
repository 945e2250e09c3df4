"""`unidpo plan`: work against torch's own counter, memory against what is held, tokens against what is trained on."""

import io
import itertools
import json
import math
import random
import sys
from dataclasses import astuple, replace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen2Config, Qwen2VLConfig, Qwen3VLConfig

from trainers import lora, trainer_of
from unidpo import cli
from unidpo.config import load_recipe
from unidpo.data.formats import load_pairs
from unidpo.errors import ModelError, RecipeError, UserError
from unidpo.losses import SimPO
from unidpo.model.encode import EncodedGroup, Encoder, plain_positions
from unidpo.model.features import image_features
from unidpo.model.lengths import fit_to_length
from unidpo.model.load import empty_model, load_processor
from unidpo.model.packs import pack
from unidpo.model.policy import Policy
from unidpo.plan import GPUS, Speed, gpu_by_name, plan_recipe
from unidpo.plan.data import patch_counter_of
from unidpo.plan.memory import Setting, features_bytes, peak_memory, sharding_of, state_bytes, tokens_that_fit
from unidpo.plan.report import clock
from unidpo.plan.shape import adapter_weights, shape_of
from unidpo.plan.work import Load, PatchCounter, forward, in_chunks, packed, padded, training
from worlds import GOLDEN, group, tiny_policy

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def qwen2_vl_2b():
    """The shape of Qwen/Qwen2-VL-2B, from what its config.json says."""
    text = {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    return shape_of(empty_model(Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)))


@pytest.fixture
def recipe_file(tmp_path):
    """A recipe of the golden model on a few ranked responses of its golden data."""
    rng = random.Random(0)
    words = ["red", "blue", "circle", "two", "left"]
    rows = [
        {
            "prompt": f"What is {prompt}?",
            "responses": [{"text": " ".join(rng.choices(words, k=n)), "score": float(n)} for n in (2, 5, 9)],
        }
        for prompt in range(5)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output: {tmp_path}/run\n"
        f"model: {{name: {GOLDEN}/model, dtype: float32}}\n"
        f"data: {{path: {tmp_path}/pairs.json, template: chatml}}\n"
        "train: {global_batch_pairs: 4}\n"
    )
    return path


@pytest.fixture
def plan_of(recipe_file):
    def plan(*overrides, **options):
        return plan_recipe(load_recipe(recipe_file, overrides), console=QUIET, **options)

    return plan


def test_the_fast_recipe_fits_the_card_it_is_made_for(qwen2_vl_2b):
    recipe = load_recipe(GOLDEN.parents[1] / "recipes" / "qwen2_vl_2b" / "uni_dpo_fast.yaml")
    setting = Setting(frozenset({"language"}))
    pack = sum((packed(850, [100] * 4, PatchCounter(4, stored=True).load([752])) for _ in range(9)), Load())
    fit = {size: tokens_that_fit(qwen2_vl_2b, setting, pack, size * 1e9, micro_batches_per_step=3) for size in (24, 80)}
    assert fit[24] == 0
    assert recipe.train.max_tokens_per_pack <= fit[80] < 13_000
    for tokens, fits in ((fit[80], True), (fit[80] + 100, False)):
        load = Load(*(round(count * tokens / pack.tokens) for count in astuple(pack)))
        assert (peak_memory(qwen2_vl_2b, setting, load, micro_batches_per_step=3).total <= 80e9) is fits


class TestAnEpochOfThePublishedData:
    """The published data: 50,555 pairs, 12,503 prompts, 752 image tokens and 98 of text, 100 a response."""

    PROMPT, RESPONSE = 752 + 98, 100
    IMAGE = PatchCounter(patches_per_token=4).load([752])

    def work(self, shape, load, reference):
        learning = training(shape, load, trainable_parts=["language"], checkpointing=True)
        return learning.total + forward(shape, reference).total

    @pytest.mark.parametrize(("every_logit", "expected"), [(True, 25e17), (False, 24e17)])
    def test_padded_pairs_encode_four_images_a_pair(self, qwen2_vl_2b, every_logit, expected):
        rows = [(self.PROMPT, self.RESPONSE)] * 2
        load = padded(rows, self.IMAGE.times(2), every_logit=every_logit)
        assert 50_555 * self.work(qwen2_vl_2b, load, load) == pytest.approx(expected, rel=0.025)

    @pytest.mark.parametrize(("responses", "times", "expected"), [(2, 50_555, 10e17), (4, 12_503, 2.9e17)])
    def test_packs_encode_one_image(self, qwen2_vl_2b, responses, times, expected):
        text = packed(self.PROMPT, [self.RESPONSE] * responses)
        assert times * self.work(qwen2_vl_2b, text + self.IMAGE, text) == pytest.approx(expected, rel=0.015)


class TestShape:
    def test_counts_weights_without_having_them(self, qwen2_vl_2b):
        layer = 2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960
        assert qwen2_vl_2b.language.matrices == 28 * layer
        assert sum(qwen2_vl_2b.weights.values()) == 2_208_985_600

    def test_the_matrices_of_the_tower_are_its_blocks_and_its_patch_embedding(self, qwen2_vl_2b):
        assert qwen2_vl_2b.vision.matrices == 32 * 12 * 1280**2 + 3 * 2 * 14 * 14 * 1280
        assert qwen2_vl_2b.projector_matrices == 5120 * 5120 + 5120 * 1536

    def test_an_adapter_is_counted_as_peft_makes_it(self):
        section = load_recipe("recipes/tiny.yaml", ["lora={r: 4}"]).lora
        hidden, wide, key_value = 128, 256, 64
        both_sides = 2 * (hidden + hidden) + 2 * (hidden + key_value) + 3 * (hidden + wide)
        assert adapter_weights(section, empty_model(GOLDEN / "model")) == 3 * 4 * both_sides

    def test_windows_and_soft_caps_keep_a_model_from_packs(self, gemma2):
        assert not shape_of(empty_model(gemma2)).packs


def seen_by(query, key, is_causal, mask):
    """Operations of scores and their sums, of what a query sees: torch itself would count what is masked out too."""
    batch, heads, queries, width = query
    keys = key[2]
    seen = queries * keys - (queries * (queries - 1) // 2 if is_causal or mask is not None else 0)
    return 4 * batch * heads * seen * width


# What torch's counter passes over: products that are added in place, and the attention kernel of the CPU, whose
# backward pass hands gradients through both products.
UNCOUNTED = {
    torch.ops.aten.addmm_: lambda own, left, right, **_: 2 * math.prod(left) * right[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, dropout=0.0, is_causal=False, *, attn_mask=None, **_: seen_by(q, k, is_causal, attn_mask)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, out, lse, dropout, is_causal, *, attn_mask=None, **_: (
            2 * seen_by(q, k, is_causal, attn_mask)
        )
    ),
}


def flops_of_a_step(tmp_path, groups, **options):
    """Floating-point work of the trainer's passes, as torch counts it."""
    trainer = trainer_of(tmp_path, groups, loss=SimPO(), batch=(2, 2), max_steps=1, attention="sdpa", **options)
    step = trainer.training_step
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)

    def counted(*arguments, **keywords):
        with counter:
            return step(*arguments, **keywords)

    trainer.training_step = counted
    trainer.train()
    return counter.get_total_flops()


class TestAgainstTorch:
    """On the golden model, four pairs in two packs."""

    LENGTHS = (30, 60)

    def load(self, groups, *, stored=False):
        encoder = Encoder(load_processor(GOLDEN / "model"), plain_positions)
        counted = fit_to_length(groups, encoder)
        tower = replace(patch_counter_of(encoder, patch_size=14), stored=stored)
        each = [packed(t.prompt, t.responses, tower.load(t.images)) for t in counted.tokens]
        return sum(each, Load())

    # A layer that is computed again is left where its last tensor is known, before its last product.
    @pytest.mark.parametrize(
        ("frozen", "checkpointing", "tolerance"),
        [
            (("vision", "projector"), False, 0.002),
            (("vision", "projector"), True, 0.05),
            (("vision", "language"), False, 0.03),
            ((), True, 0.06),
        ],
    )
    def test_the_work_of_a_step_is_what_torch_counts(self, tmp_path, frozen, checkpointing, tolerance):
        groups = [group(responses=self.LENGTHS, seed=i, row=i + 1, side=112) for i in range(4)]
        trainable = [part for part in ("vision", "projector", "language") if part not in frozen]
        shape = shape_of(empty_model(GOLDEN / "model"))
        planned = training(shape, self.load(groups), trainable_parts=trainable, checkpointing=checkpointing)
        found = flops_of_a_step(tmp_path, groups, frozen=frozen, activation_checkpointing=checkpointing)
        assert planned.total == pytest.approx(found, rel=tolerance)

    def test_the_work_of_an_adapter(self, tmp_path):
        groups = [group(images=0, responses=self.LENGTHS, seed=i, row=i + 1) for i in range(4)]
        model = empty_model(GOLDEN / "model")
        shape = shape_of(model)
        weights = 3 * 4 * ((128 + 128) + (128 + 64))  # 3 layers, rank 4, q_proj and v_proj
        planned = training(shape, self.load(groups), trainable_parts=[], checkpointing=False, adapter=weights)
        found = flops_of_a_step(tmp_path, groups, peft_config=lora())
        assert planned.total == pytest.approx(found, rel=0.03)

    @pytest.mark.parametrize("chunk", [50, 97, 10**6])
    def test_all_logits_but_the_last_chunk_are_computed_twice(self, tmp_path, monkeypatch, chunk):
        for module in ("unidpo.model.head", "unidpo.plan.work"):
            monkeypatch.setattr(f"{module}.LOGITS_CHUNK_BYTES", 4 * 2080 * chunk)
        groups = [group(images=0, responses=self.LENGTHS, seed=i, row=i + 1) for i in range(4)]
        shape = shape_of(empty_model(GOLDEN / "model"))
        halves = [in_chunks(self.load(groups[i : i + 2]), shape) for i in (0, 2)]
        planned = training(shape, sum(halves, Load()), trainable_parts=["language"], checkpointing=False)
        assert planned.total == pytest.approx(flops_of_a_step(tmp_path, groups), rel=0.002)

    def test_the_work_of_a_step_with_features_from_disk(self, tmp_path):
        groups = [group(responses=self.LENGTHS, seed=i, row=i + 1, side=112) for i in range(4)]
        load, shape = self.load(groups, stored=True), shape_of(empty_model(GOLDEN / "model"))
        planned = training(shape, load, trainable_parts=["language"], checkpointing=False)
        found = flops_of_a_step(tmp_path, groups, cache_image_features=True)
        assert planned.vision == planned.projector == 0
        assert planned.total == pytest.approx(found, rel=0.002)


LOAD = packed(300, [100, 100])


def text_model(layers):
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def fused_attention(module, query, key, value, mask, **options):
    """Keeps its inputs and its output, as the kernels of a GPU do; who sees whom changes nothing about that."""
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2), None


AttentionInterface.register("fused", fused_attention)


def kept_by_autograd(layers, *, narrow):
    """Bytes of the tensors that a forward pass of `LOAD` saves, weights and their narrow copies left out."""
    model = text_model(layers)
    policy = Policy(model, model, lambda: torch.autocast("cpu", torch.bfloat16, enabled=narrow))
    policy.set_attention("fused")
    prompt, *responses = (torch.randint(100, (tokens,)) for tokens in (300, 100, 100))
    encoded = EncodedGroup(prompt, torch.arange(300)[None], torch.zeros(300).long(), tuple(responses), (0, 0), {})
    weights = {shape for p in model.parameters() for shape in (p.shape, p.T.shape if p.dim() == 2 else p.shape)}
    saved = {}

    def save(tensor):
        if tensor.shape not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # which keeps the storage, and its address, alive
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        policy.response_logps(pack([encoded]))
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


class TestMemory:
    def test_weights_gradients_and_moments_are_those_of_a_trainer(self, tmp_path, plan_of):
        trainer = trainer_of(tmp_path, loss=SimPO(), max_steps=1)
        gradients = []
        zero = trainer.model.zero_grad
        trainer.model.zero_grad = lambda *a, **k: (gradients.append(self.held(trainer.model, "grad")), zero(*a, **k))
        trainer.train()
        states = [t for s in trainer.optimizer.state.values() for name, t in s.items() if name != "step"]
        memory = plan_of("loss={name: simpo}").memory
        assert memory.weights == self.held(trainer.model, "data")
        assert memory.optimizer == sum(state.nbytes for state in states)
        assert max(gradients) == 4 * plan_of().trainable_weights

    @staticmethod
    def held(model, what):
        tensors = [getattr(parameter, what) for parameter in model.parameters()]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def test_a_frozen_weight_takes_two_bytes_and_a_trainable_one_sixteen(self, qwen2_vl_2b):
        setting = Setting(trainable_parts=frozenset(["language"]))
        memory = peak_memory(qwen2_vl_2b, setting, Load(tokens=10), micro_batches_per_step=2)
        frozen = qwen2_vl_2b.weights["vision"] + qwen2_vl_2b.weights["projector"]
        assert memory.weights == 2 * frozen + 4 * qwen2_vl_2b.weights["language"]
        assert memory.optimizer == 8 * qwen2_vl_2b.weights["language"]

    @pytest.mark.parametrize("narrow", [False, True])
    def test_a_layer_keeps_as_much_as_autograd_keeps_of_it(self, narrow):
        """Bytes of the tensors saved for the backward pass: what two layers more add, which are nothing but layers."""
        few, many = (kept_by_autograd(layers, narrow=narrow) for layers in (2, 4))
        setting = Setting(trainable_parts=frozenset(["language"]), narrow=narrow)
        shape = shape_of(text_model(2))
        small, large = (
            peak_memory(
                replace(shape, language=replace(shape.language, layers=n)), setting, LOAD, micro_batches_per_step=2
            )
            for n in (2, 4)
        )
        assert large.activations - small.activations == pytest.approx(many - few, rel=0.1)

    @pytest.mark.parametrize(("narrow", "made"), [(False, 4), (True, 4 + 2)])
    def test_a_table_that_is_the_head_too_has_one_gradient_besides_those_that_are_there(
        self, qwen2_vl_2b, narrow, made
    ):
        """A sum in 32 bits, and a product in 16 where the arithmetic is."""
        setting = Setting(trainable_parts=frozenset(["language"]), narrow=narrow)
        first, later = (peak_memory(qwen2_vl_2b, setting, Load(tokens=1), micro_batches_per_step=n) for n in (1, 2))
        table, learning = 151936 * 1536, qwen2_vl_2b.weights["language"]
        assert first.gradients == 4 * learning
        assert later.gradients == 4 * learning + made * table

    @pytest.mark.parametrize("narrow", [False, True])
    def test_logits_take_one_chunk_and_a_step(self, qwen2_vl_2b, narrow):
        setting = Setting(trainable_parts=frozenset(), adapter=1000, narrow=narrow)
        load = packed(1, [2**26 // 151936])  # which fills a chunk
        memory = peak_memory(qwen2_vl_2b, setting, load, micro_batches_per_step=1)
        chunk, step = 2**28, 2**25
        assert memory.moment == "logits"
        assert memory.logits == pytest.approx(chunk / 2 + 2 * step if narrow else chunk + step, rel=0.01)

    def test_checkpointing_trades_memory_for_work(self, plan_of):
        overrides = ("train.per_device_train_batch_size=4",)
        plain, checkpointed = plan_of(*overrides), plan_of(*overrides, "train.gradient_checkpointing=true")
        assert checkpointed.memory.activations < plain.memory.activations
        assert checkpointed.epoch_work.language == pytest.approx(4 / 3 * plain.epoch_work.language)

    @pytest.mark.parametrize(
        ("sharding", "weights", "states"),
        [("ddp", 4, 8), ("zero2", 2, 12 / 8), ("zero3", 2 / 8, 12 / 8), ("fsdp", 4 / 8, 8 / 8)],
    )
    def test_sharding_divides_what_it_says(self, qwen2_vl_2b, sharding, weights, states):
        """Bytes of each of eight GPUs per trainable weight. DeepSpeed keeps float32 weights with the states."""
        setting = Setting(trainable_parts=frozenset(qwen2_vl_2b.weights), sharding=sharding, gpus=8)
        memory = peak_memory(qwen2_vl_2b, setting, Load(tokens=10), micro_batches_per_step=2)
        every = sum(qwen2_vl_2b.weights.values())
        assert memory.weights == pytest.approx(weights * every)
        assert memory.optimizer == pytest.approx(states * every)

    @pytest.mark.parametrize(
        ("name", "size"), [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("lion_8bit", 1), ("sgd", 0), ("other", 8)]
    )
    def test_optimizers_keep_more_or_less(self, name, size):
        assert state_bytes(name) == size

    def test_a_deepspeed_file_says_how_weights_are_spread(self, recipe_file, tmp_path):
        (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
        given = load_recipe(recipe_file, [f"train.deepspeed={tmp_path}/zero.json"])
        assert sharding_of(given, 8) == "zero3"
        with pytest.raises(RecipeError, match="cannot be read as a DeepSpeed file"):
            sharding_of(load_recipe(recipe_file, [f"train.deepspeed={tmp_path}/none.json"]), 8)


class TestTokens:
    @pytest.mark.parametrize("layout", ["auto", "padded"])
    def test_an_epoch_has_the_tokens_the_trainer_sees(self, recipe_file, plan_of, tmp_path, layout):
        overrides = [f"model.attention={layout}", "train.per_device_train_batch_size=2", "data.group_by_prompt=true"]
        trainer = trainer_of(
            tmp_path / "run",
            load_pairs(load_recipe(recipe_file).data.path, group_by_prompt=True),
            batch=(2, 2),
            attention=layout,
            template="chatml",
            loss=SimPO(),
        )
        trainer._apply_setup()
        batches = [batch.responses for step in trainer.read(trainer.get_train_dataloader()) for batch in step.batches]
        plan = plan_of(*overrides)
        assert plan.data.response_tokens == sum(int(batch.response_tokens.sum()) for batch in batches)
        if layout == "auto":  # with padding the order, which is drawn, decides
            assert plan.data.tokens == sum(batch.input_ids.numel() for batch in batches)

    def test_images_have_the_processors_own_count(self):
        encoder = Encoder(load_processor(GOLDEN / "model"), plain_positions)
        groups = [group(images=2, side=112), group(images=1, seed=1, side=56)]
        counted = fit_to_length(groups, encoder)
        assert [tokens.images for tokens in counted.tokens] == [(16, 16), (4,)]
        for each, tokens in zip(groups, counted.tokens, strict=True):
            encoded = encoder.encode(each)
            assert tokens.prompt == len(encoded.prompt_ids)
            assert tokens.responses == tuple(map(len, encoded.response_ids))
            patches = patch_counter_of(encoder, patch_size=14).load(tokens.images).patches
            assert patches == len(encoded.vision["pixel_values"])

    def test_grouping_encodes_each_prompt_once(self, recipe_file, plan_of, tmp_path):
        rows = json.loads((tmp_path / "pairs.json").read_text())
        pairs = [
            {"instruction": row["prompt"], "chosen": better["text"], "rejected": worse["text"]}
            | {"score_chosen": better["score"], "score_rejected": worse["score"]}
            for row in rows
            for worse, better in itertools.combinations(row["responses"], 2)
        ]
        (tmp_path / "rows.json").write_text(json.dumps(pairs))
        # 5 prompts of 3 responses, which make 3 pairs each; steps of 3 pairs, so that none is cut in two.
        data = [f"data.path={tmp_path}/rows.json", "data.shuffle=false", "train.global_batch_pairs=3"]
        apart, together = plan_of(*data), plan_of(*data, "data.group_by_prompt=true")
        assert (apart.data.groups, together.data.groups) == (15, 5)
        assert apart.data.pairs == together.data.pairs == 15
        prompts = together.data.tokens - together.data.response_tokens
        assert apart.data.tokens == 3 * prompts + 2 * together.data.response_tokens
        assert [way.name for way in together.ways][-1] == "a pack per prompt"
        assert together.ways[-1].work == pytest.approx(together.epoch_work.total + together.reference_work.total)

    def test_prompts_that_do_not_fit_are_counted_and_said(self, plan_of):
        lengths = plan_of().data
        plan = plan_of(f"data.max_length={lengths.tokens // lengths.groups // 2 + 5}")
        assert plan.data.cut + plan.data.too_long > 0
        assert any("cut" in note or "no room" in note for note in plan.notes())

    def test_nothing_that_fits_is_an_error(self, plan_of):
        with pytest.raises(UserError, match=r"no prompt fits data\.max_length=3"):
            plan_of("data.max_length=3")


class TestReference:
    def test_a_stored_one_is_one_forward_pass_whatever_the_epochs(self, plan_of):
        once, thrice = plan_of(), plan_of("train.num_train_epochs=3")
        assert once.reference_work == thrice.reference_work
        assert thrice.total_work == pytest.approx(3 * once.epoch_work.total + once.reference_work.total)

    def test_a_live_one_runs_along_and_is_held(self, plan_of):
        stored, live = plan_of("train.num_train_epochs=2"), plan_of("train.num_train_epochs=2", "reference=live")
        assert live.reference_work.head == pytest.approx(2 * stored.epoch_work.head / 3)
        assert live.memory.weights == 2 * stored.memory.weights

    def test_none_is_needed_by_simpo(self, plan_of):
        assert plan_of("loss={name: simpo}").reference_work is None


class TestFeatures:
    @pytest.fixture
    def plan_of(self, plan_of, tmp_path):
        """Of four prompts with an image, the last one twice."""
        rows = []
        for i in (0, 1, 2, 3, 3):
            (tmp_path / f"{i}.png").exists() or group(seed=i, side=112).images[0].save(tmp_path / f"{i}.png")
            responses = [{"text": f"red {len(rows)}", "score": 2.0}, {"text": "a blue circle", "score": 1.0}]
            rows.append({"prompt": f"<image>What is {i}?", "images": [f"{i}.png"], "responses": responses})
        (tmp_path / "pairs.json").write_text(json.dumps(rows))
        return plan_of

    def test_move_the_tower_from_steps_and_reference_to_one_pass(self, plan_of):
        more = "train.num_train_epochs=3"
        seeing, stored = plan_of(more), plan_of(more, "data.cache_image_features=true")
        once = stored.features.work
        assert (once.language, once.attention, once.head) == (0, 0, 0)
        # An epoch has five images, the reference pass and that of the features the four distinct ones.
        assert once.vision == pytest.approx(4 / 5 * seeing.epoch_work.vision)
        assert stored.epoch_work == replace(seeing.epoch_work, vision=0, projector=0)
        assert stored.reference_work == replace(seeing.reference_work, vision=0, projector=0)
        assert stored.total_work == pytest.approx(
            3 * stored.epoch_work.total + stored.reference_work.total + once.total, rel=1e-9
        )
        assert stored.data == seeing.data
        assert stored.ways[:2] == seeing.ways[:2]
        assert stored.ways[-1].work < seeing.ways[-1].work

    def test_work_and_disk_are_those_of_the_pass(self, tmp_path, plan_of):
        plan = plan_of("data.cache_image_features=true")
        groups = load_pairs(tmp_path / "pairs.json")
        model, _, encoder = tiny_policy()
        work = disk = 0
        for one in groups[:4]:
            with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
                features = image_features(model, encoder.encode(one).vision)
            work += counter.get_total_flops()
            disk += features.pooled.nbytes
        assert plan.features.work.total == pytest.approx(work, rel=0.002)
        assert plan.features.disk == disk

    def test_of_a_deepstack_take_a_vector_for_each_of_its_layers(self):
        text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16, "vocab_size": 99}
        vision = {"depth": 4, "hidden_size": 32, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1, 2]}
        shape = shape_of(empty_model(Qwen3VLConfig(text_config=text, vision_config=vision)))
        assert features_bytes(shape, 10, narrow=True) == 10 * 4 * 32 * 2

    def test_leave_nothing_of_the_tower_in_memory(self, qwen2_vl_2b):
        setting, seeing = (
            Setting(trainable_parts=frozenset(["language"])),
            packed(850, [100, 100], PatchCounter(4).load([752])),
        )
        shape = replace(qwen2_vl_2b, language=replace(qwen2_vl_2b.language, layers=0))
        moments = [
            peak_memory(shape, setting, load, micro_batches_per_step=1) for load in (seeing, seeing.with_features())
        ]
        pixels, features = 752 * 4 * 4 * 3 * 2 * 14**2, 752 * 1536 * 2
        assert moments[0].activations - moments[1].activations == pixels - features

    def test_pass_takes_time_at_the_rate_of_training(self, plan_of):
        overrides = ("data.cache_image_features=true", "loss={name: simpo}")
        by_rate, by_work = plan_of(*overrides, speeds=(Speed(pairs_per_second=5), Speed(tflops=1e-3))).times
        assert by_rate.training == pytest.approx(1)
        assert by_rate.features / by_rate.training == pytest.approx(by_work.features / by_work.training)
        assert by_rate.total == by_rate.training + by_rate.features > by_rate.training

    def test_are_seen_by_a_live_reference_too(self, plan_of):
        # It takes those of the policy, stored or not; a reference that is another model sees the images itself.
        assert plan_of("reference=live").reference_work.vision == 0
        other = plan_of(f"reference={GOLDEN}/model", "data.cache_image_features=true")
        assert other.reference_work.vision > 0 == other.epoch_work.vision

    def test_cost_nothing_without_images(self, recipe_file):
        recipe = load_recipe(recipe_file, ["data.cache_image_features=true"])
        assert plan_recipe(recipe, console=QUIET).features is None

    def test_that_an_adapter_changes_are_an_error(self, plan_of):
        with pytest.raises(ModelError, match=r"data\.cache_image_features needs .* are not trained"):
            plan_of("data.cache_image_features=true", "lora={r: 4, target_modules: [fc1, q_proj]}")

    def test_are_told_in_table_and_json(self, plan_of):
        plan = plan_of("data.cache_image_features=true", speeds=(Speed(tflops=1e-3),))
        console = Console(width=160, record=True, quiet=False, file=io.StringIO())
        plan.render(console)
        out = console.export_text()
        for words in ("features of images", "on disk"):
            assert words in out, words
        plain = json.loads(json.dumps(plan.to_json()))
        assert plain["features"]["work"]["total"] == plan.features.work.total
        assert plain["times"][0]["features"] == plan.times[0].features > 0


class TestTime:
    def test_is_the_work_over_the_rate(self, plan_of):
        plan = plan_of(speeds=(Speed(tflops=2.0),), gpus=2)
        assert plan.times[0].total == pytest.approx(plan.total_work / 4e12)

    def test_measured_pairs_a_second_decide_the_training(self, plan_of):
        plan = plan_of("train.num_train_epochs=2", speeds=(Speed(pairs_per_second=0.5),))
        assert plan.times[0].training == pytest.approx(2 * 15 / 0.5)
        assert plan.times[0].reference == pytest.approx(60 * plan.reference_work.total / (2 * plan.epoch_work.total))

    @pytest.mark.parametrize("name", ["H100", "h100", "NVIDIA H100 SXM", "H100-80GB"])
    def test_cards_have_several_spellings(self, name):
        assert gpu_by_name(name).tflops == 989

    def test_every_card_of_the_table_is_found_by_its_name(self):
        assert [gpu_by_name(gpu.name) for gpu in GPUS] == list(GPUS)

    @pytest.mark.parametrize(
        ("seconds", "said"),
        [(1, "1.0 seconds"), (119, "119.0 seconds"), (120, "2.0 minutes"), (5400, "1.5 hours"), (10**6, "12 days")],
    )
    def test_is_said_in_a_fitting_unit(self, seconds, said):
        assert clock(seconds) == said


class TestCommand:
    @pytest.fixture
    def command(self, monkeypatch, capfd):
        def run(*arguments):
            monkeypatch.setattr(sys, "argv", ["unidpo", "plan", *map(str, arguments)])
            with pytest.raises(SystemExit) as done:
                cli.main()
            out, err = capfd.readouterr()
            return done.value.code or 0, out, err

        return run

    def test_prints_a_plan(self, command, recipe_file):
        code, out, _ = command(recipe_file, "--gpu", "H100")
        assert code == 0
        for words in (
            "15  of 5 prompts",
            "Floating-point work",
            "smallest card",
            "train.max_tokens_per_pack",
            "H100, 40% of 989 TFLOP/s",
            "estimates",
        ):
            assert words in out, words

    def test_prints_json(self, command, recipe_file):
        code, out, _ = command(recipe_file, "--json", "--rate", "3", "train.seed=1")
        assert code == 0
        plan = json.loads(out)
        assert plan["data"]["pairs"] == 15
        assert plan["times"][0]["training"] == pytest.approx(5)
        assert math.isclose(
            plan["memory"]["total"],
            sum(
                plan["memory"][p]
                for p in ("weights", "gradients", "optimizer", "copies", "activations", "logits", "margin")
            ),
        )

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["--gpu", "H1000"], "no such card"),
            (["--gpu", "H100", "--rate", "1"], "give one of --gpu, --tflops and --rate"),
            (["--tflops", "0"], "must be a number above 0"),
            (["--rate", "nan"], "must be a number above 0"),
            (["--gpus", "0"], "--gpus"),
            (["model.name=nowhere"], "nowhere"),
            (["data.path=nowhere.json"], "nowhere.json"),
            (["loss.betta=1"], "betta"),
        ],
    )
    def test_says_what_is_wrong(self, command, recipe_file, arguments, reason):
        code, _, err = command(recipe_file, *arguments)
        assert code == 2
        assert reason in err
        assert "Traceback" not in err
