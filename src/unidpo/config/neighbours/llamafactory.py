"""LLaMA-Factory's arguments, and those that the authors' implementation adds to them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unidpo.config.neighbours import hugging_face
from unidpo.config.neighbours.table import (
    Given,
    Neighbour,
    NoEqual,
    NotNeeded,
    Row,
    Taken,
    by,
    missing,
    not_needed,
    only_with,
    same,
    several,
)

_MANY_ROWS = 1_000_000
"""More than the data sets of preferences that people train on."""
_CHATML = ("qwen2_vl", "qwen2_omni", "qwen2_audio")
_SFT_ONLY = "is for other stages than preference training"
_NEAREST_LOSS = {
    "hinge": "`dpo` is the nearest: a smooth hinge",
    "orpo": "`simpo` is the nearest without a reference",
    "kto_pair": "`dpo` is the nearest on pairs",
}
LOSSES: Mapping[str, str] = {"sigmoid": "dpo", "ipo": "ipo", "simpo": "simpo", "uni_dpo": "uni_dpo"}
"""Its words for losses that are here."""


def _stage(value: Any, given: Given) -> Any:
    if value == "dpo":
        return NotNeeded("is what `unidpo train` does; `pref_loss` says which loss")
    reason = f"`stage: {value}` is not training on preference pairs; `dpo` is the nearest, on pairs"
    return NoEqual(reason, leaves_open="loss.name")


def _loss(value: Any, given: Given) -> Any:
    if given.get("stage") != "dpo":
        return NotNeeded("is for `stage: dpo`")
    if value not in LOSSES:
        return NoEqual(
            f"the loss `{value}` is not here; {_NEAREST_LOSS.get(value, '`dpo` is the nearest')}", "loss.name"
        )
    mixed = _is_mixed(given)
    return Taken({"loss.name": "mpo" if mixed else LOSSES[value]}, "with its NLL and BCO terms" if mixed else "")


def _mixed(value: Any, given: Given) -> Any:
    """`pref_ftx` and `pref_bco_weight`: terms beside the preference's, which are MPO's."""
    if not value:
        return NotNeeded("is off, as it is here")
    if given.get("pref_loss") != "sigmoid":
        return NoEqual("is here a part of `mpo` alone, which is DPO with a BCO and an NLL term")
    bco = given.get("pref_bco_weight", 0.0)
    weights = {"loss.w_p": 1 / (1 + bco), "loss.w_q": bco / (1 + bco), "loss.w_g": float(given.get("pref_ftx", 0.0))}
    return Taken(weights, "the NLL term is that of each response's own tokens")


def _beta(value: Any, given: Given) -> Taken:
    return Taken({"loss.tau" if given.get("pref_loss") == "ipo" else "loss.beta": value})


def _is_mixed(given: Given) -> bool:
    return given.get("pref_loss") == "sigmoid" and bool(given.get("pref_ftx") or given.get("pref_bco_weight"))


def _smoothing(value: Any, given: Given) -> Any:
    if value and _is_mixed(given):
        return NoEqual("`mpo` has none")
    return float(value)


def _average(value: Any, given: Given) -> Any:
    if _is_mixed(given):
        return NoEqual("`mpo` takes sums over tokens") if value else NotNeeded("as here")
    if given.get("pref_loss") == "sigmoid":
        return value
    if value or given.get("pref_loss") != "uni_dpo":
        return NotNeeded("this loss has averages over tokens in any case")
    return NoEqual("Uni-DPO takes averages over tokens; there are no sums")


def _freeze(value: Any, given: Given) -> Any:
    if given.get("finetuning_type") != "full":
        return NotNeeded("an adapter is trained alone; `lora.target_modules` says where")
    frozen = {"vision": "vision_tower", "projector": "multi_modal_projector", "language": "language_model"}
    return Taken({"model.freeze": [ours for ours, name in frozen.items() if given.get(f"freeze_{name}")]})


def _method(value: Any, given: Given) -> Any:
    if value == "full":
        return Taken({"lora": None})
    if value == "lora":
        rank = given.get("lora_rank", 8)
        return Taken({"lora.r": rank, "lora.alpha": given.get("lora_alpha", 2 * rank)})
    reason = f"`finetuning_type: {value}` is not here; `lora` is the nearest that trains few weights, else `full`"
    return NoEqual(reason, leaves_open="lora")


def _target(value: Any, given: Given) -> Any:
    if value == "all":
        if given.get("freeze_vision_tower") is False:
            return Taken({"lora.target_modules": "all-linear"}, "vision tower and projector included")
        return Taken({"lora.target_modules": None}, "")
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _quantization(value: Any, given: Given) -> Any:
    method, kind = given.get("quantization_method", "bnb"), given.get("quantization_type", "nf4")
    return hugging_face.quantization(value, method, kind)


def _data(value: Any, given: Given) -> Any:
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)
    folder = str(given.get("dataset_dir", "data"))
    found = {name: name if Path(name).is_file() else given.find_data(name, folder) for name in names}
    lost = [name for name, path in found.items() if path is None]
    if lost:
        reason = f"{Path(folder, 'dataset_info.json')} is not here, or does not name {', '.join(lost)}"
        return NoEqual(f"{reason}; give `dataset_dir=FOLDER` behind the file, or the data file itself", "data.path")
    paths = [path for path in found.values() if path is not None]
    return Taken({"data.path": paths[0] if len(paths) == 1 else paths})


def _template(value: Any, given: Given) -> Taken:
    if value in _CHATML:
        return Taken({"data.template": "chatml"})
    if value in (None, "default", "empty"):
        return Taken({"data.template": None}, "the model's own chat template")
    return Taken(
        {"data.template": None}, "the model's own chat template, which may word a system prompt in another way"
    )


def _mix(value: Any, given: Given) -> Any:
    if value == "concat":
        return NotNeeded("all rows of all data sets, as here")
    return NoEqual("list the data sets as `{path, weight}`: how often each row is met in an epoch")


def _most_rows(value: Any, given: Given) -> Any:
    if value is None or value >= _MANY_ROWS:
        return NotNeeded("is above any number of rows it may cut")
    return NoEqual("all rows are used; for fewer, list the data set as `{path, weight}`, or cut its file")


_BOX = {"auto": "auto", "disabled": "auto", "sdpa": "sdpa", "fa2": "auto", "fa3": "auto"}


def _attention(value: Any, given: Given) -> Taken:
    value = str(value)
    notes = {"fa2": "flash attention where it can be had, after a check; `flash` demands it"}
    notes |= {"fa3": notes["fa2"], "disabled": "the fastest kernel that agrees with plain attention"}
    return Taken({"model.attention": _BOX.get(value, "auto")}, notes.get(value, ""))


def _checkpointing(value: Any, given: Given) -> Taken:
    return Taken({"train.gradient_checkpointing": not value}, "memory alone depends on it; `unidpo plan` says how much")


def _optimizer(name: str) -> Row:
    return missing(f"`train.optim: {name}` is the nearest")


_READING = "texts are tokenized once before training"
ROWS: Mapping[str, Row] = {
    **hugging_face.ROWS,
    "stage": by(_stage, "loss.name"),
    "pref_loss": by(_loss, "loss.name"),
    "pref_beta": by(_beta, "loss.beta"),
    "pref_ftx": by(_mixed, "loss.w_g"),
    "pref_bco_weight": by(_mixed, "loss.w_q"),
    "simpo_gamma": same("loss.gamma"),
    "dpo_label_smoothing": same("loss.label_smoothing", take=_smoothing),
    "dpo_average_log_prob": same("loss.length_normalized", take=_average),
    "uni_dpo_qual_eta": same("loss.quality_eta"),
    "uni_dpo_tau_ref": same("loss.tau_ref"),
    "uni_dpo_perf_gamma": same("loss.perf_gamma"),
    "uni_dpo_nll_lambda": same("loss.nll_weight"),
    "uni_dpo_tau_good": same("loss.tau_good"),
    "ld_alpha": missing("LD-DPO is not here; `loss.length_normalized: true` is the nearest against long responses"),
    "ref_model": same("reference"),
    "ref_model_adapters": missing("merge the adapter, and name the merged model as `reference`"),
    "ref_model_quantization_bit": missing("the reference is held as the policy is"),
    "kto_*": missing("is for KTO, which is not here"),
    **several("ppo_* reward_model*", not_needed("is for PPO")),
    "finetuning_type": by(_method, "lora"),
    "lora_rank": only_with("finetuning_type", "lora", "lora.r"),
    "lora_alpha": only_with("finetuning_type", "lora", "lora.alpha"),
    "lora_dropout": only_with("finetuning_type", "lora", "lora.dropout"),
    "lora_target": only_with("finetuning_type", "lora", "lora.target_modules", _target),
    "use_rslora": only_with("finetuning_type", "lora", "lora.rslora"),
    "use_dora": only_with("finetuning_type", "lora", "lora.dora"),
    "loraplus_lr_ratio": missing("both matrices of an adapter have one learning rate"),
    "loraplus_lr_embedding": not_needed("goes with `loraplus_lr_ratio`"),
    "pissa_init": missing("an adapter begins at zero"),
    "pissa_*": not_needed("goes with `pissa_init`"),
    "additional_target": missing("an adapter is trained alone"),
    "create_new_adapter": not_needed("an adapter is always a new one"),
    "adapter_name_or_path": missing("merge it first, and name the merged model as `model.name`"),
    "adapter_folder": not_needed("goes with `adapter_name_or_path`"),
    **several("oft_* module_dropout", missing("is for OFT, which is not here; `lora` is the nearest")),
    **several("freeze_vision_tower freeze_multi_modal_projector freeze_language_model", by(_freeze, "model.freeze")),
    **several(
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules",
        not_needed("is for `finetuning_type: freeze`"),
    ),
    "quantization_bit": by(_quantization, "model.quantize"),
    "quantization_method": not_needed("`model.quantize` is bitsandbytes'"),
    "quantization_type": not_needed("goes with `quantization_bit`"),
    "double_quantization": not_needed("scales are always quantized too"),
    "quantization_device_map": not_needed("each process has one GPU"),
    "flash_attn": same("model.attention", take=_attention),
    "use_cache": not_needed("is off in training"),
    "model_revision": missing("download that revision, and name its folder as `model.name`"),
    "disable_gradient_checkpointing": by(_checkpointing, "train.gradient_checkpointing"),
    "use_unsloth_gc": same("train.gradient_checkpointing", "without moving activations to the host"),
    "use_reentrant_gc": not_needed("layers are computed again without it, with the same numbers"),
    "enable_liger_kernel": same("train.use_liger_kernel"),
    "rope_scaling": missing("set it in the model's `config.json`"),
    "moe_aux_loss_coef": missing("the loss of the router is not added"),
    "upcast_layernorm": not_needed("trained weights are kept in float32"),
    "upcast_lmhead_output": not_needed("logits are computed in float32"),
    **several("shift_attn mixture_of_depths", missing("attention and layers are the model's own")),
    "train_from_scratch": missing("save the random model to a folder, and name it as `model.name`"),
    **several("use_unsloth use_v1_kernels", not_needed("is another way to the same numbers")),
    **several(
        "add_tokens add_special_tokens resize_vocab new_special_tokens_config",
        missing("extend tokenizer and embeddings beforehand, and save them as a model"),
    ),
    **several("init_special_tokens split_special_tokens", not_needed("goes with tokens that are added")),
    **several(
        "low_cpu_mem_usage offload_folder use_kv_cache use_fast_tokenizer device_map",
        not_needed("is about loading; the numbers are the same"),
    ),
    **several(
        "cache_dir hf_hub_token ms_hub_token om_hub_token",
        not_needed("set the hub's own environment variables, or `hf auth login`"),
    ),
    **several("infer_dtype infer_backend", not_needed("is for inference")),
    "print_param_status": not_needed("`unidpo plan` counts the weights"),
    **several(
        "vllm_* sglang_* export_* temperature top_p top_k num_beams max_new_tokens",
        not_needed("is for inference and export"),
    ),
    **several(
        "do_sample repetition_penalty length_penalty skip_special_tokens max_length "
        "predict_with_generate generation_* eval_num_beams compute_accuracy",
        not_needed("is for answers; benchmarks are `eval` of a recipe"),
    ),
    **several(
        "use_kt kt_* mode num_gpu_experts threadpool_count cpu_infer chunk_size", missing("KTransformers is not here")
    ),
    "dataset": by(_data, "data.path"),
    "dataset_dir": by(lambda value, given: NotNeeded("is where the names of `dataset` were looked up")),
    "media_dir": same("data.images"),
    "eval_dataset": missing("hold out prompts by `data.eval_fraction`, or take benchmarks: `eval.benchmarks`"),
    "eval_on_each_dataset": not_needed("goes with `eval_dataset`"),
    "template": same("data.template", take=_template),
    "cutoff_len": same("data.max_length", hugging_face.CUT),
    "image_max_pixels": same("data.max_pixels"),
    "image_min_pixels": by(
        lambda value, given: (
            NotNeeded("is the same here") if value == 32 * 32 else NoEqual("is 1,024 here and cannot be set")
        )
    ),
    **several("image_do_pan_and_scan crop_to_patches", missing("set it in the model's processor")),
    **several("video_* audio_* use_audio_in_video", not_needed("there are no videos and no sounds in the data")),
    "train_on_prompt": missing(_SFT_ONLY),
    "mask_history": not_needed("earlier turns are a part of the prompt and never learned"),
    "streaming": not_needed("images are read as they come, and rows are few"),
    "buffer_size": not_needed("goes with `streaming`"),
    "mix_strategy": by(
        lambda value, given: (
            NotNeeded("all rows of all data sets, as here")
            if value == "concat"
            else NoEqual("list the data sets as `{path, weight}`: how often each row is met in an epoch")
        )
    ),
    "interleave_probs": missing("a `weight` is for each row: the probability × all rows / rows of that data set"),
    "val_size": by(hugging_face.held_out, "data.eval_fraction"),
    "max_samples": by(_most_rows),
    "disable_shuffling": by(lambda value, given: Taken({"data.shuffle": not value}), "data.shuffle"),
    "packing": not_needed("is always on here: packs hold no padding"),
    **several("neat_packing block_diag_attn", not_needed("is always on here: responses do not see each other")),
    "tool_format": missing("write calls of tools into the texts"),
    "default_system": missing("write it into the rows, as `system`"),
    **several("enable_thinking preserve_thinking", not_needed("the model's own template decides")),
    **several(
        "overwrite_cache preprocessing_batch_size preprocessing_num_workers tokenized_path "
        "data_shared_file_system ignore_pad_token_for_loss",
        not_needed(_READING),
    ),
    "use_galore": _optimizer("galore_adamw"),
    "galore_*": not_needed("goes with `use_galore`"),
    "use_apollo": _optimizer("apollo_adamw"),
    "apollo_*": not_needed("goes with `use_apollo`"),
    "use_badam": _optimizer("lomo"),
    "badam_*": not_needed("goes with `use_badam`"),
    "use_adam_mini": _optimizer("adamw_8bit"),
    "use_muon": _optimizer("adamw_torch_fused"),
    **several("use_llama_pro use_dft_loss use_asft_loss use_eaft_loss asft_alpha eaft_alpha", missing(_SFT_ONLY)),
    **several(
        "use_mca use_megatron_bridge megatron_* use_hyper_parallel hyper_parallel_*",
        missing("Megatron is not here; shard the weights by `train.fsdp` or `train.deepspeed`"),
    ),
    **several("fp8 fp8_*", missing("there is no training in 8-bit floats")),
    "use_swanlab": by(
        lambda value, given: Taken({"train.report_to": ["swanlab"]}) if value else NotNeeded("is off, as it is here")
    ),
    "swanlab_*": not_needed("set SwanLab's own environment variables"),
    **several("ray_* master_addr master_port", not_needed("the launcher sets it")),
    **several("enable_torch_profiler profiler_* profile_modules", not_needed("there is no profile of a run")),
    "early_stopping_steps": missing("`train.load_best_model_at_end` finishes with the best evaluation instead"),
    "plot_loss": not_needed("`unidpo report` draws the curve"),
    **several(
        "include_effective_tokens_per_second include_tokens_per_second",
        not_needed("the rate is shown, and the ledger counts tokens"),
    ),
}

LLAMA_FACTORY = Neighbour(
    "LLaMA-Factory",
    ROWS,
    {
        **hugging_face.DEFAULTS,
        "stage": "sft",
        "finetuning_type": "lora",
        "lora_target": "all",
        "pref_loss": "sigmoid",
        "pref_beta": 0.1,
        "simpo_gamma": 0.5,
        "cutoff_len": 2048,
        "bf16": False,
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": True,
        "disable_gradient_checkpointing": False,
    },
    ("llamafactory-cli", "lmf"),
)
