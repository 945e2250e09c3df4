"""What comes before the first step, as one value: packs or rows, attention, features of images, the reference."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments

from unidpo.cache.features import FeaturePass
from unidpo.cache.keys import Keys, content_keys, vision_fingerprint, weights_fingerprint
from unidpo.cache.reference import ReferencePass
from unidpo.cache.store import numbers_folder
from unidpo.config.schema import Compile
from unidpo.data.pairs import PromptGroup
from unidpo.distributed import on_main, rank, world_size
from unidpo.errors import Finding
from unidpo.losses import PreferenceLoss
from unidpo.model.batches import BatchMaker, RefLogps
from unidpo.model.compile_check import choose_compiled
from unidpo.model.encode import EncodedGroup, Encoder, GroupEncoder
from unidpo.model.lengths import Fitted
from unidpo.model.load import load_policy
from unidpo.model.pack_check import BatchForm, choose_batch_form, features_problem, smallest
from unidpo.model.packs import Collate
from unidpo.model.policy import Policy
from unidpo.model.transfer import to_device
from unidpo.training.arguments import obstacle_to_compiling
from unidpo.training.objective import Objective
from unidpo.training.reading import StepReader
from unidpo.training.steps import Dealer, share_tokens
from unidpo.training.trainable import Trainable

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Setup:
    """What a training needs from its first step on.

    Attributes:
        attention: of the language model, by the name transformers knows.
        compiled: whether layers are.
        train, held_out: read the steps to train on and to measure on.
        objective: the loss, with its reference.
    """

    attention: str
    compiled: bool
    train: StepReader
    held_out: StepReader
    objective: Objective


@dataclass(frozen=True, slots=True)
class SetupMaker:
    """Makes a `Setup`; holds what it is made from.

    Attributes:
        loss: from `unidpo.losses`, or another `PreferenceLoss`.
        trainable: the model that is trained.
        encoder: opens images.
        train, held_out: groups to train on and to measure on.
        reference: `"stored"`, `"live"` or a model, see `PreferenceTrainer`; `None` where the loss needs none.
        attention: as for `pack_check.choose_batch_form`.
        compile: as for `compile_check.choose_compiled`.
        max_tokens_per_pack: see `PreferenceTrainer`.
        args: of the training.
        cache: where numbers are stored.
        on_lost: called with rows that cannot be read any more; may raise.
        on_digests: called in every process with the digest of the weights of another reference; may raise.
        on_progress: called in every process with a stage, what is done and what is to do.
    """

    loss: PreferenceLoss
    trainable: Trainable
    encoder: Encoder
    train: Fitted
    held_out: Fitted
    reference: str | None
    attention: str
    compile: Compile
    max_tokens_per_pack: int | None
    args: TrainingArguments
    cache: Path
    on_lost: Callable[[list[Finding]], None]
    on_digests: Callable[[Mapping[str, str]], None]
    on_progress: Callable[[str, int, int], None]

    def setup(self, policy: Policy, *, complete: bool = False) -> Setup:
        """Choose packs or padded rows; compute or find features and reference. Every process must call it.

        The model is left with the attention of the packs, and its layers compiled or not as it will be trained.

        Args:
            policy: in its wrapper, with the weights it came with.
            complete: as for `ReferencePass.logps`, where the policy is the reference.

        Raises:
            UserError: something cannot be used; in every process.
        """
        keys = self._keys()
        encoder: GroupEncoder = self.encoder
        if keys is not None and self.trainable.vision_fingerprint is not None:
            encoder = self._with_features(policy, keys, self.trainable.vision_fingerprint)
        dummy_group = smallest(self.train.groups, encoder)
        form = choose_batch_form(
            policy,
            self.encoder,
            dummy_group,
            attention=self.attention,
            compute_dtype=self._compute_dtype(policy),
            device=self.args.device,
        )
        policy.set_attention(form.attention)
        live_reference = None
        if self.reference == "live" and not policy.has_adapter:
            live_reference = self._beside(policy, copy.deepcopy(policy.plain))
        compiled = choose_compiled(
            policy,
            form.collate([dummy_group]),
            compile=self.compile,
            compute_dtype=self._compute_dtype(policy),
            device=self.args.device,
            obstacle=obstacle_to_compiling(self.args),
        )
        ref_logps, shares_features = None, False
        if live_reference is not None:
            live_reference.set_compiled(compiled)
        if self.reference == "live":
            shares_features = self._can_share_features(policy, dummy_group, form.collate)
        elif self.reference is not None:
            assert keys is not None
            ref_logps = self._ref_logps(policy, keys, encoder, form.collate, complete=complete)
        batches = BatchMaker(self._groups, encoder, form.collate, ref_logps, dummy_group if world_size() > 1 else None)
        own, args = len(self.train.groups), self.args
        return Setup(
            attention=form.attention,
            compiled=compiled,
            train=self._steps(batches.between(0, own), self.train, args.per_device_train_batch_size, form),
            held_out=self._steps(batches.between(own, None), self.held_out, args.per_device_eval_batch_size, form),
            objective=Objective(self.loss, live_reference, shares_features),
        )

    @property
    def _groups(self) -> list[PromptGroup]:
        """All groups, the held-out ones behind those that are trained on."""
        return [*self.train.groups, *self.held_out.groups]

    def _steps(self, batches: BatchMaker, data: Fitted, max_pairs: int, form: BatchForm) -> StepReader:
        return StepReader(
            batches,
            Dealer(max_pairs, self.max_tokens_per_pack, rank(), world_size()),
            share_tokens(data.groups, data.tokens, packs=form.has_packs),
            device=self.args.device,
            workers=self.args.dataloader_num_workers,
            prefetch=self.args.dataloader_prefetch_factor,
            pinned=self.args.dataloader_pin_memory,
        )

    def _compute_dtype(self, policy: Policy) -> torch.dtype:
        compute_dtype = torch.float16 if self.args.fp16 else policy.plain.dtype
        return torch.bfloat16 if self.args.bf16 else compute_dtype

    def _folder(self, policy: Policy, kind: str, fingerprint: str) -> Path:
        """Where numbers are stored."""
        return numbers_folder(self.cache, kind, fingerprint, self.encoder, compute_dtype=self._compute_dtype(policy))

    def _keys(self) -> Keys | None:
        """Of all groups; `None` where nothing is stored by them."""
        if self.trainable.vision_fingerprint is None and self.reference in (None, "live"):
            return None
        keys = on_main(lambda: content_keys(self._groups))
        self.on_lost(keys.lost)
        return keys

    def _with_features(self, policy: Policy, keys: Keys, fingerprint: str) -> GroupEncoder:
        features = FeaturePass(
            policy=policy,
            encoder=self.encoder,
            device=self.args.device,
            workers=self.args.dataloader_num_workers,
            on_lost=self.on_lost,
            on_progress=partial(self.on_progress, "features of images, prompts"),
        )
        with policy.without_adapter():
            return features.run(self._groups, keys, self._folder(policy, "features", fingerprint))

    def _ref_logps(
        self, policy: Policy, keys: Keys, encoder: GroupEncoder, collate: Collate, *, complete: bool
    ) -> RefLogps:
        reference, fingerprint = policy, self.trainable.fingerprint
        if self.reference != "stored":
            model = load_policy(str(self.reference), dtype=policy.plain.dtype)
            fingerprint, complete = weights_fingerprint(model), False
            self.on_digests({"reference": fingerprint})
            reference = self._beside(policy, model)
            vision = self.trainable.vision_fingerprint
            if vision is not None and vision_fingerprint(model) != vision:
                encoder = self.encoder
        reference_pass = ReferencePass(
            policy=reference,
            encoder=encoder,
            collate=collate,
            device=self.args.device,
            dummy_group=smallest(self.train.groups, encoder) if world_size() > 1 else None,
            workers=self.args.dataloader_num_workers,
            on_lost=self.on_lost,
            on_progress=partial(self.on_progress, "reference, responses"),
        )
        folder = self._folder(policy, "reference", fingerprint)
        with policy.without_adapter():
            return reference_pass.logps(self._groups, keys.responses, folder, complete=complete)

    def _can_share_features(self, policy: Policy, dummy_group: EncodedGroup, collate: Collate) -> bool:
        """Whether a live reference and the policy make the same of images and need not make it twice."""
        known = dummy_group.features is not None or not dummy_group.has_images
        if not self.trainable.images_are_frozen or known:
            return False
        problem = features_problem(policy, to_device(collate([dummy_group]), self.args.device))
        if problem is not None:
            _LOG.info("policy and reference each compute the features of images: %s", problem)
        return problem is None

    def _beside(self, policy: Policy, model: PreTrainedModel) -> Policy:
        """A frozen model beside the policy, whole in every process."""
        model = model.to(self.args.device).requires_grad_(False).eval()
        beside = Policy(model, model, policy.autocast)
        beside.set_attention(policy.attention)
        return beside
