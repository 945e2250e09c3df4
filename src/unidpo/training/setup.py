"""What a training needs before its first step: a layout, features of images, and a reference."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from unidpo.cache.feature_pass import FeaturePass, features_problem
from unidpo.cache.feature_store import vision_fingerprint
from unidpo.cache.reference import ReferencePass
from unidpo.cache.store import Keys, content_keys, numbers_folder, weights_fingerprint
from unidpo.config.schema import Attention
from unidpo.data.pairs import PromptGroup
from unidpo.distributed import on_main, world_size
from unidpo.errors import Finding
from unidpo.model.encode import EncodedGroup, Encoder, GroupEncoder
from unidpo.model.load import load_policy
from unidpo.model.pack_check import Choice, choose_layout, smallest
from unidpo.model.packs import Layout, to_device
from unidpo.model.policy import Policy

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a training goes on with.

    Attributes:
        encoder: what encodes its groups, with features of their images where these are kept.
        stand_in: see `batches.PlannedBatches`.
        choice: layout and attention. The model is left with this attention where there is a reference, else its own.
        ref_logps: for each group, those held out last; `None` where no numbers are stored.
        live_reference: a model beside the policy.
        shares_features: whether the live reference and the policy make the same of images.
    """

    encoder: GroupEncoder
    stand_in: EncodedGroup | None
    choice: Choice
    ref_logps: Sequence[Float[Tensor, " _"] | None] | None = None
    live_reference: Policy | None = None
    shares_features: bool = False


@dataclass
class Preparation:
    """Chooses the layout, and sees to features and reference. Every process makes it.

    Attributes:
        policy: in its wrapper, with the weights it came with.
        encoder: opens images.
        groups, held_out: to train on and to measure on.
        reference: `"stored"`, `"live"` or a model, see `PreferenceTrainer`; `None` where the loss needs none.
        attention: as for `pack_check.choose_layout`.
        arithmetic: what the model computes in.
        fingerprint: of the policy's weights without an adapter, for a stored reference.
        vision_fingerprint: of its tower and projector, where features of images are kept on disk.
        images_are_frozen: whether neither of them learns.
        complete: as for `ReferencePass.logps`, where the policy is the reference.
        cache: where numbers are stored.
        workers: processes that read ahead.
        on_lost: told of rows that cannot be read any more; may raise.
        on_reference: told the fingerprint of another model that is the reference; may raise.
        on_feature_progress, on_reference_progress: told what is done and what is to do, in every process.
    """

    policy: Policy
    encoder: Encoder
    groups: Sequence[PromptGroup]
    held_out: Sequence[PromptGroup]
    reference: str | None
    attention: Attention
    arithmetic: torch.dtype
    device: torch.device
    fingerprint: str
    vision_fingerprint: str | None
    images_are_frozen: bool
    complete: bool
    cache: Path
    workers: int
    on_lost: Callable[[list[Finding]], None]
    on_reference: Callable[[str], None]
    on_feature_progress: Callable[[int, int], None]
    on_reference_progress: Callable[[int, int], None]

    def run(self) -> Prepared:
        """All of it. Raises `UserError` where something cannot be used, in every process."""
        keys = self._keys()
        encoder: GroupEncoder = self.encoder
        if keys is not None and self.vision_fingerprint is not None:
            encoder = self._features(keys, self.vision_fingerprint)
        stand_in = smallest(self.groups, encoder)
        choice = choose_layout(
            self.policy,
            self.encoder,
            stand_in,
            attention=self.attention,
            arithmetic=self.arithmetic,
            device=self.device,
        )
        joins = stand_in if world_size() > 1 else None
        if self.reference is None:
            return Prepared(encoder, joins, choice)
        self.policy.set_attention(choice.attention)
        if self.reference != "live":
            assert keys is not None
            return Prepared(encoder, joins, choice, ref_logps=self._ref_logps(keys, encoder, choice.layout))
        beside = None if self.policy.has_adapter else self._beside(copy.deepcopy(self.policy.plain))
        shares = self._can_share_features(stand_in, choice.layout)
        return Prepared(encoder, joins, choice, live_reference=beside, shares_features=shares)

    def _keys(self) -> Keys | None:
        """Of all groups; `None` where nothing is stored by them."""
        if self.vision_fingerprint is None and self.reference in (None, "live"):
            return None
        keys = on_main(lambda: content_keys([*self.groups, *self.held_out]))
        self.on_lost(keys.lost)
        return keys

    def _features(self, keys: Keys, fingerprint: str) -> GroupEncoder:
        features = FeaturePass(
            policy=self.policy,
            encoder=self.encoder,
            device=self.device,
            workers=self.workers,
            on_lost=self.on_lost,
            on_progress=self.on_feature_progress,
        )
        folder = numbers_folder(self.cache, "features", fingerprint, self.encoder, arithmetic=self.arithmetic)
        with self.policy.without_adapter():
            return features.run([*self.groups, *self.held_out], keys, folder)

    def _ref_logps(self, keys: Keys, encoder: GroupEncoder, layout: Layout) -> list[Float[Tensor, " _"] | None]:
        assert self.reference is not None
        policy, fingerprint, complete = self.policy, self.fingerprint, self.complete
        if self.reference != "stored":
            model = load_policy(self.reference, dtype=policy.plain.dtype)
            fingerprint, complete = weights_fingerprint(model), False
            self.on_reference(fingerprint)
            policy = self._beside(model)
            if self.vision_fingerprint is not None and vision_fingerprint(model) != self.vision_fingerprint:
                encoder = self.encoder
        reference = ReferencePass(
            policy=policy,
            encoder=encoder,
            layout=layout,
            device=self.device,
            stand_in=smallest(self.groups, encoder) if world_size() > 1 else None,
            workers=self.workers,
            on_lost=self.on_lost,
            on_progress=self.on_reference_progress,
        )
        folder = numbers_folder(self.cache, "reference", fingerprint, self.encoder, arithmetic=self.arithmetic)
        with self.policy.without_adapter():
            return reference.logps([*self.groups, *self.held_out], keys.responses, folder, complete=complete)

    def _can_share_features(self, stand_in: EncodedGroup, layout: Layout) -> bool:
        """Whether a live reference and the policy make the same of images and need not make it twice."""
        known = stand_in.features is not None or not stand_in.has_images
        if not self.images_are_frozen or known:
            return False
        problem = features_problem(self.policy, to_device(layout([stand_in]), self.device))
        if problem is not None:
            _LOG.info("policy and reference each compute the features of images: %s", problem)
        return problem is None

    def _beside(self, model: PreTrainedModel) -> Policy:
        """A frozen model beside the policy, whole in every process."""
        model = model.to(self.device).requires_grad_(False).eval()
        beside = Policy(model, model, self.policy.autocast)
        beside.set_attention(self.policy.attention)
        return beside
