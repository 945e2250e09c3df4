"""Benchmarks of one's own: a YAML file beside a table of questions and answers.

Answers keep their spelling: "007", "None" and "=1+1" are compared as they stand in the file.
"""

from __future__ import annotations

import base64
import csv
import functools
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unidpo.data.formats.files import loads, rows_of
from unidpo.errors import DataError, Finding, did_you_mean, from_findings, shown
from unidpo.evaluate import scorers
from unidpo.evaluate.benchmarks import BenchmarkQuestion, EvaluationError, Judged, Score, Statistic
from unidpo.evaluate.scorers import Verdict
from unidpo.files.regular import open_regular, read_regular
from unidpo.generate.questions import Generation, Part

Type: TypeAlias = Literal["mcq", "yesno", "vqa", "exact"]
METRICS: Mapping[Type, tuple[str, ...]] = {
    "mcq": ("accuracy",),
    "yesno": ("accuracy", "f1"),
    "vqa": tuple(scorers.VQA_RULES),
    "exact": ("accuracy",),
}
"""What each type can be measured by, the default first."""
INSTRUCTIONS: Mapping[Type, str] = {
    "mcq": "Answer with the letter of the right option.",
    "yesno": "Answer with yes or no.",
    "vqa": "Answer with a word or a short phrase.",
    "exact": "",
}
"""What follows the question, on a line of its own, where the file says nothing else."""
SCORER_VERSION = 1
"""Raised whenever a rule changes what some answer is worth."""
YES_NO: Mapping[str, str] = {"yes": "", "no": ""}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARK = "<image>"
_DATA_URI = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_LONGEST_PATH = 1024


class BenchmarkFile(BaseModel):
    """The keys of a benchmark's YAML file.

    Attributes:
        name: of its folder in the results.
        file: the questions; TSV, JSONL or Parquet, relative to the YAML file.
        type: what kind of answer is expected.
        metric: one of `METRICS[type]`, the first by default.
        images: folder that image paths start from; by default the one of `file`.
        instruction: what follows each question; one per type by default, "" for nothing.
        max_new_tokens: longest answer.
        min_pixels: images with less width times height are enlarged.
        max_pixels: images with more are scaled down.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][\w-]{0,99}$")
    file: str
    type: Type
    metric: str | None = None
    images: str | None = None
    instruction: str | None = None
    max_new_tokens: int = Field(2048, ge=1)
    min_pixels: int | None = Field(None, ge=1)
    max_pixels: int | None = Field(None, ge=1)


@dataclass(frozen=True, slots=True)
class Item:
    """A row: the question, and what is needed to judge an answer."""

    question: BenchmarkQuestion
    answers: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    category: str = ""


class OwnBenchmark:
    """A benchmark read from a YAML file. See `load_benchmark`."""

    def __init__(self, settings: BenchmarkFile, items: Sequence[Item], checksum: str) -> None:
        self.settings = settings
        self.items = items
        self.checksum = checksum
        self.metric = settings.metric or METRICS[settings.type][0]

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def generation(self) -> Generation:
        return Generation(self.settings.max_new_tokens, self.settings.min_pixels, self.settings.max_pixels)

    def identity(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "scorer": f"unidpo {SCORER_VERSION}",
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
        by_category: dict[str, list[Judged]] = {}
        for each in judged:
            by_category.setdefault(each.category, []).append(each)
        parts = {name: _percent(rows) for name, rows in by_category.items() if name}
        if self.settings.type != "yesno":
            return Score(self.metric, _percent(judged), 100.0, judged, parts=parts)
        parts = {"accuracy": _percent(judged), **f1_parts(judged), **parts}
        statistic: Statistic = "f1" if self.metric == "f1" else "mean"
        return Score(self.metric, parts[self.metric], 100.0, judged, statistic, parts)

    def _judged(self, item: Item, text: str) -> Judged:
        verdict = self._verdict(item, text)
        index = item.question.index
        truth = item.answers[0] if self.settings.type == "yesno" else ""
        said = verdict.said or ""
        return Judged(index, index, verdict.value, verdict.said is not None, item.category, truth, said)

    def _verdict(self, item: Item, text: str) -> Verdict:
        match self.settings.type:
            case "mcq":
                return scorers.multiple_choice(text, item.answers[0], item.options)
            case "yesno":
                return scorers.yes_or_no(text, item.answers[0])
            case "vqa":
                return scorers.VQA_RULES[self.metric](text, item.answers)
            case "exact":
                return scorers.exact(text, item.answers)


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
    return INSTRUCTIONS[settings.type] if settings.instruction is None else settings.instruction


def load_benchmark(path: Path) -> OwnBenchmark:
    """Read a benchmark's YAML file and all its questions. Images are not opened.

    Raises:
        EvaluationError: the YAML file cannot be read, or something in it is wrong.
        DataError: the questions cannot be read, or rows of them are wrong; all of them at once.
    """
    settings = _settings(path)
    file = path.parent / settings.file
    root = file.parent if settings.images is None else path.parent / settings.images
    reader = _Reader(file, root, settings)
    items = [item for number, row in _rows(file) if (item := reader.item(number, row)) is not None]
    if not items and not reader.findings:
        raise DataError(f"{file}: there is no question in it")
    if reader.findings:
        title = f"{file}: rows of the benchmark `{settings.name}` cannot be used"
        raise from_findings(DataError, title, reader.findings)
    return OwnBenchmark(settings, items, file_checksum(file))


def file_checksum(path: Path) -> str:
    """MD5 of a file, as VLMEvalKit names its data."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def _settings(path: Path) -> BenchmarkFile:
    try:
        values = yaml.safe_load(read_regular(path).decode("utf-8-sig"))
    except OSError as error:
        raise EvaluationError(f"{path}: the benchmark cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise EvaluationError(f"{path}: a benchmark has the keys `name`, `file` and `type`; see docs/evaluation.md")
    try:
        settings = BenchmarkFile.model_validate(values)
    except ValidationError as error:
        findings = [_finding(path, problem) for problem in error.errors()]
        raise from_findings(EvaluationError, f"{path}: this is no benchmark as it stands", findings) from error
    allowed = METRICS[settings.type]
    if settings.metric not in (None, *allowed):
        hint = did_you_mean(settings.metric or "", allowed)
        problem = f"`metric` of the type {settings.type} is {' or '.join(allowed)}, not {shown(settings.metric)}{hint}"
        raise EvaluationError(f"{path}: {problem}")
    if settings.min_pixels and settings.max_pixels and settings.min_pixels > settings.max_pixels:
        raise EvaluationError(f"{path}: `min_pixels` is more than `max_pixels`; swap them")
    return settings


def _finding(path: Path, problem: Any) -> Finding:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        message = f"there is no such key{did_you_mean(key, BenchmarkFile.model_fields)}"
    elif problem["type"] == "missing":
        message = "this key is missing"
    else:
        message = f"{problem['msg'][:1].lower()}{problem['msg'][1:]}, not {shown(problem['input'])}"
    return Finding("bad-key", message, file=path, key=key)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows and their numbers from 1. No value is converted: what looks like a number stays text."""
    if path.suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(path)
    elif path.suffix == ".parquet":
        yield from rows_of(path)
    elif path.suffix == ".tsv":
        yield from enumerate(_table(path), start=1)
    else:
        raise EvaluationError(f"{path}: the questions of a benchmark are a .tsv, .jsonl or .parquet file")


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, loads(line, parse_int=str, parse_float=str, parse_constant=str)
            except (ValueError, RecursionError) as error:
                yield number, Finding("broken-json", f"the line is not valid JSON ({error})")


def _table(path: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)  # a cell may hold an image
    try:
        yield from csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t", restkey="", strict=True)
    except csv.Error as error:
        raise DataError(f"{path}: not a table of tab-separated values ({error})") from error


def _text(path: Path) -> str:
    try:
        return read_regular(path).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: the questions cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the file is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


class _Reader:
    """Turns rows into items and collects what is wrong with them."""

    def __init__(self, file: Path, images: Path, settings: BenchmarkFile) -> None:
        self.file = file
        self.images = images
        self.type = settings.type
        self.instruction = instruction_of(settings)
        self.findings: list[Finding] = []
        self._seen: set[str] = set()
        self._shared: dict[str, Path | bytes] = {}

    def item(self, number: int, row: Any) -> Item | None:
        before = len(self.findings)
        if isinstance(row, dict) and row.get("") is not None:
            self._wrong(number, "extra-cells", None, "the row has more cells than the table has columns")
            return None
        if isinstance(row, Finding):
            self._wrong(number, row.kind, None, row.message)
            return None
        if not isinstance(row, dict):
            self._wrong(number, "wrong-type", None, "a row is an object with `question` and `answer`")
            return None
        index = self._string(number, row, "index", default=str(number))
        if index in self._seen:
            self._wrong(number, "same-index", "index", f"{shown(index)} was the index of an earlier row")
        self._seen.add(index)
        question = self._string(number, row, "question", default=None)
        options = {x: str(row[x]) for x in LETTERS if row.get(x) not in (None, "")} if self.type == "mcq" else {}
        answers = self._answers(number, row, options)
        hint, category = (self._string(number, row, key, default="") for key in ("hint", "category"))
        lines = [hint, question, *(f"{letter}. {text}" for letter, text in options.items()), self.instruction]
        parts = self._parts(number, row, "\n".join(line for line in lines if line))
        if len(self.findings) > before:
            return None
        choices = options or (YES_NO if self.type == "yesno" else {})
        return Item(BenchmarkQuestion(index, parts, choices), answers, options, category)

    def _wrong(self, number: int, kind: str, key: str | None, problem: str) -> None:
        self.findings.append(Finding(kind, problem, row=number, key=key))

    def _string(self, number: int, row: dict[str, Any], key: str, *, default: str | None) -> str:
        value = row.get(key)
        if value is None or value == "":
            if default is None:
                self._wrong(number, "missing-key", key, "it is missing or empty")
            return default or ""
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            self._wrong(number, "wrong-type", key, f"text is expected, not {shown(value)}; put it in quotes")
            return ""
        if not str(value).isascii() and any("\ud800" <= character <= "\udfff" for character in str(value)):
            self._wrong(
                number, "broken-text", key, "half a character stands in it (\\ud800 to \\udfff); write it whole"
            )
        return str(value)

    def _answers(self, number: int, row: dict[str, Any], options: Mapping[str, str]) -> tuple[str, ...]:
        value = row.get("answer")
        if self.type == "vqa" and isinstance(value, str) and value.startswith("["):
            value = _list_of_texts(value) or value
        if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
            if self.type in ("vqa", "exact"):
                return tuple(value)
            self._wrong(number, "wrong-type", "answer", f"the type {self.type} has one answer")
            return ()
        answer = self._string(number, row, "answer", default=None)
        if self.type == "mcq" and answer and (answer not in options or len(options) < 2):
            problem = f"the answer {shown(answer)} is none of the letters {', '.join(options) or '(there are none)'}"
            self._wrong(number, "bad-answer", "answer", f"{problem}; options are the columns A, B, ...")
        if self.type == "yesno" and answer and answer.lower() not in ("yes", "no"):
            self._wrong(number, "bad-answer", "answer", f"the answer is yes or no, not {shown(answer)}")
        return (answer.lower() if self.type == "yesno" else answer,)

    def _parts(self, number: int, row: dict[str, Any], text: str) -> tuple[Part, ...]:
        """Images where the text has marks for all of them, else before it."""
        given = [key for key in ("images", "image", "image_path") if row.get(key) not in (None, "", [])]
        if len(given) > 1:
            self._wrong(number, "wrong-type", given[1], f"`{given[0]}` is given too; keep one of them")
        value = row[given[0]] if given else []
        if isinstance(value, str) and value.startswith("["):
            value = _list_of_texts(value) or value
        entries = value if isinstance(value, list) else [value]
        images = [image for each in entries if (image := self._image(number, each, given[0])) is not None]
        pieces = text.split(_MARK)
        if len(pieces) == 1:
            return (*images, text)
        if len(pieces) - 1 != len(images):
            problem = f"`{_MARK}` stands {len(pieces) - 1} times in the question, and the row has {len(images)} images"
            self._wrong(number, "image-marks", "question", problem)
            return ()
        mixed = [piece for pair in zip(pieces, [*images, ""], strict=True) for piece in pair]
        return tuple(piece for piece in mixed if piece != "")

    def _image(self, number: int, value: Any, key: str) -> Path | bytes | None:
        """A path joined to the image folder, or the bytes a table holds. The disk is not touched."""
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            self._wrong(number, "wrong-type", key, f"an image is a path or base64, not {shown(value)}")
            return None
        if value not in self._shared:
            data = _decoded(value)
            self._shared[value] = self.images / value if data is None else data
        return self._shared[value]


def _decoded(text: str) -> bytes | None:
    """The bytes behind base64 text; `None` where it is none, which makes it a path."""
    match = _DATA_URI.match(text)
    if match is None and len(text) <= _LONGEST_PATH and not text.startswith(("iVBOR", "/9j/", "R0lGOD", "UklGR")):
        return None
    try:
        return base64.b64decode(text[match.end() if match else 0 :], validate=True)
    except ValueError:
        return None


def _list_of_texts(text: str) -> list[str] | None:
    """What a JSON list of strings in a cell of a table says; `None` where the cell is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and value and all(isinstance(each, str) for each in value) else None
