"""Small benchmarks of one's own, and someone who knows their answers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from typer.testing import CliRunner

from unidpo import cli
from unidpo.evaluate.benchmarks import Judged, Statistic
from unidpo.evaluate.comparing import _components, _metric
from unidpo.generate.hugging_face import HuggingFace
from unidpo.generate.questions import Answer, Generation, Question


class Oracle:
    """Answers from a table, and remembers what it was asked."""

    def __init__(self, answers: dict[str, str], model: str = "oracle", batch_size: int = 3) -> None:
        self.answers = answers
        self.model = model
        self.batch_size = batch_size
        self.asked: list[str] = []

    def identity(self) -> dict[str, Any]:
        return {"model": self.model, "prompt_style": "plain"}

    def answer(self, questions: Sequence[Question], generation: Generation) -> Iterator[dict[str, Answer]]:
        for start in range(0, len(questions), self.batch_size):
            batch = questions[start : start + self.batch_size]
            self.asked += [question.index for question in batch]
            yield {question.index: Answer(self.answers[question.index], 1) for question in batch}


def write(folder: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> Path:
    """A benchmark of JSON lines."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "file": "rows.jsonl", "type": "exact"} | settings), "utf-8")
    return path


def write_tsv(folder: Path, rows: Sequence[dict[str, str]], **settings: Any) -> Path:
    with (folder / "rows.tsv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        table.writeheader()
        table.writerows(rows)
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "file": "rows.tsv", "type": "exact"} | settings), "utf-8")
    return path


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def run_eval(*words: object) -> Any:
    return CliRunner().invoke(cli.app, ["eval", *map(str, words)])


def exam(folder: Path, count: int = 8) -> Path:
    return write(folder, [{"question": f"{i}?", "answer": str(i)} for i in range(1, count + 1)])


def truth(count: int = 8) -> dict[str, str]:
    return {str(i): str(i) for i in range(1, count + 1)}


def all_answers(answerer: HuggingFace, questions: Sequence[Question], generation: Generation) -> dict[str, Answer]:
    return {index: answer for batch in answerer.answer(questions, generation) for index, answer in batch.items()}


def metric(judged: Sequence[Judged], *, statistic: Statistic, best: float) -> float:
    """The main metric, by the numbers that the bootstrap draws from."""
    strata: dict[str, list[list[float]]] = {}
    for unit, numbers in _components(judged, statistic).items():
        strata.setdefault(unit.split("/")[0] if statistic == "mme" else "", []).append(numbers)
    return float(
        sum(_metric(np.array(rows).sum(axis=0, keepdims=True), statistic, best)[0] for rows in strata.values())
    )
