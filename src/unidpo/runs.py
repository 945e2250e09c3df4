"""The run folder: what was asked, where it ran, what was measured, and the ledger of every pair's every visit.

A run folder holds `config.json`, `environment.json`, `metrics.jsonl`, `pairs.parquet`, `checkpoint-*/` and, once the
run is finished, `model/`. Files appear whole or not at all, so that a run killed at any moment can go on.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from unidpo.errors import Finding, RunError, from_findings
from unidpo.locks import LOCK_FILES, locked

MAY_CHANGE_ON_RESUME = frozenset(
    {
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
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": versions,
    }


class Metrics:
    """Appends to `metrics.jsonl`: one JSON object per logged step, on disk when `add` returns.

    Args:
        path: the file.
        resume_step: records of later steps, and a last line that was cut off, are dropped.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        kept = []
        for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
            try:
                if json.loads(line)["step"] <= resume_step:
                    kept.append(f"{line}\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_atomically(path, "".join(kept).encode())

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record; it needs a `step`. NaN and infinities, which JSON lacks, become null."""
        if "step" not in record:
            raise ValueError("a record of metrics needs its step")
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")


class Column(NamedTuple):
    """A column of the ledger."""

    name: str
    type: pa.DataType
    meaning: str
    nullable: bool = False


LEDGER_COLUMNS = (
    Column("step", pa.int32(), "optimizer step the visit belongs to, from 1"),
    Column("epoch", pa.float32(), "epochs done before the visit"),
    Column("file", pa.string(), "data file of the row", nullable=True),
    Column("row", pa.int32(), "row of the data file, from 1"),
    Column("chosen", pa.int16(), "index of the chosen response within its prompt group, from 0"),
    Column("rejected", pa.int16(), "index of the rejected response within its prompt group, from 0"),
    Column("chosen_score", pa.float64(), "score of the chosen response, as in the data", nullable=True),
    Column("rejected_score", pa.float64(), "score of the rejected response, as in the data", nullable=True),
    Column("chosen_logps", pa.float32(), "policy, before the step; nats per token where the loss averages, else nats"),
    Column("rejected_logps", pa.float32(), "as chosen_logps"),
    Column("ref_chosen_logps", pa.float32(), "reference, same unit; null where the loss needs none", nullable=True),
    Column("ref_rejected_logps", pa.float32(), "as ref_chosen_logps", nullable=True),
    Column("chosen_tokens", pa.int32(), "tokens of the chosen response after truncation, closing tokens included"),
    Column("rejected_tokens", pa.int32(), "as chosen_tokens"),
    Column("quality_weight", pa.float32(), "in (0, 1); 1 for losses without"),
    Column("performance_weight", pa.float32(), "> 0; 1 for losses without"),
    Column("nll_gate", pa.float32(), "1 where the NLL term is on, else 0"),
    Column("preference", pa.float32(), "preference term before any weight, -log sigmoid in most losses"),
    Column("nll", pa.float32(), "NLL term as added to the loss"),
    Column("loss", pa.float32(), "the pair's loss; the training loss is the mean over pairs"),
)
LEDGER_SCHEMA = pa.schema(
    [pa.field(c.name, c.type, c.nullable, metadata={"description": c.meaning}) for c in LEDGER_COLUMNS]
)
_PART = re.compile(r"part-(\d{8})-(\d{8})(?:_\d{4})?\.parquet")


class Ledger:
    """Writes `pairs.parquet/`: one row per pair per visit, in parts that pandas or pyarrow read as one table.

    Args:
        path: the folder.
        resume_step: rows of later steps are dropped.
        rows_per_part: rows held in memory before a part is written.
    """

    def __init__(self, path: Path, *, resume_step: int = 0, rows_per_part: int = 4096) -> None:
        self.path = path
        self.rows_per_part = rows_per_part
        self._rows: dict[str, list[Any]] = {column.name: [] for column in LEDGER_COLUMNS}
        path.mkdir(parents=True, exist_ok=True)
        for unfinished in path.glob(".*"):
            unfinished.unlink()
        for part in sorted(path.glob("part-*.parquet")):
            self._drop_after(resume_step, part)

    def add(self, rows: Mapping[str, Sequence[Any] | None]) -> None:
        """Append rows, given by column (see `LEDGER_COLUMNS`); `None` for a column that the loss does not have.

        Raises:
            ValueError: columns are missing, unknown or of different lengths, or one that must have values is `None`.
        """
        if rows.keys() != self._rows.keys():
            raise ValueError(f"columns missing or unknown: {sorted(rows.keys() ^ self._rows.keys())}")
        lengths = {len(values) for values in rows.values() if values is not None}
        if len(lengths) != 1:
            raise ValueError(f"columns of different lengths: {sorted(lengths)}")
        empty = [column.name for column in LEDGER_COLUMNS if rows[column.name] is None and not column.nullable]
        if empty:
            raise ValueError(f"columns without values: {empty}")
        (count,) = lengths
        for name, values in rows.items():
            self._rows[name].extend([None] * count if values is None else values)
        if len(self._rows["step"]) >= self.rows_per_part:
            self.flush()

    def flush(self) -> None:
        """Put every row added so far on disk. Call it before a checkpoint is written, and at the end."""
        steps = self._rows["step"]
        if not steps:
            return
        # A missing score arrives as NaN; a NaN loss is a fact and stays one.
        arrays = [pa.array(self._rows[c.name], c.type, from_pandas=c.nullable) for c in LEDGER_COLUMNS]
        self._write(pa.Table.from_arrays(arrays, schema=LEDGER_SCHEMA), self._free_name(min(steps), max(steps)))
        for values in self._rows.values():
            values.clear()

    def _drop_after(self, step: int, part: Path) -> None:
        name = _PART.fullmatch(part.name)
        first, last = (int(name[1]), int(name[2])) if name else (0, 0)
        if first > step:
            part.unlink()
        elif last > step:
            table = pq.read_table(part, schema=LEDGER_SCHEMA)
            # In place, then renamed: at no moment are there two parts with the same rows.
            self._write(table.filter(pa.compute.less_equal(table["step"], step)), part)
            part.rename(self._free_name(first, step))

    def _free_name(self, first: int, last: int) -> Path:
        """The name of a part; names sort as parts were written, also where several hold the same steps."""
        stem, number = f"part-{first:08d}-{last:08d}", 0
        path = self.path / f"{stem}.parquet"
        while path.exists():
            number += 1
            path = self.path / f"{stem}_{number:04d}.parquet"
        return path

    def _write(self, table: pa.Table, path: Path) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        write_atomically(path, sink.getvalue())


def write_atomically(path: Path, content: bytes | pa.Buffer) -> None:
    """Write a file so that it appears whole, on disk, or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_atomically(path, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
