"""Benchmarks of one's own: a YAML file beside a table of questions and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unidpo.config.explaining import findings_of
from unidpo.config.reading import read_yaml
from unidpo.errors import DataError, did_you_mean, from_findings, shown
from unidpo.evaluate.benchmarks import BenchmarkQuestion, EvaluationError, Judged, Score, md5_of
from unidpo.evaluate.own_rows import Item, read_items
from unidpo.evaluate.scorers import ANSWER_TYPES, VERSION
from unidpo.generate.questions import Generation


class BenchmarkFile(BaseModel):
    """The keys of a benchmark's YAML file.

    Attributes:
        name: of its folder in the results.
        file: the questions; TSV, JSONL or Parquet, relative to the YAML file.
        type: what kind of answer is expected; one of `ANSWER_TYPES`.
        metric: one of the type's rules; the first by default.
        images: folder that image paths start from; by default the one of `file`.
        instruction: what follows each question; the type's by default, "" for nothing.
        max_new_tokens: longest answer.
        min_pixels: images with less width times height are enlarged.
        max_pixels: images with more are scaled down.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][\w-]{0,99}$")
    file: str
    type: str
    metric: str | None = None
    images: str | None = None
    instruction: str | None = None
    max_new_tokens: int = Field(2048, ge=1)
    min_pixels: int | None = Field(None, ge=1)
    max_pixels: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _goes_together(self) -> BenchmarkFile:
        if self.type not in ANSWER_TYPES:
            raise ValueError(f"`type` {_expected(ANSWER_TYPES, self.type)}")
        if self.metric is not None and self.metric not in ANSWER_TYPES[self.type].rules:
            raise ValueError(
                f"`metric` of the type {self.type} {_expected(ANSWER_TYPES[self.type].rules, self.metric)}"
            )
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError("`min_pixels` is more than `max_pixels`; swap them")
        return self


def _expected(known: Mapping[str, Any], given: str) -> str:
    return f"is {' or '.join(known)}, not {shown(given)}{did_you_mean(given, known)}"


class OwnBenchmark:
    """A benchmark read from a YAML file. See `load_benchmark`."""

    def __init__(self, settings: BenchmarkFile, items: Sequence[Item], checksum: str) -> None:
        self.name = settings.name
        self.generation = Generation(settings.max_new_tokens, settings.min_pixels, settings.max_pixels)
        self.settings = settings
        self.items = items
        self.checksum = checksum
        self.metric = settings.metric or next(iter(ANSWER_TYPES[settings.type].rules))

    def identity(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "scorer": f"unidpo {VERSION}",
            "data": self.checksum,
            "type": self.settings.type,
            "metric": self.metric,
            "instruction": instruction_of(self.settings),
        }

    def questions(self, limit: int | None = None) -> list[BenchmarkQuestion]:
        return [item.question for item in self.items[:limit]]

    def score(self, answers: Mapping[str, str]) -> Score:
        asked = [item for item in self.items if item.question.index in answers]
        judged = [self._judged(item, answers[item.question.index]) for item in asked]
        accuracy = _percent(judged)
        parts = {"accuracy": accuracy, **f1_parts(judged)} if self.settings.type == "yesno" else {}
        for category in dict.fromkeys(each.category for each in judged if each.category):
            parts[category] = _percent([each for each in judged if each.category == category])
        if self.metric == "f1":
            return Score("f1", parts["f1"], 100.0, judged, "f1", parts)
        return Score(self.metric, accuracy, 100.0, judged, parts=parts)

    def _judged(self, item: Item, text: str) -> Judged:
        verdict = ANSWER_TYPES[self.settings.type].rules[self.metric](text, item.truth)
        index = item.question.index
        truth = item.truth.answers[0] if self.settings.type == "yesno" else ""
        return Judged(index, index, verdict.value, verdict.said is not None, item.category, truth, verdict.said or "")


def f1_parts(judged: Sequence[Judged]) -> dict[str, float]:
    """Precision, recall and F1 of "yes", in per cent; 0 where nothing is said or true."""
    right = sum(each.truth == each.said == "yes" for each in judged)
    said = sum(each.said == "yes" for each in judged)
    true = sum(each.truth == "yes" for each in judged)
    return {
        "precision": 100 * right / said if said else 0.0,
        "recall": 100 * right / true if true else 0.0,
        "f1": 200 * right / (said + true) if said + true else 0.0,
    }


def _percent(judged: Sequence[Judged]) -> float:
    return 100 * sum(each.value for each in judged) / len(judged) if judged else 0.0


def instruction_of(settings: BenchmarkFile) -> str:
    """What follows each question."""
    return ANSWER_TYPES[settings.type].instruction if settings.instruction is None else settings.instruction


def load_benchmark(path: Path) -> OwnBenchmark:
    """Read a benchmark's YAML file and all its questions. Images are not opened.

    Raises:
        RecipeError: the YAML file cannot be read.
        EvaluationError: something in it is wrong.
        DataError: the questions cannot be read, or rows of them are wrong; all of them at once.
    """
    values: Any = OmegaConf.to_container(read_yaml(path, what="benchmark"))
    try:
        settings = BenchmarkFile.model_validate(values)
    except ValidationError as error:
        findings = findings_of(error, BenchmarkFile, values)
        raise from_findings(EvaluationError, f"{path}: the benchmark cannot be used", findings) from error
    file = path.parent / settings.file
    folder = file.parent if settings.images is None else path.parent / settings.images
    items, findings = read_items(file, settings.type, instruction_of(settings), folder)
    if findings:
        raise from_findings(DataError, f"{file}: rows of the benchmark {settings.name} cannot be used", findings)
    if not items:
        raise DataError(f"{file}: there is no question in it")
    return OwnBenchmark(settings, items, md5_of(file))
