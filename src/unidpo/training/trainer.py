"""`PreferenceTrainer`: transformers' `Trainer` over packs. Wiring only; the mathematics is in `losses`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainingArguments

from unidpo.cache.store import default_cache
from unidpo.config.schema import Compile, ModelPart
from unidpo.data.lost_rows import LostRows
from unidpo.distributed import gather, is_main, on_main
from unidpo.errors import Interrupted
from unidpo.losses import LossTerms, PairLogps, PreferenceLoss
from unidpo.model.batches import Batch, Share
from unidpo.model.encode import Encoder, prompt_positions
from unidpo.model.lengths import Fitted
from unidpo.model.load import Processor, load_policy, load_processor
from unidpo.model.policy import Policy
from unidpo.training.arguments import (
    checkpoints_are_reentrant,
    refuse_settings_without_effect,
    warn_of_idle_devices,
    warn_without_workers,
)
from unidpo.training.callbacks import BeforeFirstStep, Hooks
from unidpo.training.checkpoints import checkpoint_to_resume, read_reward_shift
from unidpo.training.groups import fit_both, given_groups
from unidpo.training.reading import Step, StepLoader
from unidpo.training.record import recorded
from unidpo.training.running import StepTrainer
from unidpo.training.setup import Setup, SetupMaker
from unidpo.training.steps import StepSampler
from unidpo.training.trainable import make_trainable


class PreferenceTrainer(StepTrainer):
    """Train a policy on pairs of responses.

    The global batch is `per_device_train_batch_size * gradient_accumulation_steps * processes` **pairs** and the loss
    is the mean over them, however they fall into micro-batches and processes: transformers' loop sees one batch per
    optimizer step, and `training_step` runs its micro-batches. Everything else (optimizer, schedule, wrapping in DDP,
    FSDP or DeepSpeed, callbacks) is `Trainer`'s; a checkpoint is written beside its place and appears whole.

    Args:
        model: a loaded model, or a folder or hub id.
        loss: from `unidpo.losses`, or any other `PreferenceLoss`.
        args: `bf16`/`fp16` switch autocast on; trainable weights are then kept in float32. Settings that have no
            effect here are refused, among them those that TRL's `DPOConfig` adds.
        train_dataset: prompt groups, see `load_pairs`; or a `datasets.Dataset` or a list of rows, in any layout that is
            read from files. Images may be decoded ones; relative paths start from the working directory.
        eval_dataset: the same, to measure on when `args.eval_strategy` says so.
        processing_class: the model's processor or tokenizer; loaded from the model's name where `None`.
        peft_config: train an adapter instead of the model.
        reference: `"stored"` (before the first step the policy is the reference: its log-probabilities are computed
            once, kept on disk, and found there by the next run), `"live"` (a frozen copy runs along), or another model
            by folder or hub id (its log-probabilities are stored).
        frozen: parts of the model that are not trained; without effect where an adapter is trained.
        template, max_length, max_pixels: see `Encoder`.
        global_batch_pairs: the global batch where it is no multiple of the number of processes.
        max_tokens_per_pack: fill micro-batches up to so many tokens instead of by `per_device_train_batch_size`; what
            a micro-batch holds changes memory and speed, not the result.
        attention: `"auto"` packs prompts unless a check before the first step finds that the model's own forward pass
            disagrees, with the fastest attention backend there is; `"sdpa"`, `"varlen"`, `"flex"` and `"flash"` insist
            on packs by that backend; `"padded"` never packs.
        compile: `"layers"` has torch compile each layer of language model and vision tower, and is an error where that
            does not work; `"auto"` does so on a CUDA GPU, where it works; `"off"` does not.
        cache_image_features: keep on disk what vision tower and projector, which must not be trained, make of each
            image, and neither run them nor open an image again.
        shuffle: draw groups in an order made of `args.data_seed` (or `args.seed`) and the epoch; else in file order.
        on_bad_row: what a row that becomes unreadable during training does: stop the run, or be left out and named.
        max_lost_fraction: share of the pairs that may be left out so, of those trained on and of those held out; more
            stop the run.
        cache: folder of stored reference log-probabilities and features of images, `default_cache()` where `None`.
        callbacks: as `Trainer` takes them; a `PairsCallback` also gets the pairs of each step.
        record: leave `metrics.jsonl` and the ledger `pairs.parquet/` in `args.output_dir`, as `unidpo train` does; see
            docs/run-folder.md. A resumed training continues them.
        hooks: for `unidpo train`.

    Raises:
        DataError: a row cannot be used; the loss needs scores and some are missing; no prompt fits `max_length`.
        ModelError: the model cannot be used for this.
        RecipeError: features of images are to be kept, and vision tower or projector are trained.
        UserError: `args` holds settings that have no effect here.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        loss: PreferenceLoss,
        args: TrainingArguments,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Processor | None = None,
        peft_config: Any = None,
        reference: str = "stored",
        frozen: Iterable[ModelPart] = ("vision", "projector"),
        template: str | None = None,
        max_length: int = 4096,
        max_pixels: int = 768 * 768,
        global_batch_pairs: int | None = None,
        max_tokens_per_pack: int | None = None,
        attention: str = "auto",
        compile: Compile = "auto",  # noqa: A002
        cache_image_features: bool = False,
        shuffle: bool = True,
        on_bad_row: Literal["error", "skip"] = "error",
        max_lost_fraction: float = 0.01,
        cache: Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        record: bool = False,
        hooks: Hooks | None = None,
    ) -> None:
        refuse_settings_without_effect(args)
        warn_without_workers(args)
        warn_of_idle_devices(args)
        self.loss = loss
        self._hooks = hooks or Hooks()
        train, held_out = given_groups(train_dataset, eval_dataset, loss, on_bad_row)
        name = model.name_or_path if isinstance(model, PreTrainedModel) else str(model)
        if not isinstance(model, PreTrainedModel):
            model = load_policy(model)
        processing_class = processing_class or load_processor(name)
        self.encoder = Encoder(
            processing_class, prompt_positions(model), template=template, max_length=max_length, max_pixels=max_pixels
        )
        self._train, self._held_out = fit_both(train, held_out, self.encoder, self._hooks.on_progress)
        trainable = make_trainable(
            model,
            args,
            peft_config=peft_config,
            frozen=frozen,
            reference=reference if loss.needs_reference else None,
            cache_image_features=cache_image_features,
            needs_fingerprint=(loss.needs_reference and reference == "stored") or self._hooks.on_digests is not None,
        )
        self._check_digests({"model": trainable.fingerprint, "processor": self.encoder.fingerprint()})

        # transformers' loop accumulates over batches of its loader; here one batch is a whole optimizer step.
        args = copy.copy(args)
        pairs_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._pairs_per_step = global_batch_pairs or pairs_per_step
        args.gradient_accumulation_steps = 1
        args.remove_unused_columns = False
        args._n_gpu = 1  # of several, one process takes one; transformers would copy the model to all, see DataParallel

        self._shuffle = shuffle
        self._is_recorded = record
        lost = LostRows(
            {"training": self._train.groups, "held-out": self._held_out.groups},
            stop=on_bad_row == "error",
            max_fraction=max_lost_fraction,
            quiet=not is_main(),
        )
        self._setup_maker = SetupMaker(
            loss=loss,
            trainable=trainable,
            encoder=self.encoder if args.device.type == "cpu" else self.encoder.in_bytes(self._train.groups),
            train=self._train,
            held_out=self._held_out,
            reference=reference if loss.needs_reference else None,
            attention=attention,
            compile=compile,
            max_tokens_per_pack=max_tokens_per_pack,
            args=args,
            cache=cache or default_cache(),
            on_lost=lost.add,
            on_digests=self._check_digests,
            on_progress=self._report_progress,
        )
        self._resumed = False
        super().__init__(
            lost=lost,
            policy_is_reference=trainable.is_reference,
            model=trainable.model,
            args=args,
            train_dataset=self._train.groups,
            eval_dataset=self._held_out.groups if self._held_out.groups or self._hooks.benchmark else None,
            processing_class=processing_class,
            callbacks=[BeforeFirstStep(self._apply_setup), *(callbacks or [])],
        )
        self._own_attention = self.policy.attention

    @property
    def policy(self) -> Policy:
        """The model that is trained, in its wrapper."""
        return Policy(self.model, self.model_wrapped, self.accelerator.autocast)

    # --- before the first step -------------------------------------------------------------------------------------

    @cached_property
    def setup(self) -> Setup:
        """What comes before the first step; made on first use.

        That is at the start of training, when the model is in its wrapper; when a plain run resumes, earlier: just
        before a checkpoint's weights replace those the model came with, which may be the reference.
        """
        # DeepSpeed loads a checkpoint earlier. The reference cannot be computed then, so all of it must be stored.
        return self._setup_maker.setup(self.policy, complete=self._resumed and self.is_deepspeed_enabled)

    def _apply_setup(self) -> None:
        """Switch the model to the attention and the layers of `setup`, which is made where it is not yet."""
        self.policy.set_attention(self.setup.attention)
        if self.policy.compiled != self.setup.compiled:  # else each evaluation would wrap the layers anew
            self.policy.set_compiled(self.setup.compiled)
        if not checkpoints_are_reentrant(self.args):
            # With checkpointing transformers has every embedding ask for a gradient, that of image patches included,
            # and a frozen vision tower would be computed again and gone through backward. Only reentrant checkpoints
            # need it.
            self.policy.plain.disable_input_require_grads()

    def _check_digests(self, digests: Mapping[str, str]) -> None:
        on_main(lambda: self._hooks.on_digests and self._hooks.on_digests(digests))

    def _report_progress(self, stage: str, done: int, total: int) -> None:
        if any(gather([self._stop_requested])):
            raise Interrupted(f"stopped before the first step ({stage}: {done}/{total}); what is computed is kept")
        if is_main():
            self._hooks.on_progress(stage, done, total)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does, with all that comes before the first step.

        The model is left with the attention it came with, and not compiled.

        Raises:
            Interrupted: `request_stop` was called; there is a checkpoint of the last step.
            RunError: the checkpoint to resume from has lost something, or the training is to be recorded where the
                record of another one lies or is being written.
        """
        checkpoint = checkpoint_to_resume(self.args.output_dir, resume_from_checkpoint)
        self._resumed = checkpoint is not None
        if checkpoint is not None:
            self._policy_is_reference = False
            self.reward_shift = read_reward_shift(checkpoint)
        with contextlib.ExitStack() as stack:
            if self._is_recorded:
                stack.enter_context(recorded(self, checkpoint))
            stack.enter_context(self.policy.restored())
            stack.callback(self.stop_reading)
            output = super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **kwargs)
        self._lost.warn()
        if self._stopping:
            raise Interrupted(f"stopped after step {self.state.global_step}, of which there is a checkpoint")
        return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._apply_setup()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    # --- a step ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> StepLoader:
        """The pairs of optimizer steps; see `StepSampler`."""
        return StepLoader(self._sampler(self._train, shuffle=self._shuffle))

    def read(self, steps: Iterable[Sequence[Share]]) -> Iterator[Step]:
        """Steps to train on, from the shares in them."""
        return self.setup.train.read(steps)

    def _sampler(self, data: Fitted, *, shuffle: bool) -> StepSampler:
        return StepSampler(
            [len(group.pairs) for group in data.groups],
            pairs_per_step=self._pairs_per_step,
            shuffle=shuffle,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def evaluate_pairs(self, batch: Batch) -> tuple[PairLogps, LossTerms]:
        """Log-probabilities and loss terms of a batch that lies on the model's device."""
        return self.setup.objective.of_pairs(
            self.policy, batch, policy_is_reference=self._policy_is_reference, reward_shift=self.reward_shift.value
        )

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and the logged means over the held-out pairs, as `eval_loss`, `eval_rewards/accuracies`, ...

        The benchmark's metrics are beside them.

        Args:
            eval_dataset: not taken; the held-out groups were given to the constructor.
        """
        if not (self._held_out.groups or self._hooks.benchmark) or eval_dataset is not None:
            raise ValueError("give the held-out groups to the trainer as eval_dataset")
        found: dict[str, float] = {}
        if self._held_out.groups:
            with contextlib.nullcontext() if self.is_in_train else self.policy.restored():
                self._apply_setup()
                found |= self._evaluate_held_out()
        if self._hooks.benchmark is not None:
            found |= on_main(self._run_benchmark)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_held_out(self) -> dict[str, float]:
        steps = self._sampler(self._held_out, shuffle=False)
        with self.policy.measuring():
            return self.held_out_metrics(self.setup.held_out.read(steps))

    def _run_benchmark(self) -> Mapping[str, float]:
        assert self._hooks.benchmark is not None
        with self.policy.restored(), self.accelerator.autocast():
            self.policy.set_attention(self._own_attention)
            self.policy.set_compiled(False)  # answers grow token by token
            return self._hooks.benchmark(self.policy.plain, self.processing_class, self.state.global_step)
