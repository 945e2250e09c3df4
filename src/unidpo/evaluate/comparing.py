"""Two models on the same questions: the difference, how sure it is, and which answers changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from unidpo.evaluate.benchmarks import EvaluationError, Judged, Statistic
from unidpo.evaluate.predictions import PREDICTIONS, read_answers
from unidpo.evaluate.results import BenchmarkResult, ModelResult, read_judged
from unidpo.files.writing import write_atomically, write_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers: TypeAlias = NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95
RIGHT = 0.5
"""Credit from which an answer counts as right where answers are listed."""
_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Difference:
    """A benchmark's metric of one model less that of another.

    Attributes:
        benchmark: its name.
        before: the first model.
        after: the other model.
        value: points that `after` is better, on the benchmark's scale.
        low: lower end of the interval that holds 95 % of the differences over questions drawn anew.
        high: its upper end.
        questions: both were asked.
        gained: answers that were wrong and are right.
        lost: answers that were right and are wrong.
    """

    benchmark: str
    before: str
    after: str
    value: float
    low: float
    high: float
    questions: int
    gained: int
    lost: int


def compare(models: Sequence[ModelResult], folder: Path) -> list[Difference]:
    """Differences of each model to the first, on the benchmarks that both have a result for.

    Writes `comparison.json`, and for each model `changed-MODEL.jsonl`.

    Raises:
        EvaluationError: two models were asked different questions.
    """
    before, *others = models
    found = []
    for after in others:
        changed: list[dict[str, str]] = []
        for one, other in zip(before.benchmarks, after.benchmarks, strict=True):
            if one.failure is None and other.failure is None:
                lines = _changed(one.name, before.folder, after.folder)
                changed += lines
                found.append(_difference(before, after, one, other, [line["change"] for line in lines]))
        text = "".join(json.dumps(line) + "\n" for line in changed)
        write_atomically(folder / f"changed-{after.label}.jsonl", text.encode())
    write_json(folder / "comparison.json", [asdict(difference) for difference in found])
    return found


def _changed(benchmark: str, before: Path, after: Path) -> list[dict[str, str]]:
    """Questions that one model gets right and the other wrong, with both answers."""
    folders = [folder / benchmark for folder in (before, after)]
    right = [{each.index: each.value >= RIGHT for each in read_judged(folder)} for folder in folders]
    answers = [read_answers(folder / PREDICTIONS) for folder in folders]
    return [
        {
            "benchmark": benchmark,
            "index": index,
            "change": "right to wrong" if was else "wrong to right",
            "before": answers[0][index].text,
            "after": answers[1][index].text,
        }
        for index, was in right[0].items()
        if index in right[1] and right[1][index] != was
    ]


def _difference(
    before: ModelResult, after: ModelResult, one: BenchmarkResult, other: BenchmarkResult, changes: Sequence[str]
) -> Difference:
    judged = [read_judged(model.folder / one.name) for model in (before, after)]
    try:
        low, high = paired_bootstrap(*judged, statistic=one.statistic, best=one.best)
    except ValueError as error:
        raise EvaluationError(f"{one.name}: {error}; evaluate both with the same --limit") from error
    gained, lost = changes.count("wrong to right"), changes.count("right to wrong")
    questions = len({each.index for each in judged[0]})
    value = other.value - one.value
    return Difference(one.name, before.label, after.label, value, low, high, questions, gained, lost)


def paired_bootstrap(
    before: Sequence[Judged], after: Sequence[Judged], *, statistic: Statistic, best: float
) -> tuple[float, float]:
    """The 95 % interval of the difference between two models on the same questions.

    Units of questions are drawn with replacement, the same ones for both models; in MME within each category, so that
    none goes missing. The interval is that of percentiles.

    Args:
        before: answers of one model, judged.
        after: those of the other, on the same questions.
        statistic: how the metric follows from them.
        best: what a perfect model gets.

    Raises:
        ValueError: the questions are not the same.
    """
    tables = [_components(judged, statistic) for judged in (before, after)]
    if tables[0].keys() != tables[1].keys():
        raise ValueError("the two models were asked different questions")
    one, other = _resampled(tables, statistic, best)
    return _middle(other - one)


def bootstrap(judged: Sequence[Judged], *, statistic: Statistic, best: float) -> tuple[float, float]:
    """The 95 % interval of one model's metric over questions drawn anew; as `paired_bootstrap`."""
    (values,) = _resampled([_components(judged, statistic)], statistic, best)
    return _middle(values)


def _resampled(tables: Sequence[dict[str, list[float]]], statistic: Statistic, best: float) -> Numbers:
    """Metrics (models, draws) of models on the same units, drawn anew."""
    strata: dict[str, list[str]] = {}
    for unit in tables[0]:
        strata.setdefault(unit.split("/", 1)[0] if statistic == "mme" else "", []).append(unit)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES // _AT_ONCE):
        metrics = np.zeros((len(tables), _AT_ONCE))
        for units in strata.values():
            weights = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), size=_AT_ONCE)
            for metric, table in zip(metrics, tables, strict=True):
                metric += _metric(weights @ np.array([table[u] for u in units]), statistic, best)
        drawn.append(metrics)
    return np.concatenate(drawn, axis=1)


def _middle(values: Numbers) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _components(judged: Sequence[Judged], statistic: Statistic) -> dict[str, list[float]]:
    """By unit, the numbers whose sums over all units give the metric."""
    units: dict[str, list[Judged]] = {}
    for each in judged:
        units.setdefault(each.unit, []).append(each)
    return {unit: _sums(rows, statistic) for unit, rows in units.items()}


def _sums(rows: Sequence[Judged], statistic: Statistic) -> list[float]:
    right = sum(each.value for each in rows)
    if statistic == "f1":
        said_or_true = sum(each.said == "yes" for each in rows) + sum(each.truth == "yes" for each in rows)
        return [sum(each.truth == each.said == "yes" for each in rows), said_or_true]
    if statistic == "mme":  # right questions, questions, pictures with both right, pictures
        return [right, len(rows), float(all(each.value for each in rows)), 1]
    return [right / len(rows), 1]


def _metric(sums: Numbers, statistic: Statistic, best: float) -> Numbers:
    """Sums (draws, components) → metric (draws,)."""
    if statistic == "f1":
        return 200 * sums[:, 0] / np.maximum(sums[:, 1], 1)
    if statistic == "mme":
        return 100 * (sums[:, 0] / sums[:, 1] + sums[:, 2] / sums[:, 3])
    return best * sums[:, 0] / sums[:, 1]
