"""Checkpoints that appear whole: written beside their place by transformers, then moved there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from unidpo.errors import TrainingError
from unidpo.ranks import is_main, wait_for_all
from unidpo.runs import UNFINISHED_CHECKPOINT, RunFolder


@contextlib.contextmanager
def published(args: TrainingArguments, state: TrainerState) -> Iterator[Path]:
    """Within it, `Trainer._save_checkpoint` writes into a hidden folder, which then becomes `checkpoint-<step>/`.

    Yields where the checkpoint lies meanwhile. Older checkpoints above `args.save_total_limit` are removed
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
