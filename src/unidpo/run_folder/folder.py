"""The run folder: what was asked, where it ran, and where its results lie.

A run folder holds `config.json`, `environment.json`, `metrics.jsonl`, `pairs.parquet`, `checkpoint-*/` and, once the
run is finished, `model/`. Files appear whole or not at all, so that a run killed at any moment can be resumed.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unidpo.errors import Finding, RunError, from_findings
from unidpo.files.locks import LOCK_FILES, locked
from unidpo.files.writing import write_json
from unidpo.redaction import redacted
from unidpo.run_folder.manifest import cannot_resume, checkpoint_damage

_LOG = logging.getLogger(__name__)
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "data.max_lost_fraction",
        "output",
        "train.dataloader_num_workers",
        "train.dataloader_prefetch_factor",
        "train.logging_first_step",
        "train.logging_steps",
        "train.logging_strategy",
        "train.report_to",
        "train.run_name",
        "train.save_steps",
        "train.save_strategy",
        "train.save_total_limit",
    }
)
"""Recipe keys that do not change the training; every other one must be as the run began."""
PLACES = frozenset({"data.images", "data.path", "data.template", "model.name", "reference"})
"""Recipe keys that say where something lies: on resume its content counts, see `inputs`."""
UNFINISHED_CHECKPOINT = ".checkpoint-unfinished"
"""Folder in which a checkpoint is written before it appears."""
_PACKAGES = ("unidpo", "torch", "transformers", "accelerate", "peft", "datasets", "pillow", "pyarrow", "numpy")


class RunFolder:
    """One run on disk.

    Args:
        path: the folder; `create` makes it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.environment = self.path / "environment.json"
        self.inputs = self.path / "inputs.json"
        self.metrics = self.path / "metrics.jsonl"
        self.ledger = self.path / "pairs.parquet"
        self.model = self.path / "model"
        self.report = self.path / "report.html"

    @property
    def finished(self) -> bool:
        """Whether the run has ended: `model/` appears last, and whole."""
        return self.config.is_file() and self.model.is_dir()

    @property
    def checkpoints(self) -> list[Path]:
        """Every `checkpoint-<step>/`, whole or not, the newest first."""
        found = [path for path in self.path.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
        return sorted(found, key=step_of, reverse=True)

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest whole one, or `None`."""
        return next((path for path in self.checkpoints if checkpoint_damage(path) is None), None)

    def refuse_unless_free(self, *, resume: bool) -> None:
        """Raise `RunError` where `create` would because of what the folder holds; writes nothing."""
        other = "give another `output`, or delete the folder"
        if self.finished:
            raise RunError(f"{self.path}: this folder holds a finished run; {other}")
        ours = self.config.is_file()
        if resume and not ours:
            raise RunError(f"{self.path}: there is no run to resume; leave `--resume` out to begin one")
        has_metrics = self.metrics.is_file() and self.metrics.stat().st_size > 0
        if ours and not resume and (self.checkpoints or has_metrics):
            raise RunError(f"{self.path}: this folder holds an unfinished run; give `--resume`, or {other}")
        if not ours and self.path.is_dir() and any(path.name not in LOCK_FILES for path in self.path.iterdir()):
            raise RunError(f"{self.path}: this folder holds files that are no run; {other}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within it, no other process works in the folder.

        Raises:
            FolderInUse: another one does.
            RunError: the folder cannot be made or written.
        """
        with contextlib.ExitStack() as stack:
            with self._writing_errors():
                stack.enter_context(locked(self.path))
            yield

    @contextlib.contextmanager
    def _writing_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"{self.path}: cannot be a run folder ({error.strerror}); give another `output`") from error

    def create(self, config: Mapping[str, Any], machine: Mapping[str, Any] | None = None) -> None:
        """Begin the run, and write `config.json` and `environment.json`.

        A run that stopped before its first step leaves nothing worth keeping; beginning again there is no resume.

        Args:
            config: the resolved recipe, plain JSON values.
            machine: what `environment.json` says of the start beside versions and command.

        Raises:
            RunError: the folder cannot be written, holds another run, or files of somebody else's.
        """
        self.refuse_unless_free(resume=False)
        with self._writing_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            self._clear_unfinished()
            for of_another_start in (self.inputs, self.path / "inputs.parquet"):
                of_another_start.unlink(missing_ok=True)
            write_json(self.environment, {"starts": [this_start(machine)]})
            write_json(self.config, config)

    def resume(self, config: Mapping[str, Any]) -> Path | None:
        """The checkpoint that the run resumes from, `None` where there is none yet. See `add_start`.

        Raises:
            RunError: there is no run, a finished one, one of another recipe, or no checkpoint is whole.
        """
        self.refuse_unless_free(resume=True)
        self.refuse_other_config(config)
        self._starts()
        self._clear_unfinished()
        damaged: list[Finding] = []
        for checkpoint in self.checkpoints:
            problem = cannot_resume(checkpoint, run=self.path)
            if problem is None:
                for finding in damaged:
                    _LOG.warning("%s; resuming from %s", finding, checkpoint.name)
                return checkpoint
            damaged.append(Finding("damaged-checkpoint", problem, file=checkpoint))
        if damaged:
            remedy = "put back what is lost, or give another `output`"
            raise from_findings(RunError, f"{self.path}: there is no checkpoint to resume from; {remedy}", damaged)
        return None

    def add_start(self, config: Mapping[str, Any], machine: Mapping[str, Any] | None = None) -> None:
        """Write down that the run is resumed: nothing was found that forbids it. Warns of another machine.

        Args:
            config: as it was given to `resume`.
            machine: see `create`.
        """
        starts, start = self._starts(), this_start(machine)
        changed = _other_machine(starts[-1], start) if starts else []
        if changed:
            _LOG.warning(
                "resumed with %s: the results will not be those of an uninterrupted run bit for bit", ", ".join(changed)
            )
        with self._writing_errors():
            write_json(self.environment, {"starts": [*starts, start]})
            write_json(self.config, config)

    def add_end(self, seconds: Mapping[str, float], peak_memory: Mapping[str, int]) -> None:
        """Write down how the last start ended: the time, and what it took.

        Args:
            seconds: by stage of the work.
            peak_memory: bytes by where they lay, `cuda` or `host`.
        """
        *before, last = self._starts()
        last |= {"ended": _now(), "seconds": dict(seconds), "peak_memory": dict(peak_memory)}
        write_json(self.environment, {"starts": [*before, last]})

    def _starts(self) -> list[dict[str, Any]]:
        try:
            starts = json.loads(self.environment.read_text("utf-8"))["starts"] if self.environment.is_file() else []
            return [dict(start) for start in starts]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.environment}: is damaged ({error}); delete this file") from error

    def finish(self, save: Callable[[Path], None]) -> None:
        """Let `save` write weights and processor into a folder, which then becomes `model/` in one move."""
        unfinished = self.path / ".model-unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        save(unfinished)
        unfinished.rename(self.model)

    def _clear_unfinished(self) -> None:
        """Remove what a killed run was writing."""
        for path in self.path.glob(".*unfinished*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def refuse_other_config(self, config: Mapping[str, Any]) -> None:
        """Raise `RunError` where the folder's run began with another recipe."""
        try:
            before = flat(json.loads(self.config.read_text("utf-8")))
        except ValueError as error:
            raise RunError(f"{self.config}: is damaged ({error}); delete the run folder and begin again") from error
        now = flat(json.loads(json.dumps(config)))
        may_change = MAY_CHANGE_ON_RESUME
        if self.inputs.is_file():
            ways = {"stored", "live"} & {before.get("reference"), now.get("reference")}
            may_change |= PLACES - ({"reference"} if ways else set())
        changed = [
            Finding("changed-key", f"was {before.get(key)!r}, is {now.get(key)!r}", key=key)
            for key in sorted(before.keys() | now.keys())
            if key not in may_change and before.get(key) != now.get(key)
        ]
        if changed:
            title = f"{self.path}: this run began with another recipe; set these back, or give another `output`"
            raise from_findings(RunError, title, changed)


def this_start(machine: Mapping[str, Any] | None) -> dict[str, Any]:
    """Versions, platform, command and time (UTC) of this start, and what else is given of the machine."""
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if "torch" in sys.modules:
        # The CUDA build in the registry calls itself 2.13.0 in its metadata, and 2.13.0+cu130 once it is imported.
        versions["torch"] = str(sys.modules["torch"].__version__)
    return {
        "time": _now(),
        "command": [redacted(word) for word in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": versions,
        **(machine or {}),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _other_machine(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two starts and changes how numbers round."""
    before, now = flat(before), flat(now)
    names = ("threads", "processes", "devices", "packages.torch", "packages.transformers", "packages.unidpo")
    return [
        f"{name.removeprefix('packages.')} {now.get(name)} (before: {before[name]})"
        for name in names
        if before.get(name) not in (None, now.get(name))
    ]


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a `checkpoint-<step>`."""
    return int(checkpoint.name.rpartition("-")[2])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
