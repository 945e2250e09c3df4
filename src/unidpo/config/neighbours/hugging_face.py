"""The keys that LLaMA-Factory, TRL and ms-swift have in common: arguments of transformers' `Trainer`, old and new."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unidpo.config.hf_arguments import OWNED_BY_RECIPE, TABLE, WITHOUT_EFFECT
from unidpo.config.neighbours.table import Given, NoEqual, NotNeeded, Row, Taken, by, missing, not_needed, same, several

_FILES = {"zero0": None, "zero1": None, "zero2": "recipes/launch/zero2.json", "zero3": "recipes/launch/zero3.json"}
CUT = "a response is cut on the right, a prompt never; a prompt that is too long is named"
"""How `data.max_length` differs from their limits."""
_GONE = "transformers has dropped it"


def accumulation(value: Any, given: Given) -> Taken:
    """Micro-batches of an optimizer step: as its pairs over all processes, where their number is known."""
    at_once = given.get("per_device_train_batch_size", 1)
    if given.processes is None or not isinstance(at_once, int) or not isinstance(value, int):
        note = "for each process: start as many as before, or give `train.global_batch_pairs` in its place"
        return Taken({"train.gradient_accumulation_steps": value}, note)
    note = f"{at_once} × {value} × {given.processes} processes, and as many pairs with any number of them"
    return Taken({"train.global_batch_pairs": at_once * value * given.processes}, note)


def quantization(value: Any, method: str, kind: str) -> Taken | NoEqual | NotNeeded:
    """Bits that weights are held in, by a method and in a kind of numbers."""
    if value is None:
        return NotNeeded("is off, as it is here")
    if value not in (4, 8) or method != "bnb" or kind != "nf4":
        return NoEqual("`model.quantize` knows nf4 and int8, by bitsandbytes; nf4 is the nearest")
    return Taken({"model.quantize": {4: "nf4", 8: "int8"}[value]})


def held_out(value: Any, given: Given) -> Any:
    """The share that is held out for evaluation."""
    if not value:
        return NotNeeded("is off, as it is here")
    if isinstance(value, int | float) and value < 1:
        return Taken({"data.eval_fraction": float(value)}, "of the prompts, not of the rows: none is on both sides")
    return NoEqual("is a number of rows; give the share of the prompts, `data.eval_fraction`")


def _dtype(value: Any, given: Given) -> Taken:
    kind = next((name for key, name in _DTYPES.items() if given.get(key) is True), "float32")
    pure = given.get("pure_bf16") is True
    return Taken({"model.dtype": kind}, "trained weights are kept in float32 all the same" if pure else "")


_DTYPES = {"bf16": "bfloat16", "pure_bf16": "bfloat16", "fp16": "float16"}


def _deepspeed(value: Any, given: Given) -> Any:
    if not isinstance(value, str):
        return Taken({"train.deepspeed": value})
    if value in _FILES:
        if _FILES[value] is None:
            return NotNeeded("shards no weights; several processes are started with `--nproc`")
        return Taken({"train.deepspeed": _FILES[value]}, "the file of this repository; give the path of yours")
    note = "" if Path(value).is_file() else "there is no such file from this folder; `recipes/launch` has some"
    return Taken({"train.deepspeed": value}, note)


def _fsdp(value: Any, given: Given) -> Any:
    if isinstance(value, bool):
        return Taken({"train.fsdp": value})
    return Taken({"train.fsdp": True}, "FSDP2, weights, gradients and optimizer sharded; `train.fsdp_config` tunes it")


def _warmup_ratio(value: Any, given: Given) -> Any:
    if given.get("warmup_steps"):
        return NotNeeded("`warmup_steps` is given, and wins there too")
    return value


def _report_to(value: Any, given: Given) -> Any:
    return [] if value in (None, "none", ["none"]) else value


def _plain(key: str) -> Row:
    """The row of an argument of today's `TrainingArguments`."""
    if key in WITHOUT_EFFECT:
        return missing(WITHOUT_EFFECT[key])
    return not_needed(OWNED_BY_RECIPE[key]) if key in OWNED_BY_RECIPE else same(f"train.{key}")


ROWS: Mapping[str, Row] = {
    **{key: _plain(key) for key in TABLE["types"]},
    **several("bf16 pure_bf16 fp16", by(_dtype, "model.dtype")),
    "gradient_accumulation_steps": by(accumulation, "train.gradient_accumulation_steps"),
    "output_dir": same("output"),
    "deepspeed": by(_deepspeed, "train.deepspeed"),
    "fsdp": by(_fsdp, "train.fsdp"),
    "report_to": same("train.report_to", take=_report_to),
    "warmup_ratio": same("train.warmup_steps", take=_warmup_ratio),
    "evaluation_strategy": same("train.eval_strategy"),
    "no_cuda": same("train.use_cpu"),
    "model_name_or_path": same("model.name"),
    "trust_remote_code": same("model.trust_remote_code"),
    "dataloader_drop_last": missing("has none: the last step of an epoch takes the pairs that are left"),
    "prediction_loss_only": not_needed(WITHOUT_EFFECT["prediction_loss_only"]),
    **{
        key: not_needed(WITHOUT_EFFECT[key])
        for key in WITHOUT_EFFECT
        if key.startswith(("eval_", "batch_eval", "include_"))
    },
    **{
        key: not_needed(WITHOUT_EFFECT[key])
        for key in ("dataloader_persistent_workers", "dataloader_multiprocessing_context", "dataloader_in_order")
    },
    "torch_empty_cache_steps": not_needed("gives memory back to the driver; the numbers are the same"),
    "auto_find_batch_size": not_needed(
        "memory is bounded by `train.max_tokens_per_pack`; `unidpo plan` says by how many"
    ),
    "average_tokens_across_devices": not_needed(WITHOUT_EFFECT["average_tokens_across_devices"]),
    "group_by_length": not_needed("saves padding, and packs hold none"),
    "length_column_name": not_needed("saves padding, and packs hold none"),
    "train_sampling_strategy": by(lambda value, given: Taken({"data.shuffle": value != "sequential"}), "data.shuffle"),
    "overwrite_output_dir": not_needed("a finished run is never overwritten; choose another `output`, or `--resume`"),
    "logging_dir": not_needed("logs lie in the run folder"),
    "save_safetensors": not_needed("weights are always safetensors"),
    "local_rank": not_needed("the launcher sets it"),
    "ignore_data_skip": by(lambda value, given: NotNeeded("`--resume` finds its place without reading over data")),
    **several("fp16_opt_level half_precision_backend fp16_backend use_mps_device", not_needed(_GONE)),
    **several("jit_mode_eval use_ipex past_index tpu_* mp_parameters", not_needed(_GONE)),
    **several("fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap", not_needed(_GONE)),
    **several("torchdynamo dispatch_batches split_batches ray_scope", not_needed(_GONE)),
    **several(
        "push_to_hub_model_id push_to_hub_token push_to_hub_organization", not_needed(OWNED_BY_RECIPE["push_to_hub"])
    ),
}
"""What becomes of them."""

DEFAULTS: Mapping[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 3,
}
"""Of transformers, where ours differ and what is learned depends on it."""
