"""ms-swift's arguments of `swift rlhf`, and the environment variables that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unidpo.config.neighbours import hugging_face, trl
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

_NEAREST = {"orpo": "`simpo`, without a reference", "cpo": "`simpo`, without a reference", "kto": "`dpo`, on pairs"}


def _method(value: Any, given: Given) -> Any:
    if value == "simpo":
        return Taken({"loss.name": "simpo"}, "without an NLL term" if given.get("cpo_alpha", 1.0) else "")
    if value == "dpo":
        return NotNeeded("is what `unidpo train` does; `loss_type` says which loss")
    reason = f"`rlhf_type: {value}` is not here; the nearest is {_NEAREST.get(value, '`dpo`')}"
    return NoEqual(reason, leaves_open="loss.name")


def _loss(value: Any, given: Given) -> Any:
    if given.get("rlhf_type") != "dpo":
        return NotNeeded("`rlhf_type` has said the loss")
    found = trl.loss_of(value, given)
    alpha = given.get("rpo_alpha")
    if alpha is not None and isinstance(found, Taken) and found.values.get("loss.name") == "dpo":
        return Taken({"loss.name": "mpo", "loss.w_p": 1.0, "loss.w_q": 0.0}, "DPO with an NLL term")
    return found


def _alpha(value: Any, given: Given) -> Any:
    if given.get("rlhf_type") != "dpo" or trl.losses_of(given.get("loss_type")) != ["sigmoid"]:
        return NoEqual("is here a part of `mpo` alone, DPO with an NLL term")
    return Taken({"loss.w_g": float(value)}, "the mean over the tokens of each response, not of a batch")


def _smoothing(value: Any, given: Given) -> Any:
    if value and given.get("rpo_alpha") is not None:
        return NoEqual("`mpo` has none")
    return float(value)


def _beta(value: Any, given: Given) -> Any:
    if value is None:
        value = 2.0 if given.get("rlhf_type") == "simpo" else 0.1
    return trl.beta(value, given) if given.get("rlhf_type") == "dpo" else Taken({"loss.beta": value})


def _rate(value: Any, given: Given) -> Any:
    if value is not None:
        return value
    return 1e-5 if given.get("tuner_type") == "full" else 1e-4


def _tuner(value: Any, given: Given) -> Any:
    if value == "full":
        return Taken({"lora": None})
    if value == "lora":
        return Taken({"lora.r": given.get("lora_rank", 8)})
    return NoEqual(f"`{value}` is not here; `lora` is the nearest that trains few weights", leaves_open="lora")


def _targets(value: Any, given: Given) -> Any:
    names = [value] if isinstance(value, str) else list(value)
    if names != ["all-linear"]:
        return names
    whole = given.get("freeze_vit") is False
    return Taken({"lora.target_modules": "all-linear" if whole else None}, "vision tower included" if whole else "")


def _freeze(value: Any, given: Given) -> Any:
    if given.get("tuner_type") != "full":
        return NotNeeded("an adapter is trained alone; `lora.target_modules` says where")
    frozen = {"vision": "freeze_vit", "projector": "freeze_aligner", "language": "freeze_llm"}
    return Taken({"model.freeze": [ours for ours, theirs in frozen.items() if given.get(theirs)]})


def _dtype(value: Any, given: Given) -> Any:
    if given.get("bf16") or given.get("fp16"):
        return NotNeeded("`bf16` or `fp16` says what is computed in")
    return Taken({"model.dtype": value or "bfloat16"}, "" if value else "there it is the checkpoint's own")


def _quantize(value: Any, given: Given) -> Any:
    method, kind = given.get("quant_method", "bnb"), given.get("bnb_4bit_quant_type", "nf4")
    return hugging_face.quantization(value, method, kind)


def _data(value: Any, given: Given) -> Any:
    names = [value] if isinstance(value, str) else [str(name) for name in value]
    plain = [name.partition("#")[0].removeprefix("HF::").removeprefix("MS::") for name in names]
    notes = []
    if any("#" in name for name in names):
        notes.append("all rows are taken: `#` draws some; use `{path, weight}` for a part")
    if any("::" in name or ("/" in name and not name.startswith((".", "/"))) for name in names):
        notes.append("a name is a file here, or of the Hugging Face hub; for another hub download it first")
    return Taken({"data.path": plain[0] if len(plain) == 1 else plain}, "; ".join(notes))


def _length(value: Any, given: Given) -> Taken:
    note = hugging_face.CUT
    return Taken({"data.max_length": value or 1_000_000}, note if value else "there it is the model's own limit")


def _truncation(value: Any, given: Given) -> Any:
    if value in (None, "delete"):
        return Taken(
            {"data.on_bad_row": "skip"}, "only prompts that are too long, and rows that cannot be used, are left out"
        )
    return NotNeeded("as here") if value == "right" else NoEqual("a response is cut on the right")


def _accumulation(value: Any, given: Given) -> Taken:
    at_once = given.get("per_device_train_batch_size", 1)
    if value is None and isinstance(at_once, int):
        value = max(1, -(-16 // (at_once * (given.processes or 1))))
    return hugging_face.accumulation(value, given)


def _shuffle(value: Any, given: Given) -> Taken:
    both = given.get("dataset_shuffle", True) or given.get("train_dataloader_shuffle", True)
    return Taken({"data.shuffle": bool(both)})


_READING = "texts are tokenized once before training"
ROWS: Mapping[str, Row] = {
    **trl.ROWS,
    "rlhf_type": by(_method, "loss.name"),
    "loss_type": by(_loss, "loss.name"),
    "rpo_alpha": by(_alpha, "loss.w_g"),
    "beta": by(_beta, "loss.beta", null=True),
    "label_smoothing": same("loss.label_smoothing", take=_smoothing),
    "simpo_gamma": same("loss.gamma"),
    "cpo_alpha": by(
        lambda value, given: (
            NotNeeded("is off, as it is here")
            if not value or given.get("rlhf_type") not in ("cpo", "simpo")
            else NoEqual("`simpo` has no NLL term here")
        )
    ),
    **several("desirable_weight undesirable_weight", not_needed("is for KTO")),
    **several(
        "reward_* num_generations sft_alpha lmbda seq_kd center_rewards_coefficient kl_coef teacher_* gkd_*",
        not_needed("is for other methods than DPO"),
    ),
    "ref_adapters": missing("merge the adapter, and name the merged model as `reference`"),
    "ref_model_type": not_needed("is read from the model"),
    "ref_model_revision": missing("download that revision, and name its folder as `reference`"),
    "loss_scale": by(
        lambda value, given: (
            NotNeeded("as here")
            if value in ("default", "last_round")
            else NoEqual("every token of a response counts alike")
        )
    ),
    "model": same("model.name"),
    "model_id_or_path": same("model.name"),
    **several("model_type task_type template_backend use_chat_template", not_needed("is read from the model")),
    "template": by(
        lambda value, given: Taken(
            {"data.template": "chatml" if value in ("qwen2_vl", "qwen2_5_vl", "chatml") else None},
            "" if value == "qwen2_vl" else "the wording of a default system prompt may differ",
        ),
        "data.template",
    ),
    "torch_dtype": by(_dtype, "model.dtype", null=True),
    "dtype": by(_dtype, "model.dtype", null=True),
    "attn_impl": same("model.attention", take=trl.attention),
    "device_map": not_needed("each process has one GPU"),
    **several(
        "max_memory local_repo_path enable_npu_model_patch load_args load_data_args use_hf hub_token "
        "strict check_model ignore_args_error model_kwargs download_mode",
        not_needed("is about loading; the numbers are the same"),
    ),
    "rope_scaling": missing("set it in the model's `config.json`"),
    "max_model_len": not_needed("is for inference"),
    "init_strategy": missing("save the model with those weights, and name it as `model.name`"),
    "new_special_tokens": missing("extend tokenizer and embeddings beforehand, and save them as a model"),
    **several("tuner_type train_type sft_type", by(_tuner, "lora")),
    "lora_rank": only_with("tuner_type", "lora", "lora.r"),
    "lora_alpha": only_with("tuner_type", "lora", "lora.alpha"),
    "lora_dropout": only_with("tuner_type", "lora", "lora.dropout"),
    "use_rslora": only_with("tuner_type", "lora", "lora.rslora"),
    "use_dora": only_with("tuner_type", "lora", "lora.dora"),
    "target_modules": only_with("tuner_type", "lora", "lora.target_modules", _targets),
    "target_regex": only_with("tuner_type", "lora", "lora.target_modules"),
    **several("modules_to_save target_parameters trainable_parameters*", missing("an adapter is trained alone")),
    **several("lora_bias lora_dtype", not_needed("biases are not trained, and an adapter is kept in float32")),
    "lorap_lr_ratio": missing("both matrices of an adapter have one learning rate"),
    "init_weights": by(
        lambda value, given: (
            NotNeeded("as here") if str(value).lower() == "true" else NoEqual("an adapter begins at zero")
        )
    ),
    **several(
        "lora_ga_* fourier_* boft_* vera_* adapter_* adalora_* llamapro_* reft_*",
        not_needed("is for other tuners than LoRA"),
    ),
    "adapters": missing("merge it first, and name the merged model as `model.name`"),
    "tuner_backend": not_needed("adapters are peft's"),
    "freeze_vit": by(_freeze, "model.freeze"),
    "freeze_aligner": by(_freeze, "model.freeze"),
    "freeze_llm": by(_freeze, "model.freeze"),
    **several(
        "freeze_parameters freeze_parameters_*", missing("`model.freeze` knows the parts vision, projector, language")
    ),
    **several("vit_lr aligner_lr", missing("all trained weights have one learning rate")),
    "quant_bits": by(_quantize, "model.quantize"),
    **several("quant_method bnb_4bit_* hqq_axis", not_needed("goes with `quant_bits`")),
    "dataset": by(_data, "data.path"),
    "columns": missing("name them in a `dataset_info.json` beside the file"),
    "val_dataset": missing("hold out prompts by `data.eval_fraction`, or take benchmarks: `eval.benchmarks`"),
    **several("cached_dataset cached_val_dataset", missing("name the data set itself: `data.path`")),
    "custom_dataset_info": missing("name the data set itself: `data.path`"),
    "split_dataset_ratio": by(hugging_face.held_out, "data.eval_fraction"),
    "data_seed": not_needed("`train.seed` is the source of every random choice"),
    "dataset_shuffle": by(_shuffle, "data.shuffle"),
    "train_dataloader_shuffle": by(_shuffle, "data.shuffle"),
    "interleave_prob": missing("a `weight` is for each row: the probability × all rows / rows of that data set"),
    **several(
        "dataset_num_proc load_from_cache_file lazy_tokenize shuffle_buffer_size packing_num_proc "
        "val_dataset_shuffle stopping_strategy disable_auto_column_mapping model_name model_author",
        not_needed(_READING),
    ),
    **several(
        "packing packing_length packing_strategy padding_free padding_side use_logits_to_keep",
        not_needed("is always on here: packs hold no padding, and logits are those of responses"),
    ),
    "system": missing("write it into the rows, as `system`"),
    "max_length": same("data.max_length", take=_length, null=True),
    "truncation_strategy": by(_truncation, "data.on_bad_row", null=True),
    **several("max_pixels MAX_PIXELS", same("data.max_pixels")),
    "agent_template": missing("write calls of tools into the texts"),
    "response_prefix": missing("write it into the responses"),
    "sequence_parallel_size": missing("a response is on one GPU; `train.max_tokens_per_pack` bounds memory"),
    **several(
        "norm_bbox enable_thinking preserve_thinking add_non_thinking_prefix is_binary_loss_scale "
        "disable_ignore_empty_think",
        not_needed("the model's own template decides"),
    ),
    "learning_rate": same("train.learning_rate", take=_rate, null=True),
    "gradient_accumulation_steps": by(_accumulation, "train.gradient_accumulation_steps", null=True),
    "vit_gradient_checkpointing": not_needed("a frozen vision tower keeps nothing; memory alone depends on it"),
    "max_epochs": not_needed("goes with streaming"),
    "optimizer": by(
        lambda value, given: NotNeeded("as here") if value is None else NoEqual("`train.optim` is the nearest"),
        "train.optim",
    ),
    "acc_strategy": not_needed("is for accuracies of tokens"),
    "use_galore": missing("`train.optim: galore_adamw` is the nearest"),
    "galore_*": not_needed("goes with `use_galore`"),
    **several("lisa_activated_layers lisa_step_interval", missing("LISA is not here")),
    **several("external_plugins custom_register_path callbacks", missing("its code is not run here")),
    **several(
        "add_version create_checkpoint_symlink max_shard_size safe_serialization resume_only_model use_flash_ckpt",
        not_needed("is about files; the run folder is `output` itself"),
    ),
    **several(
        "early_stop_interval eval_metric", missing("`train.load_best_model_at_end` finishes with the best evaluation")
    ),
    **several(
        "eval_use_evalscope eval_dataset* eval_limit eval_generation_config extra_eval_args",
        missing("take benchmarks: `eval.benchmarks`"),
    ),
    **several("enable_dft_loss enable_channel_loss mrl_dims", missing("is for other stages than preference training")),
    **several(
        "max_new_tokens temperature top_k top_p repetition_penalty num_beams stream logprobs stop_words vllm_* ray_*",
        not_needed("is for inference"),
    ),
    **several("zero_hpz_partition_size deepspeed_autotp_size", missing("set it in the file of `train.deepspeed`")),
    **several(
        "ds3_gather_for_generation structured_outputs_regex top_logprobs offload_teacher_model num_labels problem_type",
        not_needed("is for other methods than DPO"),
    ),
    "experts_impl": not_needed("is another way to the same numbers"),
    "use_swift_lora": not_needed("adapters are peft's"),
    "IMAGE_MAX_TOKEN_NUM": missing(
        "`data.max_pixels` is in pixels: tokens × 32 × 32 for Qwen3-VL, × 28 × 28 before it"
    ),
    "MIN_PIXELS": missing("is 1,024 here and cannot be set"),
    **several("VIDEO_* FPS* NFRAMES", not_needed("there are no videos in the data")),
    **several(
        "CUDA_VISIBLE_DEVICES NPROC_PER_NODE NNODES NODE_RANK MASTER_* PYTORCH_* OMP_* NCCL_* HF_* MODELSCOPE_*",
        not_needed("is of the environment: set it as before"),
    ),
    "swanlab_*": not_needed("set SwanLab's own environment variables"),
}

MS_SWIFT = Neighbour(
    "ms-swift",
    ROWS,
    {
        "rlhf_type": "dpo",
        "loss_type": "sigmoid",
        "beta": None,
        "tuner_type": "lora",
        "target_modules": ["all-linear"],
        "lora_dropout": 0.05,
        "freeze_vit": True,
        "freeze_aligner": True,
        "torch_dtype": None,
        "learning_rate": None,
        "num_train_epochs": 3,
        "gradient_accumulation_steps": None,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "gradient_checkpointing": True,
        "max_length": None,
        "truncation_strategy": "delete",
    },
    ("swift", "rlhf", "megatron"),
)
