"""A loaded model → a trainable one: parts frozen, or an adapter around it; and fingerprints for its stored numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from unidpo.cache.keys import vision_fingerprint, weights_fingerprint
from unidpo.config.schema import ModelPart
from unidpo.errors import ModelError, RecipeError
from unidpo.model.adapters import adds_nothing_yet, with_adapter
from unidpo.model.features import images_are_frozen
from unidpo.model.parts import freeze, keep_trainable_in_float32
from unidpo.training.arguments import checkpoints_are_reentrant


@dataclass(frozen=True, slots=True)
class Trainable:
    """A model that is ready to be trained.

    Attributes:
        model: with its adapter, where it has one.
        is_reference: whether its log-probabilities are the reference's until the first update.
        fingerprint: of its weights without an adapter, where it was asked for; else empty.
        vision_fingerprint: of its vision tower and projector, where features of images are stored.
        images_are_frozen: whether these are known and neither is trained; false too where nobody asks.
    """

    model: torch.nn.Module
    is_reference: bool
    fingerprint: str
    vision_fingerprint: str | None
    images_are_frozen: bool


def make_trainable(
    model: PreTrainedModel,
    args: TrainingArguments,
    *,
    peft_config: Any,
    frozen: Iterable[ModelPart],
    reference: str | None,
    cache_image_features: bool,
    needs_fingerprint: bool,
) -> Trainable:
    """Freeze parts of a model, or put an adapter around it.

    Args:
        reference: as `PreferenceTrainer` takes it; `None` where the loss needs none.
        needs_fingerprint: see `Trainable.fingerprint`.
        args, peft_config, frozen, cache_image_features: see `PreferenceTrainer`.

    Raises:
        ModelError: the model, the adapter or the reference cannot be used for this.
        RecipeError: features of images are to be kept, and vision tower or projector are trained.
    """
    own_reference = reference in ("stored", "live")
    needs_second_model = reference not in (None, "stored") and not (reference == "live" and peft_config is not None)
    if needs_second_model and is_deepspeed_zero3_enabled():
        raise ModelError(
            f"reference: {reference}: beside a model that ZeRO-3 shards there is no place for a whole one; use "
            "`reference: stored`, or FSDP2 (`train.fsdp=true`)"
        )
    mixed_precision = args.bf16 or args.fp16
    if peft_config is None:
        freeze(model, frozen)
        if mixed_precision and not is_deepspeed_zero3_enabled():  # whose optimizer holds them so
            keep_trainable_in_float32(model)
    # After a wider dtype for trainable weights, in which the numbers round otherwise; before an adapter, without which
    # the reference is computed: runs with and without one share it where the weights' dtypes are the same.
    fingerprint = weights_fingerprint(model) if needs_fingerprint else ""
    vision = vision_fingerprint(model) if cache_image_features else None
    trainable: torch.nn.Module = model
    if peft_config is not None:
        trainable = with_adapter(model, peft_config, own_reference=own_reference, mixed_precision=mixed_precision)
        if checkpoints_are_reentrant(args):
            # Such a checkpoint passes no gradient on unless one of its inputs asks for it.
            trainable.enable_input_require_grads()  # type: ignore[operator]
    are_frozen = (cache_image_features or reference == "live") and images_are_frozen(model)
    if cache_image_features and not are_frozen:
        raise RecipeError(
            "data.cache_image_features: features of images are kept only where vision tower and projector are not "
            "trained; add both to model.freeze and leave them out of lora.target_modules, or set it to false"
        )
    is_reference = own_reference and adds_nothing_yet(trainable)
    return Trainable(trainable, is_reference, fingerprint, vision, are_frozen)
