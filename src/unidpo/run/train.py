"""One run, from a resolved recipe to a finished run folder."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from unidpo.config import Recipe
from unidpo.data.pairs import PromptGroup
from unidpo.devices import accelerator, device_name
from unidpo.distributed import gather, is_main, on_main, wait_for_all, world_size
from unidpo.errors import RecipeError, did_you_mean
from unidpo.losses import PreferenceLoss
from unidpo.model.adapters import lora_config
from unidpo.model.load import load_config, load_policy, load_processor, save_model
from unidpo.progress import Stages
from unidpo.report import write_report
from unidpo.run.benchmarks import open_benchmarks
from unidpo.run.card import write_card
from unidpo.run.data import training_data
from unidpo.run.logs import log_to
from unidpo.run.stops import lost_processes_named, stopped_by_signals
from unidpo.run.training_arguments import packages_the_recipe_needs, training_arguments
from unidpo.run_folder.folder import RunFolder, step_of
from unidpo.run_folder.inputs import Inputs
from unidpo.terminal import Terminal
from unidpo.training.callbacks import Hooks
from unidpo.training.metrics import held_out_keys
from unidpo.training.record import RunRecord
from unidpo.training.trainer import PreferenceTrainer

_LOG = logging.getLogger("unidpo")


def run(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """Check the data, train, and leave a finished run folder; returns its path.

    Args:
        recipe: see `unidpo.config.load_recipe`.
        resume: continue from the run's last checkpoint.
        console: where progress and warnings go.

    Raises:
        UserError: something in the recipe, the data, the model or the run folder cannot be used.
    """
    args = training_arguments(recipe)  # which joins the processes, where there are several
    console = (console or Terminal(stderr=True)) if is_main() else Console(quiet=True)
    log_to(console)
    for name in (recipe.model.name, *([recipe.reference] if recipe.reference not in ("stored", "live") else [])):
        load_config(name, trust_remote_code=recipe.model.trust_remote_code)  # before the data is read, image by image
    folder = RunFolder(recipe.output)
    with _locked(folder, resume=resume):
        with Stages(console) as stages, open_benchmarks(recipe.eval, folder.path, stages.update) as benchmarks:
            _require_metric(args, recipe.loss, [] if benchmarks is None else benchmarks.names)
            config, machine = recipe.resolved(), _machine()
            checkpoint = on_main(lambda: folder.resume(config) if resume else folder.create(config, machine))
            groups, held_out = on_main(lambda: training_data(recipe, stages))
            inputs = Inputs(folder.path, resume=resume)
            sources = [(str(source.path), source.weight) for source in recipe.data.sources]
            digested = partial(stages.update, "digests of the data, groups")
            files = on_main(lambda: inputs.check_data(groups, held_out, sources, digested))
            record = RunRecord(
                folder,
                step=0 if checkpoint is None else step_of(checkpoint),
                files=files,
                on_begin=(lambda: folder.add_start(config, machine)) if resume else (lambda: None),
            )
            with packages_the_recipe_needs():
                trainer = _trainer(
                    recipe,
                    args,
                    groups,
                    held_out,
                    callbacks=[_Progress(stages), *([record] if is_main() else [])],
                    hooks=Hooks(
                        on_digests=inputs.check_models,
                        on_progress=stages.update,
                        benchmark=None if benchmarks is None else benchmarks.run,
                    ),
                )
                with stopped_by_signals(trainer), lost_processes_named():
                    trainer.train(resume_from_checkpoint=checkpoint)
        _finish(folder, trainer, getattr(torch, recipe.model.dtype))
    if is_main():
        _report(folder, stages.seconds)
    console.print(f"finished: {folder.model}", markup=False, highlight=False, soft_wrap=True)
    return folder.path


@contextlib.contextmanager
def _locked(folder: RunFolder, *, resume: bool) -> Iterator[None]:
    """Within it, these processes alone work in the run folder. Raises `UserError`, in every process."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            folder.refuse_unless_free(resume=resume)  # before a folder is made
            stack.enter_context(folder.locked())

        on_main(lock)
        yield


def _finish(folder: RunFolder, trainer: PreferenceTrainer, dtype: torch.dtype) -> None:
    # Sharded weights are gathered here, so every process must take part.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)

    def save(target: Path) -> None:
        save_model(trainer.model, trainer.processing_class, target, state, dtype=dtype)
        try:
            write_card(folder, target)
        except Exception:  # a bug in the card must not cost the model
            _LOG.warning("the model card could not be written", exc_info=True)

    if is_main():
        folder.finish(save)
    wait_for_all()


def _peak_memory() -> dict[str, int]:
    """Bytes: of this process on the host, and on its GPU."""
    # Linux counts in kilobytes.
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"host": host} | ({"cuda": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def _report(folder: RunFolder, seconds: Mapping[str, float]) -> None:
    """Write down what a finished run took, and draw its page. A bug in either must not cost the run."""
    try:
        folder.add_end(seconds, _peak_memory())
        write_report([folder.path], folder.report)
    except Exception:
        _LOG.warning("the report could not be drawn; `unidpo report %s` tries again", folder.path, exc_info=True)


def _machine() -> dict[str, Any]:
    """What of the machine changes how numbers round. Every process must call it."""
    device = device_name(accelerator())
    return {"threads": torch.get_num_threads(), "processes": world_size(), "devices": gather([device])}


def _require_metric(args: TrainingArguments, loss: PreferenceLoss, benchmarks: Sequence[str]) -> None:
    """Raise `RecipeError` where the best model is to be known by something that no evaluation measures."""
    known, wanted = [*held_out_keys(loss), *benchmarks], args.metric_for_best_model
    if wanted is None and args.save_strategy == "best":
        raise RecipeError(f"train.save_strategy=best needs train.metric_for_best_model: one of {', '.join(known)}")
    if wanted is not None and wanted.removeprefix("eval_") not in known:
        raise RecipeError(
            f"train.metric_for_best_model={wanted}: is not measured during training; there are {', '.join(known)}"
            f"{did_you_mean(wanted.removeprefix('eval_'), known)}"
        )


def _trainer(
    recipe: Recipe,
    args: TrainingArguments,
    groups: Sequence[PromptGroup],
    held_out: Sequence[PromptGroup],
    *,
    callbacks: list[TrainerCallback],
    hooks: Hooks,
) -> PreferenceTrainer:
    set_seed(args.seed)
    trust = recipe.model.trust_remote_code
    dtype, quantize = getattr(torch, recipe.model.dtype), recipe.model.quantize
    model = load_policy(recipe.model.name, dtype=dtype, quantize=quantize, trust_remote_code=trust)
    trainer = PreferenceTrainer(
        model,
        loss=recipe.loss,
        args=args,
        train_dataset=groups,
        eval_dataset=held_out,
        processing_class=load_processor(recipe.model.name, trust_remote_code=trust),
        peft_config=None if recipe.lora is None else lora_config(recipe.lora, model),
        reference=recipe.reference,
        frozen=recipe.model.freeze,
        template=recipe.data.template,
        max_length=recipe.data.max_length,
        max_pixels=recipe.data.max_pixels,
        global_batch_pairs=recipe.train.global_batch_pairs,
        max_tokens_per_pack=recipe.train.max_tokens_per_pack,
        attention=recipe.model.attention,
        compile=recipe.train.compile,
        cache_image_features=recipe.data.cache_image_features,
        shuffle=recipe.data.shuffle,
        on_bad_row=recipe.data.on_bad_row,
        max_lost_fraction=recipe.data.max_lost_fraction,
        callbacks=callbacks,
        hooks=hooks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Shows how far a training is."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._pairs_per_step = 0.0
        self._loss = ""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loader = kwargs["train_dataloader"]
        # On average: the last step of an epoch has what is left.
        self._pairs_per_step = len(loader.dataset) / len(loader)
        self._show(state)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._show(state)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: Mapping[str, float] = kwargs.get("logs") or {}
        if "loss" in logs:
            self._loss = f"loss {logs['loss']:.4f}"

    def _show(self, state: TrainerState) -> None:
        done, total = (round(self._pairs_per_step * steps) for steps in (state.global_step, state.max_steps))
        self._stages.update("training, pairs", done, total, self._loss)
