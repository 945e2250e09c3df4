"""What is kept on disk between runs: a folder of parts that appear whole.

A part is written under another name and renamed into place, so that work that is interrupted resumes where it stopped,
and several writers do not meet. Its name is a digest of its bytes, so that damage to any of them is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import pyarrow as pa
import torch
from safetensors import SafetensorError

from unidpo.distributed import is_main, on_main
from unidpo.errors import UserError
from unidpo.files.regular import open_regular
from unidpo.files.writing import clear_unfinished, unfinished_file
from unidpo.model.encode import Encoder

_LOG = logging.getLogger(__name__)
Value = TypeVar("Value")
Entry = TypeVar("Entry")
S = TypeVar("S", bound="Store[Any, Any]")
NUMBERS = 2
"""Names how stored numbers are computed and kept. To be raised whenever code here changes what the same model makes of
the same prompt (encoding, positions, attention, head, features) beyond the rounding between two batches, or what a part
looks like; what was stored before is then computed anew."""
FLUSH_SECONDS = 30.0
"""After this much work, what it gave goes to the disk."""


def default_cache() -> Path:
    """`$UNIDPO_CACHE`, else `~/.cache/unidpo`."""
    return Path(os.environ.get("UNIDPO_CACHE") or Path.home() / ".cache" / "unidpo")


def numbers_folder(cache: Path, kind: str, fingerprint: str, encoder: Encoder, *, compute_dtype: torch.dtype) -> Path:
    """Where the numbers of a model and an encoder belong.

    Args:
        kind: what they are; a folder of the cache.
        fingerprint: of what of the model they depend on, see `keys`.
        compute_dtype: what it computes in, such as the autocast dtype.
    """
    dtype = str(compute_dtype).removeprefix("torch.")
    return cache / kind / f"{fingerprint}-{encoder.fingerprint()}-{dtype}-{NUMBERS}"


class Store(ABC, Generic[Value, Entry]):
    """Values by key, in a folder. They are added in memory, and reach the disk with `flush`, as one part.

    Args:
        folder: where the parts lie.
        index: what is known of each value; read from the disk where `None`.

    Attributes:
        kind, unit: what messages call the values and what each belongs to.
        complaint: how the error begins where `problem` finds something.
        each_process_writes: whether every process adds and writes its own values; else the main one writes for all,
            and all must add the same.
    """

    kind: ClassVar[str]
    unit: ClassVar[str]
    complaint: ClassVar[str]
    each_process_writes: ClassVar[bool]
    _suffix: ClassVar[str]

    def __init__(self, folder: Path, index: Mapping[bytes, Entry] | None = None) -> None:
        self.folder = folder
        self.index: dict[bytes, Entry] = self._read() if index is None else dict(index)
        self._new: dict[bytes, Value] = {}
        self._flushed = time.monotonic()

    @classmethod
    def shared(cls: type[S], folder: Path, keys: Iterable[bytes]) -> S:
        """In each process a store that knows what the main one finds under these keys. Raises `UserError` in all."""

        def found() -> dict[bytes, Any]:
            index = cls(folder).index
            return {key: index[key] for key in keys if key in index}

        return cls(folder, on_main(found))

    def __contains__(self, key: bytes) -> bool:
        return key in self.index

    def __len__(self) -> int:
        return len(self.index)

    def add(self, values: Mapping[bytes, Value]) -> None:
        self._new |= values

    def flush(self) -> Path | None:
        """Write what was added since the last flush as one part, atomically. Raises `UserError` where it cannot."""
        part = None
        if self._new and (self.each_process_writes or is_main()):
            part = write_part(self.folder, self._suffix, self._write)
        self._new.clear()
        self._flushed = time.monotonic()
        return part

    def flush_if_due(self) -> None:
        """Flush where that is long ago, or much was added."""
        if self._is_full() or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    @abstractmethod
    def problem(self, value: Value) -> str | None:
        """Why a value holds no numbers to keep; `None` where it does."""

    @abstractmethod
    def _read_part(self, part: Path) -> Mapping[bytes, Entry]:
        """What is in a part. Raises `DamagedPart`."""

    @abstractmethod
    def _write(self, file: Path) -> None:
        """Write the new values into a file."""

    def _is_full(self) -> bool:
        return False

    def _contradictions(self, parts: Mapping[Path, Mapping[bytes, Entry]]) -> Mapping[Path, str]:
        """Parts that are refused because of others, and why."""
        return {}

    def _read(self) -> dict[bytes, Entry]:
        """What is on disk. Damaged parts are named and put aside."""
        clear_unfinished(self.folder)
        parts: dict[Path, Mapping[bytes, Entry]] = {}
        for part in sorted(self.folder.glob(f"part-*{self._suffix}")):
            try:
                parts[part] = self._read_part(part)
            except DamagedPart as error:
                put_aside(part, error)
        for part, problem in self._contradictions(parts).items():
            put_aside(part, problem)
            del parts[part]
        return {key: entry for entries in parts.values() for key, entry in entries.items()}


def make_folder(folder: Path) -> None:
    """Make a folder where there is none. Raises `UserError` where it cannot be made."""
    with _writing_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_part(folder: Path, suffix: str, write: Callable[[Path], object]) -> Path:
    """Let `write` make a file, which becomes a part of the folder, whole, or does not appear at all.

    Returns:
        The part. A digest of its bytes is its name, see `part_damage`.

    Raises:
        UserError: it cannot be written.
    """
    make_folder(folder)
    with _writing_errors(folder), unfinished_file(folder) as unfinished:
        write(unfinished)
        return unfinished.replace(folder / f"part-{_digest(unfinished)}{suffix}")


class DamagedPart(Exception):
    """A part that cannot be used; the message says what is wrong with it."""


def part_damage(part: Path) -> str | None:
    """Why a part is not what was written into its folder, byte for byte; `None` where it is. Reads all of it."""
    try:
        if part.stem != f"part-{_digest(part)}":
            return "is damaged: its bytes are not those that were written into this folder"
    except OSError as error:
        return f"cannot be read ({error})"
    return None


def put_aside(part: Path, problem: object) -> None:
    """Say why a part cannot be used, and rename it, so that it is not found again."""
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
def _writing_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    # safetensors and Arrow have words of their own for a full disk.
    except (OSError, SafetensorError, pa.ArrowException) as error:
        raise UserError(
            f"{folder}: cannot be written ({' '.join(str(error).split())}); free some space, or set UNIDPO_CACHE to a "
            "folder with room; what lies there already is kept"
        ) from error
