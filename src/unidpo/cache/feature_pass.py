"""The pass that computes the features of all images once and stores them, see `feature_store`."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from torch.utils.data import DataLoader

from unidpo.cache.feature_store import FeatureEncoder, FeatureStore, record, require_seen
from unidpo.cache.store import UNREADABLE, Keys, make_folder
from unidpo.data.lost_rows import lost_rows
from unidpo.data.pairs import Pair, PromptGroup
from unidpo.distributed import gather, is_main, on_main, rank, world_size
from unidpo.errors import Finding, ImageError, ModelError, UserError, from_findings
from unidpo.model.encode import EncodedGroup, Encoder
from unidpo.model.features import ImageFeatures, takes_features
from unidpo.model.lengths import GroupTokens, TokenCounter
from unidpo.model.pack_check import padded_rows, smallest
from unidpo.model.packs import Pack, PaddedRows, join_vision, to_device, with_features
from unidpo.model.policy import Policy

_LOG = logging.getLogger(__name__)
PASS_IMAGE_TOKENS = 4096
"""Image tokens in one forward of the vision tower."""
_NOT_FINITE = (
    "features of images are no finite numbers: weights of vision tower or projector are none, or they overflow in "
    "model.dtype; look at the model, or set model.dtype=bfloat16 or float32"
)


def features_problem(policy: Policy, batch: Pack | PaddedRows) -> str | None:
    """Why features cannot take the place of the images of a batch, in some process; `None` where they can.

    Every process must call it, with a batch on the model's device.
    """
    problem: str | None = None
    try:
        if not takes_features(policy.plain):
            problem = (
                f"the forward of {type(policy.plain).__name__} takes none in transformers {transformers.__version__}"
            )
        else:
            features = policy.image_features(batch.vision)
            with policy.measuring():
                expected = policy.response_logps(batch)
                found = policy.response_logps(with_features(batch, features))
            if not torch.allclose(found, expected, rtol=1e-4):
                problem = f"log-probabilities differ by {float((found - expected).abs().max()):.2g} nats"
    except Exception as error:
        # What a foreign model makes of its images is its own affair.
        problem = str(error) or type(error).__name__
        _LOG.debug("features of images failed", exc_info=True)
    return next(filter(None, gather([problem])), None)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt whose features are missing, in a group that has it."""

    key: bytes
    group: PromptGroup


@dataclass(slots=True)
class _Share:
    """What one process does in one step of the pass: prompts encoded, with their pairs, by key; and rows that are lost.

    `problem` is why it cannot go on.
    """

    encoded: dict[bytes, EncodedGroup] = field(default_factory=dict)
    pairs: dict[bytes, Sequence[Pair]] = field(default_factory=dict)
    lost: list[Finding] = field(default_factory=list)
    prompts: int = 0
    problem: UserError | None = None


@dataclass
class FeaturePass:
    """Computes the features of all images that a store does not hold yet. Every process makes it.

    Attributes:
        policy: whose features; its vision tower and projector must not learn.
        device: where batches go.
        workers: processes that decode images ahead of the model.
        on_lost: told of rows that cannot be read any more; may raise.
        on_progress: told prompts done and prompts to do, over all processes.
    """

    policy: Policy
    encoder: Encoder
    device: torch.device
    workers: int = 0
    on_lost: Callable[[list[Finding]], None] = field(default=lambda findings: None)
    on_progress: Callable[[int, int], None] = field(default=lambda done, total: None)

    def run(self, groups: Sequence[PromptGroup], keys: Keys, folder: Path) -> FeatureEncoder:
        """Compute what is missing in a folder. What was computed before an interruption is kept.

        Args:
            keys: of the groups.

        Returns:
            An encoder that has all of it.

        Raises:
            ModelError: the model takes no features.
            UserError: the disk has no room for them, or a process sees neither it nor the images.
        """
        prompts = {key: group for key, group in zip(keys.prompts, groups, strict=True) if group.images}
        prompts.pop(UNREADABLE, None)
        store = FeatureStore.shared(folder, prompts)
        todo = [_Prompt(key, group) for key, group in prompts.items() if key not in store]
        if is_main() and prompts:
            _LOG.info("features of images: %d prompts, %d found in %s", len(prompts), len(prompts) - len(todo), folder)
        if todo:
            stand_in = self._tried(todo, folder)
            on_main(lambda: make_folder(folder))
            require_seen(folder, [folder])
            self._compute(todo, store, stand_in)
            store = store.with_those_of_others()
        return FeatureEncoder(self.encoder, store, keys.digests)

    def _tried(self, todo: Sequence[_Prompt], folder: Path) -> EncodedGroup | None:
        """A small prompt on which features were found right; `None` where none can be read. Sees to room for all."""
        small = unreadable = None
        try:
            small = smallest([prompt.group for prompt in todo], self.encoder)
        except ImageError as error:
            unreadable = error
        # Where one process alone sees no image, the others would wait for it in passes that it does not make.
        everywhere = gather([unreadable])
        if small is None and all(everywhere):
            return None
        if any(everywhere):
            raise next(filter(None, everywhere))
        assert small is not None
        problem = features_problem(self.policy, to_device(padded_rows(self.encoder)([small]), self.device))
        if problem is None:
            features = self.policy.image_features(to_device(small, self.device).vision)
            tokens = self._image_tokens(small)
            if len(features.pooled) != tokens:
                problem = f"{len(features.pooled)} features of {tokens} image tokens"
            else:
                bytes_per_token = sum(tensor.nbytes for tensor in record(small, features).values()) / tokens
        if problem is not None:
            raise ModelError(
                f"features of images cannot be stored for this model ({problem}); set data.cache_image_features=false"
            )
        on_main(lambda: self._announce(todo, folder, bytes_per_token))
        return small

    def _announce(self, todo: Sequence[_Prompt], folder: Path, bytes_per_token: float) -> None:
        counted = TokenCounter(self.encoder).count([prompt.group for prompt in todo])
        # Images that cannot be read are told of in their turn.
        tokens = sum(sum(each.images) for each in counted if isinstance(each, GroupTokens))
        needed = tokens * bytes_per_token
        free = shutil.disk_usage(next(parent for parent in folder.parents if parent.is_dir())).free
        sizes = f"about {_size(needed)} for {len(todo)} prompts, and the disk has {_size(free)} free"
        if needed > free:
            raise UserError(
                f"{folder}: features of images need {sizes}; free some, set UNIDPO_CACHE to a folder with room, or "
                "data.cache_image_features=false"
            )
        _LOG.info("features of images: they take %s", sizes)

    def _compute(self, todo: Sequence[_Prompt], store: FeatureStore, stand_in: EncodedGroup | None) -> None:
        done = 0
        mine = self._shares(todo[rank() :: world_size()])
        try:
            self.on_progress(0, len(todo))
            # Processes whose share is done go on with the others, whose passes need them.
            while any(steps := gather([self._step(next(mine, None), store, stand_in)])):
                for step in filter(None, steps):
                    if step.problem is not None:
                        raise step.problem
                    if step.lost:
                        self.on_lost(step.lost)
                    done += step.prompts
                self.on_progress(done, len(todo))
        finally:
            store.flush()  # what an interruption leaves

    def _step(self, share: _Share | None, store: FeatureStore, stand_in: EncodedGroup | None) -> _Share | None:
        """Compute and keep the features of a share; what is told to the others of it."""
        encoded = {} if share is None else share.encoded
        prompts = list(encoded.values())
        if not prompts and stand_in is not None and world_size() > 1:
            prompts = [stand_in]
        own: list[ImageFeatures] = []
        if prompts:
            vision = join_vision([prompt.vision for prompt in prompts])
            features = self.policy.image_features({name: tensor.to(self.device) for name, tensor in vision.items()})
            own = features.split([self._image_tokens(prompt) for prompt in prompts])
        wrong = [key for key, its in zip(encoded, own, strict=False) if not its.are_finite]
        if wrong and share is not None:
            why = ModelError("the features of its images are none")
            findings = [finding for key in wrong for finding in lost_rows(share.pairs[key], why)]
            return _Share(problem=from_findings(ModelError, _NOT_FINITE, findings))
        try:
            for (key, prompt), its in zip(encoded.items(), own, strict=False):  # nothing is kept of a stand-in
                store.add(key, prompt, its)
            if share is None:
                store.flush()
        except UserError as error:  # stops all processes with one message
            return _Share(problem=error)
        return None if share is None else replace(share, encoded={}, pairs={})

    def _shares(self, todo: Sequence[_Prompt]) -> Iterator[_Share]:
        """Encoded prompts with up to `PASS_IMAGE_TOKENS` image tokens together, at least one."""
        loader: DataLoader[EncodedGroup | UserError] = DataLoader(
            todo,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=self._encode,  # type: ignore[arg-type]
            num_workers=self.workers,
        )
        share, tokens = _Share(), 0
        for encoded, prompt in zip(loader, todo, strict=True):
            if isinstance(encoded, UserError):
                share.lost += lost_rows(prompt.group.pairs, encoded)
                share.prompts += 1
                continue
            size = self._image_tokens(encoded)
            if share.encoded and tokens + size > PASS_IMAGE_TOKENS:
                yield share
                share, tokens = _Share(), 0
            share.encoded[prompt.key] = encoded
            share.pairs[prompt.key] = prompt.group.pairs
            share.prompts += 1
            tokens += size
        if share.prompts:
            yield share

    def _image_tokens(self, prompt: EncodedGroup) -> int:
        return int((prompt.prompt_ids == getattr(self.policy.plain.config, "image_token_id", -1)).sum())

    def _encode(self, prompt: _Prompt) -> EncodedGroup | UserError:
        # An exception would lose its findings on the way out of a worker.
        try:
            return self.encoder.encode(prompt.group, ())
        except UserError as error:
            return error


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
