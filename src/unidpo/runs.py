"""The run folder: what was asked, where it ran, and where what it came to lies.

A run folder holds `config.json`, `environment.json`, `metrics.jsonl`, `pairs.parquet`, `checkpoint-*/` and, once the
run is finished, `model/`. Files appear whole or not at all, so that a run killed at any moment can go on.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unidpo.errors import Finding, RunError, from_findings
from unidpo.locks import LOCK_FILES, locked
from unidpo.redaction import redacted
from unidpo.writing import write_json

MAY_CHANGE_ON_RESUME = frozenset(
    {
        "data.max_lost_fraction",
        "output",
        "train.dataloader_num_workers",
        "train.dataloader_prefetch_factor",
        "train.logging_steps",
        "train.report_to",
        "train.run_name",
        "train.save_steps",
        "train.save_total_limit",
    }
)
"""Recipe keys that do not change what is learned; every other one must be as the run began."""
UNFINISHED_CHECKPOINT = ".checkpoint-unfinished"
"""Folder in which a checkpoint is written before it appears."""
_PACKAGES = ("unidpo", "torch", "transformers", "accelerate", "peft", "datasets", "pillow", "pyarrow", "numpy")


class RunFolder:
    """One run on disk.

    Args:
        path: the folder; `open` makes it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.ledger = self.path / "pairs.parquet"
        self.model = self.path / "model"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: `model/` appears last, and whole."""
        return self.config.is_file() and self.model.is_dir()

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest complete `checkpoint-<step>/`, or `None`."""
        complete = [p for p in self.path.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
        steps = {int(p.name.rpartition("-")[2]): p for p in complete if p.name.rpartition("-")[2].isdecimal()}
        return steps[max(steps)] if steps else None

    def refuse_unless_free(self, *, resume: bool) -> None:
        """Raise `RunError` where `create` would because of what the folder holds; writes nothing."""
        other = "give another `output`, or delete the folder"
        if self.finished:
            raise RunError(f"{self.path}: this folder holds a finished run; {other}")
        ours = self.config.is_file()
        if resume and not ours:
            raise RunError(f"{self.path}: there is no run to resume; leave `--resume` out to begin one")
        if ours and not resume and (self.last_checkpoint is not None or self._has_metrics()):
            raise RunError(f"{self.path}: this folder holds an unfinished run; go on with `--resume`, or {other}")
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
            try:
                stack.enter_context(locked(self.path))
            except OSError as error:
                raise self._unusable(error) from error
            yield

    def _unusable(self, error: OSError) -> RunError:
        return RunError(f"{self.path}: cannot be a run folder ({error.strerror}); give another `output`")

    def create(self, config: Mapping[str, Any], *, resume: bool = False) -> int:
        """Begin the run, or go on with it, and write `config.json` and `environment.json`.

        A run that stopped before its first step leaves nothing worth keeping; beginning again there is no resume.

        Args:
            config: the resolved recipe, plain JSON values.
            resume: go on from the last checkpoint, or from the beginning where there is none yet.

        Returns:
            The optimizer step to go on from; 0 for a new run.

        Raises:
            RunError: the folder cannot be written, holds a finished run, an unfinished one (without `resume`), none
                (with it), one of another recipe, or files of somebody else's.
        """
        self.refuse_unless_free(resume=resume)
        if resume:
            self.refuse_other_config(config)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._clear_unfinished()
            starts = json.loads(self.environment.read_text("utf-8"))["starts"] if self.environment.is_file() else []
            write_json(self.environment, {"starts": [*(starts if resume else []), environment()]})
            write_json(self.config, config)
        except OSError as error:
            raise self._unusable(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.environment}: is damaged ({error}); delete this file") from error
        checkpoint = self.last_checkpoint if resume else None
        return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])

    def finish(self, save: Callable[[Path], None]) -> None:
        """Let `save` write weights and processor into a folder, which then becomes `model/` in one move."""
        unfinished = self.path / ".model-unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        save(unfinished)
        unfinished.rename(self.model)

    def _clear_unfinished(self) -> None:
        """Remove what a killed run was writing."""
        for path in self.path.glob(".*unfinished"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _has_metrics(self) -> bool:
        return self.metrics.is_file() and self.metrics.stat().st_size > 0

    def refuse_other_config(self, config: Mapping[str, Any]) -> None:
        """Raise `RunError` where the folder's run began with another recipe."""
        try:
            before = _flat(json.loads(self.config.read_text("utf-8")))
        except ValueError as error:
            raise RunError(f"{self.config}: is damaged ({error}); delete the run folder and begin again") from error
        now = _flat(json.loads(json.dumps(config)))
        changed = [
            Finding("changed-key", f"was {before.get(key)!r}, is {now.get(key)!r}", key=key)
            for key in sorted(before.keys() | now.keys())
            if key not in MAY_CHANGE_ON_RESUME and before.get(key) != now.get(key)
        ]
        if changed:
            title = f"{self.path}: this run began with another recipe; set these back, or give another `output`"
            raise from_findings(RunError, title, changed)


def environment() -> dict[str, Any]:
    """Versions, platform, command and time (UTC) of a start."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if "torch" in sys.modules:
        # The CUDA build in the registry calls itself 2.13.0 in its metadata, and 2.13.0+cu130 once it is imported.
        versions["torch"] = str(sys.modules["torch"].__version__)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [redacted(word) for word in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": versions,
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
