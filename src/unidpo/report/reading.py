"""What a run folder says, as one value. Damaged or missing parts are left out, and noted."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from unidpo.errors import FolderInUse, RunError
from unidpo.files.locks import refuse_if_in_use
from unidpo.run_folder.folder import RunFolder
from unidpo.run_folder.inputs import DataFile, began_with
from unidpo.run_folder.records import LEDGER_SCHEMA

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers: TypeAlias = NDArray[np.float64]

State: TypeAlias = Literal["finished", "running", "broken"]


@dataclass(frozen=True, slots=True)
class Note:
    """Something to say in the page's words: a key of `words.json`, and what stands in its braces."""

    key: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """One run, as its folder tells it.

    Attributes:
        path: the folder.
        state: finished, running (another process holds the folder's lock), or broken off.
        config: the resolved recipe.
        starts: versions, machine, command and times of each start; see `RunFolder.end`.
        records: lines of `metrics.jsonl`.
        ledger: columns of the ledger, in the order of the visits; NaN for null.
        files: data files of the ledger by the numbers in its `file` column.
        data: data files that the run began with.
        held_out: how many groups are held out; 0 where that is unknown.
        last_step: the last optimizer step that was recorded.
        total_steps: how many there were to be; `None` where no file says it.
        last_written: when the run last wrote something.
        notes: what could not be read.
    """

    path: Path
    state: State
    config: Mapping[str, Any]
    starts: Sequence[Mapping[str, Any]]
    records: Sequence[Mapping[str, Any]]
    ledger: Mapping[str, Numbers]
    files: Sequence[str | None]
    data: Sequence[DataFile]
    held_out: int
    last_step: int
    total_steps: int | None
    last_written: datetime.datetime
    notes: Sequence[Note]

    @property
    def loss(self) -> Mapping[str, Any]:
        return dict(self.config.get("loss", {}))

    @property
    def beta(self) -> float:
        """Scale of the implicit rewards. For MM-DPO that of a tie: its β grows with the score margin."""
        return float(self.loss.get("beta", self.loss.get("tau", 1.0)))

    @property
    def trained(self) -> list[Mapping[str, Any]]:
        return [record for record in self.records if "loss" in record]

    @property
    def evaluated(self) -> list[Mapping[str, Any]]:
        return [record for record in self.records if "eval_loss" in record]


def read_run(path: str | Path) -> Run:
    """Read a run folder, be its run finished, running or broken off.

    Raises:
        RunError: there is no run, or its `config.json` is damaged.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise RunError(f"{path}: there is no run in this folder (no config.json); name one that `unidpo train` made")
    try:
        config = dict(json.loads(folder.config.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise RunError(f"{folder.config}: is damaged ({error}); nothing says what this run was") from error
    notes: list[Note] = []
    records = _records(folder.metrics)
    ledger, files = _ledger(folder.ledger, notes)
    steps = [int(record["step"]) for record in records] + ([int(ledger["step"].max())] if len(ledger["step"]) else [])
    return Run(
        path=folder.path,
        state=_state(folder),
        config=config,
        starts=_starts(folder.environment, notes),
        records=records,
        ledger=ledger,
        files=files,
        data=_data(folder.path, notes),
        held_out=_held_out(folder.path),
        last_step=max(steps, default=0),
        total_steps=_total_steps(folder),
        last_written=_last_written(folder),
        notes=notes,
    )


def _state(folder: RunFolder) -> State:
    if folder.finished:
        return "finished"
    try:
        refuse_if_in_use(folder.path)
    except FolderInUse:
        return "running"
    return "broken"


def _records(path: Path) -> list[dict[str, Any]]:
    """Whole lines; a killed process may have left half of one."""
    records = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = dict(json.loads(line))
            records.append(record | {"step": int(record["step"])})
        except (ValueError, KeyError, TypeError):
            continue
    return records


def _ledger(path: Path, notes: list[Note]) -> tuple[dict[str, Numbers], list[str | None]]:
    tables = [LEDGER_SCHEMA.empty_table()]
    for part in sorted(path.glob("part-*.parquet")):
        try:
            tables.append(pq.ParquetFile(part, page_checksum_verification=True).read().cast(LEDGER_SCHEMA))
        except (OSError, ValueError, pa.ArrowException):
            notes.append(Note("note-damaged", {"file": part.name}))
    table = pa.concat_tables(tables)
    coded = table["file"].combine_chunks().dictionary_encode(null_encoding="encode")
    columns = {
        name: np.asarray(table[name].cast(pa.float64()).to_numpy(), dtype=np.float64)
        for name in table.column_names
        if name != "file"
    }
    columns["file"] = np.asarray(coded.indices.to_numpy(zero_copy_only=False), dtype=np.float64)
    return columns, coded.dictionary.to_pylist()


def _starts(path: Path, notes: list[Note]) -> list[dict[str, Any]]:
    try:
        return [dict(start) for start in json.loads(path.read_text("utf-8"))["starts"]]
    except (OSError, ValueError, KeyError, TypeError):
        notes.append(Note("note-damaged", {"file": path.name}))
        return []


def _data(run: Path, notes: list[Note]) -> list[DataFile]:
    try:
        return began_with(run)
    except (RunError, TypeError):
        notes.append(Note("note-damaged", {"file": "inputs.json"}))
        return []


def _held_out(run: Path) -> int:
    try:
        return sum(pq.read_table(run / "inputs.parquet", columns=["held_out"])["held_out"].to_pylist())
    except (OSError, ValueError, pa.ArrowException):
        return 0


def _total_steps(folder: RunFolder) -> int | None:
    for checkpoint in folder.checkpoints:
        try:
            return int(json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["max_steps"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _last_written(folder: RunFolder) -> datetime.datetime:
    written = [path.stat().st_mtime for path in (folder.config, folder.metrics, folder.model) if path.exists()]
    return datetime.datetime.fromtimestamp(max(written), datetime.UTC)
