"""A training's metrics and ledger, written into a folder while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from unidpo.distributed import on_main
from unidpo.errors import RunError
from unidpo.run_folder.folder import RunFolder
from unidpo.run_folder.manifest import cannot_resume
from unidpo.run_folder.records import LEDGER_COLUMNS, Ledger, Metrics
from unidpo.training.callbacks import PairsCallback
from unidpo.training.metrics import Columns


class RunRecord(PairsCallback):
    """Writes `metrics.jsonl` and `pairs.parquet/` of a training. Touches neither before it begins.

    Args:
        folder: where they go.
        step: the optimizer step that the training is resumed from; what is recorded of later ones is dropped.
        files: other names for data files in the ledger, see `Inputs.check_data`.
        on_begin: called when nothing forbids the training any more.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        step: int,
        files: Mapping[str, str] | None = None,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._step = step
        self._files = files or {}
        self._on_begin = on_begin

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._on_begin()
        self._metrics = Metrics(self._folder.metrics, resume_step=self._step)
        self._ledger = Ledger(self._folder.ledger, resume_step=self._step)

    def on_pairs(self, columns: Columns) -> None:
        files = [self._files.get(file, file) for file in columns["file"]]
        self._ledger.add({column.name: columns[column.name] for column in LEDGER_COLUMNS} | {"file": files})

    # The ledger must not lag behind the checkpoint that a run is resumed from. These are the moments after which
    # transformers may write one.
    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self._ledger.flush()

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._ledger.flush()

    on_train_end = on_evaluate

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: Mapping[str, float] = kwargs.get("logs") or {}
        if any(key == "loss" or key.startswith("eval_") for key in logs):
            self._metrics.add({"step": state.global_step, **logs})


@contextlib.contextmanager
def recorded(trainer: Trainer, checkpoint: Path | None) -> Iterator[None]:
    """Within it, a training of this trainer is recorded in `args.output_dir`, and no other process may write there.

    Args:
        checkpoint: what the training is resumed from.

    Raises:
        RunError: the folder cannot be written, or holds the record of an earlier training that is not resumed.
    """
    folder = RunFolder(trainer.args.output_dir)
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(folder.locked())
            if checkpoint is None and (folder.metrics.exists() or folder.ledger.exists()):
                raise RunError(
                    f"{folder.path}: the record of an earlier training lies here; resume it with "
                    "`train(resume_from_checkpoint=True)`, delete metrics.jsonl and pairs.parquet, or give another "
                    "`output_dir`"
                )
            if checkpoint is not None and checkpoint.parent.resolve() == folder.path.resolve():
                problem = cannot_resume(checkpoint, run=folder.path)
                if problem is not None:
                    raise RunError(f"{checkpoint}: {problem}; resume from another checkpoint, or begin again")
            state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            record = RunRecord(folder, step=0 if state is None else state.global_step)
            trainer.add_callback(record)
            stack.callback(trainer.remove_callback, record)

        on_main(begin)
        yield
