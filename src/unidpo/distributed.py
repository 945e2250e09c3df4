"""Several processes that work as one: what each knows is told to all, and what stops one stops all, in one message.

Without other processes every function here is the identity.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from unidpo.errors import UserError

T = TypeVar("T")


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
    return list(gather_object(list(values)))


def from_main(value: T) -> T:
    """What the main process has, in every process. Every process must call it."""
    held = [value]
    broadcast_object_list(held)
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
    PartialState().wait_for_everyone()


def whole(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it, a weight that ZeRO-3 has sharded is in one piece. Every process must enter it."""
    if not hasattr(tensor, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters([tensor])
    return context
