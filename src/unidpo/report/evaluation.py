"""Results of `unidpo eval`, read from its folders: each model's benchmarks with intervals, and answers that changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unidpo.errors import RunError, shown
from unidpo.evaluate.comparing import bootstrap
from unidpo.evaluate.results import RESULTS, read_judged

MOST_CHANGED = 200
"""Changed answers in one page, those from right to wrong first."""
LONGEST_ANSWER = 600


@dataclass(frozen=True, slots=True)
class Bar:
    """A model's result on a benchmark; `low` and `high` hold 95 % of what other questions of its kind would give."""

    label: str
    value: float
    low: float
    high: float
    questions: int


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark with the models that took it."""

    name: str
    metric: str
    best: float
    bars: list[Bar]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What some folders of results hold.

    Attributes:
        benchmarks: by name, each with its models.
        differences: of `comparison.json`; see `unidpo.evaluate.comparing.Difference`.
        changed: answers that became wrong or right, as lines of `changed-MODEL.jsonl`.
        changed_total: how many there are; `changed` may hold fewer.
        failed: name of model and benchmark, and why there is no result.
    """

    benchmarks: list[Benchmark]
    differences: list[dict[str, Any]]
    changed: list[dict[str, str]]
    changed_total: int
    failed: list[tuple[str, str, str]]


def read_evaluations(folders: Sequence[str | Path]) -> Evaluation:
    """Read folders that `unidpo eval` wrote: of one model, or of several beside each other.

    Raises:
        RunError: a folder holds no results, or damaged ones.
    """
    benchmarks: dict[tuple[str, str], Benchmark] = {}
    failed: list[tuple[str, str, str]] = []
    differences: list[dict[str, Any]] = []
    changed: list[dict[str, str]] = []
    for folder in map(Path, folders):
        try:
            for model in _models(folder):
                _add_model(model, benchmarks, failed)
            comparison = folder / "comparison.json"
            if comparison.is_file():
                differences += json.loads(comparison.read_text("utf-8"))
            for path in sorted(folder.glob("changed-*.jsonl")):
                changed += [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{folder}: its results are damaged ({shown(str(error))}); evaluate again") from error
    changed.sort(key=lambda line: line["change"] != "right to wrong")
    cut = [{key: str(value)[:LONGEST_ANSWER] for key, value in line.items()} for line in changed[:MOST_CHANGED]]
    return Evaluation(list(benchmarks.values()), differences, cut, len(changed), failed)


def _models(folder: Path) -> list[Path]:
    """Folders of models, the one that others are compared to first."""
    if (folder / RESULTS).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{RESULTS}"))
    if not found:
        raise RunError(f"{folder}: there are no results ({RESULTS}) in it; name a folder that `unidpo eval` wrote")
    comparison = folder / "comparison.json"
    first = json.loads(comparison.read_text("utf-8")) if comparison.is_file() else []
    before = first[0]["before"] if first else None
    return sorted(found, key=lambda path: path.name != before)


def _add_model(folder: Path, benchmarks: dict[tuple[str, str], Benchmark], failed: list[tuple[str, str, str]]) -> None:
    record = json.loads((folder / RESULTS).read_text("utf-8"))
    for result in record["benchmarks"]:
        if result["failure"] is not None:
            failed.append((record["label"], result["name"], result["failure"]))
            continue
        judged = read_judged(folder / result["name"])
        low, high = bootstrap(judged, statistic=result["statistic"], best=result["best"])
        known = benchmarks.setdefault(
            (result["name"], result["metric"]), Benchmark(result["name"], result["metric"], result["best"], [])
        )
        questions = len({each.index for each in judged})
        known.bars.append(Bar(record["label"], result["value"], low, high, questions))
