"""Load a policy and its processor, and decide which of its parameters learn."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from unidpo.errors import ModelError

Processor: TypeAlias = ProcessorMixin | PreTrainedTokenizerBase
"""What turns a prompt into tensors: a processor for vision-language models, a tokenizer for text models."""
Part: TypeAlias = Literal["vision", "projector", "language"]
_LOG = logging.getLogger(__name__)


def load_policy(
    name: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model to train, from a folder or hub id, as a vision-language model where it is one, else a language model.

    A folder that holds an adapter, such as the `model/` of a run with one, gives its model with the adapter merged in.

    Raises:
        ModelError: there is no model at `name`, or transformers cannot load it.
    """
    base = _base_of_adapter(name)
    if base is not None:
        return _with_adapter(load_policy(base, dtype=dtype, trust_remote_code=trust_remote_code), name)
    config = load_config(name, trust_remote_code=trust_remote_code)
    vision = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    return load_weights(auto, name, config=config, dtype=dtype, trust_remote_code=trust_remote_code)


def load_weights(loader: Any, name: str | Path, **options: Any) -> PreTrainedModel:
    """What `loader.from_pretrained` makes of a folder or hub id, if all weights are there. Raises `ModelError`."""
    with _as_model_error(name, "the model"):
        model: PreTrainedModel
        model, info = loader.from_pretrained(str(name), use_safetensors=True, output_loading_info=True, **options)
    # transformers fills these with random numbers and only logs it.
    if missing := sorted(info["missing_keys"]):
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ModelError(f"{name}: the weights lack {len(missing)} tensors of the model ({listed}); fetch them again")
    return model


def _base_of_adapter(name: str | Path) -> str | None:
    """The model that an adapter's folder belongs to, or `None` where `name` is no such folder."""
    settings = Path(name) / "adapter_config.json"
    if not settings.is_file() or (Path(name) / "config.json").is_file():
        return None
    with _as_model_error(name, "the adapter"):
        return str(json.loads(settings.read_text("utf-8"))["base_model_name_or_path"])


def _with_adapter(model: PreTrainedModel, name: str | Path) -> PreTrainedModel:
    from peft import PeftModel

    with _as_model_error(name, "the adapter"):
        merged: PreTrainedModel = PeftModel.from_pretrained(model, str(name)).merge_and_unload()
    # An adapter trained on top of this one must name it as its model.
    merged.name_or_path = str(name)
    return merged


def load_config(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration. Raises `ModelError` where there is none."""
    base = _base_of_adapter(name)
    if base is not None:
        return load_config(base, trust_remote_code=trust_remote_code)
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{name}: this folder holds no model (no config.json); name a folder written by `save_pretrained`, "
            "such as the `model/` of a run folder, or a hub id"
        )
    with _as_model_error(name, "the model's configuration"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(name), trust_remote_code=trust_remote_code)
    return config


def load_processor(name: str | Path, *, trust_remote_code: bool = False) -> Processor:
    """The processor of the model at `name`, or its tokenizer where it is a text model.

    Some processors (Qwen2-VL's among them) hold a video processor, which cannot be built without torchvision. Where
    that is missing, the same processor is put together without one: images and text are processed as ever.

    Raises:
        ModelError: there is no processor or tokenizer at `name`.
    """
    config = load_config(name, trust_remote_code=trust_remote_code)
    load = {"trust_remote_code": trust_remote_code}
    with _as_model_error(name, "the processor"):
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return _usable(name, AutoTokenizer.from_pretrained(str(name), **load))
        try:
            processor: ProcessorMixin = AutoProcessor.from_pretrained(str(name), **load)
        except ImportError as error:
            if "torchvision" not in str(error).lower() or type(config) not in PROCESSOR_MAPPING:
                raise
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(name), **load)
            processor = compose_processor(
                PROCESSOR_MAPPING[type(config)], AutoImageProcessor.from_pretrained(str(name), **load), tokenizer
            )
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(f"{name}: this vision-language model comes without an image processor")
    _usable(name, processor.tokenizer)
    return processor


def _usable(name: str | Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    # Where the files are missing, transformers makes an empty tokenizer, to which every text is nothing.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ModelError(f"{name}: there is no tokenizer; copy its files (tokenizer.json and the like) into the folder")
    return tokenizer


def compose_processor(
    cls: type[ProcessorMixin], image_processor: Any, tokenizer: PreTrainedTokenizerBase
) -> ProcessorMixin:
    """A processor of class `cls` for images and text only.

    transformers reads a processor's parts off the signature of `__init__`; one without `video_processor` is a
    processor that needs none. The name stays, so that `save_pretrained` writes what any other machine can load.
    """

    def init(
        self: ProcessorMixin, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        cls.__init__(self, image_processor, tokenizer, None, chat_template=chat_template)

    without_video = type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__, "__doc__": cls.__doc__})
    composed: ProcessorMixin = without_video(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    return composed


def parts(model: PreTrainedModel) -> Mapping[Part, list[tuple[str, torch.nn.Parameter]]]:
    """The model's named parameters as vision tower, projector and language model.

    The language model is transformers' `get_decoder()` with the embeddings and the head, the vision tower its
    `get_encoder(modality="image")`; the projector is what is in neither, and the `merger` modules that the Qwen-VL
    family keeps inside its vision tower. Each parameter is in exactly one part.
    """
    decoder, encoder = model.get_decoder(), model.get_encoder(modality="image")
    has_vision = encoder is not model and encoder is not model.base_model and encoder is not decoder
    language_modules = [decoder, model.get_input_embeddings(), model.get_output_embeddings()]
    language = {id(p) for module in language_modules if module is not None for p in module.parameters()}
    vision = {id(p) for n, p in encoder.named_parameters() if "merger" not in n} if has_vision else set()
    found: dict[Part, list[tuple[str, torch.nn.Parameter]]] = {"vision": [], "projector": [], "language": []}
    for name, parameter in model.named_parameters():
        part: Part = "vision" if id(parameter) in vision else "projector"
        if id(parameter) in language or not has_vision:
            part = "language"
        found[part].append((name, parameter))
    return found


def freeze(model: PreTrainedModel, frozen: Iterable[Part]) -> None:
    """Freeze the named parts and let everything else learn.

    Raises:
        ModelError: nothing would be left to learn.
    """
    by_part = parts(model)
    frozen = set(frozen)
    for part, parameters in by_part.items():
        for _, parameter in parameters:
            parameter.requires_grad_(part not in frozen)
    missing = sorted(part for part in frozen if not by_part[part])
    if missing:
        _LOG.info("nothing to freeze: this model has no %s", " and no ".join(missing))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"freezing {', '.join(sorted(frozen))} leaves nothing of this model to train")


def language_linear_layers(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers of the language model, without its head: where an adapter goes by default."""
    decoder = model.get_decoder()
    inside = {id(module) for module in decoder.modules()}
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and id(m) in inside]


def keep_trainable_in_float32(model: torch.nn.Module) -> None:
    """Hold the weights that learn in float32, the frozen ones as loaded.

    At learning rates of 1e-6 an update is below the resolution of bfloat16; the arithmetic stays in the narrow type
    through autocast.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_model(model: PreTrainedModel, processor: Processor, folder: Path, *, dtype: torch.dtype) -> None:
    """Write weights (safetensors, in `dtype`) and processor, so that `from_pretrained(folder)` loads both."""
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(folder, state_dict=state)
    if isinstance(model, PreTrainedModel):
        # The configuration says in which type to load, and transformers writes the type the model has in memory.
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.save_pretrained(folder)
    processor.save_pretrained(folder)
    if isinstance(processor, ProcessorMixin) and "video_processor" not in processor.get_attributes():
        # A machine with torchvision looks for a video processor's settings; the older layout has them all in this file.
        processor.image_processor.save_pretrained(folder)


@contextlib.contextmanager
def _as_model_error(name: str | Path, what: str) -> Iterator[None]:
    """Say which model and which part of it could not be loaded, in place of the library's own exception."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        hint = "" if Path(name).exists() else "; no such folder here, and as a hub id it could not be fetched"
        raise ModelError(f"{name}: cannot load {what}{hint} ({type(error).__name__}: {reason[:400]})") from error
