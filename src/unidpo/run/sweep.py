"""Carries a sweep out: one `unidpo train` process after another, then a table of what they came to."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unidpo.config import Sweep, SweepRun
from unidpo.errors import Finding, Interrupted, RunError, TrainingError, UserError, from_findings
from unidpo.files.locks import refuse_if_in_use
from unidpo.files.writing import write_atomically, write_json
from unidpo.run.launch import end_with_parent, signals_to
from unidpo.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = {
    "eval_rewards/accuracies": "eval accuracy",
    "eval_rewards/margins": "eval margin",
    "eval_loss": "eval loss",
    "loss": "train loss",
}
"""Measures in the summary's table, where a run has them, and their headings."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has become of one run.

    Attributes:
        status: ``finished``, ``failed``, or ``open`` where it was not started or was interrupted.
        step: the last optimizer step with a record; `None` where there is no record.
        measures: last values of the training and, where there is one, the held-out record.
    """

    run: SweepRun
    status: str
    step: int | None
    measures: dict[str, float | None]


def run_sweep(sweep: Sweep, *, options: Sequence[str] = (), console: Console) -> None:
    """Train every run that is not finished yet, and leave `summary.json` and `summary.md` in the sweep's folder.

    Each run has a process of its own, so that its memory is given back. All of them find the reference that the first
    one stored, as long as they share model and data. Unfinished runs go on from their last checkpoint. A run that
    fails does not stop the others.

    Args:
        options: of `unidpo train`, passed on to each run.
        console: where progress and the table go.

    Raises:
        RunError: a run folder holds something else; nothing was started.
        TrainingError: some runs failed; the others are done.
        Interrupted: Ctrl-C or SIGTERM; the current run has stopped in good order.
    """
    _refuse_other_runs(sweep)
    failed: set[str] = set()
    try:
        for number, run in enumerate(sweep.runs, 1):
            finished = RunFolder(run.recipe.output).finished
            note = ": finished before" if finished else ""
            console.print(f"[{number}/{len(sweep.runs)}] {run.name}{note}", markup=False, highlight=False, style="bold")
            if not finished and _train(run, options) != 0:
                failed.add(run.name)
    finally:
        outcomes = [_outcome(run, failed) for run in sweep.runs]
        _write_summary(sweep, outcomes)
        _print_table(outcomes, console)
        console.print(f"summary: {sweep.output / 'summary.md'}", markup=False, highlight=False, soft_wrap=True)
    if failed:
        names = ", ".join(run.name for run in sweep.runs if run.name in failed)
        raise TrainingError(
            f"{len(failed)} of {len(sweep.runs)} runs failed: {names}; what went wrong stands above. The same command "
            "goes on with them"
        )


def _refuse_other_runs(sweep: Sweep) -> None:
    findings = []
    for run in sweep.runs:
        folder = RunFolder(run.recipe.output)
        try:
            refuse_if_in_use(folder.path)
            if folder.config.is_file():
                folder.refuse_other_config(run.recipe.resolved())
            else:
                folder.refuse_unless_free(resume=False)
        except UserError as error:
            findings.append(Finding("other-run", str(error)))
    if findings:
        raise from_findings(RunError, f"{sweep.file}: not started, because of what {sweep.output} holds", findings)


def _train(run: SweepRun, options: Sequence[str]) -> int:
    resume = ["--resume"] if RunFolder(run.recipe.output).config.is_file() else []
    code = _exit_code(["train", str(run.recipe_file), *run.overrides, *options, *resume])
    for number in (signal.SIGINT, signal.SIGTERM):
        if code in (128 + number, -number):
            raise Interrupted(f"stopped in {run.name}", exit_code=128 + number)
    return code


def _exit_code(command: Sequence[str]) -> int:
    """Of `unidpo` with these arguments, in a process of its own; SIGTERM and Ctrl-C are handed on to it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "unidpo", *command],
        # In a session of its own, or the terminal's Ctrl-C would reach it twice, which stops without a checkpoint.
        start_new_session=True,
        # So that a run whose sweep was killed saves the step at hand.
        preexec_fn=end_with_parent(signal.SIGTERM),
    )
    with signals_to([process]):
        return process.wait()


def _outcome(run: SweepRun, failed: set[str]) -> Outcome:
    folder = RunFolder(run.recipe.output)
    status = "failed" if run.name in failed else "finished" if folder.finished else "open"
    last: dict[str, Any] = {}
    for line in folder.metrics.read_text("utf-8").splitlines() if folder.metrics.is_file() else ():
        try:
            last |= json.loads(line)
        except ValueError:  # cut off where a run was killed
            continue
    measures = {key: last[key] for key in last if "/" in key or key in SHOWN}
    return Outcome(run, status, last.get("step"), measures)


def _write_summary(sweep: Sweep, outcomes: Sequence[Outcome]) -> None:
    sweep.output.mkdir(parents=True, exist_ok=True)
    runs = [
        {
            "name": outcome.run.name,
            "method": outcome.run.method,
            "recipe": str(outcome.run.recipe_file),
            "changed": dict(outcome.run.changed),
            "folder": str(outcome.run.recipe.output),
            "status": outcome.status,
            "step": outcome.step,
            "measures": outcome.measures,
        }
        for outcome in outcomes
    ]
    write_json(sweep.output / "summary.json", {"sweep": str(sweep.file), "runs": runs})
    head, *rows = _table(outcomes)
    lines = [head, ["---"] * len(head), *rows]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_atomically(sweep.output / "summary.md", text.encode())


def _table(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Heading and one row per run; measures that no run has are left out."""
    measures = [key for key in SHOWN if any(key in outcome.measures for outcome in outcomes)]
    table = [["run", "status", "step", *(SHOWN[key] for key in measures)]]
    for outcome in outcomes:
        values = [outcome.measures.get(key) for key in measures]
        cells = ["" if value is None else f"{value:.4f}" for value in values]
        step = "" if outcome.step is None else str(outcome.step)
        table.append([outcome.run.name, outcome.status, step, *cells])
    return table


def _print_table(outcomes: Sequence[Outcome], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    head, *rows = _table(outcomes)
    table = Table()
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
