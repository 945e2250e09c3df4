"""Checkpoints that appear whole: written beside their place by transformers, then moved there."""

from __future__ import annotations

import contextlib
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from unidpo.distributed import is_main, wait_for_all
from unidpo.errors import RunError, TrainingError
from unidpo.run_folder.folder import UNFINISHED_CHECKPOINT, RunFolder
from unidpo.run_folder.manifest import MANIFEST, damage, write_manifest


@contextlib.contextmanager
def published(args: TrainingArguments, state: TrainerState) -> Iterator[Path]:
    """Within it, `Trainer._save_checkpoint` writes into a hidden folder, which then becomes `checkpoint-<step>/`.

    What it holds is written down in it, see `manifest`. Yields where the checkpoint lies meanwhile. Older checkpoints
    above `args.save_total_limit` are removed
    afterwards. Every process must enter it.
    """
    output, limit = Path(args.output_dir), args.save_total_limit
    hidden = output / UNFINISHED_CHECKPOINT
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
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


@contextlib.contextmanager
def writing_errors(step: int, output: Path) -> Iterator[None]:
    """Say that a checkpoint could not be written, and which is the last good one. Raises `TrainingError`."""
    try:
        yield
    # torch and safetensors have words of their own for a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_main():
            shutil.rmtree(output / UNFINISHED_CHECKPOINT, ignore_errors=True)
        last = RunFolder(output).last_checkpoint
        kept = "there is none yet" if last is None else f"the last good one is {last}"
        raise TrainingError(
            f"the checkpoint of step {step} could not be written ({' '.join(str(error).split())}); {kept}; "
            "free some space and go on with `--resume`"
        ) from error


def refuse_damaged(checkpoint: Path) -> None:
    """Raise `RunError` where a checkpoint has lost something; one without a manifest is somebody else's."""
    problem = damage(checkpoint) if (checkpoint / MANIFEST).exists() else None
    if problem is not None:
        raise RunError(f"{checkpoint}: {problem}; resume from another checkpoint, or begin again")


@contextlib.contextmanager
def reading_errors(checkpoint: str | None) -> Iterator[None]:
    """Say that a checkpoint's state cannot be read, which sizes do not tell. Raises `RunError`."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        if checkpoint is None:
            raise
        raise RunError(
            f"{checkpoint}: its optimizer, schedule or random state cannot be read ({' '.join(str(error).split())}); "
            "delete this checkpoint, and `--resume` takes the one before"
        ) from error
