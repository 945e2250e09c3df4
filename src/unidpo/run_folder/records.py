"""What a run writes down as it goes: `metrics.jsonl`, and the ledger of every pair's every visit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from unidpo.files.writing import replacing, write_atomically


class Metrics:
    """Appends to `metrics.jsonl`: one JSON object per logged step, on disk when `add` returns.

    Args:
        path: the file.
        resume_step: records of later steps, and a last line that was cut off, are dropped.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        write_atomically(path, "".join(f"{line}\n" for line in _lines_up_to(resume_step, path)).encode())

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record; it needs a `step`. NaN and infinities, which JSON lacks, become null."""
        if "step" not in record:
            raise ValueError("a record of metrics needs its step")
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")


def count_records(path: Path, step: int) -> int:
    """How many whole records of `metrics.jsonl` there are up to a step; 0 where there is no file."""
    return len(_lines_up_to(step, path))


def _lines_up_to(step: int, path: Path) -> list[str]:
    kept = []
    # A line that was damaged may be no UTF-8.
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


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
        self._tables: list[pa.Table] = []
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
        if others := rows.keys() ^ set(LEDGER_SCHEMA.names):
            raise ValueError(f"columns missing or unknown: {sorted(others)}")
        arrays = []
        for column in LEDGER_COLUMNS:
            values = rows[column.name]
            if values is None and column.nullable:
                arrays.append(pa.nulls(len(rows["step"] or ()), column.type))
            elif values is None:
                raise ValueError(f"columns without values: {column.name}")
            else:  # a missing score arrives as NaN; a NaN loss is a fact and stays one
                arrays.append(pa.array(values, column.type, from_pandas=column.nullable))
        table = pa.Table.from_arrays(arrays, schema=LEDGER_SCHEMA)
        table.validate()
        self._tables.append(table)
        if sum(map(len, self._tables)) >= self.rows_per_part:
            self.flush()

    def flush(self) -> None:
        """Put every row added so far on disk. Call it before a checkpoint is written, and at the end."""
        if self._tables and len(table := pa.concat_tables(self._tables)):
            steps = table["step"].to_pylist()
            _write(table, self._free_name(min(steps), max(steps)))
        self._tables.clear()

    def _drop_after(self, step: int, part: Path) -> None:
        first, last = _steps_of(part)
        if first > step:
            part.unlink()
        elif last > step:
            table = pq.read_table(part, schema=LEDGER_SCHEMA)
            # In place, then renamed: at no moment are there two parts with the same rows.
            _write(table.filter(pa.compute.less_equal(table["step"], step)), part)
            part.rename(self._free_name(first, step))

    def _free_name(self, first: int, last: int) -> Path:
        """The name of a part; names sort as parts were written, also where several hold the same steps."""
        stem, number = f"part-{first:08d}-{last:08d}", 0
        path = self.path / f"{stem}.parquet"
        while path.exists():
            number += 1
            path = self.path / f"{stem}_{number:04d}.parquet"
        return path


def _write(table: pa.Table, path: Path) -> None:
    with replacing(path) as unfinished:
        pq.write_table(table, unfinished, write_page_checksum=True)


def count_rows(path: Path, step: int) -> int:
    """How many rows of a ledger there are up to a step; 0 where there is none.

    Raises:
        ValueError: a part that holds such rows is damaged; names it.
    """
    rows = 0
    for part in sorted(path.glob("part-*.parquet")):
        if _steps_of(part)[0] > step:
            continue
        try:
            table = pq.ParquetFile(part, page_checksum_verification=True).read()
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{part} is damaged") from error
        if not table.schema.equals(LEDGER_SCHEMA):
            raise ValueError(f"{part} is damaged")
        rows += pyarrow.compute.sum(pyarrow.compute.less_equal(table["step"], step), min_count=0).as_py()
    return rows


def _steps_of(part: Path) -> tuple[int, int]:
    """First and last optimizer step of a part."""
    name = _PART.fullmatch(part.name)
    return (int(name[1]), int(name[2])) if name else (0, 0)
