"""What is kept on disk between runs: where, under which keys, and in parts that appear whole.

A part is written under another name and renamed into place, so that work that is interrupted goes on where it stopped,
and several writers do not meet. Its name is a digest of its bytes, so that damage to any of them is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch
from safetensors import SafetensorError
from torch import Tensor

from unidpo.data.images import content_digest
from unidpo.data.lost_rows import lost_rows
from unidpo.data.pairs import ImageSource, PromptGroup
from unidpo.distributed import whole
from unidpo.errors import Finding, ImageError, UserError
from unidpo.files.regular import open_regular
from unidpo.model.encode import Encoder

_LOG = logging.getLogger(__name__)
NUMBERS = 2
"""Names how stored numbers are computed and kept. To be raised whenever code here changes what the same model makes of
the same prompt (encoding, positions, attention, head, features) beyond the rounding between two batches, or what a part
looks like; what was stored before is then computed anew."""
FLUSH_SECONDS = 30.0
"""After this much work, what it gave goes to the disk."""
UNREADABLE = b""
"""Stands for the key of what cannot be read any more."""


def default_cache() -> Path:
    """`$UNIDPO_CACHE`, else `~/.cache/unidpo`."""
    return Path(os.environ.get("UNIDPO_CACHE") or Path.home() / ".cache" / "unidpo")


def numbers_folder(cache: Path, kind: str, fingerprint: str, encoder: Encoder, *, arithmetic: torch.dtype) -> Path:
    """Where the numbers of a model and an encoder belong.

    Args:
        kind: what they are; a folder of the cache.
        fingerprint: of what of the model they depend on, see `weights_fingerprint`.
        arithmetic: what it computes in, such as the autocast dtype.
    """
    dtype = str(arithmetic).removeprefix("torch.")
    return cache / kind / f"{fingerprint}-{encoder.fingerprint()}-{dtype}-{NUMBERS}"


def make_folder(folder: Path) -> None:
    """See that it is there. Raises `UserError` where it cannot be made."""
    with _said(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_part(folder: Path, suffix: str, write: Callable[[Path], None]) -> Path:
    """Let `write` make a file, which becomes a part of the folder, whole, or does not appear at all.

    Returns:
        The part. A digest of its bytes is its name, see `require_undamaged`.

    Raises:
        UserError: it cannot be written.
    """
    make_folder(folder)
    unfinished = folder / f".{platform.node()}-{os.getpid()}-{uuid.uuid4().hex}.tmp"
    try:
        with _said(folder):
            write(unfinished)
            part = folder / f"part-{_digest(unfinished)}{suffix}"
            unfinished.replace(part)
    finally:
        unfinished.unlink(missing_ok=True)
    return part


class DamagedPart(Exception):
    """A part that cannot be used; the message says what is wrong with it."""


def require_undamaged(part: Path) -> None:
    """Raise `DamagedPart` where a part is not what was written into its folder, byte for byte. Reads all of it."""
    try:
        if part.stem != f"part-{_digest(part)}":
            raise DamagedPart("is damaged: its bytes are not those that were written into this folder")
    except OSError as error:
        raise DamagedPart(f"cannot be read ({error})") from error


def put_aside(part: Path, problem: object) -> None:
    """Say why a part cannot be used, and see that it is not found again."""
    aside = part.with_name(f"{part.name}.damaged")
    try:
        part.replace(aside)
        done = f"put aside as {aside.name}"
    except OSError as error:
        done = f"left out, and cannot be renamed ({error})"
    _LOG.warning("%s: %s; %s, and what this run needs of it is computed anew", part, problem, done)


def _digest(part: Path) -> str:
    """Of a file's bytes and its folder's name: a part of another model, copied here, has another one."""
    with open_regular(part) as file:
        start = part.parent.name.encode()
        return hashlib.file_digest(file, lambda: hashlib.blake2b(start, digest_size=16)).hexdigest()


@contextlib.contextmanager
def _said(folder: Path) -> Iterator[None]:
    try:
        yield
    # safetensors and Arrow have words of their own for a full disk.
    except (OSError, SafetensorError, pa.ArrowException) as error:
        raise UserError(
            f"{folder}: cannot be written ({' '.join(str(error).split())}); free some space, or set UNIDPO_CACHE to a "
            "folder with room; what lies there already is kept"
        ) from error


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes of this machine were writing; others may be writing now."""
    for path in folder.glob(f".{platform.node()}-*.tmp"):
        if not _is_alive(int(path.name.removeprefix(f".{platform.node()}-").partition("-")[0])):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def weights_fingerprint(model: torch.nn.Module) -> str:
    """32 hex digits that name the weights: every parameter and buffer with name, shape, dtype and bytes.

    Buffers that are not saved count too: rotary frequencies change with a setting of the configuration alone.
    """
    return tensors_fingerprint(model.state_dict(keep_vars=True) | dict(model.named_buffers()))


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """32 hex digits that name tensors: each with name, shape, dtype and bytes.

    Weights that ZeRO-3 has spread over processes are brought together one by one; every process must call it then.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        with whole(tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class ImageDigests:
    """The digests of images by their contents; each file is read once.

    Attributes:
        of_files: of those that were read.
    """

    of_files: dict[Path, bytes] = field(default_factory=dict)

    def __call__(self, source: ImageSource) -> bytes:
        """See `images.content_digest`."""
        if not isinstance(source, Path):
            return content_digest(source)
        if source not in self.of_files:
            self.of_files[source] = content_digest(source)
        return self.of_files[source]


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
        _update(prompt, "image", digests(source))
    return prompt


def _update(digest: hashlib.blake2b, kind: str, part: str | bytes) -> None:
    # Kind and length come first, so that no two sequences of parts are the same bytes.
    data = part.encode() if isinstance(part, str) else part
    digest.update(f"{kind} {len(data)} ".encode())
    digest.update(data)
