"""What it costs to read micro-batches: an image in a worker, and what comes from a worker in the process that trains.

    python -m benchmarks.reading

A micro-batch is a pair with a photograph of 3,036 patches, as in the authors' setting. CPU seconds, medians. Adds a
record to benchmarks/results/reading.json.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.check import photograph
from benchmarks.records import add_record
from benchmarks.shapes import GOLDEN
from unidpo.data.pairs import IMAGE, Message, Pair, PromptGroup, Response
from unidpo.model.batches import Batch, BatchMaker
from unidpo.model.encode import Encoder, plain_positions
from unidpo.model.load import load_processor
from unidpo.model.transfer import Parcel, opened

RUNS = 15
SIZE = (1280, 900)
ITEMS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the record and add it to no file")
    parser.add_argument("--runs", type=int, default=RUNS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = {"runs": options.runs, "images": images(options.runs), "items": items()}
    print(json.dumps(record, indent=1))
    if not options.dry_run:
        add_record("reading", torch=torch.__version__, **record)


def images(runs: int) -> dict[str, dict[str, float]]:
    """CPU seconds to make a micro-batch, and its bytes, by what its pixels are; in turn."""
    ways = {"float32": maker(in_bytes=False), "bytes": maker(in_bytes=True)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, each in ways.items():
            seconds[name].append(_seconds(lambda each=each: Parcel.of(batch_of(each))))  # type: ignore[misc]
    return {
        name: {"seconds": statistics.median(seconds[name]), "bytes": Parcel.of(batch_of(each)).buffer.nbytes}
        for name, each in ways.items()
    }


def items() -> dict[str, dict[str, float]]:
    """CPU seconds of the main process for an item from a worker, and its open files while it holds 64 of them."""
    made = batch_of(maker(in_bytes=False))
    return {name: _received(made, collate) for name, collate in (("tensors", _as_it_is), ("one buffer", Parcel.of))}


def _received(made: Batch, collate: Callable[[Any], Any]) -> dict[str, float]:
    loader: DataLoader[Any] = DataLoader(_Copies(made), batch_size=None, collate_fn=collate, num_workers=1)
    held: list[Batch] = []
    seconds = _seconds(lambda: held.extend(map(opened, loader)))
    return {"seconds": seconds / ITEMS, "open_files": len(list(Path("/proc/self/fd").iterdir()))}


def maker(*, in_bytes: bool) -> BatchMaker:
    file = io.BytesIO()
    Image.open(io.BytesIO(photograph(0))).resize(SIZE).save(file, "JPEG", quality=90)
    responses = (Response("a short answer " * 30, 5.0), Response("another one " * 30, 3.0))
    message = Message("user", (IMAGE, "What is to be seen here?"))
    groups = [PromptGroup((message,), (file.getvalue(),), responses, (Pair(0, 1, 1),))]
    encoder = Encoder(load_processor(GOLDEN), plain_positions)
    return BatchMaker(groups, encoder.in_bytes(groups) if in_bytes else encoder)


def batch_of(each: BatchMaker) -> Batch:
    batch, _ = each.batch([(0, (0,))])
    assert batch is not None
    return batch


class _Copies(Dataset[Batch]):
    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, place: int) -> Batch:
        return copy.deepcopy(self._batch)  # in memory of its own, as one that was made


def _as_it_is(item: Any) -> Any:
    return item


def _seconds(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


if __name__ == "__main__":
    main()
