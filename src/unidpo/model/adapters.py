"""Adapters (peft): which layers get one, and when the model without it is still the model that was given."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from unidpo.config import LoraSection
from unidpo.errors import ModelError, did_you_mean
from unidpo.model.load import quiet_peft
from unidpo.model.parts import keep_trainable_in_float32, language_linear_layers

# Ways to begin in which peft takes the adapter's share out of the weights beneath it.
_TAKES_FROM_THE_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_config(lora: LoraSection, model: PreTrainedModel) -> Any:
    """Peft's configuration of a recipe's `lora` section. Raises `ModelError` where a layer it names is not there."""
    from peft import LoraConfig

    targets = lora.target_modules
    if targets is None:
        targets = tuple(language_linear_layers(model))
    elif isinstance(targets, tuple):  # peft looks for one of them alone
        known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        if missing := [name for name in targets if name.rpartition(".")[2] not in known]:
            hint = did_you_mean(missing[0], known)
            raise ModelError(f"lora.target_modules: this model has no layer {missing[0]!r}{hint}")
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def with_adapter(
    model: PreTrainedModel, peft_config: Any, *, own_reference: bool, mixed_precision: bool
) -> torch.nn.Module:
    """The model with an adapter, which alone is trained.

    Args:
        own_reference: whether the model with the adapter off is to be the reference.
        mixed_precision: hold the adapter in float32, whatever the model's type.

    Raises:
        ModelError: the adapter does not fit the model, or cannot be trained here.
    """
    from peft import get_peft_model

    if peft_config.is_prompt_learning:
        raise ModelError(
            f"an adapter of prompts ({peft_config.peft_type.value}) has no place in a pack; use LoRA or another "
            "adapter of the layers"
        )
    start = str(getattr(peft_config, "init_lora_weights", "")).lower()
    if own_reference and start.startswith(_TAKES_FROM_THE_WEIGHTS):
        raise ModelError(
            f"init_lora_weights={start!r} changes the weights under the adapter, so that the model with the adapter "
            "off is not the model you gave; use init_lora_weights=True, or name the model as `reference`"
        )
    try:
        with quiet_peft():
            policy: torch.nn.Module = get_peft_model(model, peft_config)
    except ValueError as error:
        raise ModelError(f"this adapter does not fit the model: {' '.join(str(error).split())}") from error
    if mixed_precision:
        keep_trainable_in_float32(policy)
    _keep_differentiable(policy)
    return policy


def _keep_differentiable(policy: torch.nn.Module) -> None:
    """Keep 4-bit layers from repacking their weights on a CPU with avx512_bf16. Other machines are not affected.

    There bitsandbytes repacks the weights of a layer when it first runs without gradient, as in the reference pass.
    The kernel for the new format rounds to bfloat16 and has no gradient, and training would use it too. With
    its flag for these instructions off, a layer computes as on every other machine.
    """
    for name, module in policy.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise ModelError(
                f"{name}: bitsandbytes has repacked these weights for generating text, which has no gradient on a "
                "CPU; load the model again before training it"
            )
        module.support_avx512bf16_for_cpu = False


def adds_nothing_yet(policy: torch.nn.Module) -> bool:
    """Whether the model's output is, but for rounding, what it is without its adapter; true where it has none.

    LoRA and DoRA begin with B = 0, on embeddings with A = 0. Of other adapters nothing is known.
    """
    if isinstance(policy, PreTrainedModel):
        return True
    zeros = [p for name, p in policy.named_parameters() if ".lora_B." in name or ".lora_embedding_A." in name]
    return bool(zeros) and not any(p.any() for p in zeros)
