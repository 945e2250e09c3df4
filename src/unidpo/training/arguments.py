"""Training arguments that nothing here reads are refused: no setting is passed over without a word."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from accelerate.utils import get_int_from_env
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from unidpo.config.hf_arguments import RENAMED, WITHOUT_EFFECT
from unidpo.devices import unused_devices
from unidpo.errors import Finding, UserError, from_findings, shown

_LOG = logging.getLogger(__name__)

_LOSS = "is of the loss: give `PreferenceTrainer(loss=...)` UniDPO, DPO, SimPO, IPO, MPO or another of `unidpo.losses`"
_STORED = 'has no effect; reference log-probabilities are stored, see `PreferenceTrainer(reference="stored")`'
_PACKS = "has no effect; packs hold no padding, see `PreferenceTrainer(attention=...)`"
_LOADED = "has no effect; load the model with `unidpo.load_policy` and give it as `model`"
_STILL = "is not supported; the reference stays what it is"
ELSEWHERE: Mapping[str, str] = {
    "beta": "is of the loss: `PreferenceTrainer(loss=UniDPO(beta=...))`",
    "label_smoothing": "is of the loss: `PreferenceTrainer(loss=DPO(label_smoothing=...))`",
    "simpo_gamma": "is of the loss: `PreferenceTrainer(loss=SimPO(gamma=...))`",
    "use_weighting": "has no counterpart: WPO is not among `unidpo.losses`",
    "reference_free": "is of the loss: `PreferenceTrainer(loss=SimPO())` needs no reference",
    "loss_type": _LOSS,
    "loss_weights": _LOSS,
    "max_length": "is given to `PreferenceTrainer(max_length=...)`",
    "max_prompt_length": "has no effect; a prompt is never cut, see `PreferenceTrainer(max_length=...)`",
    "max_completion_length": "has no effect; see `PreferenceTrainer(max_length=...)`",
    "truncation_mode": "has no effect; a response is cut on the right, a prompt never",
    "padding_free": _PACKS,
    "pad_to_multiple_of": _PACKS,
    "precompute_ref_log_probs": _STORED,
    "precompute_ref_batch_size": _STORED,
    "sync_ref_model": _STILL,
    "ref_model_mixup_alpha": _STILL,
    "ref_model_sync_steps": _STILL,
    "disable_dropout": "has no effect; the model trains with the dropout of its configuration, which is most often 0",
    "model_init_kwargs": _LOADED,
    "trust_remote_code": _LOADED,
}
"""Settings of other trainers' arguments, TRL's above all, and where they go here."""


def spelled_for_transformers(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments under the names that the installed transformers prefers."""
    known = TrainingArguments.__dataclass_fields__
    names = {name: new if new in known else old for old, new in RENAMED.items() for name in (old, new)}
    return {names.get(name, name): value for name, value in arguments.items()}


def checkpoints_are_reentrant(args: TrainingArguments) -> bool:
    """Whether layers are computed again by the older of torch's two ways, a backward pass within the backward pass."""
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # by the version of transformers
    return any((getattr(args, name, None) or {}).get("use_reentrant") for name in names)


def default_workers() -> int:
    """Processes that read micro-batches for one that trains on a GPU: as many as it has cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // _processes_here()))


def _processes_here() -> int:
    """Of the training, on this machine."""
    processes: int = get_int_from_env(("LOCAL_WORLD_SIZE", "LOCAL_SIZE"), 1)
    return processes


def warn_of_idle_devices(args: TrainingArguments) -> None:
    """Say which accelerators of this machine a training does not use."""
    if (idle := unused_devices(args.device, _processes_here())) is not None:
        _LOG.warning("%s", idle)


def warn_without_workers(args: TrainingArguments) -> None:
    """Say where a GPU will wait for each image to be opened; transformers' default cannot be told from a setting."""
    if args.device.type != "cpu" and not args.dataloader_num_workers:
        _LOG.warning(
            "dataloader_num_workers=0: the process that trains opens images and tokenizes, and the GPU waits for it; "
            "%d workers are what this machine has cores for",
            default_workers(),
        )


def obstacle_to_compiling(args: TrainingArguments) -> str | None:
    """Why layers cannot be compiled in such a training, or `None`."""
    if args.torch_compile:
        return "train.torch_compile has the whole model compiled"
    if checkpoints_are_reentrant(args):
        return "checkpoints that are reentrant cannot be compiled within; leave use_reentrant out"
    if args.fsdp:
        return "FSDP gathers a layer's weights when it is called, which was not tried yet; use DDP or ZeRO-2"
    if is_deepspeed_zero3_enabled():
        return "ZeRO-3 gathers the weights of each module when it is called; use ZeRO-2"
    return None


def refuse_settings_without_effect(args: TrainingArguments) -> None:
    """Raise `UserError` for every setting that nothing here reads and that is not as its class has it by default.

    A default cannot be told from a setting that is equal to it, so a class with fields of its own gets a warning.
    """
    own = [field for field in fields(args) if field.name not in TrainingArguments.__dataclass_fields__]
    if own:
        known = [f"`{field.name}`" for field in own if field.name in ELSEWHERE][:3]
        _LOG.warning(
            "args: what %s has beside TrainingArguments%s has no effect here; the loss, `max_length` and the reference "
            "are arguments of the trainer",
            type(args).__name__,
            f" ({', '.join([*known, '...'])})" if known else "",
        )
    suspects = [field for field in fields(args) if field in own or field.name in WITHOUT_EFFECT]
    changed = [field.name for field in suspects if getattr(args, field.name) != _default(field)]
    if changed:  # some classes compute a default when they are made
        with warnings.catch_warnings(action="ignore"):  # they were given when `args` was made
            plain = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu)
        changed = [name for name in changed if getattr(args, name) != getattr(plain, name)]
    reasons = {**ELSEWHERE, **WITHOUT_EFFECT}
    findings = [
        Finding(
            "no-effect",
            reasons.get(name, "has no effect here; leave it out"),
            key=f"{name}={shown(getattr(args, name), most=60)}",
        )
        for name in changed
    ]
    if findings:
        raise from_findings(UserError, f"{type(args).__name__}: settings without effect here", findings)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
