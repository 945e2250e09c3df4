"""Memory per GPU: what is held all the time, and what a training step adds at its worst moment.

Formulas for transformers of the Llama kind (gated feed-forward layer, root-mean-square norms, fused attention), which
most families are near enough to. docs/plan.md says how far they are from measurement.
"""

from __future__ import annotations

import bisect
import json
import re
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
_LONGEST = 1_000_000  # tokens of a micro-batch that nobody has
# Bytes of optimizer state per trainable weight, by what stands in the optimizer's name; the first that matches.
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
        trainable_parts: parts whose weights are trained; none where an adapter is.
        adapter: weights of an adapter.
        narrow: whether the compute dtype has 16 bits.
        quantize: as `model.quantize`.
        checkpointing: whether layers are computed again in the backward pass.
        optimizer: as `train.optim`.
        sharding: how weights, gradients and states are sharded over GPUs.
        gpus: how many.
        live_reference: whether a frozen copy of the model is held beside it.
    """

    trainable_parts: frozenset[ModelPart]
    adapter: int = 0
    narrow: bool = True
    quantize: str | None = None
    checkpointing: bool = False
    optimizer: str = "adamw_torch_fused"
    sharding: Sharding = "none"
    gpus: int = 1
    live_reference: bool = False

    @property
    def compute_bytes(self) -> int:
        """Of a number in the compute dtype."""
        return 2 if self.narrow else 4

    @property
    def trainable_bytes(self) -> int:
        """Of a trainable weight and of its gradient: DeepSpeed holds both in the compute dtype."""
        return self.compute_bytes if self.sharding.startswith("zero") else 4


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each GPU at the worst moment of a step.

    Attributes:
        moment: which moment that is.
        weights: of the model, and of a live reference.
        copies: 16-bit copies of float32 weights that autocast holds, and weights that were gathered from other GPUs.
        activations: what the language model and, where it is trained, the vision tower keep for the backward pass, and
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
    """Bytes of optimizer state per trainable weight; AdamW's for one that is not known."""
    return next(size for pattern, size in _STATES if re.search(pattern, optimizer))


def sharding_of(recipe: Recipe, gpus: int) -> Sharding:
    """How a recipe shards its work over GPUs. Raises `RecipeError` where DeepSpeed's file cannot be read."""
    given = recipe.train.given()
    deepspeed = given.get("deepspeed")
    if deepspeed is None:
        sharded: Sharding = "fsdp" if recipe.train.fsdp else "ddp"
        return sharded if gpus > 1 else "none"
    try:
        values = deepspeed if isinstance(deepspeed, dict) else json.loads(read_regular(Path(deepspeed)))
    except (OSError, ValueError) as error:
        raise RecipeError(f"train.deepspeed={deepspeed}: cannot be read as a DeepSpeed file: {error}") from error
    stage = dict(values.get("zero_optimization") or {}).get("stage", 0)
    stages: dict[Any, Sharding] = {1: "zero1", 2: "zero2", 3: "zero3"}
    return stages.get(stage, "ddp")


def peak_memory(shape: ModelShape, setting: Setting, load: Load, *, micro_batches_per_step: int) -> Memory:
    """The worst moment of a training step whose longest micro-batch is `load`.

    Args:
        micro_batches_per_step: of one GPU; from two on, gradients are there in the forward pass.
    """
    held, head = _held(shape, setting), _head_weights(shape, setting)
    # The head's gradient is a sum in 32 bits; a product in 16 bits is on its way to it.
    summed, head_gradient = (4 + (2 if setting.narrow else 0)) * head, setting.trainable_bytes * head
    layer_kept, passing = _layer_bytes(shape.language, setting, load.tokens)
    layers, hidden, residual = shape.language.layers, shape.language.hidden, _residual(setting)
    tower, tower_passing = _tower_bytes(shape, setting, load)
    # Before the first and behind the last layer, in the layers, and in the tower.
    kept = load.tokens * float(hidden * (4 + 3 * residual))
    kept += layers * (load.tokens * hidden * residual if setting.checkpointing else layer_kept)
    kept += tower
    passing += layer_kept if setting.checkpointing else 0
    late_copies = held.copies / (layers if setting.checkpointing else 1)
    logits = _logits_bytes(shape, setting, load.targets)
    before = held.gradients if micro_batches_per_step > 1 else 0.0
    # A tied table's gradient waits for that of the lookups; another's is added to those that are there at once.
    behind_head = before if micro_batches_per_step > 1 and not shape.tied else before + head_gradient
    at_end = held.gradients + head_gradient * (micro_batches_per_step > 1)
    moments = {
        "images": (before, held.copies, tower + tower_passing, 0.0),
        "logits": (before + summed, held.copies, kept, logits),
        "first layer of the backward pass": (behind_head, late_copies, kept + passing, 0.0),
        "end of the backward pass": (at_end, late_copies, tower + passing, 0.0),
        "update": (held.gradients, 0.0, 0.0, 0.0),
    }
    found = [Memory(name, held.weights, g, held.optimizer, c, a, lo) for name, (g, c, a, lo) in moments.items()]
    worst = max(found, key=lambda memory: memory.total)
    return replace(worst, margin=_CONTEXT + _FRAGMENTS * worst.total)


def tokens_that_fit(
    shape: ModelShape, setting: Setting, load: Load, size: float, *, micro_batches_per_step: int
) -> int:
    """How long a micro-batch made of the same parts as `load` may be in `size` bytes: tokens, in full hundreds."""

    def needed(tokens: int) -> float:
        part = Load(*(round(count * tokens / load.tokens) for count in astuple(load)))
        return peak_memory(shape, setting, part, micro_batches_per_step=micro_batches_per_step).total

    return max(0, 100 * (bisect.bisect_right(range(0, _LONGEST, 100), size, key=needed) - 1))


def _held(shape: ModelShape, setting: Setting) -> Memory:
    """What does not depend on the data, at the end of the backward pass."""
    every = sum(shape.weights.values())
    own = sum(count for part, count in shape.weights.items() if part in setting.trainable_parts)
    trainable, frozen = own + setting.adapter, every - own
    size, gpus = setting.compute_bytes, setting.gpus
    engine, fsdp = setting.sharding.startswith("zero"), setting.sharding == "fsdp"
    stage = int(setting.sharding[-1]) if engine else 0
    quantized = {"nf4": _NF4_BITS / 8, "int8": 1.0}.get(setting.quantize or "", float(size))
    frozen_bytes: float = frozen * size + shape.quantizable * (quantized - size)
    trainable_bytes: float = trainable * setting.trainable_bytes
    gradient = trainable_bytes
    # DeepSpeed keeps float32 weights with the optimizer's states.
    states: float = trainable * (state_bytes(setting.optimizer) + (4 if engine and setting.narrow else 0))
    copies: float = 2 * trainable if setting.narrow and not engine else 0
    if setting.sharding == "ddp":
        gradient *= 2  # its buckets
    if engine or fsdp:
        states /= gpus
    if stage > 1 or fsdp:
        gradient /= gpus
    if engine:
        gradient += size * min(trainable, 2 * _BUCKET)
    if stage == 3 or fsdp:
        trainable_bytes, frozen_bytes = trainable_bytes / gpus, frozen_bytes / gpus
    if fsdp:
        copies = size * (shape.largest_weight + 2 * shape.language.matrices / shape.language.layers)
    if stage == 3:
        copies = size * min(every, _LIVE)
    weights = trainable_bytes + frozen_bytes
    if setting.live_reference and not setting.adapter:
        weights += own * 4 + frozen * size  # whole in every process
    return Memory("", weights, gradient, states, copies, activations=0.0, logits=0.0)


def _head_weights(shape: ModelShape, setting: Setting) -> int:
    """Weights of a head, or of a table of embeddings, whose gradient is whole before it joins the others."""
    sharded = setting.sharding in ("zero2", "zero3", "fsdp")
    return 0 if sharded or "language" not in setting.trainable_parts else shape.largest_weight


def _residual(setting: Setting) -> int:
    """Bytes of a number in the residual stream: that of the embeddings, which are float32 where they are trained."""
    is_wide = "language" in setting.trainable_parts and not setting.sharding.startswith(("zero", "fsdp"))
    return 4 if is_wide or not setting.narrow else 2


def _layer_bytes(stack: Transformer, setting: Setting, tokens: int) -> tuple[float, float]:
    """Bytes that one layer keeps for its backward pass, and of what passes through that."""
    size, residual = setting.compute_bytes, _residual(setting)
    hidden, wide = stack.hidden, stack.intermediate
    # Two norms: what comes in, as float32, and what comes out.
    norms = 2 * (4 + residual) * hidden
    # Inputs of the linear layers: of q, k, v and of gate, up. Autocast makes each its own narrow copy.
    inputs = (5 if size != residual else 2 if size == 2 else 0) * size * hidden
    attention = size * (3 * stack.query + 2 * stack.key_value)
    feed_forward = 4 * size * wide
    adapter = 2 * (6 * hidden + wide) if setting.adapter else 0
    kept = norms + inputs + attention + feed_forward + adapter
    return tokens * kept, tokens * (3 * size * wide + 2 * residual * hidden)


def features_bytes(shape: ModelShape, image_tokens: int, *, narrow: bool) -> int:
    """Of the features of images, in memory or on disk."""
    return image_tokens * shape.features * shape.language.hidden * (2 if narrow else 4)


def _tower_bytes(shape: ModelShape, setting: Setting, load: Load) -> tuple[float, float]:
    """Bytes of the images and what the vision tower keeps, and of what passes through it in its forward pass."""
    if shape.vision is None or not load.patches:
        return float(features_bytes(shape, load.image_tokens, narrow=setting.narrow)), 0.0
    size, tower = setting.compute_bytes, shape.vision
    pixels = 4 * 3 * 2 * shape.patch_size**2 * load.patches
    passing = load.patches * (size * (4 * tower.hidden + 2 * tower.intermediate) + 8 * tower.hidden)
    if "vision" not in setting.trainable_parts:
        return pixels, passing
    kept, _ = _layer_bytes(tower, setting, load.patches)
    if setting.checkpointing:
        kept = load.patches * tower.hidden * size
    return pixels + tower.layers * kept, passing


def _logits_bytes(shape: ModelShape, setting: Setting, targets: int) -> float:
    """Of a chunk, which its gradient takes the place of, and of a step over some of its rows in float32."""
    chunk = max(1, LOGITS_CHUNK_BYTES // (4 * shape.vocabulary))
    logits = min(targets, chunk) * shape.vocabulary
    # Logits in 16 bits are widened for it first.
    step = min(4 * logits, STEP_BYTES) * (2 if setting.narrow else 1)
    return float(logits * setting.compute_bytes + step)
