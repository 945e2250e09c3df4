"""What is wrong with a recipe's keys and values, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from unidpo.config.hf_arguments import OWNED_BY_RECIPE
from unidpo.config.schema import (
    DataSection,
    EvalSection,
    LoraSection,
    ModelSection,
    Recipe,
    SourceSection,
    TrainSection,
)
from unidpo.errors import did_you_mean, nearest, shown
from unidpo.losses import LOSSES

_SECTIONS: Mapping[str, type[BaseModel]] = {
    "model": ModelSection,
    "data": DataSection,
    "data.path": SourceSection,
    "lora": LoraSection,
    "train": TrainSection,
    "eval": EvalSection,
}
_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dictionary": "a mapping",
    "None": "null",
    "an instance of Path": "a path",
}
_MOST_WORDS = 16
"""Of a list in a message."""
FOREIGN: Mapping[str, str] = {
    foreign: ours
    for ours, names in {
        "lora.r": "rank lora_r lora_rank",
        "lora.alpha": "lora_alpha",
        "lora.dropout": "lora_dropout",
        "lora.target_modules": "lora_target lora_target_modules modules",
        "lora.rslora": "use_rslora",
        "lora.dora": "use_dora",
        "model.name": "model_name_or_path model_id base_model",
        "model.dtype": "torch_dtype precision",
        "model.attention": "attn_implementation attn_impl flash_attn",
        "model.quantize": "quantization_bit load_in_4bit load_in_8bit",
        "model.freeze": "freeze_vision_tower freeze_vit",
        "reference": "ref_model reference_model ref_model_name_or_path",
        "data.path": "dataset dataset_name train_file file",
        "data.images": "media_dir image_dir image_folder",
        "data.template": "chat_template",
        "data.max_length": "cutoff_len max_seq_length",
        "data.max_pixels": "image_max_pixels",
        "data.eval_fraction": "val_size",
        "loss.name": "pref_loss loss_type rlhf_type",
        "loss.beta": "pref_beta",
        "loss.gamma": "simpo_gamma",
        "train.learning_rate": "lr",
        "train.num_train_epochs": "epochs num_epochs",
        "train.per_device_train_batch_size": "batch_size",
        "train.global_batch_pairs": "global_batch_size total_batch_size",
        "train.gradient_accumulation_steps": "grad_accum",
        "train.lr_scheduler_type": "lr_scheduler",
        "train.warmup_steps": "warmup_ratio",
        "train.optim": "optimizer",
        "train.max_grad_norm": "clip_grad_norm max_grad",
        "output": "output_dir save_dir",
    }.items()
    for foreign in names.split()
}
"""What other trainers call a key of ours."""


def explained(detail: ErrorDetails) -> tuple[str, str, str]:
    """Dotted key, kind and message of one validation error."""
    names = [str(part) for part in detail["loc"]]
    # Inside a union the path goes on with the alternative that was tried; a recipe's keys are two levels deep.
    loss = names.pop(1) if len(names) > 1 and names[0] == "loss" else None
    key = ".".join(names[:2])
    if key == "data.path" and len(names) > 3:  # except for the sources of a mixture: data, path, several, 0, weight
        key = ".".join([f"{key}[{names[3]}]", *names[4:5]])
        names = ["data.path", *names[4:5]]
    kind, context = detail["type"], detail.get("ctx", {})
    given = "null" if detail["input"] is None else shown(detail["input"], most=60)
    match kind:
        case "extra_forbidden":
            return key, "unknown-key", _unknown(names, loss)
        case "missing":
            return key, "missing-key", "is required"
        case "union_tag_not_found":
            return f"{key}.name", "missing-key", f"is required: one of {', '.join(LOSSES)}"
        case "union_tag_invalid":
            known = f"{', '.join(LOSSES)}, not {context['tag']!r}"
            return f"{key}.name", "bad-value", f"must be one of {known}{did_you_mean(context['tag'], LOSSES)}"
        case "model_type" | "model_attributes_type":
            return key, "bad-value", f"is a section with keys of its own, not {given}"
        case "too_short" if key == "data.path":
            return key, "bad-value", "needs at least one source"
        case "tuple_type" if key == "data.path":
            return key, "bad-value", f"must be a path or a list of sources, not {given}"
        case "value_error":
            return key, "bad-value", str(context["error"])
        case "literal_error":
            words = context["expected"].split("'")[1::2]
            if len(words) > _MOST_WORDS:
                close = ", ".join(nearest(str(detail["input"]), words, most=8))
                return key, "bad-value", f"must be one of {len(words)} words, not {given}; the nearest are {close}"
            hint = did_you_mean(str(detail["input"]), words)
            return key, "bad-value", f"must be {context['expected']}, not {given}{hint}"
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return key, "bad-value", f"must be {_KINDS.get(expected, expected)}, not {given}"


def _unknown(names: Sequence[str], loss: str | None) -> str:
    """What to say of a key that does not exist."""
    word, section = names[-1], _SECTIONS.get(names[0], Recipe) if len(names) > 1 else Recipe
    if section is TrainSection and word in OWNED_BY_RECIPE:
        return OWNED_BY_RECIPE[word]
    if loss is not None:
        section = LOSSES[loss]
        owners = [name for name, other in LOSSES.items() if word in other.model_fields]
        if owners:
            return (
                f"is a key of the loss {' and '.join(owners)}, not of {loss}; to change the loss, replace the whole "
                f"section: loss={{name: {loss}}}"
            )
    ours = FOREIGN.get(word, "")
    known = [key for key in _dotted_keys() if key.rpartition(".")[2] == word]
    if ours:
        hint = f"; did you mean `{ours.removeprefix(f'{names[0]}.') if len(names) > 1 else ours}`?"
    else:
        hint = did_you_mean(word, section.model_fields) or (f"; did you mean `{known[0]}`?" if known else "")
    return f"is not a key of {f'`{names[0]}`' if len(names) > 1 else 'a recipe'}{hint}"


def _dotted_keys() -> Iterator[str]:
    for name, section in [*_SECTIONS.items(), *(("loss", loss) for loss in LOSSES.values())]:
        yield from (f"{name}.{key}" for key in section.model_fields)
