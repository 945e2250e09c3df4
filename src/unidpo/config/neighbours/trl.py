"""TRL's arguments of `trl dpo`: `DPOConfig`, and those about scripts, data sets and models."""

from __future__ import annotations

from collections.abc import Mapping
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

_LOSSES = {"sigmoid": "dpo", "sigmoid_norm": "dpo", "ipo": "ipo"}
_MPO = {"sigmoid": "w_p", "bco_pair": "w_q", "sft": "w_g"}
_NO_LIMIT = 1_000_000
_NEAREST = {
    "hinge": "`dpo`, a smooth hinge",
    "robust": "`dpo` with `label_smoothing`",
    "exo_pair": "`rpo`, a divergence between two preferences",
    "bco_pair": "`mpo`, of which it is a part",
    "sft": "`mpo`, of which it is a part",
    "simpo": "`simpo`",
}


def losses_of(value: Any) -> list[str]:
    """The losses of `loss_type`, one or several."""
    return list(value) if isinstance(value, list | tuple) else [str(value)]


def loss_of(value: Any, given: Given) -> Any:
    """`loss_type`, and its weights where there are several."""
    kinds = losses_of(value)
    weights = given.get("loss_weights", [1.0] * len(kinds))
    if len(kinds) == 1 and kinds[0] in _LOSSES:
        averaged = {"loss.length_normalized": True} if kinds[0] == "sigmoid_norm" else {}
        return Taken({"loss.name": _LOSSES[kinds[0]], **averaged})
    if len(kinds) > 1 and set(kinds) <= set(_MPO) and len(weights) == len(kinds):
        parts = dict.fromkeys(_MPO.values(), 0.0) | {
            _MPO[kind]: float(w) for kind, w in zip(kinds, weights, strict=True)
        }
        note = "an NLL per response, not per batch; BCO is shifted by the mean of the rewards"
        return Taken({"loss.name": "mpo"} | {f"loss.{part}": weight for part, weight in parts.items()}, note)
    odd = next((kind for kind in kinds if kind not in _LOSSES), kinds[0])
    return NoEqual(f"this loss is not here; the nearest is {_NEAREST.get(odd, '`dpo`')}", leaves_open="loss.name")


def beta(value: Any, given: Given) -> Taken:
    """`beta`, which IPO calls τ."""
    return Taken({"loss.tau" if losses_of(given.get("loss_type")) == ["ipo"] else "loss.beta": value})


def smoothing(value: Any, given: Given) -> Any:
    """`label_smoothing`, which only two of TRL's losses read."""
    if value and {"robust", "exo_pair"} & set(losses_of(given.get("loss_type"))):
        return value
    return NotNeeded("its `sigmoid` does not read it" if value else "is off, as it is here")


def _max_length(value: Any, given: Given) -> Taken:
    note = hugging_face.CUT
    return Taken({"data.max_length": value}, note) if value else Taken({"data.max_length": _NO_LIMIT}, "no limit there")


def _targets(value: Any, given: Given) -> Any:
    if value is None:
        return Taken({"lora.target_modules": ["q_proj", "v_proj"]}, "peft's own choice for most models")
    return value if value == "all-linear" or not isinstance(value, str) else [value]


def _use_peft(value: Any, given: Given) -> Taken:
    return Taken({"lora.r": given.get("lora_r", 16)} if value else {"lora": None})


def _quantize(kind: str) -> Row:
    def take(value: Any, given: Given) -> Any:
        if value and given.get("bnb_4bit_quant_type", "nf4") != "nf4":
            return NoEqual("`model.quantize` knows nf4 and int8; nf4 is the nearest")
        return kind if value else NotNeeded("is off, as it is here")

    return same("model.quantize", take=take)


def _dataset(value: Any, given: Given) -> Any:
    config, split = given.get("dataset_config"), given.get("dataset_train_split", "train")
    return Taken({"data.path": f"{value}{f':{config}' if config else ''}@{split}"})


def _datasets(value: Any, given: Given) -> Any:
    paths = []
    for entry in value if isinstance(value, list) else []:
        if not isinstance(entry, dict) or "path" not in entry or entry.keys() - {"path", "name", "split", "columns"}:
            return NoEqual("list the data sets yourself, each a path or a hub name", leaves_open="data.path")
        name = f":{entry['name']}" if entry.get("name") else ""
        paths.append(f"{entry['path']}{name}@{entry.get('split', 'train')}")
    return Taken({"data.path": paths[0] if len(paths) == 1 else paths}) if paths else NotNeeded("is empty")


def attention(value: Any, given: Given) -> Taken:
    """Transformers' word for an implementation of attention."""
    if value == "sdpa":
        return Taken({"model.attention": "sdpa"})
    return Taken({"model.attention": "auto"}, "the fastest kernel that agrees with plain attention; `flash` demands it")


ROWS: Mapping[str, Row] = {
    **hugging_face.ROWS,
    "loss_type": by(loss_of, "loss.name"),
    "loss_weights": by(lambda value, given: NotNeeded("goes with `loss_type`")),
    "beta": by(beta, "loss.beta"),
    "label_smoothing": same("loss.label_smoothing", take=smoothing),
    "ld_alpha": missing("LD-DPO is not here; `loss.length_normalized: true` is the nearest against long responses"),
    "f_divergence_type": by(
        lambda value, given: (
            NotNeeded("as here")
            if value == "reverse_kl"
            else NoEqual("the losses are those of the reverse KL divergence")
        )
    ),
    "f_alpha_divergence_coef": not_needed("goes with `f_divergence_type`"),
    "use_weighting": missing("WPO is not here; the performance weight of `uni_dpo` is the nearest"),
    "discopop_tau": not_needed("is for `discopop`"),
    "sync_ref_model": missing("the reference stays what it is"),
    "ref_model_mixup_alpha": not_needed("goes with `sync_ref_model`"),
    "ref_model_sync_steps": not_needed("goes with `sync_ref_model`"),
    "reference_free": missing("`simpo` is the loss without a reference"),
    **several("precompute_ref_log_probs precompute_ref_batch_size", not_needed("the reference is always stored")),
    **several("padding_free pad_to_multiple_of pad_token", not_needed("packs hold no padding")),
    "disable_dropout": not_needed("dropout is that of the model's configuration, most often 0"),
    "router_aux_loss_coef": missing("the loss of the router is not added"),
    "dataset_num_proc": not_needed("texts are tokenized once before training"),
    "activation_offloading": not_needed("the numbers are the same; `train.gradient_checkpointing` saves memory"),
    "max_length": same("data.max_length", take=_max_length, null=True),
    "max_prompt_length": missing("a prompt is never cut"),
    "max_completion_length": missing("`data.max_length` counts prompt and response together"),
    "truncation_mode": by(
        lambda value, given: (
            NotNeeded("as here") if value == "keep_start" else NoEqual("a response is cut on the right")
        )
    ),
    "model_init_kwargs": missing("set `model.dtype` and `model.attention`"),
    **several("model_revision revision", missing("download that revision, and name its folder as `model.name`")),
    "dtype": by(lambda value, given: NotNeeded("trained weights are kept in float32; `bf16` says what is computed in")),
    "torch_dtype": not_needed("trained weights are kept in float32; `bf16` says what is computed in"),
    "attn_implementation": same("model.attention", take=attention),
    "use_peft": by(_use_peft, "lora"),
    "lora_r": only_with("use_peft", True, "lora.r"),
    "lora_alpha": only_with("use_peft", True, "lora.alpha"),
    "lora_dropout": only_with("use_peft", True, "lora.dropout"),
    "lora_target_modules": only_with("use_peft", True, "lora.target_modules", _targets, null=True),
    "use_rslora": only_with("use_peft", True, "lora.rslora"),
    "use_dora": only_with("use_peft", True, "lora.dora"),
    "lora_task_type": not_needed("it is causal language modelling"),
    **several("lora_modules_to_save lora_target_parameters", missing("an adapter is trained alone")),
    "load_in_4bit": _quantize("nf4"),
    "load_in_8bit": _quantize("int8"),
    **several(
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage", not_needed("goes with `load_in_4bit`")
    ),
    "ref_model": same("reference"),
    "dataset_name": by(_dataset, "data.path"),
    "datasets": by(_datasets, "data.path"),
    **several(
        "dataset_config dataset_train_split",
        by(lambda value, given: NotNeeded("stands behind the name: `name:config@split`")),
    ),
    "dataset_test_split": missing("hold out prompts by `data.eval_fraction`"),
    "test_split_size": by(hugging_face.held_out, "data.eval_fraction"),
    **several("dataset_streaming streaming", not_needed("images are read as they come, and rows are few")),
    "ignore_bias_buffers": not_needed("buffers are not sent around"),
    **several(
        "num_processes accelerate_config env config", not_needed("is of the launcher: several processes are `--nproc`")
    ),
    "generate_during_eval": missing("take benchmarks: `eval.benchmarks`"),
    "force_use_ref_model": not_needed("an adapter's reference is the model below it"),
    "model_adapter_name": not_needed("there is one adapter"),
    "ref_adapter_name": missing("merge it, and name the merged model as `reference`"),
    "rpo_alpha": missing("`loss_type: [sigmoid, sft]` with weights 1 and this is `mpo`"),
}

TRL = Neighbour(
    "TRL",
    ROWS,
    {
        **hugging_face.DEFAULTS,
        "learning_rate": 1e-6,
        "bf16": True,
        "gradient_checkpointing": True,
        "loss_type": ["sigmoid"],
        "beta": 0.1,
        "max_length": 1024,
        "lora_dropout": 0.05,
        "lora_target_modules": None,
    },
    ("dpo",),
    {"model.freeze": ([], "every weight is trained there, the vision tower's too")},
)
