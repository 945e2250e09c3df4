"""Training passes on a CPU that says it is a GPU: the CPU's numbers, no mixed devices, and budgets for each pass."""

import copy
import inspect
import random
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedModel, Trainer
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.trainer_utils import rotate_checkpoints

from benchmarks.fused import TOKENS, Asked, asked
from benchmarks.pretended_gpu import GPU, MixedDevicesError, OnGPU
from benchmarks.pretended_torch import pretended_gpu
from benchmarks.pretended_training import Case, checkpoint_layers, counted
from benchmarks.shapes import SHAPES
from trainers import trainer_of
from unidpo.losses import LOSSES, UniDPO
from unidpo.model.attention import BACKENDS, missing
from unidpo.model.batches import BatchMaker
from unidpo.model.features import image_features
from unidpo.model.pack_check import padded_rows
from unidpo.model.packs import images_of, pack, with_features
from unidpo.model.parts import freeze
from unidpo.model.policy import Policy
from unidpo.model.tower import tower_of
from unidpo.model.transfer import ahead
from unidpo.training.metrics import PairColumns
from unidpo.training.objective import Objective
from unidpo.training.trainer import PreferenceTrainer
from worlds import group, tiny_policy

with pretended_gpu(numbers=True):
    PACKS = [name for name in BACKENDS if missing(name, device=GPU, dtype=torch.bfloat16) is None]
CPU = torch.device("cpu")
LAYOUTS = [*PACKS, "padded"]
# As wide as Qwen2-VL-2B, with two layers of everything: shapes alone cost nothing to be wide.
SHORT = replace(SHAPES["gpu"], layers=2, vision=(1280, 2, 16))


class Budget(NamedTuple):
    """What one pass of `SHORT` may ask for at most: 13 prompts of 4 responses, an image each."""

    waits: int
    blocking_copies: int
    kernels: int
    bytes: float
    copied_bytes: float


BUDGETS = {
    ("varlen", "images"): Budget(2, 0, 1760, 186e9, 26e6),
    ("varlen", "features"): Budget(2, 0, 1630, 157e9, 32e6),
    ("sdpa", "images"): Budget(2, 0, 3190, 188e9, 26e6),
    ("sdpa", "features"): Budget(2, 0, 2980, 159e9, 32e6),
}
# Twice the prompts ask for at most so many times the kernels and the bytes.
GROWTH = 2.2


@pytest.fixture(scope="module")
def world():
    """Two prompts with an image and three responses each, in batches of each layout, with pixels and with features."""
    model, _, encoder = tiny_policy()
    freeze(model, ("vision", "projector"))
    groups = [group(responses=(4, 7, 3), seed=seed, row=1 + 3 * seed) for seed in range(2)]
    encoder = encoder.in_bytes(groups)
    batches, tower = {}, tower_of(model)
    for layout in LAYOUTS:
        packs = partial(pack, table=None if layout == "padded" else BACKENDS[layout].table, tower=tower)
        collate = padded_rows(encoder, tower) if layout == "padded" else packs
        rng = random.Random(0)
        ref_logps = [torch.tensor([rng.uniform(-60, -20) for _ in range(3)], dtype=torch.float64) for _ in groups]
        maker = BatchMaker(groups, encoder, collate, ref_logps)
        batch, _ = maker.batch([(place, tuple(range(len(each.pairs)))) for place, each in enumerate(groups)])
        with torch.no_grad():
            features = image_features(model, images_of(batch.responses))
        batches[layout, "images"] = batch
        batches[layout, "features"] = replace(batch, responses=with_features(batch.responses, features))
    return model, batches


def a_pass(policy, batch, loss, device):
    """Log-probabilities, loss and gradients of a micro-batch, and its rows of the ledger."""
    policy.model.zero_grad()
    columns = PairColumns()
    for on_device in ahead([batch], device):
        seen, terms = Objective(loss).of_pairs(policy, on_device, policy_is_reference=False, reward_shift=0.1)
        terms.loss.mean().backward()
        columns.add(batch, seen, terms)
    gradients = {name: held(p.grad) for name, p in policy.model.named_parameters() if p.grad is not None}
    return columns.take(), gradients


def held(tensor):
    return tensor.held.clone() if isinstance(tensor, OnGPU) else tensor.clone()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("images", ["images", "features"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pass_on_the_gpu_has_the_numbers_of_the_cpu(world, layout, images, checkpointing):
    """A mixed device raises. Each loss, which does not know whether layers are computed again."""
    original, batches = world
    model = copy.deepcopy(original).train()
    policy = Policy(model, model)
    if layout != "padded":
        policy.set_attention(BACKENDS["sdpa"].attention)
    if checkpointing:
        checkpoint_layers(model)
    losses = [UniDPO()] if checkpointing else [loss() for loss in LOSSES.values()]
    on_cpu = [a_pass(policy, batches["padded" if layout == "padded" else "sdpa", images], loss, CPU) for loss in losses]
    with pretended_gpu(numbers=True) as gpu:
        gpu.put(model)
        if layout != "padded":
            policy.set_attention(BACKENDS[layout].attention)
        on_gpu = [a_pass(policy, batches[layout, images], loss, GPU) for loss in losses]
    for (columns, gradients), (expected_columns, expected) in zip(on_gpu, on_cpu, strict=True):
        for name, values in expected_columns.items():
            known = values if values[0] is None or name == "file" else pytest.approx(values, rel=1e-4, abs=1e-5)
            assert columns[name] == known, name
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert (gradient - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


@pytest.mark.parametrize("images", ["images", "features"])
def test_a_training_on_the_gpu_is_that_on_the_cpu(tmp_path, images):
    """From the pack check to the last update; the log and the weights."""
    groups = [group(responses=(4, 7, 3), seed=seed, row=1 + 3 * seed) for seed in range(4)]

    def train(place, **more):
        model, processor, _ = tiny_policy()
        if more["use_cpu"] is False:
            gpu.put(model)
        trainer = trainer_of(
            tmp_path / place,
            groups,
            model,
            processing_class=processor,
            cache_image_features=images == "features",
            cache=tmp_path / place,
            attention="sdpa",
            compile="off",
            batch=(2, 3),
            **more,
        )
        trainer.train()
        logged = [record for record in trainer.state.log_history if "loss" in record]
        return logged, {name: held(weight) for name, weight in model.named_parameters()}

    logged, weights = train("cpu", use_cpu=True)
    try:
        with pretended_gpu(numbers=True) as gpu:
            on_gpu, weights_on_gpu = train("gpu", use_cpu=False)
            counts = gpu.counts
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert len(logged) == 2
    for record, expected in zip(on_gpu, logged, strict=True):
        assert record == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weights_on_gpu[name], weight, rtol=1e-4, atol=2e-5)
    ours = {place: count for (_, place), count in counts.waits.items() if place.startswith("unidpo/training/")}
    assert sum(ours.values()) == len(logged), ours  # the numbers of a step's pairs
    assert not [place for kind, place in counts.copies if kind != "pinned" and place.startswith("unidpo/")]


def test_tensors_of_two_devices_do_not_meet():
    with pretended_gpu(numbers=True):
        here, there = torch.ones(3, device="cuda"), torch.ones(3)
        assert (here.device, here.sum().item()) == (GPU, 3.0)
        with pytest.raises(MixedDevicesError, match=r"test_pretended_gpu.* on the host, \(3,\)"):
            here + there


def test_what_the_host_waits_for_is_counted():
    with pretended_gpu(numbers=True) as gpu:
        values = torch.arange(4.0).to("cuda")
        pinned = torch.ones(5).pin_memory().to("cuda", non_blocking=True)
        torch.ones(5).to("cuda", non_blocking=True)
        assert [kind for kind, _ in gpu.counts.copies] == ["blocking", "pinned", "pageable"]
        assert gpu.counts.copied_bytes == 4 * 14
        for wait in (
            lambda: values.tolist(),
            lambda: bool(values[0]),
            lambda: values.nonzero(),
            lambda: values[values > 1],
            lambda: pinned.cpu(),
            lambda: torch.cuda.current_stream().synchronize(),
        ):
            before = sum(gpu.counts.waits.values())
            wait()
            assert sum(gpu.counts.waits.values()) == before + 1
        assert all("test_pretended_gpu" in place for _, place in gpu.counts.waits)


def test_kernels_bytes_and_work_are_counted():
    with pretended_gpu(numbers=False) as gpu:
        left, right = torch.empty(8, 16, device="cuda"), torch.empty(16, 4, device="cuda")
        gpu.reset()
        product = left @ right
        assert (gpu.counts.kernels, gpu.counts.work["mm"]) == ({"mm": 1}, 2 * 8 * 16 * 4)
        assert gpu.counts.matrix_bytes["mm"] == 4 * (8 * 16 + 16 * 4 + 8 * 4)
        product.view(-1, 2)[1:].t()
        assert sum(gpu.counts.kernels.values()) == 1  # views are free
        product.add_(1)
        assert gpu.counts.other_bytes["add_"] == 2 * 4 * 32
        before = gpu.now
        more = torch.empty(1000, dtype=torch.bfloat16, device="cuda")
        assert gpu.peak == gpu.now == before + 2048  # whole blocks of 512 bytes
        del more
        assert gpu.now == before


def growths(backend, images):
    return [counted(SHORT, Case("", prompts, backend=backend, features=images == "features")) for prompts in (13, 26)]


@pytest.mark.parametrize("images", ["images", "features"])
@pytest.mark.parametrize("backend", PACKS)
def test_a_pass_stays_within_its_budget_and_grows_in_proportion(backend, images):
    once, twice = growths(backend, images)
    asked = Budget(*(once[name] for name in Budget._fields))
    assert all(found <= most for found, most in zip(asked, BUDGETS[backend, images], strict=True)), asked
    assert (twice["waits"], twice["blocking_copies"]) == (once["waits"], once["blocking_copies"])
    for what in ("kernels", "bytes"):
        assert twice[what] <= GROWTH * once[what], what


@pytest.mark.parametrize("case", [Case("", 1, 2), Case("", 4), Case("", 4, checkpointing=True)], ids=str)
def test_the_peak_is_what_the_plan_says(case):
    """All layers of the language model; the frozen tower's come and go."""
    found = counted(replace(SHAPES["gpu"], vision=(1280, 2, 16)), replace(case, features=True))
    assert found["peak_bytes"] == pytest.approx(found["planned_bytes"], rel=0.05)


def test_fused_work_is_counted_where_matrix_products_part_it():
    def layer(inputs, weight):
        wide = inputs * 2 + 1
        product = wide @ weight
        return torch.sigmoid(product) * wide, product.sum(0)

    graph = make_fx(layer)(torch.ones(TOKENS, 8), torch.ones(8, 8))
    each = 4 * TOKENS * 8
    # inputs → wide; product and wide → result; product, once more, → sums
    assert asked(graph, growth=10) == Asked(kernels=4, other_bytes=10 * each * (2 + 3 + 1) + 4 * 8)


# --- what is used of torch and transformers ---------------------------------------------------------------------------


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_trainer_overrides_what_transformers_calls():
    """Each method that takes the place of one of transformers' takes what that takes."""
    ours = [each for each in PreferenceTrainer.__mro__ if each.__module__.startswith("unidpo")]
    overridden = {
        name: method
        for each in reversed(ours)
        for name, method in vars(each).items()
        if callable(method) and name != "__init__" and hasattr(Trainer, name)
    }
    assert {"training_step", "get_batch_samples", "_save_checkpoint", "_load_rng_state", "log"} <= overridden.keys()
    for name, method in overridden.items():
        known = parameters(getattr(Trainer, name))
        assert [each for each in parameters(method) if each != "kwargs"] == [
            k for k in known if k in parameters(method)
        ], name
        assert "kwargs" in parameters(method) or parameters(method) == known, name


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (Qwen2VLModel.forward, {"input_ids", "position_ids", "mm_encoder_outputs", "image_grid_thw", "pixel_values"}),
        (Qwen2VLModel.get_image_features, {"pixel_values", "image_grid_thw"}),
        (PreTrainedModel.get_encoder, {"modality"}),
        (PreTrainedModel.set_attn_implementation, {"attn_implementation"}),
        (AttentionInterface.register, {"key", "value"}),
        (rotate_checkpoints, {"output_dir", "save_total_limit", "best_model_checkpoint"}),
        (flex_attention, {"query", "key", "value", "block_mask", "scale", "enable_gqa"}),
        (
            BlockMask.from_kv_blocks,
            {
                "kv_num_blocks",
                "kv_indices",
                "full_kv_num_blocks",
                "full_kv_indices",
                "BLOCK_SIZE",
                "mask_mod",
                "seq_lengths",
            },
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_functions_take_what_they_are_given(function, names):
    assert names <= set(parameters(function))


def test_attention_takes_grouped_heads():
    query, key = torch.ones(1, 4, 3, 8), torch.ones(1, 2, 3, 8)
    seen = F.scaled_dot_product_attention(query, key, key, is_causal=True, scale=1.0, dropout_p=0.0, enable_gqa=True)
    assert torch.equal(seen, torch.ones(1, 4, 3, 8))
