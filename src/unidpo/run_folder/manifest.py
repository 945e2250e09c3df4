"""What a checkpoint holds, written down in it: one that has lost something is known by it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from unidpo.files.writing import write_json
from unidpo.run_folder.records import count_records, count_rows

MANIFEST = "manifest.json"
_HASHED_UP_TO = 1 << 24
"""Bytes of a file whose content is compared too; of larger ones (weights, optimizer) the size."""


def write_manifest(checkpoint: Path, step: int, *, run: Path, resumable: bool) -> None:
    """Write down the files of a checkpoint, and how much metrics and ledger of its run hold by then.

    Args:
        checkpoint: with all its files; where it lies does not count.
        step: its optimizer step.
        run: the run folder.
        resumable: whether it holds more than weights.
    """
    files = {path.relative_to(checkpoint).as_posix(): _described(path) for path in _files(checkpoint)}
    written = {
        "step": step,
        "resumable": resumable,
        "metrics": count_records(run / "metrics.jsonl", step),
        "ledger": count_rows(run / "pairs.parquet", step),
        "files": files,
    }
    write_json(checkpoint / MANIFEST, written)


def checkpoint_damage(checkpoint: Path) -> str | None:
    """What a checkpoint has lost of what its manifest lists; `None` where it is whole."""
    written = _read(checkpoint)
    if written is None:
        return f"it has no usable {MANIFEST}, so it is damaged, or an older version of unidpo wrote it"
    problems = []
    for name, expected in written["files"].items():
        path = checkpoint / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected["size"]:
            problems.append(f"{name} has {path.stat().st_size:,} of {expected['size']:,} bytes")
        elif _described(path) != expected:
            problems.append(f"{name} is damaged")
    return ", ".join(problems) or None


def cannot_resume(checkpoint: Path, *, run: Path) -> str | None:
    """Why a run cannot resume from a checkpoint: it, the metrics or the ledger up to it are not whole; else `None`."""
    problem = checkpoint_damage(checkpoint)
    written = _read(checkpoint)
    if problem is not None or written is None:
        return problem
    if not written["resumable"]:
        return "it holds weights alone (`train.save_only_model`), and no optimizer to resume with"
    step = written["step"]
    try:
        records, rows = count_records(run / "metrics.jsonl", step), count_rows(run / "pairs.parquet", step)
    except ValueError as error:
        return f"{error}, and it belongs to the steps before"
    if records < written["metrics"]:  # an evaluation after the checkpoint adds one of its step
        return f"{run / 'metrics.jsonl'} has {records:,} of {written['metrics']:,} records up to step {step}"
    if rows != written["ledger"]:
        return f"{run / 'pairs.parquet'} has {rows:,} of {written['ledger']:,} rows up to step {step}"
    return None


def _read(checkpoint: Path) -> dict[str, Any] | None:
    try:
        written = json.loads((checkpoint / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    complete = isinstance(written, dict) and {"step", "resumable", "metrics", "ledger", "files"} <= written.keys()
    return written if complete else None


def _files(checkpoint: Path) -> list[Path]:
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]


def _described(path: Path) -> dict[str, int | str]:
    size = path.stat().st_size
    if size > _HASHED_UP_TO:
        return {"size": size}
    return {"size": size, "blake2b": hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()}
