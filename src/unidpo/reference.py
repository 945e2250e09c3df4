"""The reference as stored numbers: one log-probability per response, computed once and kept on disk.

A store is a folder of Parquet parts, named by what the numbers depend on besides the response itself: the model's
weights and arithmetic, the processor, the template and the limits. Parts are written whole and renamed into place,
so a pass that is interrupted goes on where it stopped, and several writers do not meet.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from unidpo.encode import EncodedGroup, Encoder
from unidpo.errors import ImageError, UserError
from unidpo.images import content_digest
from unidpo.logps import response_logps
from unidpo.packs import Layout, to_device
from unidpo.pairs import ImageSource, PromptGroup

FLUSH_SECONDS = 30.0
PASS_TOKENS = 8192
"""Tokens in one forward of the reference pass; without gradients this is small beside a training step."""

_SCHEMA = pa.schema([("key", pa.binary(16)), ("logp", pa.float64()), ("tokens", pa.int32())])


def default_cache() -> Path:
    """`$UNIDPO_CACHE`, else `~/.cache/unidpo`."""
    return Path(os.environ.get("UNIDPO_CACHE") or Path.home() / ".cache" / "unidpo")


class LogpStore:
    """Log-probabilities (nats, summed over the response's tokens) by response key, in a folder.

    Numbers are added in memory and reach the disk with `flush`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._logps: dict[bytes, float] = {}
        self._new: dict[bytes, tuple[float, int]] = {}
        self.reload()

    def reload(self) -> None:
        """Take in what is on disk; parts that other writers added included.

        Raises:
            UserError: a part is damaged.
        """
        for part in sorted(self.folder.glob("part-*.parquet")):
            try:
                table = pq.read_table(part, columns=["key", "logp"])
            except (OSError, pa.ArrowException) as error:
                reason = " ".join(str(error).split())[-200:]
                raise UserError(
                    f"{part}: these stored reference log-probabilities cannot be read ({reason}); delete the file, "
                    "and what it held is computed again"
                ) from error
            self._logps.update(zip(table["key"].to_pylist(), table["logp"].to_pylist(), strict=True))

    def __contains__(self, key: bytes) -> bool:
        return key in self._logps

    def __getitem__(self, key: bytes) -> float:
        return self._logps[key]

    def __len__(self) -> int:
        return len(self._logps)

    def add(self, key: bytes, logp: float, tokens: int) -> None:
        self._logps[key] = logp
        self._new[key] = (logp, tokens)

    def flush(self) -> None:
        """Write what was added since the last flush as one part, atomically."""
        if not self._new:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = [{"key": key, "logp": logp, "tokens": tokens} for key, (logp, tokens) in self._new.items()]
        name = uuid.uuid4().hex
        unfinished = self.folder / f".{name}.tmp"
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), unfinished)
        unfinished.replace(self.folder / f"part-{name}.parquet")
        self._new.clear()


def store_folder(cache: Path, fingerprint: str, encoder: Encoder, *, arithmetic: str) -> Path:
    """Where the numbers of a model and an encoder belong.

    Args:
        fingerprint: of the model, see `weights_fingerprint`.
        arithmetic: what else changes the numbers, such as the autocast dtype.
    """
    return cache / "reference" / f"{fingerprint}-{encoder.fingerprint()}-{arithmetic}"


def weights_fingerprint(model: torch.nn.Module) -> str:
    """32 hex digits that name the weights: every parameter and buffer with name, shape, dtype and bytes.

    Buffers that are not saved count too: rotary frequencies change with a setting of the configuration alone.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted((model.state_dict() | dict(model.named_buffers())).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def response_keys(groups: Iterable[PromptGroup]) -> list[list[bytes]]:
    """For each group the 16-byte keys of its responses, made of prompt, image contents and response text.

    Each distinct image file is read once. Raises `ImageError` where one cannot be read.
    """
    digests: dict[Path | bytes, bytes] = {}

    def image_digest(source: ImageSource) -> bytes:
        if not isinstance(source, (Path, bytes)):
            return content_digest(source)
        if source not in digests:
            digests[source] = content_digest(source)
        return digests[source]

    keys: list[list[bytes]] = []
    for group in groups:
        prompt = hashlib.blake2b(digest_size=16)
        for message in group.messages:
            _update(prompt, "role", message.role)
            for part in message.content:
                _update(prompt, *(("text", part) if isinstance(part, str) else ("mark", "")))
        for source in group.images:
            try:
                _update(prompt, "image", image_digest(source))
            except ImageError as error:
                raise ImageError(f"row {group.pairs[0].row}: {error}", findings=error.findings) from error
        keys.append([])
        for response in group.responses:
            key = prompt.copy()
            _update(key, "response", response.text)
            keys[-1].append(key.digest())
    return keys


@dataclass(frozen=True, slots=True)
class PassCounts:
    """What a reference pass did, in distinct responses."""

    found: int
    computed: int


@dataclass(frozen=True, slots=True)
class _Missing:
    """The responses of a group whose numbers are missing: their indices and keys."""

    group: PromptGroup
    responses: list[int]
    keys: list[bytes]


@dataclass
class ReferencePass:
    """Fill a store with the log-probabilities of all responses it does not hold yet.

    Attributes:
        model: the reference; run in eval mode without gradients and put back into the mode it was in.
        layout: how encoded groups become a batch, `packs.pack` or the padded path.
        autocast: a fresh context for each forward.
        workers: processes that decode images and tokenize ahead of the model.
    """

    model: PreTrainedModel
    encoder: Encoder
    layout: Layout
    store: LogpStore
    autocast: Callable[[], AbstractContextManager[object]]
    workers: int = 0
    on_progress: Callable[[int, int], None] = field(default=lambda done, total: None)

    def run(self, groups: Sequence[PromptGroup], keys: Sequence[Sequence[bytes]]) -> PassCounts:
        """Compute what is missing. What was computed before an interruption is kept."""
        todo: list[_Missing] = []
        seen: set[bytes] = set()
        for group, group_keys in zip(groups, keys, strict=True):
            missing = []
            for i, key in enumerate(group_keys):
                if key not in self.store and key not in seen:
                    missing.append(i)
                seen.add(key)
            if missing:
                todo.append(_Missing(group, missing, [group_keys[i] for i in missing]))
        total = sum(len(missing.keys) for missing in todo)
        if total:
            self._compute(todo, total)
        return PassCounts(found=len(seen) - total, computed=total)

    def _compute(self, todo: Sequence[_Missing], total: int) -> None:
        was_training = self.model.training
        self.model.eval()
        done, flushed = 0, time.monotonic()
        try:
            self.on_progress(0, total)
            for groups, group_keys in self._batches(todo):
                batch = to_device(self.layout(groups), self.model.device)
                with torch.no_grad(), self.autocast():
                    logps = response_logps(self.model, batch)
                tokens = batch.response_tokens.tolist()
                for key, logp, count in zip(group_keys, logps.tolist(), tokens, strict=True):
                    self.store.add(key, logp, count)
                done += len(group_keys)
                self.on_progress(done, total)
                if time.monotonic() - flushed > FLUSH_SECONDS:
                    self.store.flush()
                    flushed = time.monotonic()
        finally:
            self.store.flush()
            self.model.train(was_training)

    def _encode(self, missing: _Missing) -> EncodedGroup:
        return self.encoder.encode(missing.group, missing.responses)

    def _batches(self, todo: Sequence[_Missing]) -> Iterator[tuple[list[EncodedGroup], list[bytes]]]:
        """Encoded groups up to `PASS_TOKENS` together (at least one), with the keys of their responses."""
        loader: DataLoader[EncodedGroup] = DataLoader(
            todo,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=self._encode,  # type: ignore[arg-type]
            num_workers=self.workers,
        )
        groups: list[EncodedGroup] = []
        keys: list[bytes] = []
        tokens = 0
        for encoded, missing in zip(loader, todo, strict=True):
            size = len(encoded.prompt_ids) + sum(map(len, encoded.response_ids))
            if groups and tokens + size > PASS_TOKENS:
                yield groups, keys
                groups, keys, tokens = [], [], 0
            groups.append(encoded)
            keys += missing.keys
            tokens += size
        yield groups, keys


def lookup(store: LogpStore, keys: Sequence[Sequence[bytes]]) -> list[Float[Tensor, " responses"]]:
    """The stored log-probabilities of each group's responses, in nats. Raises `KeyError` if one is missing."""
    return [torch.tensor([store[key] for key in group], dtype=torch.float64) for group in keys]


def _update(digest: hashlib.blake2b, kind: str, part: str | bytes) -> None:
    # Kind and length come first, so that no two sequences of parts are the same bytes.
    data = part.encode() if isinstance(part, str) else part
    digest.update(f"{kind} {len(data)} ".encode())
    digest.update(data)
