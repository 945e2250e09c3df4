"""The parts of a model: vision tower, projector, language model; which of them train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from unidpo.config.schema import ModelPart
from unidpo.errors import ModelError


def parameters_by_part(model: PreTrainedModel) -> Mapping[ModelPart, list[tuple[str, torch.nn.Parameter]]]:
    """The model's named parameters as vision tower, projector and language model.

    The language model is transformers' `get_decoder()` with the embeddings and the head, the vision tower its
    `get_encoder(modality="image")`; the projector is what is in neither, and the `merger` modules that the Qwen-VL
    family keeps inside its vision tower. Each parameter is in exactly one part; in a text model all are language.

    Raises:
        ModelError: the model takes images, and transformers does not tell its vision tower or its language model.
    """
    decoder, encoder = _decoder(model), model.get_encoder(modality="image")
    if encoder is model or encoder is model.base_model or encoder is decoder:
        if "image" in model.input_modalities:
            raise _unknown("vision tower", model)
        encoder = torch.nn.Module()
        decoder = model
    language_modules = [decoder, model.get_input_embeddings(), model.get_output_embeddings()]
    language = {id(p) for module in language_modules if module is not None for p in module.parameters()}
    vision = {id(p) for n, p in encoder.named_parameters() if "merger" not in n}
    found: dict[ModelPart, list[tuple[str, torch.nn.Parameter]]] = {"vision": [], "projector": [], "language": []}
    for name, parameter in model.named_parameters():
        part: ModelPart = "vision" if id(parameter) in vision else "projector"
        found["language" if id(parameter) in language else part].append((name, parameter))
    return found


def _decoder(model: PreTrainedModel) -> torch.nn.Module:
    decoder: torch.nn.Module = model.get_decoder()
    if "image" in model.input_modalities and (decoder is model or decoder is model.base_model):
        raise _unknown("language model", model)
    return decoder


def _unknown(what: str, model: PreTrainedModel) -> ModelError:
    modules = ", ".join(name for name, _ in model.base_model.named_children())
    return ModelError(
        f"cannot tell which part of {type(model).__name__} is its {what} (its modules are {modules}); "
        "set model.freeze=none to train all of it, or train an adapter and name its lora.target_modules"
    )


def freeze(model: PreTrainedModel, frozen: Iterable[ModelPart]) -> None:
    """Freeze the named parts and make everything else trainable.

    An output head that shares its weight with the embeddings belongs to them, as language.

    Raises:
        ModelError: nothing would be left to train, or the model's parts are unknown, see `parameters_by_part`.
    """
    frozen = set(frozen)
    model.requires_grad_(True)
    if not frozen:
        return
    by_part = parameters_by_part(model)
    for part in frozen:
        for _, parameter in by_part[part]:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"freezing {', '.join(sorted(frozen))} leaves nothing of this model to train")


def language_linear_layers(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers of the language model, without its head: where an adapter goes by default.

    Raises:
        ModelError: the model takes images, and transformers does not tell its language model.
    """
    inside = {id(module) for module in _decoder(model).modules()}
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and id(m) in inside]


def keep_trainable_in_float32(model: torch.nn.Module) -> None:
    """Hold the trainable weights in float32, the frozen ones as loaded.

    At learning rates of 1e-6 an update is below the resolution of bfloat16; autocast still computes in that.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
