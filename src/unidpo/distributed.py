"""Several processes that work as one: what each knows is told to all, and what stops one stops all, in one message.

Without other processes every function here is the identity.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from unidpo.errors import UserError

T = TypeVar("T")
_PATIENCE = timedelta(days=30)


def is_main() -> bool:
    """Whether this is the process that writes and speaks for all."""
    main: bool = PartialState().is_main_process
    return main


def rank() -> int:
    """Number of this process, from 0."""
    number: int = PartialState().process_index
    return number


def world_size() -> int:
    """How many processes there are."""
    count: int = PartialState().num_processes
    return count


def gather(values: Sequence[T]) -> list[T]:
    """The values of all processes, those of process 0 first. Every process must call it."""
    if world_size() == 1:
        return list(values)
    held: list[Any] = [None] * world_size()
    dist.all_gather_object(held, list(values), group=_through_the_cpu(dist.group.WORLD))
    return [value for each in held for value in each]


def from_main(value: T) -> T:
    """What the main process has, in every process. Every process must call it."""
    if world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0, group=_through_the_cpu(dist.group.WORLD))
    return held[0]


def on_main(work: Callable[[], T]) -> T:
    """Let the main process work, and hand its result, or its `UserError`, to every process."""
    outcome: T | UserError | None = None
    if is_main():
        try:
            outcome = work()
        except UserError as error:
            outcome = error
    outcome = from_main(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome  # type: ignore[return-value]


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if world_size() > 1:
        dist.barrier(_through_the_cpu(dist.group.WORLD))


@functools.cache
def _through_the_cpu(world: Any) -> Any:
    """All processes, as a group of their own for objects. Every process must come here once.

    The processes' first group may compute on GPUs: what it gathers, such as the images of a data set, lies in their
    memory. And it stops waiting after `ddp_timeout`, where the main process may check data or answer a benchmark for
    longer. A process that is gone is noticed here at once, because its connection closes.
    """
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def whole(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it, a weight that ZeRO-3 has sharded is in one piece. Every process must enter it."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters([tensor])
    return context
