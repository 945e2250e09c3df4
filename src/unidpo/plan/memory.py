"""Memory per GPU: what is held all the time, and what a training step adds at its worst moment.

Formulas for transformers of the Llama kind (gated feed-forward layer, root-mean-square norms, fused attention), which
most families are near enough to. docs/plan.md says how far they are from measurement.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from unidpo.config import Recipe
from unidpo.config.schema import ModelPart
from unidpo.errors import RecipeError
from unidpo.files.regular import read_regular
from unidpo.model.head import LOGITS_CHUNK_BYTES, STEP_BYTES
from unidpo.plan.shape import ModelShape, Transformer
from unidpo.plan.work import Load

Sharding: TypeAlias = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp"]
# Bits per weight: 4, an 8-bit constant for 64 of them, a 32-bit one for 256 of these (arXiv:2305.14314, section 3).
_NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
_BUCKET = 500_000_000  # weights whose gradients DeepSpeed brings together at a time; two such buckets take turns
_LIVE = 1_000_000_000  # weights that ZeRO-3 lets be whole at a time
_CONTEXT = 1.5e9  # bytes of the CUDA context and the kernels' workspaces
_FRAGMENTS = 0.05
# Bytes of optimizer state per weight that learns, by what stands in the optimizer's name; the first that matches.
_STATES = (
    ("lion.*8bit|rmsprop.*8bit", 1),
    ("ademamix.*8bit", 3),
    ("8bit", 2),
    ("ademamix", 12),
    ("adafactor|sgd|lomo", 0),
    ("lion|rmsprop|adagrad", 4),
    ("", 8),
)


@dataclass(frozen=True, slots=True)
class Setting:
    """What memory and work depend on besides the model's shape and the data.

    Attributes:
        learns: parts whose weights learn; none where an adapter does.
        adapter: weights of an adapter.
        narrow: whether the compute dtype has 16 bits.
        quantize: as `model.quantize`.
        checkpointing: whether layers are computed again in the backward pass.
        optimizer: as `train.optim`.
        sharding: how weights, gradients and states are sharded over GPUs.
        gpus: how many.
        live_reference: whether a frozen copy of the model is held beside it.
    """

    learns: frozenset[ModelPart]
    adapter: int = 0
    narrow: bool = True
    quantize: str | None = None
    checkpointing: bool = False
    optimizer: str = "adamw_torch_fused"
    sharding: Sharding = "none"
    gpus: int = 1
    live_reference: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each GPU at the worst moment of a step.

    Attributes:
        moment: which moment that is.
        weights: of the model, and of a live reference.
        copies: 16-bit copies of float32 weights that autocast holds, and weights that were gathered from other GPUs.
        activations: what the language model and, where it learns, the vision tower keep for the backward pass, and
            what is on the way.
        margin: CUDA context, workspaces, fragmentation.
    """

    moment: str
    weights: float
    gradients: float
    optimizer: float
    copies: float
    activations: float
    logits: float
    margin: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(astuple(self)[1:]))


def state_bytes(optimizer: str) -> int:
    """Bytes of optimizer state per weight that learns; AdamW's for one that is not known."""
    return next(size for pattern, size in _STATES if re.search(pattern, optimizer))


def sharding_of(recipe: Recipe, gpus: int) -> Sharding:
    """How a recipe shards its work over GPUs. Raises `RecipeError` where DeepSpeed's file cannot be read."""
    given = recipe.train.given()
    if (deepspeed := given.get("deepspeed")) is not None:
        try:
            values: Mapping[str, Any] = (
                deepspeed if isinstance(deepspeed, dict) else json.loads(read_regular(Path(deepspeed)))
            )
        except (OSError, ValueError) as error:
            raise RecipeError(f"train.deepspeed={deepspeed}: cannot be read as a DeepSpeed file: {error}") from error
        stage = dict(values.get("zero_optimization") or {}).get("stage", 0)
        stages: dict[Any, Sharding] = {1: "zero1", 2: "zero2", 3: "zero3"}
        return stages.get(stage, "ddp")
    if gpus == 1:
        return "none"
    return "fsdp" if recipe.train.fsdp else "ddp"


def peak_memory(shape: ModelShape, setting: Setting, load: Load, *, passes_per_step: int, margin: bool) -> Memory:
    """The worst moment of a training step whose largest pass is `load`.

    Args:
        passes_per_step: forward passes of one GPU before each update; from two on, gradients are there in the forward
            pass.
        margin: add what CUDA and its allocator take.
    """
    held = _Held.of(shape, setting)
    layer, kept = _layer_bytes(shape.language, setting, load.tokens), load.tokens * _ends(shape, setting)
    layers, residual = shape.language.layers, load.tokens * shape.language.hidden * _residual(setting)
    kept += layers * (residual if setting.checkpointing else layer.kept)
    tower, tower_passing = _tower_bytes(shape, setting, load)
    kept += tower
    passing = layer.passing + (layer.kept if setting.checkpointing else 0)
    before = held.gradients if passes_per_step > 1 else 0.0
    late_copies = held.copies / (layers if setting.checkpointing else 1)
    logits = _logits_bytes(shape, setting, load.targets)
    at_head = before + (held.narrow_head_gradient or held.head_gradient)
    widened = before + held.narrow_head_gradient + held.head_gradient
    # A tied table's gradient waits for that of the lookups; another's is added to those that are there at once.
    behind_head = before if passes_per_step > 1 and not shape.tied else before + held.head_gradient
    at_end = held.gradients + held.head_gradient * (passes_per_step > 1)
    moments = {
        "images": (before, held.copies, tower + tower_passing, 0.0),
        "logits": (at_head, held.copies, kept, logits),
        "gradient of the head": (widened, held.copies, kept, 0.0),
        "first layer of the backward pass": (behind_head, late_copies, kept + passing, 0.0),
        "end of the backward pass": (at_end, late_copies, tower + passing, 0.0),
        "update": (held.gradients, 0.0, 0.0, 0.0),
    }
    found = [Memory(name, held.weights, g, held.optimizer, c, a, lo) for name, (g, c, a, lo) in moments.items()]
    worst = max(found, key=lambda memory: memory.total)
    return replace(worst, margin=_CONTEXT + _FRAGMENTS * worst.total) if margin else worst


def sum_of(memory: Memory) -> Mapping[str, float]:
    """The parts and their sum, in bytes."""
    names = ("weights", "gradients", "optimizer", "copies", "activations", "logits", "margin")
    return {name: getattr(memory, name) for name in names} | {"total": memory.total}


@dataclass(frozen=True, slots=True)
class _Held:
    """Bytes that do not depend on the data.

    Attributes:
        gradients: at the end of the backward pass.
        head_gradient: of the head's weight, or of a table of embeddings, before it is added to those that are there.
        narrow_head_gradient: the same in 16 bits, as it is made, where the weight is wider.
    """

    weights: float
    gradients: float
    optimizer: float
    copies: float
    head_gradient: float
    narrow_head_gradient: float

    @classmethod
    def of(cls, shape: ModelShape, setting: Setting) -> _Held:
        every = sum(shape.weights.values())
        own = sum(count for part, count in shape.weights.items() if part in setting.learns)
        learning, frozen = own + setting.adapter, every - own
        size = 2 if setting.narrow else 4
        engine = setting.sharding.startswith("zero")
        gpus, stage = setting.gpus, int(setting.sharding[-1]) if engine else 0
        frozen_bytes: float = frozen * size + shape.quantizable * (_weight_bytes(setting, size) - size)
        wide = size if engine else 4
        learning_bytes: float = learning * wide
        gradient: float = learning * wide
        # DeepSpeed keeps float32 weights with the optimizer's states.
        states: float = learning * (state_bytes(setting.optimizer) + (4 if engine and setting.narrow else 0))
        copies: float = 2 * learning if setting.narrow and not engine else 0
        if setting.sharding == "ddp":
            gradient *= 2  # its buckets
        if engine:
            states /= gpus
            gradient = gradient / (gpus if stage > 1 else 1) + size * min(learning, 2 * _BUCKET)
        if stage == 3 or setting.sharding == "fsdp":
            learning_bytes, frozen_bytes = learning_bytes / gpus, frozen_bytes / gpus
        if setting.sharding == "fsdp":
            states, gradient = states / gpus, gradient / gpus
            copies = size * (shape.largest_weight + 2 * shape.language.matrices / shape.language.layers)
        if stage == 3:
            copies = size * min(every, _LIVE)
        weights = learning_bytes + frozen_bytes
        if setting.live_reference and not setting.adapter:
            weights += own * 4 + frozen * size  # whole in every process
        sharded = stage > 1 or setting.sharding == "fsdp"
        head = 0 if sharded or "language" not in setting.learns else shape.largest_weight
        return cls(weights, gradient, states, copies, wide * head, size * head if size < wide else 0)


def _weight_bytes(setting: Setting, size: int) -> float:
    return {"nf4": _NF4_BITS / 8, "int8": 1.0}.get(setting.quantize or "", float(size))


def _residual(setting: Setting) -> int:
    """Bytes of a number in the residual stream: that of the embeddings, which are float32 where they learn."""
    learns = "language" in setting.learns and not setting.sharding.startswith(("zero", "fsdp"))
    return 4 if learns or not setting.narrow else 2


@dataclass(frozen=True, slots=True)
class _Layer:
    """Bytes of one layer in training: kept for its backward pass, and passing through that."""

    kept: float
    passing: float


def _layer_bytes(stack: Transformer, setting: Setting, tokens: int) -> _Layer:
    size, residual = 2 if setting.narrow else 4, _residual(setting)
    hidden, wide = stack.hidden, stack.intermediate
    # Two norms: what comes in, as float32, and what comes out.
    norms = 2 * (4 + residual) * hidden
    # Inputs of the linear layers: of q, k, v and of gate, up. Autocast makes each its own narrow copy.
    inputs = (5 if size != residual else 2 if size == 2 else 0) * size * hidden
    attention = size * (3 * stack.query + 2 * stack.key_value)
    feed_forward = 4 * size * wide
    adapter = 2 * (6 * hidden + wide) if setting.adapter else 0
    kept = norms + inputs + attention + feed_forward + adapter
    return _Layer(tokens * kept, tokens * (3 * size * wide + 2 * residual * hidden))


def _ends(shape: ModelShape, setting: Setting) -> float:
    """Bytes per token of what lies before the first and behind the last layer."""
    return float(shape.language.hidden * (4 + 3 * _residual(setting)))


def features_bytes(shape: ModelShape, image_tokens: int, *, narrow: bool) -> int:
    """Of the features of images, in memory or on disk."""
    return image_tokens * shape.features * shape.language.hidden * (2 if narrow else 4)


def _tower_bytes(shape: ModelShape, setting: Setting, load: Load) -> tuple[float, float]:
    """Bytes of the images and what the vision tower keeps, and of what passes through it in its forward pass."""
    if shape.vision is None or not load.patches:
        return float(features_bytes(shape, load.image_tokens, narrow=setting.narrow)), 0.0
    size = 2 if setting.narrow else 4
    tower = shape.vision
    pixels = 4 * 3 * 2 * shape.patch_size**2 * load.patches
    passing = load.patches * (size * (4 * tower.hidden + 2 * tower.intermediate) + 8 * tower.hidden)
    if "vision" not in setting.learns:
        return pixels, passing
    layer = _layer_bytes(tower, setting, load.patches)
    each = load.patches * tower.hidden * size if setting.checkpointing else layer.kept
    return pixels + tower.layers * each, passing


def _logits_bytes(shape: ModelShape, setting: Setting, targets: int) -> float:
    """Of a chunk, which its gradient takes the place of, and of a step over some of its rows in float32."""
    chunk = max(1, LOGITS_CHUNK_BYTES // (4 * shape.vocabulary))
    logits = min(targets, chunk) * shape.vocabulary
    # Logits in 16 bits are widened for it first.
    step = min(4 * logits, STEP_BYTES) * (2 if setting.narrow else 1)
    return float(logits * (2 if setting.narrow else 4) + step)
