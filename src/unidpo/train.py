"""One run, from a resolved recipe to a finished run folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from unidpo.check import check_data
from unidpo.config import LoraSection, Recipe
from unidpo.errors import DataError, RecipeError
from unidpo.losses import PreferenceLoss, make_loss
from unidpo.models import language_linear_layers, load_config, load_policy, load_processor, save_model
from unidpo.pairs import PromptGroup
from unidpo.progress import Stages
from unidpo.runs import LEDGER_COLUMNS, Ledger, Metrics, RunFolder
from unidpo.sources import mix, select_pairs, split_by_prompt
from unidpo.trainer import PreferenceTrainer

_LOG = logging.getLogger("unidpo")


def run(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """Check the data, train, and leave a finished run folder; returns its path.

    Args:
        recipe: see `unidpo.config.load_recipe`.
        resume: go on from the run's last checkpoint.
        console: where progress and warnings go.

    Raises:
        UserError: something in the recipe, the data, the model or the run folder cannot be used.
    """
    console = console or Console(stderr=True)
    _log_to(console)
    args = _training_arguments(recipe)
    for name in (recipe.model.name, *([recipe.reference] if recipe.reference not in ("stored", "live") else [])):
        load_config(name, trust_remote_code=recipe.model.trust_remote_code)  # before the data is read, image by image
    folder = RunFolder(recipe.output)
    step = folder.create(recipe.resolved(), resume=resume)
    loss: PreferenceLoss = make_loss(**recipe.loss.model_dump())
    with Stages(console) as stages:
        groups, held_out = _training_data(recipe, loss, stages)
        checkpoint = folder.last_checkpoint if resume else None
        with _packages_the_recipe_needs():
            trainer = _trainer(recipe, args, loss, groups, held_out, RunRecord(folder, stages, step=step))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    dtype = getattr(torch, recipe.model.dtype)
    folder.finish(lambda target: save_model(trainer.model, trainer.processing_class, target, dtype=dtype))
    console.print(f"finished: {folder.model}", markup=False, highlight=False, soft_wrap=True)
    return folder.path


@contextlib.contextmanager
def _packages_the_recipe_needs() -> Iterator[None]:
    """An optional package that `train` or `lora` asks for and that is not there is the recipe's error."""
    try:
        yield
    except (ImportError, RuntimeError) as error:
        # transformers' reporters raise RuntimeError for this, as others do for quite other things.
        if isinstance(error, RuntimeError) and "to be installed" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise RecipeError(f"this recipe asks for a package that is not installed: {reason}") from error


def _training_data(recipe: Recipe, loss: PreferenceLoss, stages: Stages) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """The groups to train on and those held out, after the check every data set goes through."""
    data = recipe.data
    reports = [
        check_data(
            source.path,
            images=source.images or data.images,
            require_scores=loss.needs_scores or data.min_score_margin is not None,
            max_pixels=data.max_pixels,
            on_progress=lambda stage, done, total, path=source.path: stages.update(  # type: ignore[misc]
                f"checking {path}, {stage}", done, total
            ),
        )
        for source in data.sources
    ]
    for report in reports:
        if report.findings:
            report.render(stages.console)
    errors = [finding for report in reports for finding in report.errors]
    if errors and data.on_bad_row == "error":
        verdicts = "; ".join(f"{report.file}: {report.verdict}" for report in reports if report.errors)
        raise DataError(verdicts, findings=errors)
    weighted = [(report.groups, source.weight) for report, source in zip(reports, data.sources, strict=True)]
    groups = select_pairs(
        mix(weighted, seed=recipe.train.seed),
        min_score_margin=data.min_score_margin,
        group_by_prompt=data.group_by_prompt,
    )
    kept, held_out = split_by_prompt(groups, data.eval_fraction, recipe.train.seed)
    if not kept:
        raise DataError(f"data.eval_fraction={data.eval_fraction} holds out all {len(groups)} groups; lower it")
    _LOG.info("training on %d pairs of %d groups", sum(len(group.pairs) for group in kept), len(kept))
    if held_out:
        _LOG.info("held out: %d pairs of %d groups", sum(len(group.pairs) for group in held_out), len(held_out))
    return kept, held_out


def _trainer(
    recipe: Recipe,
    args: TrainingArguments,
    loss: PreferenceLoss,
    groups: Sequence[PromptGroup],
    held_out: Sequence[PromptGroup],
    record: RunRecord,
) -> PreferenceTrainer:
    set_seed(args.seed)
    trust = recipe.model.trust_remote_code
    model = load_policy(recipe.model.name, dtype=getattr(torch, recipe.model.dtype), trust_remote_code=trust)
    trainer = PreferenceTrainer(
        model,
        loss=loss,
        args=args,
        train_dataset=groups,
        eval_dataset=held_out,
        processing_class=load_processor(recipe.model.name, trust_remote_code=trust),
        peft_config=None if recipe.lora is None else _lora_config(recipe.lora, model),
        reference=recipe.reference,
        frozen=recipe.model.freeze,
        template=recipe.data.template,
        max_length=recipe.data.max_length,
        max_pixels=recipe.data.max_pixels,
        attention=recipe.model.attention,
        shuffle=recipe.data.shuffle,
        on_bad_row=recipe.data.on_bad_row,
        callbacks=[record],
        on_pairs=record.add_pairs,
        on_reference_progress=record.show_reference,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _training_arguments(recipe: Recipe) -> TrainingArguments:
    """What transformers' loop is told. Raises `RecipeError` where it refuses keys that go ill together."""
    values = recipe.train.training_arguments()
    if recipe.train.global_batch_pairs is not None:
        values["gradient_accumulation_steps"] = (
            recipe.train.global_batch_pairs // recipe.train.per_device_train_batch_size
        )
    if recipe.data.eval_fraction:
        values = {"eval_strategy": "epoch"} | values
    try:
        return TrainingArguments(
            output_dir=str(recipe.output),
            bf16=recipe.model.dtype == "bfloat16",
            fp16=recipe.model.dtype == "float16",
            disable_tqdm=True,
            # A loss that is not a number must be seen, not averaged away.
            logging_nan_inf_filter=False,
            **{"report_to": "none", "use_cpu": not torch.cuda.is_available()} | values,
        )
    except ValueError as error:
        raise RecipeError(f"transformers refuses the `train` section: {' '.join(str(error).split())}") from error


def _lora_config(lora: LoraSection, model: transformers.PreTrainedModel) -> Any:
    from peft import LoraConfig

    targets = lora.target_modules
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=language_linear_layers(model)
        if targets is None
        else targets
        if isinstance(targets, str)
        else list(targets),
        task_type="CAUSAL_LM",
    )


class RunRecord(TrainerCallback):  # type: ignore[misc]
    """Writes metrics and ledger of a run, and shows how far it is."""

    def __init__(self, folder: RunFolder, stages: Stages, *, step: int) -> None:
        self._metrics = Metrics(folder.metrics, resume_step=step)
        self._ledger = Ledger(folder.ledger, resume_step=step)
        self._stages = stages
        self._pairs_per_step = 0.0
        self._loss = ""

    def add_pairs(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Take the pairs of one optimizer step into the ledger."""
        self._ledger.add({column.name: columns[column.name] for column in LEDGER_COLUMNS})

    def show_reference(self, done: int, total: int) -> None:
        """Show how far the reference pass is."""
        self._stages.update("reference, responses", done, total)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        # On average: the last step of an epoch has what is left.
        self._pairs_per_step = len(train_dataloader.dataset) / len(train_dataloader)
        self._show(state)

    # The ledger must not lag behind the checkpoint a resumed run goes on from. These are the moments after which
    # transformers may write one.
    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self._ledger.flush()
        self._show(state)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self._ledger.flush()

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._ledger.flush()

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._loss = f"loss {logs['loss']:.4f}"
        if logs and ("loss" in logs or "eval_loss" in logs):
            self._metrics.add({"step": state.global_step, **logs})

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._ledger.flush()

    def _show(self, state: TrainerState) -> None:
        done, total = (round(self._pairs_per_step * steps) for steps in (state.global_step, state.max_steps))
        self._stages.update("training, pairs", done, total, self._loss)


class _ConsoleLog(logging.Handler):
    """What this package logs, as plain lines above the progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


def _log_to(console: Console) -> None:
    """What this package says goes to the console; transformers' own chatter stays out."""
    _LOG.handlers = [_ConsoleLog(console)]
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
