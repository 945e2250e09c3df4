"""How a training is stopped from outside: by a signal, or by another process that is gone."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from unidpo.distributed import world_size
from unidpo.errors import Interrupted, TrainingError
from unidpo.training.trainer import PreferenceTrainer

_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def stopped_by_signals(trainer: PreferenceTrainer) -> Iterator[None]:
    """SIGTERM, and the first Ctrl-C, let the current step finish and save it; the second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT and received.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        trainer.request_stop()
        _LOG.warning("%s: this step is finished and saved first", signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Interrupted as stopped:
        # The signal may have come to another process.
        number = received[0] if received else signal.SIGTERM
        raise Interrupted(str(stopped), exit_code=128 + number) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def lost_processes_named() -> Iterator[None]:
    """Raise `TrainingError`, in one line, where another process of the training is gone."""
    try:
        yield
    except RuntimeError as error:
        gone = re.search("[Cc]onnection (closed|reset|refused)|Broken pipe|remote process exited|NCCL|gloo", str(error))
        if world_size() == 1 or gone is None:
            raise
        raise TrainingError("another process of this training is gone; its own message says why") from error
