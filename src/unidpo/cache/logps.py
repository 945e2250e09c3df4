"""Log-probabilities of responses on disk, by response key.

A store is a folder of Parquet parts, named by what the numbers depend on besides the response itself: the model's
weights and arithmetic, the processor, the template and the limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from unidpo.cache.store import DamagedPart, clear_unfinished, put_aside, require_undamaged, write_part
from unidpo.distributed import on_main

ROUNDING = 1e-4
"""How far above 0 a log-softmax may come out, in nats per token: float32 rounds it by 1e-7 of the largest logit."""
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(16), nullable=False),
        pa.field("logp", pa.float64(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
    ]
)


def is_logp(logp: float, tokens: int) -> bool:
    """Whether a number can be a response's log-probability: finite, and not above 0 by more than rounding explains."""
    return math.isfinite(logp) and logp <= ROUNDING * tokens


class LogpStore:
    """Log-probabilities (nats, summed over the response's tokens) by response key, in a folder.

    Numbers are added in memory and reach the disk with `flush`.

    Args:
        folder: where the parts lie.
        logps: what is in it; read from the disk where `None`.
    """

    def __init__(self, folder: Path, logps: Mapping[bytes, float] | None = None) -> None:
        self.folder = folder
        self._logps: dict[bytes, float] = dict(logps or {})
        self._new: dict[bytes, tuple[float, int]] = {}
        if logps is None:
            clear_unfinished(folder)
            self.reload()

    @classmethod
    def shared(cls, folder: Path, keys: Sequence[Sequence[bytes]]) -> LogpStore:
        """In each process a store with what the main one finds under these keys. Raises `UserError` in all."""

        def found() -> dict[bytes, float]:
            store = cls(folder)
            return {key: store[key] for group in keys for key in group if key in store}

        return cls(folder, on_main(found))

    def reload(self) -> None:
        """Take in what is on disk; parts that other writers added included. Damaged ones are named and put aside."""
        parts: dict[Path, dict[bytes, float]] = {}
        for part in sorted(self.folder.glob("part-*.parquet")):
            try:
                parts[part] = _numbers_in(part)
            except DamagedPart as error:
                put_aside(part, error)
        for part, other in _contradictions(parts).items():
            put_aside(part, f"contradicts {other.name}, and nobody knows which of the two is right")
            del parts[part]
        for numbers in parts.values():
            self._logps.update(numbers)

    def __contains__(self, key: bytes) -> bool:
        return key in self._logps

    def __getitem__(self, key: bytes) -> float:
        return self._logps[key]

    def __len__(self) -> int:
        return len(self._logps)

    def add(self, key: bytes, logp: float, tokens: int) -> None:
        self._logps[key] = logp
        self._new[key] = (logp, tokens)

    def flush(self) -> None:
        """Write what was added since the last flush as one part, atomically. Raises `UserError` where it cannot."""
        if not self._new:
            return
        rows = [{"key": key, "logp": logp, "tokens": tokens} for key, (logp, tokens) in self._new.items()]
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        write_part(self.folder, ".parquet", lambda unfinished: pq.write_table(table, unfinished))
        self._new.clear()


def _numbers_in(part: Path) -> dict[bytes, float]:
    """The log-probabilities of a part. Raises `DamagedPart` where any of it is not as it should be."""
    require_undamaged(part)
    try:
        table = pq.read_table(part, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise DamagedPart(f"cannot be read ({' '.join(str(error).split())[-200:]})") from error
    if not table.schema.equals(_SCHEMA):
        raise DamagedPart(f"has other columns than {', '.join(_SCHEMA.names)}, or of other types")
    keys, logps, tokens = (table[name].to_pylist() for name in _SCHEMA.names)
    for logp, count in zip(logps, tokens, strict=True):
        if not is_logp(logp, count):
            raise DamagedPart(f"holds {logp}, which is no log-probability of {count} tokens")
    numbers = dict(zip(keys, logps, strict=True))
    if len(numbers) != len(keys):
        raise DamagedPart("holds a key twice")
    return numbers


def _contradictions(parts: Mapping[Path, Mapping[bytes, float]]) -> dict[Path, Path]:
    """Parts that give a key numbers that rounding does not explain, each with another one of them.

    Two runs at the same time may each have computed a number, in batches of their own.
    """
    found: dict[Path, Path] = {}
    first: dict[bytes, Path] = {}
    for part, numbers in parts.items():
        for key, logp in numbers.items():
            other = first.setdefault(key, part)
            if not math.isclose(parts[other][key], logp, rel_tol=0.1, abs_tol=1.0):
                found |= {part: other, other: part}
    return found
