"""Features of images on disk, for models whose vision tower and projector are not trained.

A value is an encoded prompt with the features of its images, so that nothing of an image is needed any more, neither
its pixels nor their processor. Where several processes train together, each writes its share and reads all of it.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.filesize import decimal
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unidpo.cache.keys import ImageDigests, Keys, prompt_key
from unidpo.cache.store import DamagedPart, Store, make_folder, part_damage, put_aside
from unidpo.cache.stored_pass import StoredPass, Task
from unidpo.data.pairs import GroupTokens, PromptGroup
from unidpo.distributed import gather, is_main, on_main, rank, world_size
from unidpo.errors import ImageError, ModelError, UserError
from unidpo.files.regular import open_regular
from unidpo.model.encode import EncodedGroup, Encoder
from unidpo.model.features import ImageFeatures, without_pixels
from unidpo.model.lengths import TokenCounter
from unidpo.model.pack_check import features_problem, padded_rows, smallest, usable_tower
from unidpo.model.packs import split_vision
from unidpo.model.tower import Tower
from unidpo.model.transfer import to_device

_LOG = logging.getLogger(__name__)
PART_BYTES = 256 * 2**20
_OF_PROMPT = ("prompt_ids", "position_ids", "mm_token_type_ids")


# --- the store -------------------------------------------------------------------------------------------------------


class FeatureStore(Store[Mapping[str, Tensor], str]):
    """Encoded prompts with features of their images by prompt key, in safetensors; the index says which part has a key.

    Values are read from the disk one by one, and nothing is kept. Each process writes its own.
    """

    kind = "features of images"
    unit = "prompts"
    complaint = "features of images are no finite numbers"
    each_process_writes = True
    _suffix = ".safetensors"

    @classmethod
    def shared(cls, folder: Path, keys: Iterable[bytes]) -> FeatureStore:
        """See `Store.shared`. Every part with one of the keys is read through, each by one process.

        Raises:
            UserError: a process cannot see the folder.
        """
        store = super().shared(folder, keys)
        if store.index:
            store.require_seen()
        parts = sorted(set(store.index.values()))
        problems = {part: part_damage(folder / part) for part in parts[rank() :: world_size()]}
        problems = {part: problem for each in gather([problems]) for part, problem in each.items() if problem}
        for part, problem in problems.items():
            if is_main():
                put_aside(folder / part, problem)
        _reader.cache_clear()  # a part that is written anew may have the name of the one that was put aside
        return cls(folder, {key: part for key, part in store.index.items() if part not in problems})

    def merge(self) -> None:
        """Take in what the other processes have written. Raises `UserError` where one cannot see it."""
        # Gathered, not listed: a network disk may not show yet what others wrote just now.
        self.index = {key: part for index in gather([self.index]) for key, part in index.items()}
        self.require_seen()

    def require_seen(self) -> None:
        """Raise `UserError` in every process where one does not see the parts, or the folder while it is empty."""
        parts = set(self.index.values()) or {"."}
        if not all(gather([all((self.folder / part).exists() for part in parts)])):
            raise UserError(
                f"{self.folder}: not every process sees this folder; set UNIDPO_CACHE to one that all share"
            )

    def __getitem__(self, key: bytes) -> EncodedGroup:
        """The prompt, without responses. Raises `UserError` where its part is gone since the store was made."""
        path = self.folder / self.index[key]
        try:
            # Copies: a tensor that lies in the mapped file would take all of it along to another process.
            held = {name: tensor.clone() for name, tensor in _reader(path)(key.hex()).items()}
        except (OSError, SafetensorError) as error:
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

    def add(self, values: Mapping[bytes, Mapping[str, Tensor]]) -> None:
        for key, value in values.items():
            kept = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in value.items()}
            super().add({key: kept})

    def flush(self) -> Path | None:
        keys = [*self._new]
        part = super().flush()
        if part is not None:
            self.index |= dict.fromkeys(keys, part.name)
        return part

    def problem(self, value: Mapping[str, Tensor]) -> str | None:
        return None if ImageFeatures.from_tensors(value).are_finite else "the features of its images are none"

    def _is_full(self) -> bool:
        return sum(tensor.nbytes for value in self._new.values() for tensor in value.values()) > PART_BYTES

    def _write(self, file: Path) -> None:
        save_file({f"{key.hex()}.{name}": t for key, value in self._new.items() for name, t in value.items()}, file)

    def _read_part(self, part: Path) -> dict[bytes, str]:
        """The keys that a part names, of which nothing else is looked at before they are asked for, see `shared`."""
        try:
            open_regular(part).close()  # safetensors would wait for a pipe
            with safe_open(part, framework="pt") as tensors:
                return {bytes.fromhex(name.partition(".")[0]): part.name for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise DamagedPart(f"cannot be read ({error})") from error


def stored_tensors(prompt: EncodedGroup, features: ImageFeatures) -> dict[str, Tensor]:
    """What is kept of a prompt."""
    return {name: getattr(prompt, name) for name in _OF_PROMPT} | without_pixels(prompt.vision) | features.tensors


@functools.lru_cache(maxsize=1024)
def _reader(part: Path) -> Callable[[str], dict[str, Tensor]]:
    """What reads the tensors of a key, in hex digits, from an open part."""
    tensors = safe_open(part, framework="pt")
    names = {name.partition(".")[2] for name in tensors.keys()}  # type: ignore[no-untyped-call]  # noqa: SIM118
    return lambda key: {name: tensors.get_tensor(f"{key}.{name}") for name in names}  # type: ignore[no-untyped-call]


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


# --- the pass --------------------------------------------------------------------------------------------------------


@dataclass
class FeaturePass(StoredPass[Mapping[str, Tensor]]):
    """Computes the features of all images that a store does not hold yet. Every process must run it.

    The policy's vision tower and projector must not be trained.

    Attributes:
        tower: as for `packs.pack`; found out before the pass.
    """

    encoder: Encoder
    tower: Tower | None = None
    batch_tokens = 4096  # of images, in one forward of the vision tower
    of_responses = False

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
        of_images = [[key] if group.images else [] for group, key in zip(groups, keys.prompts, strict=True)]
        store = FeatureStore.shared(folder, [key for each in of_images for key in each])
        if tasks := self.tasks(groups, of_images, store):
            tried = self._try(tasks, folder)
            self.dummy_group = tried if world_size() > 1 else None
            on_main(lambda: make_folder(folder))
            store.require_seen()
            self.fill(store, tasks)
            store.merge()
        return FeatureEncoder(self.encoder, store, keys.digests)

    def _try(self, tasks: Sequence[Task], folder: Path) -> EncodedGroup | None:
        """A small prompt on which features were right; `None` where none can be read. Requires room for all."""
        small = unreadable = None
        try:
            small = smallest([task.group for task in tasks], self.encoder)
        except ImageError as error:
            unreadable = error
        # Where one process alone sees no image, the others would wait for it in forward passes that it does not make.
        everywhere = gather([unreadable])
        if small is None and all(everywhere):
            return None
        if any(everywhere):
            raise next(filter(None, everywhere))
        assert small is not None
        problem = features_problem(self.policy, to_device(padded_rows(self.encoder)([small]), self.device))
        if problem is None:
            self.tower = usable_tower(self.policy, small, self.device)
            features = self._features([small])
            if len(features.pooled) != self._size(small):
                problem = f"{len(features.pooled)} features of {self._size(small)} image tokens"
        if problem is not None:
            raise ModelError(
                f"features of images cannot be stored for this model ({problem}); set data.cache_image_features=false"
            )
        size = sum(tensor.nbytes for tensor in stored_tensors(small, features).values())
        on_main(lambda: self._require_room(tasks, folder, size / self._size(small)))
        return small

    def _require_room(self, tasks: Sequence[Task], folder: Path, bytes_per_token: float) -> None:
        counted = TokenCounter(self.encoder).count([task.group for task in tasks])
        # Images that cannot be read are named in their turn.
        tokens = sum(sum(each.images) for each in counted if isinstance(each, GroupTokens))
        needed = round(tokens * bytes_per_token)
        free = shutil.disk_usage(next(parent for parent in folder.parents if parent.is_dir())).free
        sizes = f"about {decimal(needed)} for {len(tasks)} prompts, and the disk has {decimal(free)} free"
        if needed > free:
            raise UserError(
                f"{folder}: features of images need {sizes}; free some, set UNIDPO_CACHE to a folder with room, or "
                "data.cache_image_features=false"
            )
        _LOG.info("features of images: they take %s", sizes)

    def _size(self, group: EncodedGroup) -> int:
        return int((group.prompt_ids == getattr(self.policy.plain.config, "image_token_id", -1)).sum())

    def _compute(self, groups: Sequence[EncodedGroup]) -> list[Mapping[str, Tensor]]:
        split = self._features(groups).split([self._size(group) for group in groups])
        return [stored_tensors(group, own) for group, own in zip(groups, split, strict=True)]

    def _features(self, groups: Sequence[EncodedGroup]) -> ImageFeatures:
        vision, on_host = split_vision([group.vision for group in groups], self.tower)
        return self.policy.image_features({**to_device(vision, self.device), **on_host})
