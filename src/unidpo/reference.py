"""The reference as stored numbers: one log-probability per response, computed once and kept on disk.

A store is a folder of Parquet parts, named by what the numbers depend on besides the response itself: the model's
weights and arithmetic, the processor, the template and the limits. Parts are written whole and renamed into place,
so a pass that is interrupted goes on where it stopped, and several writers do not meet.

Where several processes train together, the main one alone reads and writes the store; each computes its share.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from unidpo.batches import lost_rows
from unidpo.encode import EncodedGroup, Encoder
from unidpo.errors import Finding, ImageError, ModelError, UserError
from unidpo.images import content_digest
from unidpo.packs import Layout, to_device
from unidpo.pairs import ImageSource, PromptGroup
from unidpo.policy import Policy
from unidpo.ranks import gather, is_main, on_main, rank, whole, world_size

_LOG = logging.getLogger(__name__)
FLUSH_SECONDS = 30.0
PASS_TOKENS = 8192
"""Tokens in one forward of the reference pass; without gradients this is small beside a training step."""
UNREADABLE = b""
"""Stands for the key of a response whose prompt cannot be read any more."""

_SCHEMA = pa.schema([("key", pa.binary(16)), ("logp", pa.float64()), ("tokens", pa.int32())])


def default_cache() -> Path:
    """`$UNIDPO_CACHE`, else `~/.cache/unidpo`."""
    return Path(os.environ.get("UNIDPO_CACHE") or Path.home() / ".cache" / "unidpo")


class LogpStore:
    """Log-probabilities (nats, summed over the response's tokens) by response key, in a folder.

    Numbers are added in memory and reach the disk with `flush`.

    Args:
        folder: where the parts lie.
        logps: what is in it; read from the disk where `None`.
    """

    def __init__(self, folder: Path, logps: Mapping[bytes, float] | None = None) -> None:
        self.folder = folder
        self._logps: dict[bytes, float] = dict(logps or {})
        self._new: dict[bytes, tuple[float, int]] = {}
        if logps is None:
            self._clear_unfinished()
            self.reload()

    @classmethod
    def shared(cls, folder: Path, keys: Sequence[Sequence[bytes]]) -> LogpStore:
        """In each process a store with what the main one finds under these keys. Raises `UserError` in all."""

        def found() -> dict[bytes, float]:
            store = cls(folder)
            return {key: store[key] for group in keys for key in group if key in store}

        return cls(folder, on_main(found))

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

    def _clear_unfinished(self) -> None:
        """Remove what killed processes of this machine were writing; others may be writing now."""
        for path in self.folder.glob(f".{platform.node()}-*.tmp"):
            if not _is_alive(int(path.name.removeprefix(f".{platform.node()}-").partition("-")[0])):
                path.unlink(missing_ok=True)

    def __contains__(self, key: bytes) -> bool:
        return key in self._logps

    def __getitem__(self, key: bytes) -> float:
        return self._logps[key]

    def get(self, key: bytes) -> float:
        """The log-probability, or NaN."""
        return self._logps.get(key, math.nan)

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
        unfinished = self.folder / f".{platform.node()}-{os.getpid()}-{name}.tmp"
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), unfinished)
        unfinished.replace(self.folder / f"part-{name}.parquet")
        self._new.clear()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def store_folder(cache: Path, fingerprint: str, encoder: Encoder, *, arithmetic: str) -> Path:
    """Where the numbers of a model and an encoder belong.

    Args:
        fingerprint: of the model, see `weights_fingerprint`.
        arithmetic: what else changes the numbers, such as the autocast dtype.
    """
    return cache / "reference" / f"{fingerprint}-{encoder.fingerprint()}-{arithmetic}"


def weights_fingerprint(model: torch.nn.Module) -> str:
    """32 hex digits that name the weights: every parameter and buffer with name, shape, dtype and bytes.

    Buffers that are not saved count too: rotary frequencies change with a setting of the configuration alone. Weights
    that ZeRO-3 has spread over processes are brought together one by one; every process must call it then.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted((model.state_dict(keep_vars=True) | dict(model.named_buffers())).items()):
        with whole(tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def response_keys(groups: Iterable[PromptGroup]) -> tuple[list[list[bytes]], list[Finding]]:
    """For each group the 16-byte keys of its responses, made of prompt, image contents and response text.

    Each distinct image file is read once. Groups of which an image cannot be read any more have empty keys, and their
    rows are among the findings.
    """
    digests: dict[Path | bytes, bytes] = {}

    def image_digest(source: ImageSource) -> bytes:
        if not isinstance(source, (Path, bytes)):
            return content_digest(source)
        if source not in digests:
            digests[source] = content_digest(source)
        return digests[source]

    keys: list[list[bytes]] = []
    lost: list[Finding] = []
    for group in groups:
        prompt = hashlib.blake2b(digest_size=16)
        for message in group.messages:
            _update(prompt, "role", message.role)
            for part in message.content:
                _update(prompt, *(("text", part) if isinstance(part, str) else ("mark", "")))
        try:
            for source in group.images:
                _update(prompt, "image", image_digest(source))
        except ImageError as error:
            lost += lost_rows(group.pairs, error)
            keys.append([UNREADABLE] * len(group.responses))
            continue
        keys.append([])
        for response in group.responses:
            key = prompt.copy()
            _update(key, "response", response.text)
            keys[-1].append(key.digest())
    return keys, lost


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


@dataclass(slots=True)
class _PassBatch:
    """Groups of one forward pass, the keys of their responses, and the rows that were to be in it and are lost."""

    groups: list[EncodedGroup] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    lost: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Scored:
    """What a pass gave: key, log-probability and tokens of each response."""

    entries: list[tuple[bytes, float, int]]
    lost: list[Finding]


@dataclass
class ReferencePass:
    """Computes the log-probabilities of all responses that a store does not hold yet. Every process makes it.

    Attributes:
        policy: the reference; put into eval mode meanwhile.
        layout: how encoded groups become a batch, `packs.pack` or the padded path.
        device: where batches go.
        stand_in: as in `batches.PlannedBatches`.
        workers: processes that decode images and tokenize ahead of the model.
        on_lost: told of rows that cannot be read any more; may raise.
        on_progress: told responses done and responses to do, over all processes.
    """

    policy: Policy
    encoder: Encoder
    layout: Layout
    device: torch.device
    stand_in: EncodedGroup | None = None
    workers: int = 0
    on_lost: Callable[[list[Finding]], None] = field(default=lambda findings: None)
    on_progress: Callable[[int, int], None] = field(default=lambda done, total: None)

    def logps(
        self, groups: Sequence[PromptGroup], folder: Path, *, complete: bool = False
    ) -> list[Float[Tensor, " responses"]]:
        """The log-probabilities of each group's responses, in nats; NaN for rows that cannot be read any more.

        Args:
            folder: of the store.
            complete: whether the store must hold them all, because the model is not the reference any more.

        Raises:
            ModelError: it does not.
        """
        keys, lost = on_main(lambda: response_keys(groups))
        if lost:
            self.on_lost(lost)
        store = LogpStore.shared(folder, keys)
        missing = {key for group in keys for key in group if key != UNREADABLE and key not in store}
        if complete and missing:
            raise ModelError(
                f"{folder}: {len(missing)} stored reference log-probabilities of this run are gone, and its model "
                "cannot compute them any more; put them back, or begin the run anew"
            )
        counts = self.run(groups, keys, store)
        if is_main():
            _LOG.info("reference: %d responses found in %s, %d computed", counts.found, folder, counts.computed)
        return lookup(store, keys)

    def run(self, groups: Sequence[PromptGroup], keys: Sequence[Sequence[bytes]], store: LogpStore) -> PassCounts:
        """Compute what is missing in a store. What was computed before an interruption is kept."""
        todo: list[_Missing] = []
        seen: set[bytes] = {UNREADABLE}
        for group, group_keys in zip(groups, keys, strict=True):
            missing = []
            for i, key in enumerate(group_keys):
                if key not in store and key not in seen:
                    missing.append(i)
                seen.add(key)
            if missing:
                todo.append(_Missing(group, missing, [group_keys[i] for i in missing]))
        total = sum(len(missing.keys) for missing in todo)
        computed = self._compute(todo, total, store) if total else 0
        return PassCounts(found=len(seen) - 1 - total, computed=computed)

    def _compute(self, todo: Sequence[_Missing], total: int, store: LogpStore) -> int:
        done, flushed = 0, time.monotonic()
        mine = self._batches(todo[rank() :: world_size()])
        try:
            self.on_progress(0, total)
            with self.policy.measuring():
                # Processes whose share is done go on with the others, whose passes need them.
                while any(shares := gather([self._score(next(mine, None))])):
                    for share in filter(None, shares):
                        if share.lost:
                            self.on_lost(share.lost)
                        for entry in share.entries:
                            store.add(*entry)
                        done += len(share.entries)
                    self.on_progress(done, total)
                    if time.monotonic() - flushed > FLUSH_SECONDS:
                        _flush(store)
                        flushed = time.monotonic()
        finally:
            _flush(store)
        return done

    def _score(self, batch: _PassBatch | None) -> _Scored | None:
        if batch is None and world_size() == 1:
            return None
        groups = [] if batch is None else batch.groups
        if self.stand_in is not None and not any(group.vision for group in groups):
            groups = [*groups, self.stand_in]
        entries: list[tuple[bytes, float, int]] = []
        if groups:
            responses = to_device(self.layout(groups), self.device)
            logps = self.policy.response_logps(responses).tolist()
            # The stand-in's are behind those that have keys.
            keys = [] if batch is None else batch.keys
            entries = list(zip(keys, logps, responses.response_tokens.tolist(), strict=False))
        return None if batch is None else _Scored(entries, batch.lost)

    def _encode(self, missing: _Missing) -> EncodedGroup | UserError:
        # An exception would lose its findings on the way out of a worker.
        try:
            return self.encoder.encode(missing.group, missing.responses)
        except UserError as error:
            return error

    def _batches(self, todo: Sequence[_Missing]) -> Iterator[_PassBatch]:
        """Encoded groups up to `PASS_TOKENS` together (at least one), with the keys of their responses."""
        loader: DataLoader[EncodedGroup | UserError] = DataLoader(
            todo,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=self._encode,  # type: ignore[arg-type]
            num_workers=self.workers,
        )
        batch, tokens = _PassBatch(), 0
        for encoded, missing in zip(loader, todo, strict=True):
            if isinstance(encoded, UserError):
                batch.lost += lost_rows(missing.group.pairs, encoded)
                continue
            size = len(encoded.prompt_ids) + sum(map(len, encoded.response_ids))
            if batch.groups and tokens + size > PASS_TOKENS:
                yield batch
                batch, tokens = _PassBatch(), 0
            batch.groups.append(encoded)
            batch.keys += missing.keys
            tokens += size
        if batch.groups or batch.lost:
            yield batch


def _flush(store: LogpStore) -> None:
    if is_main():
        store.flush()


def lookup(store: LogpStore, keys: Sequence[Sequence[bytes]]) -> list[Float[Tensor, " responses"]]:
    """The stored log-probabilities of each group's responses, in nats; NaN for those it does not hold."""
    return [torch.tensor([store.get(key) for key in group], dtype=torch.float64) for group in keys]


def _update(digest: hashlib.blake2b, kind: str, part: str | bytes) -> None:
    # Kind and length come first, so that no two sequences of parts are the same bytes.
    data = part.encode() if isinstance(part, str) else part
    digest.update(f"{kind} {len(data)} ".encode())
    digest.update(data)
