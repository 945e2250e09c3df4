"""The reference as stored numbers: one log-probability per response, computed once and kept on disk as Parquet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from unidpo.cache.store import DamagedPart, Store, part_damage
from unidpo.cache.stored_pass import StoredPass
from unidpo.data.pairs import PromptGroup
from unidpo.errors import ModelError
from unidpo.model.encode import EncodedGroup
from unidpo.model.packs import Collate
from unidpo.model.transfer import to_device

ROUNDING = 1e-4
"""How far above 0 a log-softmax may come out, in nats per token: float32 rounds it by 1e-7 of the largest logit."""
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(16), nullable=False),
        pa.field("logp", pa.float64(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
    ]
)


class Logp(NamedTuple):
    """A response's log-probability in nats, summed over its tokens; and how many these are."""

    logp: float
    tokens: int

    @property
    def is_valid(self) -> bool:
        """Whether it can be one: finite, and not above 0 by more than rounding explains."""
        return math.isfinite(self.logp) and self.logp <= ROUNDING * self.tokens


class LogpStore(Store[Logp, float]):
    """Log-probabilities (nats, summed over the response's tokens) by response key. The main process writes for all."""

    kind = "reference"
    unit = "responses"
    complaint = "the reference gives no log-probabilities (finite numbers, not above 0)"
    each_process_writes = False
    _suffix = ".parquet"

    def lookup(self, keys: Sequence[bytes]) -> Float[Tensor, " _"] | None:
        """The numbers of a group's responses; `None` where one is missing, which could not be read when it was due."""
        if not all(key in self.index for key in keys):
            return None
        return torch.tensor([self.index[key] for key in keys], dtype=torch.float64)

    def add(self, values: Mapping[bytes, Logp]) -> None:
        super().add(values)
        self.index |= {key: value.logp for key, value in values.items()}

    def problem(self, value: Logp) -> str | None:
        return None if value.is_valid else f"the log-probability of a response is {value.logp}"

    def _write(self, file: Path) -> None:
        rows = [{"key": key, **value._asdict()} for key, value in self._new.items()]
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file)

    def _read_part(self, part: Path) -> dict[bytes, float]:
        if problem := part_damage(part):
            raise DamagedPart(problem)
        table = pq.read_table(part, partitioning=None)
        return dict(zip(table["key"].to_pylist(), table["logp"].to_pylist(), strict=True))

    def _contradictions(self, parts: Mapping[Path, Mapping[bytes, float]]) -> dict[Path, str]:
        """Parts that give a key numbers that rounding does not explain.

        Two runs at the same time may each have computed a number, in batches of their own.
        """
        found: dict[Path, str] = {}
        first: dict[bytes, Path] = {}
        for part, numbers in parts.items():
            for key, logp in numbers.items():
                other = first.setdefault(key, part)
                if not math.isclose(parts[other][key], logp, rel_tol=0.1, abs_tol=1.0):
                    for one, another in ((part, other), (other, part)):
                        found[one] = f"contradicts {another.name}, and nobody knows which of the two is right"
        return found


@dataclass
class ReferencePass(StoredPass[Logp]):
    """Computes the log-probabilities of all responses that a store does not hold yet. Every process must run it.

    Attributes:
        collate: how encoded groups become a batch, `packs.pack` or the padded path.
    """

    collate: Collate = field(kw_only=True)
    batch_tokens = 8192  # without gradients this is small beside a training step
    of_responses = True

    def logps(
        self,
        groups: Sequence[PromptGroup],
        keys: Sequence[Sequence[bytes]],
        folder: Path,
        *,
        complete: bool = False,
    ) -> list[Float[Tensor, " _"] | None]:
        """The log-probabilities of each group's responses, in nats; `None` for a group that cannot be read any more.

        Args:
            keys: of each group's responses, see `keys.content_keys`.
            folder: of the store.
            complete: whether the store must hold them all, because the model is not the reference any more.

        Raises:
            ModelError: it does not, or the model gives numbers that are no log-probabilities.
        """
        store = LogpStore.shared(folder, [key for of_group in keys for key in of_group])
        tasks = self.tasks(groups, keys, store)
        if complete and tasks:
            raise ModelError(
                f"{folder}: {sum(len(task.keys) for task in tasks)} stored reference log-probabilities of this run are "
                "gone or damaged, and its model cannot compute them any more; put them back, or begin the run anew"
            )
        self.fill(store, tasks)
        return [store.lookup(of_group) for of_group in keys]

    def _size(self, group: EncodedGroup) -> int:
        return len(group.prompt_ids) + sum(map(len, group.response_ids))

    def _compute(self, groups: Sequence[EncodedGroup]) -> list[Logp]:
        responses = self.collate(groups)
        logps = self.policy.response_logps(to_device(responses, self.device)).tolist()
        return [Logp(*each) for each in zip(logps, responses.response_tokens.tolist(), strict=True)]
