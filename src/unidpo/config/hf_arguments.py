"""The keys and types of `transformers.TrainingArguments`, read from its source: importing it would import torch."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import AfterValidator, BaseModel, BeforeValidator, create_model

from unidpo.config.ranges import within_range
from unidpo.errors import did_you_mean, nearest, shown

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
    "dataloader_pin_memory": "is not set here; batches are not pinned",
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
    "enable_jit_checkpoint": "is not needed; SIGTERM always ends the step at hand and saves it",
}
"""Keys of `TrainingArguments` that a recipe may not set, each with the reason and the place to go."""

RENAMED: Mapping[str, str] = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Former and later names of arguments. A recipe takes both; transformers knows the later ones from 5.23 on."""


def _classes(module: str, named: str) -> dict[str, ast.ClassDef]:
    """The classes of a transformers module whose `class` line matches a pattern, up to their first method.

    Only these few lines are parsed: a whole module takes longer than everything else a recipe check does.
    """
    source = _source(module)
    blocks = re.findall(rf"^class {named}.*:\n(?:(?!    def |    @)(?:    .*)?\n)+", source, re.MULTILINE)
    return {node.name: node for block in blocks for node in ast.parse(block).body if isinstance(node, ast.ClassDef)}


def _source(module: str) -> str:
    package = importlib.util.find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("unidpo needs transformers; install it with `pip install unidpo`")
    return (Path(package.submodule_search_locations[0]) / f"{module}.py").read_text("utf-8")


def _members(body: ast.ClassDef) -> tuple[str, ...]:
    """The string values of an enumeration's members."""
    values = [node.value for node in body.body if isinstance(node, ast.Assign)]
    return tuple(v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str))


_ENUMS = {
    name: _members(body)
    for module in ("training_args", "trainer_utils")
    for name, body in _classes(module, r"\w+\(ExplicitEnum\)").items()
}


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """A validator that knows the words a field takes. Raises `ValueError` with the nearest one."""
    known = tuple(names)

    def check(value: str) -> str:
        if value not in known:
            if len(known) > 16:
                close = ", ".join(nearest(value, known, most=8))
                raise ValueError(
                    f"must be one of {len(known)} words, not {shown(value, most=60)}; the nearest are {close}"
                )
            raise ValueError(
                f"must be one of {', '.join(known)}, not {shown(value, most=60)}{did_you_mean(value, known)}"
            )
        return value

    return check


def _off_is_no(value: Any) -> Any:
    """YAML reads a bare `no` as false."""
    return "no" if value is False else value


SCHEDULERS = _ENUMS["SchedulerType"]
"""Learning rate schedules by name."""


_WORDS = {
    name: Annotated[str, BeforeValidator(_off_is_no), AfterValidator(one_of(values))] for name, values in _ENUMS.items()
}
_PLAIN = {kind.__name__: kind for kind in (bool, int, float, str, list, dict)}


def _reporters() -> tuple[str, ...]:
    """What `report_to` takes; nothing where this transformers keeps it elsewhere."""
    source = _source("integrations/integration_utils")
    table = re.search(r"^INTEGRATION_TO_CALLBACK = \{\n(.*?)^\}", source, re.MULTILINE | re.DOTALL)
    names = re.findall(r'^ +"(\w+)":', table[1], re.MULTILINE) if table else []
    return ("none", "all", *names) if names else ()


def _known_reporters(value: str | list[str]) -> str | list[str]:
    known = _reporters()
    for name in [value] if isinstance(value, str) else value:
        if known:
            one_of(known)(name)
    return value


def _checkpointing_options(value: Any) -> Any:
    """What torch takes of `activation_checkpointing_kwargs`, as a mapping or the JSON of one."""
    try:
        given = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise ValueError(f"must be a mapping such as {{use_reentrant: false}}, not {shown(value, most=60)}")
    for name in given:
        one_of(("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"))(name)
    return given


_LEVEL = Annotated[str, AfterValidator(one_of(("passive", "debug", "info", "warning", "error", "critical", "detail")))]
KNOWN_WORDS: Mapping[str, Any] = {
    "report_to": Annotated[str | list[str], AfterValidator(_known_reporters)] | None,
    **dict.fromkeys(
        ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        Annotated[dict[str, Any] | str, AfterValidator(_checkpointing_options)] | None,
    ),
    "log_level": _LEVEL,
    "log_level_replica": _LEVEL,
}
"""Arguments whose words stand in no enumeration."""


def _type_of(annotation: ast.expr, name: str = "") -> Any:
    """What a field takes from YAML; `Any` where its type has no plain form."""
    kinds = [_plain_kind(part) for part in _alternatives(annotation)]
    if Any in kinds:
        return Any
    if name in KNOWN_WORDS:
        return KNOWN_WORDS[name]
    kinds = [within_range(name, kind) for kind in kinds]
    # `SchedulerType | str` takes the enumeration's words and no others.
    if any(kind in _WORDS.values() for kind in kinds):
        kinds = [kind for kind in kinds if kind is not str]
    return Union[tuple(kinds)]  # noqa: UP007


def _alternatives(annotation: ast.expr) -> list[ast.expr]:
    """The parts of `a | b | c`."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return [*_alternatives(annotation.left), *_alternatives(annotation.right)]
    return [annotation]


def _plain_kind(part: ast.expr) -> Any:
    match part:
        case ast.Constant(None):
            return None
        case ast.Name(name):
            return {**_PLAIN, **_WORDS}.get(name, Any)
        case ast.Subscript(ast.Name("Literal"), ast.Constant(value)):
            return Literal[value]
        case ast.Subscript(ast.Name("list"), inside):
            return list[_type_of(inside)]  # type: ignore[misc]
        case ast.Subscript(ast.Name("dict"), ast.Tuple([key, value])):
            return dict[_type_of(key), _type_of(value)]  # type: ignore[misc]
    return Any


def _fields() -> dict[str, Any]:
    body = _classes("training_args", "TrainingArguments")["TrainingArguments"].body
    declared = [n for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return {
        node.target.id: (_type_of(node.annotation, node.target.id), None)
        for node in declared
        if isinstance(node.target, ast.Name) and node.target.id not in OWNED_BY_RECIPE
    }


_FIELDS = _fields()


def spelled_for_transformers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments under the names that the installed transformers prefers."""
    names = {old: new if new in _FIELDS else old for old, new in RENAMED.items()}
    names |= {new: names[old] for old, new in RENAMED.items()}
    return {names.get(name, name): value for name, value in arguments.items()}


def model_of_arguments(base: type[BaseModel]) -> Any:
    """A model with a field per training argument that a recipe may set; unset ones are left to transformers."""
    pairs = [*RENAMED.items(), *((new, old) for old, new in RENAMED.items())]
    other_names = {name: _FIELDS[known] for name, known in pairs if name not in _FIELDS}
    return create_model("HuggingFaceArguments", __base__=base, __module__=__name__, **_FIELDS, **other_names)
