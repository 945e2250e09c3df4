"""Checkpoints that appear whole: written beside their place by transformers, then moved there."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from unidpo.distributed import is_main, wait_for_all
from unidpo.errors import RunError, TrainingError
from unidpo.model.load import load_weights
from unidpo.run_folder.folder import UNFINISHED_CHECKPOINT, RunFolder
from unidpo.run_folder.manifest import MANIFEST, checkpoint_damage, write_manifest
from unidpo.training.metrics import RewardShift

_REWARD_SHIFT = "reward_shift.json"


class CheckpointTrainer(Trainer):  # type: ignore[misc]
    """transformers' `Trainer` with checkpoints that appear whole, and whose weights are found by their names.

    Attributes:
        reward_shift: kept in a checkpoint beside what transformers keeps.
    """

    reward_shift: RewardShift

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with _published(self.args, self.state) as folder:
            super()._save_checkpoint(model, trial)
            if is_main():
                (folder / _REWARD_SHIFT).write_text(json.dumps(asdict(self.reward_shift)), "utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights of a checkpoint.

        transformers' own loads the file's tensors by name and passes over names it does not know; `save_pretrained`
        writes the names of the hub, which for many vision-language models are not those in memory, and nothing would
        be loaded at all (huggingface/transformers#43701). `from_pretrained` knows both.
        """
        if not isinstance(self.model, PreTrainedModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        wide = torch.promote_types(self.model.dtype, torch.float32)
        saved = load_weights(type(self.model), resume_from_checkpoint, dtype=wide)
        self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading_errors(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading_errors(checkpoint):
            super()._load_rng_state(checkpoint)


def checkpoint_to_resume(output: str, given: str | Path | bool | None) -> Path | None:
    """The checkpoint that `Trainer.train(resume_from_checkpoint=given)` names; `None` where nothing is resumed.

    Raises:
        RunError: there is none, or it has lost something; one without a manifest is somebody else's.
    """
    if not given:
        return None
    checkpoint = RunFolder(output).last_checkpoint if given is True else Path(given)
    if checkpoint is None:
        raise RunError(f"{output}: there is no whole checkpoint to resume from; begin again")
    problem = checkpoint_damage(checkpoint) if (checkpoint / MANIFEST).exists() else None
    if problem is not None:
        raise RunError(f"{checkpoint}: {problem}; resume from another checkpoint, or begin again")
    return checkpoint


def read_reward_shift(checkpoint: Path) -> RewardShift:
    """What a checkpoint kept of it."""
    kept = checkpoint / _REWARD_SHIFT
    return RewardShift(**json.loads(kept.read_text("utf-8"))) if kept.is_file() else RewardShift()


@contextlib.contextmanager
def _published(args: TrainingArguments, state: TrainerState) -> Iterator[Path]:
    """Within it, `Trainer._save_checkpoint` writes into a hidden folder, which then becomes `checkpoint-<step>/`.

    What it holds is written down in it, see `manifest`. Yields where the checkpoint lies meanwhile. Older checkpoints
    above `args.save_total_limit` are removed afterwards. Every process must enter it.

    Raises:
        TrainingError: the checkpoint cannot be written; names the last good one.
    """
    output, limit = Path(args.output_dir), args.save_total_limit
    hidden = output / UNFINISHED_CHECKPOINT
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    try:
        if args.should_save:
            shutil.rmtree(hidden, ignore_errors=True)
        wait_for_all()
        args.output_dir, args.save_total_limit = str(hidden), None
        try:
            yield hidden / name
        finally:
            args.output_dir, args.save_total_limit = str(output), limit
        wait_for_all()
        if state.best_model_checkpoint == str(hidden / name):
            state.best_model_checkpoint = str(output / name)
        if args.should_save:
            state.save_to_json(str(hidden / name / TRAINER_STATE_NAME))
            write_manifest(hidden / name, state.global_step, run=output, resumable=not args.save_only_model)
            shutil.rmtree(output / name, ignore_errors=True)
            (hidden / name).rename(output / name)
            hidden.rmdir()
            rotate_checkpoints(
                output_dir=str(output), save_total_limit=limit, best_model_checkpoint=state.best_model_checkpoint
            )
        wait_for_all()
    # torch and safetensors have words of their own for a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_main():
            shutil.rmtree(hidden, ignore_errors=True)
        last = RunFolder(output).last_checkpoint
        kept = "there is none yet" if last is None else f"the last good one is {last}"
        raise TrainingError(
            f"the checkpoint of step {state.global_step} could not be written ({' '.join(str(error).split())}); "
            f"{kept}; free some space and resume with `--resume`"
        ) from error


@contextlib.contextmanager
def _reading_errors(checkpoint: str | None) -> Iterator[None]:
    """Raise `RunError` where a checkpoint's state cannot be read, which the sizes of its files do not tell."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        if checkpoint is None:
            raise
        raise RunError(
            f"{checkpoint}: its optimizer, schedule or random state cannot be read ({' '.join(str(error).split())}); "
            "delete this checkpoint, and `--resume` takes the one before"
        ) from error
