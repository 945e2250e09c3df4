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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Integer, jaxtyped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from unidpo.cache.store import (
    FLUSH_SECONDS,
    DamagedPart,
    ImageDigests,
    clear_unfinished,
    prompt_key,
    put_aside,
    require_undamaged,
    tensors_fingerprint,
    write_part,
)
from unidpo.data.pairs import PromptGroup
from unidpo.distributed import gather, is_main, on_main, rank, world_size
from unidpo.errors import ImageError, ModelError, UserError
from unidpo.files.regular import open_regular
from unidpo.model.encode import EncodedGroup, Encoder
from unidpo.model.features import ImageFeatures, without_pixels
from unidpo.model.load import parts

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
                try:
                    self._places |= dict.fromkeys(_keys_in(part), part.name)
                except DamagedPart as damage:
                    put_aside(part, damage)

    @classmethod
    def shared(cls, folder: Path, keys: Collection[bytes]) -> FeatureStore:
        """In each process a store that knows what the main one finds of these keys.

        Every part with one of them is read through, each by one process. Damaged ones are named and put aside.

        Raises:
            UserError: a process cannot see the folder.
        """
        found = on_main(lambda: cls(folder)._places)
        store = cls(folder, {key: part for key, part in found.items() if key in keys})
        store._require_seen()
        if parts := sorted(set(store._places.values())):
            problems = {part: _problem(folder / part) for part in parts[rank() :: world_size()]}
            problems = {part: problem for those in gather([problems]) for part, problem in those.items()}
            for part, problem in problems.items():
                if problem is not None and is_main():
                    put_aside(folder / part, problem)
            store = cls(folder, {key: part for key, part in store._places.items() if problems[part] is None})
        _opened.cache_clear()  # a part that is written anew may have the name of the one that was put aside
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
        """The prompt, without responses. Raises `UserError` where its part is gone since the store was made."""
        path = self.folder / self._places[key]
        try:
            # Copies: a tensor that lies in the mapped file would take all of it along to another process.
            held = {name: tensor.clone() for name, tensor in _opened(path).record(key.hex()).items()}
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"{path}: these stored features of images cannot be read any more ({error}); start the run again, and "
                "they are computed anew"
            ) from error
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
            part = write_part(self.folder, ".safetensors", lambda unfinished: save_file(self._new, unfinished))
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


_KINDS: Mapping[str, Any] = {
    "prompt_ids": Int64[Tensor, " prompt"],
    "position_ids": Int64[Tensor, "axes prompt"],
    "mm_token_type_ids": Integer[Tensor, " prompt"],
    "pooled": Float[Tensor, "tokens hidden"],
    "deepstack": Float[Tensor, "layers tokens hidden"],
    "listed": Bool[Tensor, ""],
}
"""Types and shapes of a record's tensors; how images lie is beside them, as each model says it."""


@dataclass(frozen=True, slots=True)
class _Part:
    """An open part: its tensors, and the names of those of each key, which is in hex digits."""

    tensors: Any
    names: Mapping[str, list[str]]

    def record(self, key: str) -> dict[str, Tensor]:
        return {name: self.tensors.get_tensor(f"{key}.{name}") for name in self.names[key]}


def _open(path: Path) -> _Part:
    tensors = safe_open(path, framework="pt")
    names = defaultdict(list)
    for name in tensors.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118 (no mapping)
        key, _, rest = name.partition(".")
        names[key].append(rest)
    return _Part(tensors, dict(names))


_opened = functools.lru_cache(maxsize=1024)(_open)


def _keys_in(part: Path) -> list[bytes]:
    """The keys that a part names, of which nothing else is looked at. Raises `DamagedPart`."""
    with _damage_said():
        open_regular(part).close()  # safetensors would wait for a pipe
        return [bytes.fromhex(key) for key in _open(part).names]


def _problem(part: Path) -> str | None:
    """What is wrong with a part, all of which is read; `None` where nothing is."""
    try:
        require_undamaged(part)
        with _damage_said():
            opened = _open(part)
            for key in opened.names:
                _require_record(opened.record(key))
    except DamagedPart as damage:
        return str(damage)
    return None


def _require_record(tensors: Mapping[str, Tensor]) -> None:
    """Raise `DamagedPart` where tensors are not those of a prompt, of their types and shapes, or no finite numbers."""
    if missing := {*_KINDS} - {"deepstack"} - {*tensors}:
        raise DamagedPart(f"has no `{min(missing)}` for one of its prompts")
    with jaxtyped("context"):  # in which equal names of axes are equal lengths
        for name in {*_KINDS} & {*tensors}:
            if not isinstance(tensors[name], _KINDS[name]):
                found = f"{tensors[name].dtype} {tuple(tensors[name].shape)}"
                raise DamagedPart(f"holds a `{name}` of another type or shape than it must have ({found})")
    if not ImageFeatures.from_tensors(tensors).are_finite:
        raise DamagedPart("holds features that are no finite numbers")


@contextlib.contextmanager
def _damage_said() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, ValueError) as error:
        raise DamagedPart(f"cannot be read ({error})") from error


def vision_fingerprint(model: PreTrainedModel) -> str:
    """Hex digits that name vision tower and projector: their weights, buffers and configuration.

    Raises:
        ModelError: they are not known, see `load.parts`.
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
