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
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from unidpo.encode import EncodedGroup, Encoder
from unidpo.errors import ImageError, ModelError, UserError
from unidpo.features import ImageFeatures, without_pixels
from unidpo.models import parts
from unidpo.pairs import PromptGroup
from unidpo.ranks import gather, on_main
from unidpo.stores import (
    FLUSH_SECONDS,
    ImageDigests,
    clear_unfinished,
    new_part,
    part_name,
    prompt_key,
    tensors_fingerprint,
)

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
        store._require_seen()
        return store

    def with_those_of_others(self) -> FeatureStore:
        """In each process a store that knows what all have written. Raises `UserError` where one cannot see it."""
        # Told and not looked up: on a network disk a folder may be listed without what others wrote just now.
        told = gather([self._places])
        store = FeatureStore(self.folder, {key: part for places in told for key, part in places.items()})
        store._require_seen()
        return store

    def _require_seen(self) -> None:
        require_seen(self.folder, [self.folder / part for part in set(self._places.values())])

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
        for name, tensor in record(prompt, features).items():
            self._new[f"{key.hex()}.{name}"] = tensor.cpu().clone(memory_format=torch.contiguous_format)
            self._new_bytes += tensor.nbytes
        if self._new_bytes > PART_BYTES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last flush as one part, atomically. Raises `UserError` where it cannot."""
        if self._new:
            part = self.folder / part_name(".safetensors")
            with new_part(part) as unfinished:
                save_file(self._new, unfinished)
            self._places.update((bytes.fromhex(name.partition(".")[0]), part.name) for name in self._new)
        self._new, self._new_bytes, self._flushed = {}, 0, time.monotonic()


def require_seen(folder: Path, paths: Sequence[Path]) -> None:
    """Raise `UserError` in every process where one does not see these paths of a folder."""
    if not all(gather([all(path.exists() for path in paths)])):
        raise UserError(f"{folder}: not every process sees this folder; set UNIDPO_CACHE to one that all share")


_OF_PROMPT = ("prompt_ids", "position_ids", "mm_token_type_ids")


def record(prompt: EncodedGroup, features: ImageFeatures) -> dict[str, Tensor]:
    """What is kept of a prompt."""
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
