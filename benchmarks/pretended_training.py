"""Micro-batches of Qwen2-VL in the published data's mean shape, and how one is trained on, on a pretended GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2VLForConditionalGeneration

from benchmarks.pretended_gpu import GPU, PretendedGPU
from benchmarks.pretended_torch import pretended_gpu
from benchmarks.shapes import Shape
from unidpo.losses import UniDPO
from unidpo.model.attention import BACKENDS
from unidpo.model.batches import Batch
from unidpo.model.encode import EncodedGroup, PositionIds, prompt_positions
from unidpo.model.features import ImageFeatures
from unidpo.model.packs import PairIndex, pack, with_features
from unidpo.model.parts import freeze, keep_trainable_in_float32
from unidpo.model.policy import Policy
from unidpo.model.tower import Tower, tower_of
from unidpo.model.transfer import ahead
from unidpo.plan.memory import Setting, peak_memory
from unidpo.plan.shape import shape_of
from unidpo.plan.work import PatchCounter, in_chunks, packed
from unidpo.training.metrics import PairColumns
from unidpo.training.objective import Objective


@dataclass(frozen=True, slots=True)
class Case:
    """A micro-batch: `prompts` with `responses` each, in one pack.

    The lengths are those of the published data's mean row: `grid`, patches of an image in height and width, four of
    which are a token; `text` tokens besides, and `length` tokens a response.
    """

    title: str
    prompts: int
    responses: int = 4
    backend: str = "varlen"
    checkpointing: bool = False
    features: bool = False
    grid: tuple[int, int] = (46, 66)
    text: int = 98
    length: int = 100


def policy_on(gpu: PretendedGPU, model: PreTrainedModel, case: Case) -> Policy:
    """A model on the GPU as a run with `train.bf16` trains it."""
    as_trained(model)
    gpu.put(model)
    if case.checkpointing:
        checkpoint_layers(model)
    policy = Policy(model, model, partial(torch.autocast, "cuda", dtype=torch.bfloat16))
    policy.set_attention(BACKENDS[case.backend].attention)
    return policy


def as_trained(model: PreTrainedModel) -> None:
    """Vision tower and projector frozen, the rest in float32."""
    freeze(model, ("vision", "projector"))
    keep_trainable_in_float32(model)
    model.train()


def checkpoint_layers(model: PreTrainedModel) -> None:
    """As transformers' `Trainer` and ours do."""
    name = "activation_checkpointing_enable"  # an older transformers has it under another name
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()


def one_pass(policy: Policy, objective: Objective, batch: Batch) -> None:
    """A micro-batch as `StepTrainer.training_step` runs it."""
    columns = PairColumns()
    for on_gpu in ahead([batch], GPU):
        pairs, terms = objective.of_pairs(policy, on_gpu, policy_is_reference=False, reward_shift=0.0)
        (terms.loss.sum() / 128).backward()
        columns.add(batch, pairs, terms)
    columns.take()


def batch_of(shape: Shape, case: Case, positions: PositionIds, tower: Tower | None) -> Batch:
    groups = [group(shape, positions, case) for _ in range(case.prompts)]
    packed = pack(groups, table=BACKENDS[case.backend].table, tower=tower)
    if case.features:
        tokens = int((packed.input_ids == shape.config.image_token_id).sum())
        pooled = torch.zeros(tokens, shape.hidden, dtype=shape.dtype)
        packed = with_features(packed, ImageFeatures(pooled, None, listed=True))
    return Batch(packed, all_pairs(groups), torch.zeros(len(packed.response_tokens), dtype=torch.float64))


def group(shape: Shape, positions: PositionIds, case: Case) -> EncodedGroup:
    config, (height, width) = shape.config, case.grid
    image = [config.vision_start_token_id, *[config.image_token_id] * (height * width // 4), config.vision_end_token_id]
    ids = torch.tensor([*range(case.text // 2), *image, *range(case.text - case.text // 2 - 2)])
    types = (ids == config.image_token_id).long()
    vision = {
        "image_grid_thw": torch.tensor([[1, height, width]]),
        "pixel_bytes": torch.zeros(height * width, 3, 14 * 14, dtype=torch.uint8),
        "pixel_table": torch.zeros(1, 2, 3, 256),
    }
    answers = tuple(torch.arange(case.length) for _ in range(case.responses))
    return EncodedGroup(ids, positions(ids, types, vision), types, answers, (0,) * case.responses, vision)


def all_pairs(groups: Sequence[EncodedGroup]) -> PairIndex:
    """All pairs of each group's responses."""
    sizes = [len(group.response_ids) for group in groups]
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    found = [(s + i, s + j) for s, n in zip(starts, sizes, strict=True) for i in range(n) for j in range(i + 1, n)]
    chosen, rejected = torch.tensor(found).unbind(1)
    scores = torch.ones(len(found), dtype=torch.float64)
    known = tuple(range(len(found)))
    return PairIndex(chosen, rejected, scores, scores - 1, known, (None,) * len(found), known, known)


def counted(shape: Shape, case: Case) -> dict[str, Any]:
    """A pass of a case within a step: what is asked of the GPU, and the most memory that was held."""
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(shape.config).to(torch.bfloat16)
    positions, tower = prompt_positions(model), tower_of(model)
    with pretended_gpu(numbers=False) as gpu:
        policy = policy_on(gpu, model, case)
        objective = Objective(UniDPO())
        trainable = [weight for weight in model.parameters() if weight.requires_grad]
        adam = [torch.zeros_like(weight) for weight in trainable for _ in range(2)]
        for weight in trainable:  # of the passes before
            weight.grad = torch.zeros_like(weight)
        batch = batch_of(shape, case, positions, tower)
        gpu.reset()
        one_pass(policy, objective, batch)
        del adam
        counts = gpu.counts
        segments = batch.responses.segments
        return {
            "tokens": len(batch.responses.input_ids),
            "work": sum(counts.work.values()),
            "kernels": sum(counts.kernels.values()),
            "waits": sum(counts.waits.values()),
            "blocking_copies": counts.blocking,
            "copied_bytes": counts.copied_bytes,
            "matrix_bytes": sum(counts.matrix_bytes.values()),
            "other_bytes": sum(counts.other_bytes.values()),
            "bytes": sum((counts.matrix_bytes + counts.other_bytes).values()),
            "peak_bytes": gpu.peak,
            "planned_bytes": planned(shape, case, len(segments)),
            "places": {" ".join(place): n for place, n in [*counts.waits.items(), *counts.copies.items()]},
        }


def planned(shape: Shape, case: Case, prompts: int) -> float:
    """Bytes that `unidpo plan` says for the pass, without its margin."""
    with torch.device("meta"):
        model = shape_of(Qwen2VLForConditionalGeneration(shape.config))
    image = PatchCounter(patches_per_token=4, stored=case.features).load([case.grid[0] * case.grid[1] // 4])
    load = packed(case.text + image.image_tokens, [case.length] * case.responses, image).times(prompts)
    setting = Setting(frozenset({"language"}), checkpointing=case.checkpointing)
    found = peak_memory(model, setting, in_chunks(load, model), micro_batches_per_step=2)
    return found.total - found.margin
