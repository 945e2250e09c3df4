"""Ask a model questions about pictures, and make data sets of questions and answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from unidpo.demo.digits import KINDS, DigitQuestion, Kind, is_correct, noisy_grade
from unidpo.generate.hugging_face import HuggingFace
from unidpo.generate.questions import Answer, Generation, Question, Sampling
from unidpo.model.load import Processor

MOST_NEW_TOKENS = 6
"""The longest right answer takes three tokens and the end mark."""
BATCH_SIZE = 100


@dataclass(frozen=True, slots=True)
class Measured:
    """How well questions were answered.

    Attributes:
        accuracy: share answered correctly.
        standard_error: of the accuracy, binomial.
        questions: how many.
    """

    accuracy: float
    standard_error: float
    questions: int

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} ± {100 * self.standard_error:.1f} %"


def greedy_answers(
    model: PreTrainedModel, processor: Processor, questions: Sequence[DigitQuestion], *, batch_size: int = BATCH_SIZE
) -> list[str]:
    """The most likely answer to each question, token by token."""
    answerer = HuggingFace(model, processor, batch_size=batch_size)
    answers: dict[str, Answer] = {}
    for batch in answerer.answer(_asked(questions), Generation(MOST_NEW_TOKENS)):
        answers |= batch
    return [answers[str(i)].text.strip() for i in range(len(questions))]


def sampled_answers(
    model: PreTrainedModel,
    processor: Processor,
    questions: Sequence[DigitQuestion],
    *,
    count: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[str]]:
    """``count`` answers to each question, drawn at temperature 1; the same for the same seed."""
    answerer = HuggingFace(model, processor, batch_size=BATCH_SIZE)
    sampling = Sampling(count, seed=seed)
    answers = answerer.sample(_asked(questions), Generation(MOST_NEW_TOKENS), sampling, on_progress)
    return [[answer.text.strip() for answer in answers[str(i)]] for i in range(len(questions))]


def _asked(questions: Sequence[DigitQuestion]) -> list[Question]:
    return [Question(str(i), (question.image, question.prompt)) for i, question in enumerate(questions)]


def accuracies(questions: Sequence[DigitQuestion], answers: Sequence[str]) -> dict[Kind, Measured]:
    """Accuracy per kind of question, for the kinds there are."""
    table = {}
    for kind in KINDS:
        right = [is_correct(q, a) for q, a in zip(questions, answers, strict=True) if q.kind == kind]
        if right:
            accuracy = sum(right) / len(right)
            table[kind] = Measured(accuracy, math.sqrt(accuracy * (1 - accuracy) / len(right)), len(right))
    return table


def write_ranked_data(
    questions: Sequence[DigitQuestion],
    answers: Sequence[Sequence[str]],
    folder: Path,
    *,
    noise: float,
    rng: np.random.Generator,
) -> Path:
    """Grade answers and write them as a data set in the ranked-responses layout, the pictures beside it.

    Equal answers to one question are one response with one grade. A question whose responses all got the same
    grade teaches no preference and is left out. Returns the file.

    Args:
        questions: what was asked.
        answers: of each question, one or more; empty ones are not written.
        folder: receives ``ranked.jsonl`` and ``images/``.
        noise: share of grades drawn by chance (see ``noisy_grade``).
        rng: draws them.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for question, texts in zip(questions, answers, strict=True):
        distinct = [text for text in dict.fromkeys(texts) if text]
        scored = [{"text": text, "score": noisy_grade(question, text, rng, noise=noise)} for text in distinct]
        if len({response["score"] for response in scored}) < 2:
            continue
        name = f"images/{len(lines) + 1:04d}.png"
        question.image.save(folder / name)
        row = {"prompt": f"<image>{question.prompt}", "images": [name], "responses": scored}
        lines.append(json.dumps(row) + "\n")
    path = folder / "ranked.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_benchmark(questions: Sequence[DigitQuestion], folder: Path) -> Path:
    """Write questions as a benchmark that `unidpo eval` reads; returns its YAML file.

    Args:
        questions: what is asked.
        folder: receives ``benchmark.yaml``, ``questions.jsonl`` and ``images/``.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, question in enumerate(questions, start=1):
        name = f"images/{number:04d}.png"
        question.image.save(folder / name)
        row = {"question": question.prompt, "answer": question.answer, "category": question.kind, "image": name}
        rows.append(json.dumps(row) + "\n")
    (folder / "questions.jsonl").write_text("".join(rows), encoding="utf-8")
    path = folder / "benchmark.yaml"
    path.write_text(
        f"name: digits\nfile: questions.jsonl\ntype: exact\nmax_new_tokens: {MOST_NEW_TOKENS}\n", encoding="utf-8"
    )
    return path
