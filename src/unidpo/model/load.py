"""Load and save a policy and its processor."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import PIL.Image
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

# In 5.17, `transformers.AutoImageProcessor` asks for torchvision, which its own module does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from unidpo.errors import ModelError, RecipeError, UserError
from unidpo.files.places import missing_here
from unidpo.model.parts import language_linear_layers
from unidpo.model.patches import multiply_patches

Processor: TypeAlias = ProcessorMixin | PreTrainedTokenizerBase
"""What turns a prompt into tensors: a processor for vision-language models, a tokenizer for text models."""
Quantization: TypeAlias = Literal["nf4", "int8"]


def load_policy(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    quantize: Quantization | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model to train, from a folder or hub id, as a vision-language model where it is one, else a language model.

    A folder that holds an adapter, such as the `model/` of a run with one, gives its model with the adapter merged in.

    Args:
        dtype: of the weights; only of what is computed where they are quantized.
        quantize: hold the linear layers of the language model in 4 bits (`"nf4"`) or 8 bits (`"int8"`) per weight, to
            train an adapter on. Vision tower, projector and head, in which rounding hurts most, stay as they are.

    Raises:
        ModelError: there is no model at `name`, or transformers cannot load it, or not quantized.
        RecipeError: `quantize` is given and bitsandbytes is not installed.
    """
    base = base_of_adapter(name)
    if base is not None:
        if quantize is not None:
            raise ModelError(
                f"{name}: model.quantize={quantize} needs whole weights, and this is an adapter of {base}; save the "
                "merged model first (`load_policy(...).save_pretrained(...)`, its processor beside it) and name that"
            )
        return _with_adapter(load_policy(base, dtype=dtype, trust_remote_code=trust_remote_code), name)
    config = load_config(name, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantize is not None:
        empty = empty_model(config, trust_remote_code=trust_remote_code)
        options["quantization_config"] = _quantization(empty, quantize, dtype=dtype)
    model = load_weights(_auto(config), name, **options)
    multiply_patches(model)
    return model


def empty_model(model: str | Path | PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a folder, hub id or configuration without weights, on the `meta` device. Raises `ModelError`."""
    config = load_config(model, trust_remote_code=trust_remote_code) if isinstance(model, str | Path) else model
    with _as_model_error(config.name_or_path, "the model"), torch.device("meta"):
        empty: PreTrainedModel = _auto(config).from_config(config, trust_remote_code=trust_remote_code)
    return empty


def _auto(config: PreTrainedConfig) -> Any:
    return AutoModelForImageTextToText if _takes_images(config) else AutoModelForCausalLM


def _takes_images(config: PreTrainedConfig) -> bool:
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _quantization(empty: PreTrainedModel, kind: Quantization, *, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Quantize the linear layers of the language model and nothing else; `empty` is the model without its weights."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"model.quantize={kind} needs the package bitsandbytes; install it with `pip install 'unidpo[quantize]'`"
        )
    inside = set(language_linear_layers(empty))
    # Given here, these replace the names of transformers' own guess, which differs between model families.
    skip = [name for name, m in empty.named_modules() if isinstance(m, torch.nn.Linear) and name not in inside]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


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


def base_of_adapter(name: str | Path) -> str | None:
    """The model that an adapter's folder belongs to, or `None` where `name` is no such folder."""
    settings = Path(name) / "adapter_config.json"
    if not settings.is_file() or (Path(name) / "config.json").is_file():
        return None
    with _as_model_error(name, "the adapter"):
        return str(json.loads(settings.read_text("utf-8"))["base_model_name_or_path"])


def _with_adapter(model: PreTrainedModel, name: str | Path) -> PreTrainedModel:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embeddings.weight is head.weight
    with _as_model_error(name, "the adapter"):
        with quiet_peft():
            adapted = PeftModel.from_pretrained(model, str(name))
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if tied and any(isinstance(end, BaseTunerLayer) for end in ends):
            raise ModelError(
                f"{name}: this adapter changes the embeddings or the head of a model in which the two share their "
                "weights; it cannot be merged into one without changing the other: load it with peft"
            )
        merged: PreTrainedModel = adapted.merge_and_unload()
    # An adapter trained on top of this one must name it as its model.
    merged.name_or_path = str(name)
    return merged


def load_config(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration. Raises `ModelError` where there is none."""
    base = base_of_adapter(name)
    if base is not None:
        return load_config(base, trust_remote_code=trust_remote_code)
    folder = Path(name)
    if problem := missing_here(name):
        raise ModelError(f"{name}: {problem}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{name}: this folder holds no model (no config.json); name a folder written by `save_pretrained`, "
            "such as the `model/` of a run folder, or a hub id"
        )
    if (folder / "environment.json").is_file():
        finished = (folder / "model").is_dir()
        what = f"its model is {folder / 'model'}" if finished else "it has no model yet; resume the run"
        raise ModelError(f"{name}: this is a run folder; {what}")
    with _as_model_error(name, "the model's configuration"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(name), trust_remote_code=trust_remote_code)
    return config


def load_processor(name: str | Path, *, trust_remote_code: bool = False) -> Processor:
    """The processor of the model at `name`, or its tokenizer where it is a text model.

    Some processors (Qwen2-VL's among them) hold a video processor, which needs torchvision. Where that is missing, the
    same processor is put together without one.

    Raises:
        ModelError: there is no processor or tokenizer at `name`.
    """
    config = load_config(name, trust_remote_code=trust_remote_code)
    load = {"trust_remote_code": trust_remote_code}
    with _as_model_error(name, "the processor"):
        if not _takes_images(config):
            return _usable(name, AutoTokenizer.from_pretrained(str(name), **load))
        cls = PROCESSOR_MAPPING.get(type(config), None)
        processor: ProcessorMixin
        if cls is not None and "video_processor" in cls.get_attributes() and not is_torchvision_available():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(name), **load)
            image_processor = AutoImageProcessor.from_pretrained(str(name), **load)
            settings, _ = cls.get_processor_dict(str(name))
            processor = compose_processor(cls, image_processor, tokenizer, settings=settings)
        else:
            processor = AutoProcessor.from_pretrained(str(name), **load)
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(f"{name}: this vision-language model comes without an image processor")
    _usable(name, processor.tokenizer)
    with _as_model_error(name, "the image processor (preprocessor_config.json)"):
        # Its settings are not looked at before an image comes.
        processor.image_processor(PIL.Image.new("RGB", (64, 64)), return_tensors="pt")
    return processor


def _usable(name: str | Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    # Where the files are missing, transformers makes an empty tokenizer, to which every text is nothing.
    with _as_model_error(name, "the tokenizer"):
        ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    if not ids:
        raise ModelError(f"{name}: there is no tokenizer; copy its files (tokenizer.json and the like) into the folder")
    return tokenizer


def compose_processor(
    cls: type[ProcessorMixin],
    image_processor: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> ProcessorMixin:
    """A processor of class `cls` for images and text only.

    transformers reads a processor's parts off the signature of `__init__`, so one without `video_processor` needs none.
    The class keeps its name, so that any machine can load what `save_pretrained` writes.

    Args:
        settings: what else `cls` takes, such as the number of tokens per image; other keys are ignored.
    """
    signature = inspect.signature(cls.__init__)
    kept = [parameter for name, parameter in signature.parameters.items() if name != "video_processor"]

    def init(self: ProcessorMixin, **options: Any) -> None:
        cls.__init__(self, video_processor=None, **options)

    init.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    without_video = type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__, "__doc__": cls.__doc__})
    held = {"image_processor": image_processor, "tokenizer": tokenizer}
    own = {p.name for p in kept if p.kind is not inspect.Parameter.VAR_KEYWORD} - {"self", *held}
    options = {"chat_template": tokenizer.chat_template} | {n: v for n, v in settings.items() if n in own}
    composed: ProcessorMixin = without_video(**held, **options)
    return composed


def save_model(
    model: Any,
    processor: Processor,
    folder: Path,
    state: Mapping[str, torch.Tensor] | None = None,
    *,
    dtype: torch.dtype,
) -> None:
    """Write weights (safetensors, in `dtype`) and processor, so that `from_pretrained(folder)` loads both.

    Args:
        model: a transformers model, or one with an adapter around it.
        state: the model's state, where it is not in the model: brought together from several processes.
    """
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in (model.state_dict() if state is None else state).items()
    }
    model.save_pretrained(folder, state_dict=state)
    if isinstance(model, PreTrainedModel):
        # The configuration says in which type to load, and transformers writes the type the model has in memory.
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.save_pretrained(folder)
    processor.save_pretrained(folder)
    if isinstance(processor, ProcessorMixin) and "video_processor" not in processor.get_attributes():
        # A machine with torchvision looks for a video processor's settings; older versions have them all in this file.
        processor.image_processor.save_pretrained(folder)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning that peft asks transformers by a name on its way out; users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


@contextlib.contextmanager
def _as_model_error(name: str | Path, what: str) -> Iterator[None]:
    """Say which model and which part of it could not be loaded, in place of the library's own exception."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a broken file, a library raises whatever its first use of it raises
        reason = " ".join(str(error).split())
        hint = "" if Path(name).exists() else "; no such folder here, and as a hub id it could not be fetched"
        raise ModelError(f"{name}: cannot load {what}{hint} ({type(error).__name__}: {reason[:400]})") from error
