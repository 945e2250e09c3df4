"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeAlias

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

OnProgress: TypeAlias = Callable[[str, int, int], None]
"""Called with a stage, how many are done and how many there are; `Stages.update` is one."""

PLAIN_SECONDS = 10.0
"""Where there is no terminal, a line per stage at most this often, and one when it is done."""


class Stages:
    """Stages of one piece of work, each counted from 0 to a total. Used as a context manager.

    Args:
        console: where it is shown.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._stages: dict[str, TaskID] = {}

    def __enter__(self) -> Stages:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> dict[str, float]:
        """How long each stage took, from its first update to its last."""
        return {task.description: task.fields["updated"] - task.fields["started"] for task in self._bar.tasks}

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Say how far a stage is.

        Args:
            stage: what is counted, e.g. ``reference, responses``.
            done: how many are done, 0 at the start (or where a resumed stage begins).
            total: how many there are.
            note: something to show beside, e.g. the loss.
        """
        now = time.monotonic()
        if stage not in self._stages:
            self._stages[stage] = self._bar.add_task(
                stage, total=total, completed=done, note=note, started=now, printed=now, first=done
            )
        self._bar.update(self._stages[stage], completed=done, total=total, note=note, updated=now)
        if not self.console.is_terminal:
            self._plain(self._bar.tasks[self._stages[stage]], done, total, now)

    def _plain(self, task: Task, done: int, total: int, now: float) -> None:
        times = task.fields
        ended = done >= total
        if times["printed"] is None or not (ended or now - times["printed"] >= PLAIN_SECONDS):
            return
        times["printed"] = None if ended else now
        seconds = now - times["started"]
        rate = (done - times["first"]) / max(seconds, 1e-9)
        left = "" if ended or not rate else f", {_clock((total - done) / rate)} left"
        end = f" in {_clock(seconds)}" if ended else ""
        speed = "" if ended and done == times["first"] else f", {rate:,.1f}/s"  # done before it could be timed
        note = f", {times['note']}" if times["note"] else ""
        line = f"{task.description}: {done:,}/{total:,}{end}{speed}{left}{note}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Finished units per second, over the last half minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="progress.data.speed")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
