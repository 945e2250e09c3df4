"""Keys of stored numbers: digests of a model's weights, and of what is in a prompt and its responses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unidpo.data.images import content_digest
from unidpo.data.lost_rows import lost_rows
from unidpo.data.pairs import PromptGroup
from unidpo.distributed import whole
from unidpo.errors import Finding, ImageError
from unidpo.model.parts import parameters_by_part

UNREADABLE = b""
"""Stands for the key of what cannot be read any more."""
# What a configuration says beside how images become features.
_NOT_OF_IMAGES = {"text_config", "architectures", "dtype", "transformers_version", "use_cache", "_name_or_path"}


def weights_fingerprint(model: torch.nn.Module) -> str:
    """32 hex digits that name the weights: every parameter and buffer with name, shape, dtype and bytes.

    Buffers that are not saved count too: rotary frequencies change with a setting of the configuration alone.
    """
    return _fingerprint(model.state_dict(keep_vars=True) | dict(model.named_buffers()))


def vision_fingerprint(model: PreTrainedModel) -> str:
    """32 hex digits that name vision tower and projector: their weights, buffers and configuration.

    Raises:
        ModelError: they are not known, see `parts.parameters_by_part`.
    """
    found = parameters_by_part(model)
    of_language = {id(buffer) for buffer in model.get_decoder().buffers()}
    buffers = {name: buffer for name, buffer in model.named_buffers() if id(buffer) not in of_language}
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_OF_IMAGES}
    described = json.dumps(config, sort_keys=True, default=str)
    weights = _fingerprint(dict(found["vision"]) | dict(found["projector"]) | buffers)
    return hashlib.blake2b(f"{weights} {described}".encode(), digest_size=16).hexdigest()


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Of tensors, each with name, shape, dtype and bytes.

    Weights that ZeRO-3 has sharded are brought together one by one; every process must call it then.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        with whole(tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ImageDigests(dict[Path, bytes]):
    """The digests of image files by their contents, see `images.content_digest`; each file is read once."""

    def __missing__(self, path: Path) -> bytes:
        self[path] = content_digest(path)
        return self[path]


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of 16 bytes, group by group.

    Attributes:
        prompts: of each group's messages and image contents; `UNREADABLE` where an image cannot be read any more.
        responses: of each group's prompt with each of its responses, or as many times `UNREADABLE`.
        lost: the rows of the unreadable groups.
        digests: of the images.
    """

    prompts: list[bytes]
    responses: list[list[bytes]]
    lost: list[Finding]
    digests: ImageDigests


def content_keys(groups: Iterable[PromptGroup]) -> Keys:
    """The keys of groups, made of what is in them and not of where it lies."""
    keys = Keys([], [], [], ImageDigests())
    for group in groups:
        try:
            prompt = _prompt_digest(group, keys.digests)
        except ImageError as error:
            keys.lost.extend(lost_rows(group.pairs, error))
            keys.prompts.append(UNREADABLE)
            keys.responses.append([UNREADABLE] * len(group.responses))
            continue
        keys.prompts.append(prompt.digest())
        keys.responses.append([])
        for response in group.responses:
            key = prompt.copy()
            _update(key, "response", response.text)
            keys.responses[-1].append(key.digest())
    return keys


def prompt_key(group: PromptGroup, digests: ImageDigests) -> bytes:
    """One group's key among `Keys.prompts`. Raises `ImageError`."""
    return _prompt_digest(group, digests).digest()


def _prompt_digest(group: PromptGroup, digests: ImageDigests) -> hashlib.blake2b:
    prompt = hashlib.blake2b(digest_size=16)
    for message in group.messages:
        _update(prompt, "role", message.role)
        for part in message.content:
            _update(prompt, *(("text", part) if isinstance(part, str) else ("mark", "")))
    for source in group.images:
        _update(prompt, "image", digests[source] if isinstance(source, Path) else content_digest(source))
    return prompt


def _update(digest: hashlib.blake2b, kind: str, part: str | bytes) -> None:
    # Kind and length come first, so that no two sequences of parts are the same bytes.
    data = part.encode() if isinstance(part, str) else part
    digest.update(f"{kind} {len(data)} ".encode())
    digest.update(data)
