"""Trains the runs of a sweep: one `unidpo train` process after another, and a table of what they came to."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unidpo.config import SweepRun
from unidpo.errors import Interrupted, TrainingError
from unidpo.files.writing import write_atomically
from unidpo.run.launch import signals_to, start
from unidpo.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = {
    "eval_rewards/accuracies": "eval accuracy",
    "eval_rewards/margins": "eval margin",
    "eval_loss": "eval loss",
    "loss": "train loss",
}
"""Metrics in the summary and their headings."""


def run_sweep(runs: Sequence[SweepRun], *, options: Sequence[str] = (), console: Console) -> None:
    """Train every run that is not finished yet, and leave `summary.md` in the sweep's folder.

    Each run has a process of its own, so that its memory is given back. All of them find the reference that the first
    one stored, as long as they share model and data. Unfinished runs resume from their last checkpoint. A run that
    fails does not stop the others.

    Args:
        options: of `unidpo train`, passed on to each run.

    Raises:
        RunError: a run folder was begun with another recipe; nothing was started.
        TrainingError: some runs failed; the others are done.
        Interrupted: Ctrl-C or SIGTERM; the current run has stopped in good order.
    """
    folders = [RunFolder(run.recipe.output) for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if folder.config.is_file():
            folder.refuse_other_config(run.recipe.resolved())
    output = folders[0].path.parent
    output.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    for number, (run, folder) in enumerate(zip(runs, folders, strict=True), 1):
        note = ": finished before" if folder.finished else ""
        console.print(f"[{number}/{len(runs)}] {run.name}{note}", markup=False, highlight=False, style="bold")
        if not folder.finished:
            resume = ["--resume"] if folder.config.is_file() else []
            code = _exit_code(["train", str(run.recipe_file), *run.overrides, *options, *resume])
            if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
                raise Interrupted(f"stopped in {run.name}; the same command resumes it", exit_code=code)
            if code != 0:
                failed.append(run.name)
        summary = _summary(folders, failed)
        write_atomically(output / "summary.md", summary.encode())
    console.print(summary, markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; what went wrong stands above. The same "
            "command begins them again"
        )


def _exit_code(arguments: Sequence[str]) -> int:
    """Of `unidpo` with these arguments, in a process of its own; a signal's number plus 128 where one ended it."""
    # A run whose sweep was killed saves its current step.
    process = start(arguments, when_parent_dies=signal.SIGTERM)
    with signals_to([process]):
        code = process.wait()
    return code if code >= 0 else 128 - code


def _summary(folders: Sequence[RunFolder], failed: Sequence[str]) -> str:
    """A Markdown table of all runs, with the last metrics of the finished ones."""
    rows = [["run", "status", "step", *SHOWN.values()], ["---"] * (3 + len(SHOWN))]
    for folder in folders:
        last: dict[str, Any] = {}
        if folder.finished:
            for line in folder.metrics.read_text("utf-8").splitlines():
                last |= json.loads(line)
        status = "finished" if last else "failed" if folder.path.name in failed else "open"
        numbers = [f"{last[key]:.4f}" if last.get(key) is not None else "" for key in SHOWN]
        rows.append([folder.path.name, status, str(last.get("step", "")), *numbers])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
