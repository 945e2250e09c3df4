"""The keys and types of `transformers.TrainingArguments`, from a table: importing transformers would import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, Field, create_model

WITHOUT_EFFECT: Mapping[str, str] = {
    "label_smoothing_factor": "has no meaning for pairs; the dpo loss has its own `label_smoothing`",
    "train_sampling_strategy": "has no effect; `shuffle` (`data.shuffle` in a recipe) decides",
    "auto_find_batch_size": "is not supported; set `per_device_train_batch_size`",
    "dataloader_drop_last": "has no effect; every pair of an epoch is visited",
    "dataloader_persistent_workers": "has no effect; workers live for an epoch",
    "dataloader_multiprocessing_context": "has no effect",
    "dataloader_in_order": "has no effect; steps always come in their order",
    "include_num_input_tokens_seen": "is not supported; the ledger has the tokens of every response",
    "torch_empty_cache_steps": "is not supported",
    "length_column_name": "has no meaning for prompt groups",
    "label_names": "has no meaning for pairs",
    "average_tokens_across_devices": "has no meaning for pairs; the loss is their mean over all processes",
    "neftune_noise_alpha": "is not supported; the noise would depend on what shares a pack",
    "prediction_loss_only": "has no effect; an evaluation measures everything that training logs",
    "batch_eval_metrics": "has no effect; an evaluation makes no predictions",
    "eval_accumulation_steps": "has no effect; an evaluation makes no predictions",
    "eval_do_concat_batches": "has no effect; an evaluation makes no predictions",
    "eval_use_gather_object": "has no effect; an evaluation makes no predictions",
    "include_for_metrics": "has no effect; an evaluation makes no predictions",
}
"""Keys of `TrainingArguments` that nothing here reads, each with the reason and the place to go."""

OWNED_BY_RECIPE: Mapping[str, str] = {
    **WITHOUT_EFFECT,
    "output_dir": "is not set here; it is `output` of the recipe",
    "bf16": "is not set here; `model.dtype` decides",
    "fp16": "is not set here; `model.dtype` decides",
    "bf16_full_eval": "is not set here; `model.dtype` decides",
    "fp16_full_eval": "is not set here; `model.dtype` decides",
    "dataloader_pin_memory": "is not set here; batches for a GPU are pinned",
    "remove_unused_columns": "is not set here; the trainer needs every column",
    "resume_from_checkpoint": "is not set here; use `unidpo train RECIPE --resume`",
    "do_train": "is not set here; `unidpo train` trains",
    "do_eval": "is not set here; `train.eval_strategy` and `data.eval_fraction` decide",
    "do_predict": "is not set here; `unidpo train` trains",
    "disable_tqdm": "is not set here; progress is shown by unidpo itself",
    "logging_nan_inf_filter": "is not set here; a loss that is not a number is never averaged away",
    "hub_token": "does not belong in a file; log in with `hf auth login` or set HF_TOKEN",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        "is not set here; use `unidpo train RECIPE --push-to-hub REPO_ID`",
    ),
    "parallelism_config": "is not supported; use `fsdp` or `deepspeed`",
    "local_rank": "is not set here; the launcher sets it",
    "enable_jit_checkpoint": "is not needed; SIGTERM always finishes the current step and saves it",
}
"""Keys of `TrainingArguments` that a recipe may not set, each with the reason and the place to go."""

RENAMED: Mapping[str, str] = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Former and later names of arguments. A recipe takes both; transformers knows the later ones from 5.23 on."""

MANY = 10**9
"""More of anything that is counted is a slip of the keyboard."""

TABLE: Mapping[str, Any] = json.loads(Path(__file__).with_name("hf_arguments.json").read_text("utf-8"))
"""Made by `scripts/make_training_arguments.py`: the types of each argument, and the words of those that take words."""


def _no_is_a_word(value: Any) -> Any:
    """YAML reads a bare `no` as false."""
    return "no" if value is False else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def words_of(name: str) -> Any:
    """The type of an argument that takes one of some words."""
    return Annotated[Literal[tuple(TABLE["words"][name])], BeforeValidator(_no_is_a_word)]


_TYPES: Mapping[str, Any] = {
    **{kind.__name__: kind for kind in (bool, int, float, str, list, dict)},
    "None": None,
    "False": Literal[False],
    "list[str]": list[str],
    "Any": Any,
}

_CHECKPOINTING = Literal["use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"]
# Outside of these transformers, torch or numpy fail late, with an error that names no key, or do something else.
# `TrainSection` holds the ranges of those arguments that have a default of ours.
_NARROWED: Mapping[str, Any] = {
    "activation_checkpointing_kwargs": dict[_CHECKPOINTING, Any] | None,
    "gradient_checkpointing_kwargs": dict[_CHECKPOINTING, Any] | None,
    "report_to": Annotated[list[words_of("report_to")], BeforeValidator(_as_list)] | None,  # type: ignore[misc]
    "adam_beta1": Annotated[float, Field(ge=0, lt=1)],
    "adam_beta2": Annotated[float, Field(ge=0, lt=1)],
    "adam_epsilon": Annotated[float, Field(ge=0, le=1)],
    "data_seed": Annotated[int, Field(ge=0, lt=2**32)] | None,
    "dataloader_num_workers": Annotated[int, Field(ge=0, le=1024)],
    "dataloader_prefetch_factor": Annotated[int, Field(ge=1, le=1024)] | None,
    "ddp_bucket_cap_mb": Annotated[int, Field(ge=1, le=1_000_000)] | None,
    "ddp_timeout": Annotated[int, Field(ge=1, le=MANY)],
    "eval_delay": Annotated[float, Field(ge=0, le=MANY)],
    "eval_steps": Annotated[float, Field(gt=0, le=MANY)] | None,
    "gradient_accumulation_steps": Annotated[int, Field(ge=1, le=MANY)],
    "max_steps": Annotated[int, Field(ge=1, le=MANY)] | Literal[-1],
}


def _type_of(name: str, kinds: str) -> Any:
    """What an argument takes from YAML; `None` may stand for every default."""
    if name in _NARROWED:
        return _NARROWED[name]
    if name in TABLE["words"]:
        return words_of(name)
    return Union[tuple(_TYPES[kind] for kind in kinds.split(" | "))]  # noqa: UP007


def model_of_arguments(base: type[BaseModel]) -> Any:
    """A model with a field per training argument that a recipe may set; unset ones are left to transformers."""
    settable = {name: kinds for name, kinds in TABLE["types"].items() if name not in OWNED_BY_RECIPE}
    fields: dict[str, Any] = {name: (_type_of(name, kinds), None) for name, kinds in settable.items()}
    return create_model("HuggingFaceArguments", __base__=base, __module__=__name__, **fields)
