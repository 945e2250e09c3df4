"""The reference as stored numbers: one log-probability per response, computed once and kept on disk.

Where several processes train together, the main one alone reads and writes the store; each computes its share.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from unidpo.cache.logps import LogpStore, is_logp
from unidpo.cache.store import FLUSH_SECONDS, UNREADABLE
from unidpo.data.lost_rows import lost_rows
from unidpo.data.pairs import PromptGroup
from unidpo.distributed import gather, is_main, rank, world_size
from unidpo.errors import Finding, ModelError, UserError, from_findings
from unidpo.model.encode import EncodedGroup, GroupEncoder
from unidpo.model.packs import Layout, to_device
from unidpo.model.policy import Policy

_LOG = logging.getLogger(__name__)
PASS_TOKENS = 8192
"""Tokens in one forward of the reference pass; without gradients this is small beside a training step."""


@dataclass(frozen=True, slots=True)
class PassCounts:
    """What a reference pass did, in distinct responses.

    Attributes:
        lost: keys of responses whose prompt cannot be read any more.
    """

    found: int
    computed: int
    lost: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class _Missing:
    """The responses of a group whose numbers are missing: their indices and keys."""

    group: PromptGroup
    responses: list[int]
    keys: list[bytes]


@dataclass(slots=True)
class _PassBatch:
    """Groups of one forward pass, the keys of their responses, and what was to be in it and is lost: rows and keys."""

    groups: list[EncodedGroup] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    lost: list[Finding] = field(default_factory=list)
    lost_keys: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Scored:
    """What a pass gave: key, log-probability and tokens of each response."""

    entries: list[tuple[bytes, float, int]]
    lost: list[Finding]
    lost_keys: list[bytes]


@dataclass
class ReferencePass:
    """Computes the log-probabilities of all responses that a store does not hold yet. Every process makes it.

    Attributes:
        policy: the reference; put into eval mode meanwhile.
        encoder: what encodes groups for it.
        layout: how encoded groups become a batch, `packs.pack` or the padded path.
        device: where batches go.
        stand_in: as in `batches.PlannedBatches`.
        workers: processes that decode images and tokenize ahead of the model.
        on_lost: told of rows that cannot be read any more; may raise.
        on_progress: told responses done and responses to do, over all processes.
    """

    policy: Policy
    encoder: GroupEncoder
    layout: Layout
    device: torch.device
    stand_in: EncodedGroup | None = None
    workers: int = 0
    on_lost: Callable[[list[Finding]], None] = field(default=lambda findings: None)
    on_progress: Callable[[int, int], None] = field(default=lambda done, total: None)

    def logps(
        self,
        groups: Sequence[PromptGroup],
        keys: Sequence[Sequence[bytes]],
        folder: Path,
        *,
        complete: bool = False,
    ) -> list[Float[Tensor, " responses"] | None]:
        """The log-probabilities of each group's responses, in nats; `None` for a group that cannot be read any more.

        Args:
            keys: of each group's responses, see `store.content_keys`.
            folder: of the store.
            complete: whether the store must hold them all, because the model is not the reference any more.

        Raises:
            ModelError: it does not, or the model gives numbers that are no log-probabilities.
        """
        store = LogpStore.shared(folder, keys)
        missing = {key for group in keys for key in group if key != UNREADABLE and key not in store}
        if complete and missing:
            raise ModelError(
                f"{folder}: {len(missing)} stored reference log-probabilities of this run are gone or damaged, and its "
                "model cannot compute them any more; put them back, or begin the run anew"
            )
        counts = self.run(groups, keys, store)
        if is_main():
            _LOG.info("reference: %d responses found in %s, %d computed", counts.found, folder, counts.computed)
        return lookup(store, keys, counts.lost)

    def run(self, groups: Sequence[PromptGroup], keys: Sequence[Sequence[bytes]], store: LogpStore) -> PassCounts:
        """Compute what is missing in a store. What was computed before an interruption is kept.

        Raises:
            ModelError: the model gives numbers that are no log-probabilities; names the rows.
        """
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
        lost = self._compute(todo, total, store) if total else frozenset()
        return PassCounts(found=len(seen) - 1 - total, computed=total - len(lost), lost=lost)

    def _compute(self, todo: Sequence[_Missing], total: int, store: LogpStore) -> frozenset[bytes]:
        """Add what is missing to the store; returns the keys of what is lost."""
        lost: set[bytes] = set()
        done, flushed = 0, time.monotonic()
        mine = self._batches(todo[rank() :: world_size()])
        try:
            self.on_progress(0, total)
            with self.policy.measuring():
                # Processes whose share is done go on with the others, whose passes need them.
                while any(shares := gather([self._score(next(mine, None))])):
                    entries = [entry for share in shares if share for entry in share.entries]
                    for key, logp, tokens in entries:
                        if is_logp(logp, tokens):
                            store.add(key, logp, tokens)
                    _require_logps(entries, todo)
                    for share in filter(None, shares):
                        if share.lost:
                            self.on_lost(share.lost)
                        lost.update(share.lost_keys)
                    done += len(entries)
                    self.on_progress(done, total)
                    if time.monotonic() - flushed > FLUSH_SECONDS:
                        _flush(store)
                        flushed = time.monotonic()
        finally:
            _flush(store)
        return frozenset(lost)

    def _score(self, batch: _PassBatch | None) -> _Scored | None:
        if batch is None and world_size() == 1:
            return None
        groups = [] if batch is None else batch.groups
        if self.stand_in is not None and not any(group.has_images for group in groups):
            groups = [*groups, self.stand_in]
        entries: list[tuple[bytes, float, int]] = []
        if groups:
            responses = to_device(self.layout(groups), self.device)
            logps = self.policy.response_logps(responses).tolist()
            # The stand-in's are behind those that have keys.
            keys = [] if batch is None else batch.keys
            entries = list(zip(keys, logps, responses.response_tokens.tolist(), strict=False))
        return None if batch is None else _Scored(entries, batch.lost, batch.lost_keys)

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
                batch.lost_keys += missing.keys
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


def _require_logps(entries: Sequence[tuple[bytes, float, int]], todo: Sequence[_Missing]) -> None:
    """Raise `ModelError`, which names the rows, where a number is no log-probability."""
    wrong = {key: logp for key, logp, tokens in entries if not is_logp(logp, tokens)}
    if not wrong:
        return
    findings = []
    for missing in todo:
        of_response = {i: wrong[key] for i, key in zip(missing.responses, missing.keys, strict=True) if key in wrong}
        for pair in missing.group.pairs:
            if found := [str(of_response[i]) for i in (pair.chosen, pair.rejected) if i in of_response]:
                message = f"the log-probability of a response is {' and '.join(found)}"
                findings.append(Finding("not-a-logp", message, pair.file, pair.row))
    raise from_findings(
        ModelError,
        f"the reference gives {len(wrong)} of {len(entries)} responses no log-probability (a finite number, not above "
        "0): its weights hold such numbers, or they overflow in model.dtype; look at the model, or set "
        "model.dtype=bfloat16 or float32",
        findings,
    )


def lookup(
    store: LogpStore, keys: Sequence[Sequence[bytes]], lost: Collection[bytes] = ()
) -> list[Float[Tensor, " responses"] | None]:
    """The stored log-probabilities of each group's responses, in nats; `None` for a group that is lost.

    Args:
        lost: the keys of what cannot be read any more, besides `UNREADABLE`.
    """
    gone = {UNREADABLE, *lost}
    return [
        None if gone.intersection(group) else torch.tensor([store[key] for key in group], dtype=torch.float64)
        for group in keys
    ]
