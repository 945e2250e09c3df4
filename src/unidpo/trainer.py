"""`PreferenceTrainer`: transformers' `Trainer` over packs. Wiring only; the mathematics is in `losses`."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainingArguments

from unidpo.attention import PACK_ATTENTION, PackAttentionError, set_text_attention
from unidpo.batches import Batch, PlannedBatches, Step, StepLoader, StepSampler
from unidpo.encode import EncodedGroup, Encoder, fit_to_length, prompt_positions
from unidpo.errors import DataError, Finding, ModelError, TrainingError, from_findings
from unidpo.logps import response_logps
from unidpo.losses import LossTerms, PairLogps, PreferenceLoss
from unidpo.measures import Columns, Means, pair_columns
from unidpo.models import (
    Part,
    Processor,
    freeze,
    keep_trainable_in_float32,
    load_policy,
    load_processor,
    load_weights,
)
from unidpo.packs import Layout, pack, pad, to_device
from unidpo.pairs import PromptGroup
from unidpo.reference import (
    LogpStore,
    ReferencePass,
    default_cache,
    lookup,
    response_keys,
    store_folder,
    weights_fingerprint,
)

_LOG = logging.getLogger(__name__)
Attention = Literal["auto", "sdpa", "padded"]
# Largest difference between the two paths, in nats per token, that rounding explains, by the type of the arithmetic.
_PATH_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


class PreferenceTrainer(Trainer):  # type: ignore[misc]
    """Train a policy on pairs of responses.

    The global batch is `per_device_train_batch_size * gradient_accumulation_steps` **pairs** and the loss is the mean
    over them, however they fall into forward passes: transformers' loop sees one batch per optimizer step, and
    `training_step` runs its passes. Everything else (optimizer, schedule, checkpoints, callbacks) is `Trainer`'s.

    Args:
        model: a loaded model, or a folder or hub id.
        loss: from `unidpo.losses`, or any other `PreferenceLoss`.
        args: `bf16`/`fp16` switch autocast on; weights that learn are then kept in float32.
        train_dataset: prompt groups, see `load_pairs`.
        eval_dataset: prompt groups to measure on when `args.eval_strategy` says so.
        processing_class: the model's processor or tokenizer; loaded from the model's name where `None`.
        peft_config: train an adapter instead of the model.
        reference: `"stored"` (before the first step the policy is the reference: its log-probabilities are computed
            once, kept on disk, and found there by the next run), `"live"` (a frozen copy runs along), or another model
            by folder or hub id (its log-probabilities are stored).
        frozen: parts of the model that do not learn; without effect where an adapter is trained.
        template, max_length, max_pixels: see `Encoder`.
        attention: `"auto"` packs prompts unless a check before the first step finds that the model's own forward pass
            disagrees; `"sdpa"` insists on packs; `"padded"` never packs.
        shuffle: draw groups in an order made of `args.data_seed` (or `args.seed`) and the epoch; else in file order.
        on_bad_row: what a row that becomes unreadable during training does: stop the run, or be left out and named.
        cache: folder of stored reference log-probabilities, `default_cache()` where `None`.
        callbacks: as `Trainer` takes them.
        on_pairs: called once per optimizer step with the step's pairs, see `measures.pair_columns`.
        on_reference_progress: called with responses done and responses to do.

    Raises:
        DataError: the loss needs scores and some are missing; no prompt fits `max_length`.
        ModelError: the model cannot be used for this.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        loss: PreferenceLoss,
        args: TrainingArguments,
        train_dataset: Sequence[PromptGroup],
        eval_dataset: Sequence[PromptGroup] | None = None,
        processing_class: Processor | None = None,
        peft_config: Any = None,
        reference: str = "stored",
        frozen: Iterable[Part] = ("vision", "projector"),
        template: str | None = None,
        max_length: int = 4096,
        max_pixels: int = 768 * 768,
        attention: Attention = "auto",
        shuffle: bool = True,
        on_bad_row: Literal["error", "skip"] = "error",
        cache: Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        on_pairs: Callable[[Columns], None] | None = None,
        on_reference_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if loss.needs_scores:
            _require_scores([*train_dataset, *(eval_dataset or ())], loss)
        if args.world_size > 1:
            raise ModelError("training on several processes is not supported yet; start one process")
        name = model.name_or_path if isinstance(model, PreTrainedModel) else str(model)
        if not isinstance(model, PreTrainedModel):
            model = load_policy(model)
        processing_class = processing_class or load_processor(name)
        encoder = Encoder(
            processing_class, prompt_positions(model), template=template, max_length=max_length, max_pixels=max_pixels
        )
        groups = fit_to_length(train_dataset, encoder)
        held_out = fit_to_length(eval_dataset, encoder) if eval_dataset else []
        mixed_precision = args.bf16 or args.fp16
        if peft_config is None:
            freeze(model, frozen)
            if mixed_precision:
                keep_trainable_in_float32(model)
        # After a wider type for what learns, in which the numbers round otherwise; before an adapter, without which
        # the reference is computed: runs with and without one share it where the weights' types are the same.
        self._fingerprint = weights_fingerprint(model) if loss.needs_reference and reference == "stored" else ""
        if peft_config is not None:
            model = _with_adapter(model, peft_config, mixed_precision=mixed_precision)

        # transformers' loop accumulates over batches of its loader; here one batch is a whole optimizer step.
        args = copy.copy(args)
        self._pairs_per_pack = args.per_device_train_batch_size
        self._pairs_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        args.gradient_accumulation_steps = 1
        args.remove_unused_columns = False

        self.loss = loss
        self.encoder = encoder
        self.reference = reference
        self.layout: Layout = pack
        self._groups = groups
        self._held_out = held_out
        self._attention: Attention = attention
        self._shuffle = shuffle
        self._on_bad_row = on_bad_row
        self._cache = cache or default_cache()
        self._on_pairs = on_pairs
        self._on_reference_progress = on_reference_progress or (lambda done, total: None)
        self._ref_logps: Sequence[Tensor] | None = None
        self._held_out_ref_logps: Sequence[Tensor] | None = None
        self._live_reference: PreTrainedModel | None = None
        self._prepared = False
        # Until an update has changed the weights, the policy is its own reference: see docs/decisions.
        self._policy_is_reference = reference in ("stored", "live") and _adds_nothing_yet(model)
        self._means = Means()
        self._lost: set[Finding] = set()
        super().__init__(
            model=model,
            args=args,
            train_dataset=groups,
            eval_dataset=held_out or None,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self._own_attention: str = self._plain_model.config.get_text_config()._attn_implementation
        self.model_accepts_loss_kwargs = False

    # --- before the first step -------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Check the paths against each other, see to the reference, then train as `Trainer.train` does.

        The model is left with the attention it came with.
        """
        with self._ready():
            if resume_from_checkpoint:
                self._policy_is_reference = False
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self._lost:
            _LOG.warning("%d rows could not be read any more and were skipped", len(self._lost))
        return output

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        """Layout and reference, seen to once, and the attention that the layout needs; the model's own afterwards.

        An evaluation within the training finds the training's attention and leaves it.
        """
        before = self._plain_model.config.get_text_config()._attn_implementation
        try:
            if not self._prepared:
                self._choose_layout()
                if self.loss.needs_reference:
                    self._prepare_reference()
                self._prepared = True
            set_text_attention(self._plain_model, PACK_ATTENTION if self.layout is pack else self._own_attention)
            yield
        finally:
            set_text_attention(self._plain_model, before)

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
        if isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    @property
    def _plain_model(self) -> PreTrainedModel:
        """The policy without adapter wrapper; its layers still hold the adapter."""
        model = self.model
        return model if isinstance(model, PreTrainedModel) else model.get_base_model()

    def _without_adapter(self) -> contextlib.AbstractContextManager[None]:
        """The model as it was loaded, where an adapter is trained."""
        return contextlib.nullcontext() if isinstance(self.model, PreTrainedModel) else self.model.disable_adapter()

    def _choose_layout(self) -> None:
        """Run both paths on one small group and keep packs if they agree."""
        padded = functools.partial(pad, pad_token_id=self.encoder.tokenizer.pad_token_id or 0)
        if self._attention == "padded":
            self.layout = padded
            return
        group = self.encoder.encode(min(self._groups, key=_size_of_check))
        try:
            difference = self._path_difference(group, padded)
            tolerance = _PATH_TOLERANCE[self._arithmetic]
            problem = (
                None if difference <= tolerance else f"log-probabilities differ by {difference:.2g} nats per token"
            )
        except Exception as error:
            # Whatever a foreign model does not understand about packs, the padded path is the answer.
            problem = str(error) or type(error).__name__
            _LOG.debug("packs failed", exc_info=True)
        if problem is None:
            self.layout = pack
            return
        if self._attention != "auto":
            raise ModelError(
                f"model.attention={self._attention}: packs do not work with this model ({problem}); "
                "set model.attention=padded"
            )
        _LOG.warning("packs do not work with this model (%s); using the slower padded path", problem)
        set_text_attention(self._plain_model, self._own_attention)
        self.layout = padded

    def _path_difference(self, group: EncodedGroup, padded: Layout) -> float:
        """Largest difference between the two paths over a group's responses, in nats per token."""
        config = self._plain_model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise PackAttentionError(f"its attention layers are {', '.join(sorted(kinds))}")
        was_training = self.model.training
        self.model.eval()
        means = []
        for layout, attention in ((padded, self._own_attention), (pack, PACK_ATTENTION)):
            set_text_attention(self._plain_model, attention)
            batch = to_device(layout([group]), self.args.device)
            with torch.no_grad(), self.compute_loss_context_manager():
                means.append(response_logps(self._plain_model, batch) / batch.response_tokens)
        self.model.train(was_training)
        return float((means[0] - means[1]).abs().max())

    @property
    def _arithmetic(self) -> torch.dtype:
        if self.args.bf16:
            return torch.bfloat16
        return torch.float16 if self.args.fp16 else self._plain_model.dtype

    def _prepare_reference(self) -> None:
        if self.reference == "live":
            if isinstance(self.model, PreTrainedModel):
                self._live_reference = copy.deepcopy(self.model).requires_grad_(False).eval()
            return
        model, fingerprint = self._plain_model, self._fingerprint
        if self.reference != "stored":
            model = load_policy(self.reference, dtype=self._plain_model.dtype)
            fingerprint = weights_fingerprint(model)
            model.to(self.args.device)
            if self.layout is pack:
                set_text_attention(model, PACK_ATTENTION)
        arithmetic = str(self._arithmetic).removeprefix("torch.")
        store = LogpStore(store_folder(self._cache, fingerprint, self.encoder, arithmetic=arithmetic))
        keys = response_keys([*self._groups, *self._held_out])
        reference_pass = ReferencePass(
            model=model,
            encoder=self.encoder,
            layout=self.layout,
            store=store,
            autocast=self.compute_loss_context_manager,
            workers=self.args.dataloader_num_workers,
            on_progress=self._on_reference_progress,
        )
        with self._without_adapter():
            counts = reference_pass.run([*self._groups, *self._held_out], keys)
        _LOG.info("reference: %d responses found in %s, %d computed", counts.found, store.folder, counts.computed)
        logps = lookup(store, keys)
        self._ref_logps, self._held_out_ref_logps = logps[: len(self._groups)], logps[len(self._groups) :]

    # --- a step ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Step]:
        """Optimizer steps; see `StepSampler`."""
        sampler = self._sampler(self._groups, per_pack=self._pairs_per_pack, shuffle=self._shuffle)
        return self._loader(PlannedBatches(self._groups, self.encoder, self.layout, self._ref_logps), sampler)

    def _loader(self, batches: PlannedBatches, sampler: StepSampler) -> StepLoader:
        args = self.args
        workers, prefetch = args.dataloader_num_workers, args.dataloader_prefetch_factor
        return StepLoader(batches, sampler, workers=workers, prefetch=prefetch)

    def _sampler(self, groups: Sequence[PromptGroup], *, per_pack: int, shuffle: bool) -> StepSampler:
        return StepSampler(
            [len(group.pairs) for group in groups],
            pairs_per_step=self._pairs_per_step,
            pairs_per_pack=per_pack,
            shuffle=shuffle,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Step], num_batches: int, device: torch.device
    ) -> tuple[list[Step], None]:
        """The next step. There is no count of labels beside it: the mean is over pairs, which a step knows itself."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def training_step(self, model: torch.nn.Module, inputs: Step, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one optimizer step; returns its loss, the mean over the step's pairs.

        Raises:
            DataError: rows became unreadable since the check, and `on_bad_row` is `"error"`.
            TrainingError: the loss is not a finite number; names the pairs.
        """
        self._see_lost(inputs.lost)
        model.train()
        total = torch.zeros((), device=self.args.device)
        columns: dict[str, list[Any]] = defaultdict(list)
        for batch in inputs.batches:
            batch = to_device(batch, self.args.device)
            with self.compute_loss_context_manager():
                pairs, terms = self.evaluate_pairs(batch)
                loss = terms.loss.sum() / inputs.pairs
            self.accelerator.backward(loss)
            total += loss.detach()
            for name, values in pair_columns(batch, pairs, terms).items():
                columns[name] += values
        if not torch.isfinite(total):
            raise _not_a_number(columns)
        if columns:
            self._means.add(columns)
        if columns and self._on_pairs is not None:
            length = len(columns["row"])
            visit = {"step": [self.state.global_step + 1] * length, "epoch": [self.state.epoch or 0.0] * length}
            self._on_pairs(visit | columns)
        # A warm-up's first update may be made with learning rate 0 and change nothing.
        if any(group["lr"] > 0 for group in self.optimizer.param_groups):
            self._policy_is_reference = False
        return total

    def _see_lost(self, lost: Sequence[Finding]) -> None:
        if lost and self._on_bad_row == "error":
            raise from_findings(DataError, f"{len(lost)} rows cannot be read any more", lost)
        for finding in lost:
            if finding not in self._lost:  # once, not in every epoch
                _LOG.warning("skipped: %s", finding)
                self._lost.add(finding)

    def evaluate_pairs(self, batch: Batch) -> tuple[PairLogps, LossTerms]:
        """Log-probabilities and loss terms of a batch that lies on the model's device."""
        pairs = batch.pairs
        logps = response_logps(self._plain_model, batch.responses)
        ref_logps = self._reference_logps(batch, logps) if self.loss.needs_reference else None
        if self.loss.length_normalized:
            logps = logps / batch.responses.response_tokens
            ref_logps = None if ref_logps is None else ref_logps / batch.responses.response_tokens
        seen = PairLogps(
            chosen_logps=logps[pairs.chosen],
            rejected_logps=logps[pairs.rejected],
            ref_chosen_logps=None if ref_logps is None else ref_logps[pairs.chosen],
            ref_rejected_logps=None if ref_logps is None else ref_logps[pairs.rejected],
            chosen_scores=pairs.chosen_scores,
            rejected_scores=pairs.rejected_scores,
        )
        return seen, self.loss(seen)

    def _reference_logps(self, batch: Batch, policy_logps: Tensor) -> Tensor:
        if self._policy_is_reference:
            return policy_logps.detach()
        if batch.ref_logps is not None:
            return batch.ref_logps
        with torch.no_grad():
            if self._live_reference is not None:
                return response_logps(self._live_reference, batch.responses)
            was_training = self.model.training
            self.model.eval()
            with self._without_adapter():
                logps = response_logps(self._plain_model, batch.responses)
            self.model.train(was_training)
            return logps

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss and the logged means over the held-out pairs, as `eval_loss`, `eval_rewards/accuracies`, ...

        Args:
            eval_dataset: not taken; the held-out groups were given to the constructor.
        """
        if not self._held_out or eval_dataset is not None:
            raise ValueError("give the held-out groups to the trainer as eval_dataset")
        with self._ready():
            found = self._measure_held_out()
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in found.items()}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure_held_out(self) -> dict[str, float]:
        sampler = self._sampler(self._held_out, per_pack=self.args.per_device_eval_batch_size, shuffle=False)
        batches = PlannedBatches(self._held_out, self.encoder, self.layout, self._held_out_ref_logps)
        means, losses = Means(), []
        was_training = self.model.training
        self.model.eval()
        for step in self._loader(batches, sampler):
            self._see_lost(step.lost)
            for batch in step.batches:
                batch = to_device(batch, self.args.device)
                with torch.no_grad(), self.compute_loss_context_manager():
                    pairs, terms = self.evaluate_pairs(batch)
                columns = pair_columns(batch, pairs, terms)
                means.add(columns)
                losses += columns["loss"]
        self.model.train(was_training)
        if not losses:
            raise DataError("none of the held-out rows can be read any more")
        return {"loss": sum(losses) / len(losses)} | means.take()

    # --- what is written down ----------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all pairs since the last record to what transformers logs."""
        super().log(logs | self._means.take() if "loss" in logs else logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: transformers estimates this from padded token counts, which packs do not have."""
        return 0


def _with_adapter(model: PreTrainedModel, peft_config: Any, *, mixed_precision: bool) -> torch.nn.Module:
    """The model with an adapter, which alone learns. Raises `ModelError` where it does not fit."""
    from peft import get_peft_model

    try:
        policy: torch.nn.Module = get_peft_model(model, peft_config)
    except ValueError as error:
        raise ModelError(f"this adapter does not fit the model: {' '.join(str(error).split())}") from error
    if mixed_precision:
        keep_trainable_in_float32(policy)
    return policy


def _adds_nothing_yet(policy: torch.nn.Module) -> bool:
    """Whether an adapter, where there is one, leaves the model's output as it was: LoRA begins with B = 0."""
    return not any(p.any() for name, p in policy.named_parameters() if ".lora_B." in name)


def _not_a_number(columns: Columns) -> TrainingError:
    pairs = zip(columns["loss"], columns["file"], columns["row"], strict=True)
    findings = [
        Finding("loss-not-finite", f"the loss of this pair is {loss}", file, row)
        for loss, file, row in pairs
        if not math.isfinite(loss)
    ]
    title = "the loss is not a finite number any more; a smaller train.learning_rate helps most often"
    return from_findings(TrainingError, title, findings)


def _require_scores(groups: Sequence[PromptGroup], loss: PreferenceLoss) -> None:
    findings = [
        Finding("missing-score", f"{type(loss).__name__} needs a score for both responses", pair.file, pair.row)
        for group in groups
        for pair in group.pairs
        if group.score_margin(pair) is None
    ]
    if findings:
        raise from_findings(DataError, f"{len(findings)} pairs have no scores; add them, or use DPO or SimPO", findings)


def _size_of_check(group: PromptGroup) -> tuple[bool, int]:
    """Sorts the group for the check to the front: one with an image, then the least text."""
    text = [message.text for message in group.messages] + [response.text for response in group.responses]
    return not group.images, sum(map(len, text))
