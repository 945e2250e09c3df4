"""Features of images on disk, for models whose vision tower and projector do not learn.

A store is a folder of safetensors parts, named by what features depend on besides the prompt: the weights of vision
tower and projector and their arithmetic, the processor, the template and the limits. A record is an encoded prompt with
the features of its images, so that nothing of an image is needed any more, neither its pixels nor their processor.

Where several processes train together, each writes its share of the records and reads them all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from unidpo.batches import lost_rows
from unidpo.encode import EncodedGroup, Encoder
from unidpo.errors import Finding, ImageError, ModelError, UserError
from unidpo.features import ImageFeatures, takes_features, without_pixels
from unidpo.layouts import padded_rows, smallest
from unidpo.models import parts
from unidpo.packs import Pack, PaddedRows, join_vision, to_device, with_features
from unidpo.pairs import PromptGroup
from unidpo.policy import Policy
from unidpo.ranks import gather, is_main, on_main, rank, wait_for_all, world_size
from unidpo.stores import (
    FLUSH_SECONDS,
    UNREADABLE,
    ImageDigests,
    Keys,
    clear_unfinished,
    new_part,
    prompt_key,
    tensors_fingerprint,
)

_LOG = logging.getLogger(__name__)
PASS_IMAGE_TOKENS = 4096
"""Image tokens in one forward of the vision tower."""
PART_BYTES = 256 * 2**20
# What a configuration says beside how images become features.
_NOT_OF_IMAGES = {"text_config", "architectures", "dtype", "transformers_version", "use_cache", "_name_or_path"}


class FeatureStore:
    """Encoded prompts with features of their images by prompt key, in a folder.

    Records are added in memory and reach the disk with `flush`; they are read from it one by one, and nothing is kept.

    Args:
        folder: where the parts lie.
        places: the part that each key is in; looked up on the disk where `None`.
    """

    def __init__(self, folder: Path, places: Mapping[bytes, str] | None = None) -> None:
        self.folder = folder
        self._places: dict[bytes, str] = dict(places or {})
        self._new: dict[str, Tensor] = {}
        self._new_bytes = 0
        self._flushed = time.monotonic()
        if places is None:
            clear_unfinished(folder)
            for part in sorted(folder.glob("part-*.safetensors")):
                with _damage_named(part):
                    self._places.update((bytes.fromhex(key), part.name) for key in _opened(part).names)

    @classmethod
    def shared(cls, folder: Path) -> FeatureStore:
        """In each process a store that knows what the main one finds.

        Raises:
            UserError: a part is damaged, or a process cannot see the folder.
        """
        store = cls(folder, on_main(lambda: cls(folder)._places))
        if not all(gather([all((folder / part).is_file() for part in set(store._places.values()))])):
            raise UserError(f"{folder}: not every process sees this folder; set UNIDPO_CACHE to one that all share")
        return store

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, key: bytes) -> EncodedGroup:
        """The prompt, without responses. Raises `UserError` where its part is damaged."""
        path = self.folder / self._places[key]
        with _damage_named(path):
            part = _opened(path)
            # Copies: a tensor that lies in the mapped file would take all of it along to another process.
            held = {n: part.tensors.get_tensor(f"{key.hex()}.{n}").clone() for n in part.names[key.hex()]}
        return EncodedGroup(
            **{name: held.pop(name) for name in _OF_PROMPT},
            response_ids=(),
            cut_tokens=(),
            features=ImageFeatures.from_tensors(held),
            vision=without_pixels(held),
        )

    def add(self, key: bytes, prompt: EncodedGroup, features: ImageFeatures) -> None:
        """Keep a prompt and the features of its images."""
        for name, tensor in _record(prompt, features).items():
            self._new[f"{key.hex()}.{name}"] = tensor.cpu().clone(memory_format=torch.contiguous_format)
            self._new_bytes += tensor.nbytes
        if self._new_bytes > PART_BYTES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last flush as one part, atomically. Raises `UserError` where it cannot."""
        if self._new:
            try:
                with new_part(self.folder, ".safetensors") as unfinished:
                    save_file(self._new, unfinished)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.folder}: cannot write features of images ({error})") from error
        self._new, self._new_bytes, self._flushed = {}, 0, time.monotonic()


_OF_PROMPT = ("prompt_ids", "position_ids", "mm_token_type_ids")


def _record(prompt: EncodedGroup, features: ImageFeatures) -> dict[str, Tensor]:
    of_prompt = {name: getattr(prompt, name) for name in _OF_PROMPT}
    return of_prompt | without_pixels(prompt.vision) | features.tensors


@dataclass(frozen=True, slots=True)
class _Part:
    """An open part: its tensors, and the names of those of each key."""

    tensors: Any
    names: Mapping[str, list[str]]


@functools.lru_cache(maxsize=1024)
def _opened(path: Path) -> _Part:
    tensors = safe_open(path, framework="pt")
    names = defaultdict(list)
    for name in tensors.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118 (no mapping)
        key, _, rest = name.partition(".")
        names[key].append(rest)
    return _Part(tensors, dict(names))


@contextlib.contextmanager
def _damage_named(part: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{part}: these stored features of images cannot be read ({error}); delete the file, and what it held is "
            "computed again"
        ) from error


def features_folder(cache: Path, fingerprint: str, encoder: Encoder, *, arithmetic: torch.dtype) -> Path:
    """Where the features of a model and an encoder belong.

    Args:
        fingerprint: of the model, see `vision_fingerprint`.
        arithmetic: what else changes the numbers, such as the autocast dtype.
    """
    return cache / "features" / f"{fingerprint}-{encoder.fingerprint()}-{str(arithmetic).removeprefix('torch.')}"


def vision_fingerprint(model: PreTrainedModel) -> str:
    """Hex digits that name vision tower and projector: their weights, buffers and configuration.

    Raises:
        ModelError: they are not known, see `models.parts`.
    """
    found = parts(model)
    of_language = {id(buffer) for buffer in model.get_decoder().buffers()}
    buffers = {name: buffer for name, buffer in model.named_buffers() if id(buffer) not in of_language}
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_OF_IMAGES}
    described = json.dumps(config, sort_keys=True, default=str)
    weights = tensors_fingerprint(dict(found["vision"]) | dict(found["projector"]) | buffers)
    return hashlib.blake2b(f"{weights} {described}".encode(), digest_size=16).hexdigest()


def images_are_frozen(model: PreTrainedModel) -> bool:
    """Whether nothing learns between an image and its features; false where the model's parts are unknown."""
    try:
        found = parts(model)
    except ModelError:
        return False
    return not any(weight.requires_grad for part in ("vision", "projector") for _, weight in found[part])


def features_problem(policy: Policy, batch: Pack | PaddedRows) -> str | None:
    """Why features cannot take the place of the images of a batch, in some process; `None` where they can.

    Every process must call it, with a batch on the model's device.
    """
    problem: str | None = None
    try:
        if not takes_features(policy.plain):
            problem = f"the forward of {type(policy.plain).__name__} takes none"
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


@dataclass(frozen=True)
class FeatureEncoder:
    """Encodes groups with stored features of their images; opens no image.

    Attributes:
        encoder: for what has no images, and for responses.
        digests: of the image files when they were last looked at.
    """

    encoder: Encoder
    store: FeatureStore
    digests: ImageDigests

    def encode(self, group: PromptGroup, responses: Sequence[int] | None = None) -> EncodedGroup:
        """See `Encoder.encode`. Raises `ImageError` where there are no features."""
        if not group.images:
            return self.encoder.encode(group, responses)
        key = prompt_key(group, self.digests)
        if key not in self.store:
            raise ImageError("it could not be read when the features of images were computed")
        return self.encoder.with_responses(self.store[key], group, responses)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt whose features are missing, in a group that has it."""

    key: bytes
    group: PromptGroup


@dataclass(slots=True)
class _Share:
    """What one process does in one step of the pass: prompts encoded, by key, and the rows of those that are lost."""

    encoded: dict[bytes, EncodedGroup] = field(default_factory=dict)
    lost: list[Finding] = field(default_factory=list)
    prompts: int = 0


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
            UserError: the disk has no room for them.
        """
        store = FeatureStore.shared(folder)
        prompts = {key: group for key, group in zip(keys.prompts, groups, strict=True) if group.images}
        prompts.pop(UNREADABLE, None)
        todo = [_Prompt(key, group) for key, group in prompts.items() if key not in store]
        if is_main() and prompts:
            _LOG.info("features of images: %d prompts, %d found in %s", len(prompts), len(prompts) - len(todo), folder)
        if todo:
            self._compute(todo, store, self._tried(todo, folder))
            wait_for_all()  # until each has written its share
            store = FeatureStore.shared(folder)
        return FeatureEncoder(self.encoder, store, keys.digests)

    def _tried(self, todo: Sequence[_Prompt], folder: Path) -> EncodedGroup | None:
        """A small prompt on which features were found right; `None` where none can be read. Sees to room for all."""
        try:
            small = smallest([prompt.group for prompt in todo], self.encoder)
        except ImageError:
            return None
        problem = features_problem(self.policy, to_device(padded_rows(self.encoder)([small]), self.device))
        if problem is None:
            features = self.policy.image_features(to_device(small, self.device).vision)
            tokens = self._image_tokens(small)
            if len(features.pooled) != tokens:
                problem = f"{len(features.pooled)} features of {tokens} image tokens"
            else:
                bytes_per_token = sum(tensor.nbytes for tensor in _record(small, features).values()) / tokens
        if problem is not None:
            raise ModelError(
                f"features of images cannot be stored for this model ({problem}); set data.cache_image_features=false"
            )
        on_main(lambda: self._announce(todo, folder, bytes_per_token))
        return small

    def _announce(self, todo: Sequence[_Prompt], folder: Path, bytes_per_token: float) -> None:
        tokens = 0
        for prompt in todo:
            with contextlib.suppress(ImageError):  # told of in its turn
                tokens += self.encoder.image_tokens(prompt.group)
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
                    if step.lost:
                        self.on_lost(step.lost)
                    done += step.prompts
                self.on_progress(done, len(todo))
        finally:
            store.flush()

    def _step(self, share: _Share | None, store: FeatureStore, stand_in: EncodedGroup | None) -> _Share | None:
        """Compute and keep the features of a share; what is told to the others of it."""
        encoded = {} if share is None else share.encoded
        prompts = list(encoded.values())
        if not prompts and stand_in is not None and world_size() > 1:
            prompts = [stand_in]
        if prompts:
            vision = join_vision([prompt.vision for prompt in prompts])
            features = self.policy.image_features({name: tensor.to(self.device) for name, tensor in vision.items()})
            split = features.split([self._image_tokens(prompt) for prompt in prompts])
            for (key, prompt), own in zip(encoded.items(), split, strict=False):  # nothing is kept of a stand-in
                store.add(key, prompt, own)
        return None if share is None else replace(share, encoded={})

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
