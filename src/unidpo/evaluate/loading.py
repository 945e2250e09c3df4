"""From a model's name to something that answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from unidpo.evaluate.generation import HuggingFace
from unidpo.evaluate.prompting import PromptStyle
from unidpo.model.load import load_policy, load_processor


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How models are loaded.

    Attributes:
        prompt_style: see `HuggingFace`, as is `batch_size`.
        batch_size: questions answered together.
        dtype: of the weights; "auto" is bfloat16 on a GPU and float32 on a CPU.
        trust_remote_code: run code that comes with a model.
        processes: how many load the model, each on a GPU of its own.
        backend: "hf" for Hugging Face, "vllm" for vLLM.
        server: address of a server that speaks OpenAI's protocol; `None` for vLLM in this process.
    """

    prompt_style: PromptStyle | None = None
    batch_size: int | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    processes: int = 1
    backend: str = "hf"
    server: str | None = None


def load_model(name: str, options: LoadOptions, *, gpu: int = 0) -> HuggingFace:
    """A model from a folder or hub id, ready to answer on a GPU, or on the CPU where there is none.

    Raises:
        ModelError: there is no such model, or its chat template cannot be used as asked.
    """
    place = torch.device("cuda", gpu) if torch.cuda.is_available() else torch.device("cpu")
    auto = torch.float32 if place.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = auto if options.dtype == "auto" else getattr(torch, options.dtype)
    model = load_policy(name, dtype=dtype, trust_remote_code=options.trust_remote_code)
    processor = load_processor(_with_tokenizer(name), trust_remote_code=options.trust_remote_code)
    model.to(place)
    return HuggingFace(model, processor, prompt_style=options.prompt_style, batch_size=options.batch_size)


def _with_tokenizer(name: str) -> str:
    """The folder itself, or for an adapter that comes without a tokenizer the model it belongs to."""
    settings = Path(name) / "adapter_config.json"
    if not settings.is_file() or (Path(name) / "tokenizer_config.json").is_file():
        return name
    return str(json.loads(settings.read_text("utf-8"))["base_model_name_or_path"])
