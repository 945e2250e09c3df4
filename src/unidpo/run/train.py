"""One run, from a resolved recipe to a finished run folder."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
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
from unidpo.data.check import ScoreKnobs, check_data
from unidpo.data.formats import mix, select_pairs, split_by_prompt
from unidpo.data.pairs import PromptGroup
from unidpo.distributed import gather, is_main, on_main, wait_for_all, world_size
from unidpo.errors import DataError, Interrupted, RecipeError, TrainingError, did_you_mean
from unidpo.losses import PreferenceLoss, UniDPO
from unidpo.model.adapters import lora_config
from unidpo.model.load import load_config, load_policy, load_processor, save_model
from unidpo.progress import Stages
from unidpo.run.benchmarks import TrainingBenchmarks, open_benchmarks
from unidpo.run.card import write_card
from unidpo.run.training_arguments import packages_the_recipe_needs, training_arguments
from unidpo.run_folder.folder import RunFolder, step_of
from unidpo.run_folder.inputs import Inputs
from unidpo.terminal import Terminal
from unidpo.training.metrics import held_out_keys
from unidpo.training.record import RunRecord
from unidpo.training.trainer import PreferenceTrainer

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
    args = training_arguments(recipe)  # which joins the processes, where there are several
    console = (console or Terminal(stderr=True)) if is_main() else Console(quiet=True)
    _log_to(console)
    for name in (recipe.model.name, *([recipe.reference] if recipe.reference not in ("stored", "live") else [])):
        load_config(name, trust_remote_code=recipe.model.trust_remote_code)  # before the data is read, image by image
    loss = recipe.loss
    folder = RunFolder(recipe.output)
    with _locked(folder, resume=resume):
        with Stages(console) as stages, open_benchmarks(recipe.eval, folder.path, stages.update) as benchmarks:
            _require_metric(args, loss, [] if benchmarks is None else benchmarks.names)
            config, machine = recipe.resolved(), _machine()
            checkpoint = on_main(lambda: folder.resume(config) if resume else folder.create(config, machine))
            groups, held_out = on_main(lambda: training_data(recipe, loss, stages))
            inputs = Inputs(folder.path, resume=resume)
            files = on_main(lambda: _see_data(inputs, recipe, groups, held_out, stages))
            with packages_the_recipe_needs():
                begin = (lambda: folder.add_start(config, machine)) if resume else (lambda: None)
                step = 0 if checkpoint is None else step_of(checkpoint)
                record = RunRecord(folder, step=step, files=files, on_begin=begin) if is_main() else None
                progress = _Progress(stages)
                trainer = _trainer(
                    recipe, args, loss, groups, held_out, record, progress, benchmarks, inputs.see_models
                )
                with _stopped_by_signals(trainer), _together():
                    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        _finish(folder, trainer, getattr(torch, recipe.model.dtype))
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
    # Weights that are spread over processes come together here, so every process must take part.
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


def _machine() -> dict[str, Any]:
    """What of the machine changes how numbers round. Every process must call it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return {"threads": torch.get_num_threads(), "processes": world_size(), "devices": gather([device])}


def _see_data(
    inputs: Inputs, recipe: Recipe, groups: Sequence[PromptGroup], held_out: Sequence[PromptGroup], stages: Stages
) -> dict[str, str]:
    sources = [(str(source.path), source.weight) for source in recipe.data.sources]
    return inputs.see_data(
        groups, held_out, sources, lambda done, total: stages.update("digests of the data, groups", done, total)
    )


@contextlib.contextmanager
def _stopped_by_signals(trainer: PreferenceTrainer) -> Iterator[None]:
    """SIGTERM, and the first Ctrl-C, let the step at hand end and save it; the second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT and received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        trainer.request_stop()
        _LOG.warning("%s: this step is finished and saved first", signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Interrupted as stopped:
        # Another process may be the one that was told.
        number = received[0] if received else signal.SIGTERM
        raise Interrupted(str(stopped), exit_code=128 + number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Another process that is gone is said in one line. Raises `TrainingError`."""
    try:
        yield
    except RuntimeError as error:
        gone = re.search("[Cc]onnection (closed|reset|refused)|Broken pipe|remote process exited|NCCL|gloo", str(error))
        if world_size() == 1 or gone is None:
            raise
        raise TrainingError("another process of this training is gone; its own message says why") from error


def training_data(
    recipe: Recipe, loss: PreferenceLoss, stages: Stages, *, scan_images: bool = True
) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """The groups to train on and those held out, after the check every data set goes through.

    Args:
        scan_images: decode every image, which is most of the check's time.
    """
    data = recipe.data
    reports = [
        check_data(
            source.path,
            images=source.images or data.images,
            scan_images=scan_images,
            require_scores=loss.needs_scores or data.min_score_margin is not None,
            max_pixels=data.max_pixels,
            knobs=_knobs(recipe.loss),
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
        if loss.needs_scores and all(finding.kind == "missing-score" for finding in errors):
            verdicts += " Add scores, or train with a loss that needs none: loss={name: dpo}."
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


def _knobs(loss: PreferenceLoss) -> ScoreKnobs | None:
    if not isinstance(loss, UniDPO):
        return None
    return ScoreKnobs(loss.quality_eta, loss.tau_good if loss.nll_weight else None, whose="of the recipe")


def _trainer(
    recipe: Recipe,
    args: TrainingArguments,
    loss: PreferenceLoss,
    groups: Sequence[PromptGroup],
    held_out: Sequence[PromptGroup],
    record: RunRecord | None,
    progress: _Progress,
    benchmarks: TrainingBenchmarks | None,
    on_digests: Callable[[Mapping[str, str]], None],
) -> PreferenceTrainer:
    set_seed(args.seed)
    trust = recipe.model.trust_remote_code
    dtype, quantize = getattr(torch, recipe.model.dtype), recipe.model.quantize
    model = load_policy(recipe.model.name, dtype=dtype, quantize=quantize, trust_remote_code=trust)
    trainer = PreferenceTrainer(
        model,
        loss=loss,
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
        cache_image_features=recipe.data.cache_image_features,
        shuffle=recipe.data.shuffle,
        on_bad_row=recipe.data.on_bad_row,
        max_lost_fraction=recipe.data.max_lost_fraction,
        callbacks=[progress, *([record] if record else [])],
        on_digests=on_digests,
        on_pairs=record.add_pairs if record else None,
        on_token_progress=progress.show_tokens,
        on_reference_progress=progress.show_reference,
        on_feature_progress=progress.show_features,
        benchmark=None if benchmarks is None else benchmarks.run,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Shows how far a training is."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._pairs_per_step = 0.0
        self._loss = ""

    def show_tokens(self, done: int, total: int) -> None:
        self._stages.update("tokenizing, groups", done, total)

    def show_reference(self, done: int, total: int) -> None:
        self._stages.update("reference, responses", done, total)

    def show_features(self, done: int, total: int) -> None:
        self._stages.update("features of images, prompts", done, total)

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        # On average: the last step of an epoch has what is left.
        self._pairs_per_step = len(train_dataloader.dataset) / len(train_dataloader)
        self._show(state)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._show(state)

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
    """What this package says goes to the console, and so do errors of transformers; its chatter stays out."""
    _LOG.handlers = [_ConsoleLog(console)]
    logging.getLogger("transformers").handlers = [_ConsoleLog(console)]  # its own writes a file's text as it is
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed's, once per step
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each rounding
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
