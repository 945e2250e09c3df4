"""A model's shape: what its configuration says, without its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from unidpo.config import LoraSection
from unidpo.config.schema import ModelPart
from unidpo.errors import ModelError
from unidpo.model.adapters import lora_config, with_adapter
from unidpo.model.parts import language_linear_layers, parameters_by_part

_MATRICES = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Transformer:
    """One stack of layers.

    Attributes:
        layers: how many.
        hidden, intermediate, query, key_value: widths of the residual stream, of the feed-forward layer, of all heads'
            queries, and of all heads' keys, per token.
        matrices: weights that each token is multiplied with in one forward pass, in all layers.
        window: tokens that most layers see at once, where the model has such layers; 0 for all.
        whole_layers: layers that see everything; counts only with a window.
    """

    layers: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    matrices: int
    window: int = 0
    whole_layers: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What plans need of a model.

    Attributes:
        language: the language model without embeddings and head.
        vision: the vision tower without the projector; `None` for a text model.
        vocabulary: size of the head's output.
        projector_matrices: weights that each image token is multiplied with between tower and language model.
        weights: of each part, embeddings and head included.
        tied: whether the head's weight is that of the embeddings.
        largest_weight: elements of the largest single weight.
        quantizable: weights in the linear layers of the language model, which `model.quantize` takes.
        features: vectors of the language model's width that stand for an image token: one, and one for each layer of
            the tower that is handed on besides (Qwen3-VL's deepstack).
        packs: whether attention is plainly causal in all layers, which packs need.
        patch_size: pixels along a side of an image patch.
    """

    language: Transformer
    vision: Transformer | None
    vocabulary: int
    projector_matrices: int
    weights: Mapping[ModelPart, int]
    tied: bool
    largest_weight: int
    quantizable: int
    features: int
    packs: bool
    patch_size: int


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a model, which may lie on the `meta` device.

    Raises:
        ModelError: it has no language model with a head, or its parts are unknown, see `parts.parameters_by_part`.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no head over a vocabulary; a plan needs a language model")
    by_part = parameters_by_part(model)
    ids = {part: {id(parameter) for _, parameter in named} for part, named in by_part.items()}
    outside = {id(head.weight), id(model.get_input_embeddings().weight)}
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    linear: list[Any] = [model.get_submodule(layer) for layer in language_linear_layers(model)]
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    vision_config = getattr(model.config, "vision_config", None)
    patch_size = getattr(vision_config, "patch_size", 14)
    return ModelShape(
        language=Transformer(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or max(layer.out_features for layer in linear),
            query=heads * width,
            key_value=(getattr(config, "num_key_value_heads", None) or heads) * width,
            matrices=_matrices(model, ids["language"] - outside) + _experts(by_part["language"], config),
        ),
        vision=_vision(vision_config, _matrices(model, ids["vision"])) if ids["vision"] else None,
        vocabulary=len(head.weight),
        projector_matrices=_matrices(model, ids["projector"]),
        weights={part: sum(p.numel() for _, p in named) for part, named in by_part.items()},
        tied=head.weight is model.get_input_embeddings().weight,
        largest_weight=max(parameter.numel() for parameter in model.parameters()),
        quantizable=sum(layer.weight.numel() for layer in linear),
        features=1 + len(getattr(vision_config, "deepstack_visual_indexes", None) or ()),
        packs=kinds == {"full_attention"} and getattr(config, "attn_logit_softcapping", None) is None,
        patch_size=patch_size[0] if isinstance(patch_size, list | tuple) else patch_size,
    )


def adapter_weights(lora: LoraSection, model: PreTrainedModel) -> int:
    """Weights of an adapter that alone is trained. `model` lies on the `meta` device and has the adapter afterwards.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    adapted = with_adapter(model, lora_config(lora, model), own_reference=False, mixed_precision=False)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _matrices(model: PreTrainedModel, wanted: set[int]) -> int:
    modules = [module for module in model.modules() if isinstance(module, _MATRICES)]
    return sum(module.weight.numel() for module in modules if id(module.weight) in wanted)


def _experts(named: Iterable[tuple[str, torch.nn.Parameter]], config: Any) -> int:
    """Weights that a token meets in mixtures of experts, which transformers keeps as one three-dimensional tensor."""
    weights = sum(p.numel() for name, p in named if ".experts." in name and p.dim() == 3)
    if not weights:
        return 0
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or chosen
    return round(weights * chosen / experts)


def _vision(config: Any, matrices: int) -> Transformer:
    """Families name the same things differently."""
    layers = getattr(config, "depth", None) or config.num_hidden_layers
    hidden = getattr(config, "embed_dim", None) or config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or round(hidden * getattr(config, "mlp_ratio", 4))
    whole: list[int] | None = getattr(config, "fullatt_block_indexes", None)
    window = (config.window_size // config.patch_size) ** 2 if whole is not None else 0
    return Transformer(
        layers, hidden, intermediate, hidden, hidden, matrices, window=window, whole_layers=len(whole or ())
    )
