"""One pass over the data that computes what a store lacks, and can be interrupted at any moment.

Where several processes train together, each computes its share, and an error in one is raised in all.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic

import torch
from torch.utils.data import DataLoader

from unidpo.cache.keys import UNREADABLE
from unidpo.cache.store import Store, Value
from unidpo.data.lost_rows import lost_rows
from unidpo.data.pairs import PromptGroup
from unidpo.distributed import gather, is_main, rank, world_size
from unidpo.errors import Finding, ModelError, UserError, from_findings
from unidpo.model.encode import EncodedGroup, GroupEncoder
from unidpo.model.policy import Policy
from unidpo.model.transfer import Parcel, opened

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Task:
    """What is missing of a group: values of some responses, or of the prompt where `responses` is empty.

    Attributes:
        keys: of the values, in order.
    """

    group: PromptGroup
    responses: tuple[int, ...]
    keys: tuple[bytes, ...]

    def rows(self, key: bytes, problem: str) -> list[Finding]:
        """The rows of the pairs that need a value, as findings."""
        pairs = self.group.pairs
        if self.responses:
            response = self.responses[self.keys.index(key)]
            pairs = tuple(pair for pair in pairs if response in (pair.chosen, pair.rejected))
        return [Finding("no-number", problem, pair.file, pair.row) for pair in pairs]


@dataclass(slots=True)
class _Batch:
    """Groups of one forward pass.

    Attributes:
        tasks: by the keys of the values that the groups give, in order.
        lost: rows that were to be among them, and cannot be read any more.
        done: values that need not be waited for any more, lost ones included.
    """

    groups: list[EncodedGroup] = field(default_factory=list)
    tasks: dict[bytes, Task] = field(default_factory=dict)
    lost: list[Finding] = field(default_factory=list)
    done: int = 0


@dataclass(slots=True)
class _Outcome(Generic[Value]):
    """What a process tells the others of a batch.

    Attributes:
        values: for the store, where the main process writes for all.
        problem: why the process cannot continue.
    """

    done: int
    lost: list[Finding]
    values: dict[bytes, Value] = field(default_factory=dict)
    problem: UserError | None = None


@dataclass
class StoredPass(ABC, Generic[Value]):
    """Computes the values that a store does not hold yet. Every process must run it.

    Attributes:
        policy: the model; in eval mode meanwhile.
        encoder: what encodes groups for it.
        device: where batches go.
        dummy_group: as in `batches.BatchMaker`.
        workers: processes that decode images and tokenize ahead of the model.
        on_lost: called with rows that cannot be read any more; may raise.
        on_progress: called with values done and values to do, over all processes.
        batch_tokens: how much, by `_size`, goes into one forward pass.
        of_responses: whether each response has a value, or each prompt.
    """

    policy: Policy
    encoder: GroupEncoder
    device: torch.device
    dummy_group: EncodedGroup | None = None
    workers: int = 0
    on_lost: Callable[[list[Finding]], None] = field(default=lambda findings: None)
    on_progress: Callable[[int, int], None] = field(default=lambda done, total: None)
    batch_tokens: ClassVar[int]
    of_responses: ClassVar[bool]

    @abstractmethod
    def _size(self, group: EncodedGroup) -> int:
        """What a group takes of `batch_tokens`."""

    @abstractmethod
    def _compute(self, groups: Sequence[EncodedGroup]) -> list[Value]:
        """The values of groups, in order."""

    def tasks(
        self, groups: Sequence[PromptGroup], keys: Sequence[Sequence[bytes]], store: Store[Value, Any]
    ) -> list[Task]:
        """What a store lacks of groups, each key once.

        Args:
            keys: of each group's values.
        """
        tasks: list[Task] = []
        seen: set[bytes] = {UNREADABLE}
        for group, keys_of_group in zip(groups, keys, strict=True):
            missing: dict[bytes, int] = {}
            for place, key in enumerate(keys_of_group):
                if key not in store and key not in seen:
                    missing[key] = place
                seen.add(key)
            if missing:
                responses = tuple(missing.values()) if self.of_responses else ()
                tasks.append(Task(group, responses, tuple(missing)))
        if is_main():
            total = sum(len(task.keys) for task in tasks)
            found = len(seen) - 1 - total
            _LOG.info("%s: %d %s found in %s, %d to compute", store.kind, found, store.unit, store.folder, total)
        return tasks

    def fill(self, store: Store[Value, Any], tasks: Sequence[Task]) -> None:
        """Compute what a store lacks, but for what cannot be read any more. An interruption loses nothing.

        Raises:
            ModelError: the model gives numbers that are none; names the rows.
            UserError: the store cannot be written.
        """
        if not tasks:
            return
        total, done = sum(len(task.keys) for task in tasks), 0
        batches = self._batches(tasks[rank() :: world_size()])
        try:
            self.on_progress(0, total)
            with self.policy.measuring():
                # Processes whose share is done continue with the others, whose forward passes need them.
                while outcomes := [each for each in gather([self._step(batches, store)]) if each is not None]:
                    for outcome in outcomes:
                        store.add(outcome.values)
                    _raise_first(outcome.problem for outcome in outcomes)
                    if lost := [row for outcome in outcomes for row in outcome.lost]:
                        self.on_lost(lost)
                    done += sum(outcome.done for outcome in outcomes)
                    self.on_progress(done, total)
            _raise_first(gather([_error_of(store.flush)]))
        finally:
            store.flush()  # what an interruption leaves

    def _step(self, batches: Iterator[_Batch], store: Store[Value, Any]) -> _Outcome[Value] | None:
        """Compute the next batch; `None` where this process has none, and no problem either."""
        batch = next(batches, _Batch())
        groups = batch.groups
        if self.dummy_group is not None and not any(group.has_images for group in groups):
            groups = [*groups, self.dummy_group]
        values = self._compute(groups) if groups else []
        outcome: _Outcome[Value] = _Outcome(batch.done, batch.lost)
        wrong: dict[Finding, None] = {}
        # The dummy group's values are behind those that have keys.
        for (key, task), value in zip(batch.tasks.items(), values, strict=False):
            if problem := store.problem(value):
                wrong |= dict.fromkeys(task.rows(key, problem))
            else:
                outcome.values[key] = value
        if wrong:
            why = "the model's weights hold other numbers, or they overflow in model.dtype"
            remedy = "look at the model, or set model.dtype=bfloat16 or float32"
            outcome.problem = from_findings(ModelError, f"{store.complaint}: {why}; {remedy}", list(wrong))
        if store.each_process_writes:
            store.add(outcome.values)
            outcome.values = {}
        outcome.problem = outcome.problem or _error_of(store.flush_if_due)
        return outcome if batch.done or outcome.problem else None

    def _batches(self, tasks: Sequence[Task]) -> Iterator[_Batch]:
        """Encoded groups up to `batch_tokens` together, at least one."""
        loader: DataLoader[Any] = DataLoader(
            tasks,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=self._encode,  # type: ignore[arg-type]
            num_workers=self.workers,
        )
        batch, size = _Batch(), 0
        for task, item in zip(tasks, loader, strict=True):
            encoded: EncodedGroup | UserError = opened(item)
            if isinstance(encoded, UserError):
                batch.lost += lost_rows(task.group.pairs, encoded)
            else:
                size_of_group = self._size(encoded)
                if batch.groups and size + size_of_group > self.batch_tokens:
                    yield batch
                    batch, size = _Batch(), 0
                batch.groups.append(encoded)
                batch.tasks |= dict.fromkeys(task.keys, task)
                size += size_of_group
            batch.done += len(task.keys)
        if batch.done:
            yield batch

    def _encode(self, task: Task) -> EncodedGroup | Parcel[EncodedGroup] | UserError:
        # An exception would lose its findings on the way out of a worker.
        try:
            encoded = self.encoder.encode(task.group, task.responses)
        except UserError as error:
            return error
        return Parcel.of(encoded) if self.workers else encoded


def _error_of(flush: Callable[[], object]) -> UserError | None:
    """What goes wrong in one process is raised in all of them, see `_raise_first`."""
    try:
        flush()
    except UserError as error:
        return error
    return None


def _raise_first(problems: Iterable[UserError | None]) -> None:
    for problem in problems:
        if problem is not None:
            raise problem
