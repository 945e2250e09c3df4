"""`PreferenceTrainer`: transformers' `Trainer` over packs. Wiring only; the mathematics is in `losses`."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import DistributedType
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from unidpo.cache.store import default_cache
from unidpo.config.schema import Attention
from unidpo.data.formats import groups_of
from unidpo.data.pairs import PromptGroup
from unidpo.distributed import gather, is_main, on_main, rank, world_size
from unidpo.errors import DataError, Finding, Interrupted, ModelError, from_findings
from unidpo.losses import LossTerms, PairLogps, PreferenceLoss
from unidpo.model.adapters import adds_nothing_yet
from unidpo.model.batches import Batch, LostRows, PlannedBatches, Step, StepLoader, StepSampler
from unidpo.model.encode import Encoder, prompt_positions
from unidpo.model.lengths import GroupTokens, fit_to_length
from unidpo.model.load import Part, Processor, load_policy, load_processor, load_weights
from unidpo.model.packs import Layout, pack, to_device, used_responses
from unidpo.model.policy import Policy
from unidpo.run_folder.folder import RunFolder
from unidpo.training.arguments import checkpoints_are_reentrant, refuse_settings_without_effect
from unidpo.training.checkpoints import published, reading_errors, refuse_damaged, writing_errors
from unidpo.training.metrics import Columns, Means, RewardShift, extend, joined, pair_columns, require_finite
from unidpo.training.objective import Objective, require_scores
from unidpo.training.record import recorded
from unidpo.training.setup import Preparation
from unidpo.training.trainable import make_learner

_REWARD_SHIFT = "reward_shift.json"


class PreferenceTrainer(Trainer):  # type: ignore[misc]
    """Train a policy on pairs of responses.

    The global batch is `per_device_train_batch_size * gradient_accumulation_steps * processes` **pairs** and the loss
    is the mean over them, however they fall into forward passes and processes: transformers' loop sees one batch per
    optimizer step, and `training_step` runs its passes. Everything else (optimizer, schedule, wrapping in DDP, FSDP or
    DeepSpeed, callbacks) is `Trainer`'s; a checkpoint is written beside its place and appears whole.

    Args:
        model: a loaded model, or a folder or hub id.
        loss: from `unidpo.losses`, or any other `PreferenceLoss`.
        args: `bf16`/`fp16` switch autocast on; weights that learn are then kept in float32. Settings that have no
            effect here are refused, among them those that TRL's `DPOConfig` adds.
        train_dataset: prompt groups, see `load_pairs`; or a `datasets.Dataset` or a list of rows, in any layout that is
            read from files. Images may be decoded ones; relative paths start from the working directory.
        eval_dataset: the same, to measure on when `args.eval_strategy` says so.
        processing_class: the model's processor or tokenizer; loaded from the model's name where `None`.
        peft_config: train an adapter instead of the model.
        reference: `"stored"` (before the first step the policy is the reference: its log-probabilities are computed
            once, kept on disk, and found there by the next run), `"live"` (a frozen copy runs along), or another model
            by folder or hub id (its log-probabilities are stored).
        frozen: parts of the model that do not learn; without effect where an adapter is trained.
        template, max_length, max_pixels: see `Encoder`.
        global_batch_pairs: the global batch where it is no multiple of the number of processes.
        max_tokens_per_pack: fill forward passes up to so many tokens instead of by `per_device_train_batch_size`; what
            a pass holds changes memory and speed, not the result.
        attention: `"auto"` packs prompts unless a check before the first step finds that the model's own forward pass
            disagrees, with the fastest attention backend there is; `"sdpa"`, `"varlen"`, `"flex"` and `"flash"` insist
            on packs by that backend; `"padded"` never packs.
        cache_image_features: keep on disk what vision tower and projector, which must not learn, make of each image,
            and neither run them nor open an image again.
        shuffle: draw groups in an order made of `args.data_seed` (or `args.seed`) and the epoch; else in file order.
        on_bad_row: what a row that becomes unreadable during training does: stop the run, or be left out and named.
        max_lost_fraction: share of the pairs that may be left out so, of those trained on and of those held out; more
            stop the run.
        cache: folder of stored reference log-probabilities and features of images, `default_cache()` where `None`.
        callbacks: as `Trainer` takes them.
        record: leave `metrics.jsonl` and the ledger `pairs.parquet/` in `args.output_dir`, as `unidpo train` does; see
            docs/run-folder.md. A resumed training goes on with them.
        on_digests: called in the main process with digests of the weights (`model`), of processor and template
            (`processor`) and, later, of the weights of another `reference`; refuses them by raising `UserError`.
        on_pairs: called in the main process once per optimizer step with the step's pairs, see
            `metrics.pair_columns`.
        on_token_progress: called in the main process with groups whose tokens are counted and groups to count.
        on_reference_progress: called in the main process with responses done and responses to do.
        on_feature_progress: called in the main process with prompts done and prompts to do, where features are kept.
        benchmark: called in the main process at each evaluation with the model in its own attention, the processor
            and the step; gives further metrics by name.

    Raises:
        DataError: a row cannot be used; the loss needs scores and some are missing; no prompt fits `max_length`.
        ModelError: the model cannot be used for this.
        RecipeError: features of images are to be kept, and vision tower or projector learn.
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
        frozen: Iterable[Part] = ("vision", "projector"),
        template: str | None = None,
        max_length: int = 4096,
        max_pixels: int = 768 * 768,
        global_batch_pairs: int | None = None,
        max_tokens_per_pack: int | None = None,
        attention: Attention = "auto",
        cache_image_features: bool = False,
        shuffle: bool = True,
        on_bad_row: Literal["error", "skip"] = "error",
        max_lost_fraction: float = 0.01,
        cache: Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        record: bool = False,
        on_digests: Callable[[Mapping[str, str]], None] | None = None,
        on_pairs: Callable[[Columns], None] | None = None,
        on_token_progress: Callable[[int, int], None] | None = None,
        on_reference_progress: Callable[[int, int], None] | None = None,
        on_feature_progress: Callable[[int, int], None] | None = None,
        benchmark: Callable[[PreTrainedModel, Processor, int], Mapping[str, float]] | None = None,
    ) -> None:
        refuse_settings_without_effect(args)
        train_groups, held_out_groups = (
            groups_of(given, name=name, require_scores=loss.needs_scores, on_bad_row=on_bad_row)
            for name, given in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset or ()))
        )
        if loss.needs_scores:
            require_scores([*train_groups, *held_out_groups], loss)
        name = model.name_or_path if isinstance(model, PreTrainedModel) else str(model)
        if not isinstance(model, PreTrainedModel):
            model = load_policy(model)
        processing_class = processing_class or load_processor(name)
        encoder = Encoder(
            processing_class, prompt_positions(model), template=template, max_length=max_length, max_pixels=max_pixels
        )
        tell, all_groups = on_token_progress or (lambda done, total: None), len(train_groups) + len(held_out_groups)
        groups = fit_to_length(train_groups, encoder, on_progress=lambda done, _: tell(done, all_groups))
        held_out = fit_to_length(
            held_out_groups, encoder, on_progress=lambda done, _: tell(len(train_groups) + done, all_groups)
        )
        learner = make_learner(
            model,
            args,
            peft_config=peft_config,
            frozen=frozen,
            reference=reference if loss.needs_reference else None,
            cache_image_features=cache_image_features,
            name_weights=(loss.needs_reference and reference == "stored") or on_digests is not None,
        )
        model = learner.model
        self._on_digests = on_digests or (lambda digests: None)
        on_main(lambda: self._on_digests({"model": learner.fingerprint, "processor": encoder.fingerprint()}))
        self._fingerprint = learner.fingerprint
        self._vision_fingerprint = learner.vision_fingerprint
        self._images_are_frozen = learner.images_are_frozen

        # transformers' loop accumulates over batches of its loader; here one batch is a whole optimizer step.
        args = copy.copy(args)
        self._pairs_per_pack = args.per_device_train_batch_size
        self._pairs_per_step = global_batch_pairs or (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        )
        args.gradient_accumulation_steps = 1
        args.remove_unused_columns = False

        self.loss = loss
        self.encoder = encoder
        self.reference = reference
        self.layout: Layout = pack
        self._groups = groups.groups
        self._held_out = held_out.groups
        self._tokens = groups.tokens
        self._held_out_tokens = held_out.tokens
        self._max_tokens_per_pack = max_tokens_per_pack
        self._attention: Attention = attention
        self._shuffle = shuffle
        self._cache = cache or default_cache()
        self._is_recorded = record
        self._on_pairs = [on_pairs] if on_pairs is not None else []
        self._benchmark = benchmark
        self._on_reference_progress = on_reference_progress or (lambda done, total: None)
        self._on_feature_progress = on_feature_progress or (lambda done, total: None)
        self._batches = PlannedBatches(self._groups, encoder)
        self._held_out_batches = PlannedBatches(self._held_out, encoder)
        self._prepared = False
        self._stop_requested = False
        self._stopping = False
        self._resumed = False
        self._objective = Objective(loss, reference in ("stored", "live") and adds_nothing_yet(model))
        self._means = Means()
        self._reward_shift = RewardShift()
        self._lost = LostRows(
            {"training": self._groups, "held-out": self._held_out},
            stop=on_bad_row == "error",
            max_fraction=max_lost_fraction,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._groups,
            eval_dataset=self._held_out if self._held_out or benchmark else None,
            processing_class=processing_class,
            callbacks=[_BeforeFirstStep(self._prepare), *(callbacks or [])],
        )
        if is_deepspeed_zero3_enabled() and loss.needs_reference and self._needs_second_model:
            raise ModelError(
                f"reference: {reference}: beside a model that ZeRO-3 has spread there is no place for a whole one; use "
                "`reference: stored`, or FSDP2 (`train.fsdp=true`)"
            )
        self._own_attention = self._attention_in_use = self.policy.attention
        self.model_accepts_loss_kwargs = False

    @property
    def _needs_second_model(self) -> bool:
        return self.reference != "stored" and not (self.reference == "live" and self.policy.has_adapter)

    @property
    def policy(self) -> Policy:
        """The model that learns, in the wrapper it learns in."""
        return Policy(self.model, self.model_wrapped, self.accelerator.autocast)

    # --- before the first step -------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does. Before the first step, see to the layout and the reference.

        The model is left with the attention it came with.

        Raises:
            Interrupted: `request_stop` was called; there is a checkpoint of the last step.
            RunError: the checkpoint to resume from has lost something, or the training is to be recorded where the
                record of another one lies or is being written.
        """
        self._resumed = bool(resume_from_checkpoint)
        if resume_from_checkpoint:
            self._objective.policy_is_reference = False
            if resume_from_checkpoint is True:
                last = RunFolder(self.args.output_dir).last_checkpoint
                resume_from_checkpoint = True if last is None else str(last)
            refuse_damaged(Path(str(resume_from_checkpoint)))
            kept = Path(str(resume_from_checkpoint)) / _REWARD_SHIFT
            if kept.is_file():
                self._reward_shift = RewardShift(**json.loads(kept.read_text("utf-8")))
        with contextlib.ExitStack() as stack:
            if self._is_recorded:
                checkpoint = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
                stack.enter_context(recorded(self, self._on_pairs, checkpoint))
            stack.enter_context(self._attention_restored())
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._lost.warn()
        if self._stopping:
            raise Interrupted(f"stopped after step {self.state.global_step}, of which there is a checkpoint")
        return output

    def request_stop(self) -> None:
        """Let the training end after the step at hand or the next, with a checkpoint; any process may be asked.

        A training whose last step is done ends as ever.
        """
        self._stop_requested = True

    @contextlib.contextmanager
    def _attention_restored(self) -> Iterator[None]:
        before = self.policy.attention
        try:
            yield
        finally:
            self.policy.set_attention(before)

    def _prepare(self) -> None:
        """Choose the layout and see to the reference, once, and give the model the attention that the layout needs.

        Called when the model is in its wrapper and, at the latest, before a checkpoint's weights take the place of
        those it came with, which may be the reference.
        """
        if not self._prepared:
            prepared = self._preparation().run()
            self.layout, self._attention_in_use = prepared.choice.layout, prepared.choice.attention
            for batches in (self._batches, self._held_out_batches):
                batches.encoder, batches.stand_in, batches.layout = prepared.encoder, prepared.stand_in, self.layout
            if prepared.ref_logps is not None:
                own = len(self._groups)
                self._batches.ref_logps, self._held_out_batches.ref_logps = (
                    prepared.ref_logps[:own],
                    prepared.ref_logps[own:],
                )
            self._objective.live_reference = prepared.live_reference
            self._objective.shares_features = prepared.shares_features
            self._prepared = True
        self.policy.set_attention(self._attention_in_use)
        if not checkpoints_are_reentrant(self.args):
            # With checkpointing transformers has every embedding ask for a gradient, that of image patches included,
            # and a frozen vision tower would be computed again and gone through backward. Only reentrant checkpoints
            # need it.
            self.policy.plain.disable_input_require_grads()

    def _preparation(self) -> Preparation:
        arithmetic = torch.float16 if self.args.fp16 else self.policy.plain.dtype
        return Preparation(
            policy=self.policy,
            encoder=self.encoder,
            groups=self._groups,
            held_out=self._held_out,
            reference=self.reference if self.loss.needs_reference else None,
            attention=self._attention,
            arithmetic=torch.bfloat16 if self.args.bf16 else arithmetic,
            device=self.args.device,
            fingerprint=self._fingerprint,
            vision_fingerprint=self._vision_fingerprint,
            images_are_frozen=self._images_are_frozen,
            # DeepSpeed has put a checkpoint's weights in place of those the reference is made of.
            complete=self._resumed and self.is_deepspeed_enabled,
            cache=self._cache,
            workers=self.args.dataloader_num_workers,
            on_lost=self._lost.see,
            on_reference=lambda digest: on_main(lambda: self._on_digests({"reference": digest})),
            on_feature_progress=self._progress("feature", self._on_feature_progress),
            on_reference_progress=self._progress("reference", self._on_reference_progress),
        )

    def _progress(self, what: str, tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if any(gather([self._stop_requested])):
                raise Interrupted(f"stopped in the {what} pass; what is computed is kept")
            if is_main():
                tell(done, total)

        return progress

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output = Path(self.args.output_dir)
        with writing_errors(self.state.global_step, output), published(self.args, self.state) as folder:
            super()._save_checkpoint(model, trial)
            if is_main():
                (folder / _REWARD_SHIFT).write_text(json.dumps(asdict(self._reward_shift)), "utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights of a checkpoint.

        transformers' own loads the file's tensors by name and passes over names it does not know; `save_pretrained`
        writes the names of the hub, which for many vision-language models are not those in memory, and nothing would
        be loaded at all (huggingface/transformers#43701). `from_pretrained` knows both.
        """
        self._prepare()
        if not isinstance(self.model, PreTrainedModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        wide = torch.promote_types(self.model.dtype, torch.float32)
        saved = load_weights(type(self.model), resume_from_checkpoint, dtype=wide)
        self.model.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading_errors(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading_errors(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        if isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    # --- a step ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Step]:
        """Optimizer steps; see `StepSampler`."""
        sampler = self._sampler(self._groups, self._tokens, per_pack=self._pairs_per_pack, shuffle=self._shuffle)
        return self._loader(self._batches, sampler)

    def _loader(self, batches: PlannedBatches, sampler: StepSampler) -> StepLoader:
        args = self.args
        workers, prefetch = args.dataloader_num_workers, args.dataloader_prefetch_factor
        return StepLoader(batches, sampler, workers=workers, prefetch=prefetch)

    def _sampler(
        self, groups: Sequence[PromptGroup], tokens: Sequence[GroupTokens], *, per_pack: int, shuffle: bool
    ) -> StepSampler:
        def size(index: int, places: Sequence[int]) -> int:
            used = used_responses([groups[index].pairs[place] for place in places])
            responses = sum(tokens[index].responses[response] for response in used)
            return responses + tokens[index].prompt * (1 if self.layout is pack else len(used))

        return StepSampler(
            [len(group.pairs) for group in groups],
            size,
            pairs_per_step=self._pairs_per_step,
            pairs_per_pack=per_pack,
            tokens_per_pack=self._max_tokens_per_pack,
            shuffle=shuffle,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            rank=rank(),
            world_size=world_size(),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Step], num_batches: int, device: torch.device
    ) -> tuple[list[Step], None]:
        """The next step. There is no count of labels beside it: the mean is over pairs, which a step knows itself."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def training_step(self, model: torch.nn.Module, inputs: Step, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one optimizer step; returns its loss, the mean over the step's pairs.

        Raises:
            DataError: rows became unreadable since the check, and `on_bad_row` is `"error"`, or too many of them, or
                all of this step.
            TrainingError: the loss is not a finite number; names the pairs.
        """
        reports = gather([_Report(inputs.pairs, inputs.lost, self._stop_requested)])
        lost = [finding for report in reports for finding in report.lost]
        self._lost.see(lost)
        pairs_of_step = sum(report.pairs for report in reports)
        if not pairs_of_step:
            raise from_findings(DataError, f"step {self.state.global_step + 1}: none of its pairs can be read", lost)
        if any(report.stop for report in reports):
            self._stopping = True
            self.control.should_save = self.control.should_training_stop = True
        model.train()
        total = torch.zeros((), device=self.args.device)
        # Wrappers average gradients over processes; the mean is over pairs, of which processes have unequal numbers.
        share = world_size() / pairs_of_step
        engine = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        columns: dict[str, list[Any]] = {}
        for place, batch in enumerate(inputs.batches, start=1):
            batch = to_device(batch, self.args.device)
            last = place == len(inputs.batches)
            self.accelerator.gradient_state._set_sync_gradients(last)
            with contextlib.nullcontext() if last or engine else self.accelerator.no_sync(model):
                pairs, terms = self.evaluate_pairs(batch)
                loss = terms.loss.sum() * share
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if engine else {}))
            total += loss.detach()
            extend(columns, pair_columns(batch, pairs, terms))
        self._record(joined(gather([columns])))
        # A warm-up's first update may be made with learning rate 0 and change nothing.
        if any(group["lr"] > 0 for group in self.optimizer.param_groups):
            self._objective.policy_is_reference = False
        return total

    def _record(self, columns: Columns) -> None:
        """Take in the pairs of a step, of all processes. Raises `TrainingError` where a loss is not finite."""
        require_finite(columns)
        self._means.add(columns)
        self._reward_shift.add(columns)
        if is_main():
            length = len(columns["row"])
            visit = {"step": [self.state.global_step + 1] * length, "epoch": [self.state.epoch or 0.0] * length}
            for take in self._on_pairs:
                take({**visit, **columns})

    def evaluate_pairs(self, batch: Batch) -> tuple[PairLogps, LossTerms]:
        """Log-probabilities and loss terms of a batch that lies on the model's device."""
        return self._objective.of_pairs(self.policy, batch, reward_shift=self._reward_shift.value)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and the logged means over the held-out pairs, as `eval_loss`, `eval_rewards/accuracies`, ...

        The benchmark's metrics are beside them.

        Args:
            eval_dataset: not taken; the held-out groups were given to the constructor.
        """
        if not (self._held_out or self._benchmark) or eval_dataset is not None:
            raise ValueError("give the held-out groups to the trainer as eval_dataset")
        found: dict[str, float] = {}
        if self._held_out:
            with contextlib.nullcontext() if self.is_in_train else self._attention_restored():
                self._prepare()
                found |= self._measure_held_out()
        if self._benchmark is not None:
            found |= on_main(self._take_benchmark)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _take_benchmark(self) -> Mapping[str, float]:
        assert self._benchmark is not None
        with self._attention_restored(), self.accelerator.autocast():
            self.policy.set_attention(self._own_attention)
            return self._benchmark(self.policy.plain, self.processing_class, self.state.global_step)

    def _measure_held_out(self) -> dict[str, float]:
        per_pack = self.args.per_device_eval_batch_size
        sampler = self._sampler(self._held_out, self._held_out_tokens, per_pack=per_pack, shuffle=False)
        columns: dict[str, list[Any]] = {}
        for step in self._loader(self._held_out_batches, sampler):
            self._lost.see([finding for lost in gather([step.lost]) for finding in lost])
            for batch in step.batches:
                batch = to_device(batch, self.args.device)
                with self.policy.measuring():
                    pairs, terms = self.evaluate_pairs(batch)
                extend(columns, pair_columns(batch, pairs, terms))
        seen = joined(gather([columns]))
        if not seen:
            raise DataError("none of the held-out rows can be read any more")
        require_finite(seen)
        means = Means()
        means.add(seen)
        return {"loss": sum(seen["loss"]) / len(seen["loss"])} | means.take()

    # --- what is written down ----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all pairs since the last record to what transformers logs."""
        super().log(logs | self._means.take() if "loss" in logs else logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: transformers estimates this from padded token counts, which packs do not have."""
        return 0


@dataclass(frozen=True, slots=True)
class _Report:
    """What each process tells the others before a step: its pairs, rows it lost, and whether it was asked to stop."""

    pairs: int
    lost: list[Finding]
    stop: bool


class _BeforeFirstStep(TrainerCallback):  # type: ignore[misc]
    """Calls back when the model is in its wrapper."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare = prepare

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._prepare()
