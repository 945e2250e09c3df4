"""Ask a model questions about pictures: greedy answers to measure it, sampled answers to make training data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedModel

from unidpo.demo.digits import KINDS, Kind, Question, is_correct, noisy_grade
from unidpo.model.load import Processor

Progress: TypeAlias = Callable[[int, int], None]
"""Called with how many questions are answered and how many there are."""

MOST_NEW_TOKENS = 6
"""The longest right answer takes three tokens and the end mark."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The share of questions answered correctly.

    Attributes:
        correct: number of correct answers.
        count: number of questions.
    """

    correct: int
    count: int

    @property
    def value(self) -> float:
        """In [0, 1]."""
        return self.correct / self.count

    @property
    def standard_error(self) -> float:
        """Of ``value``, binomial."""
        return math.sqrt(self.value * (1 - self.value) / self.count)


@dataclass(frozen=True, slots=True)
class RankedData:
    """What ``write_ranked_data`` wrote.

    Attributes:
        path: the JSONL file.
        rows: prompts in it.
        responses: distinct responses in it.
        left_out: prompts not in it, because all their responses were graded alike.
    """

    path: Path
    rows: int
    responses: int
    left_out: int


def greedy_answers(
    model: PreTrainedModel,
    processor: Processor,
    questions: Sequence[Question],
    *,
    batch_size: int = 100,
    on_progress: Progress | None = None,
) -> list[str]:
    """The most likely answer to each question, token by token."""
    answers = _generate(model, processor, questions, batch_size, on_progress, do_sample=False)
    return [text for texts in answers for text in texts]


def sampled_answers(
    model: PreTrainedModel,
    processor: Processor,
    questions: Sequence[Question],
    *,
    count: int,
    seed: int,
    batch_size: int = 100,
    on_progress: Progress | None = None,
) -> list[list[str]]:
    """``count`` answers to each question, drawn at temperature 1; the same for the same seed.

    The caller's random state is left as it was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": count}
        return list(_generate(model, processor, questions, batch_size, on_progress, **options))


@torch.inference_mode()
def _generate(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    batch_size: int,
    on_progress: Progress | None,
    **options: Any,
) -> Iterator[list[str]]:
    """Yields the answers to one question after the other."""
    was_training = model.training
    model.eval()
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        inputs = processor(
            text=[_chat(processor, question) for question in batch],
            images=[question.image for question in batch],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(model.device)
        tokens = model.generate(**inputs, max_new_tokens=MOST_NEW_TOKENS, **options)
        texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        each = options.get("num_return_sequences", 1)
        for i in range(len(batch)):
            yield [text.strip() for text in texts[i * each : (i + 1) * each]]
        if on_progress:
            on_progress(start + len(batch), len(questions))
    model.train(was_training)


def _chat(processor: Any, question: Question) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question.prompt}]
    text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return text


def accuracies(questions: Sequence[Question], answers: Sequence[str]) -> dict[Kind, Accuracy]:
    """Accuracy per kind of question, for the kinds there are."""
    table = {}
    for kind in KINDS:
        right = [is_correct(q, a) for q, a in zip(questions, answers, strict=True) if q.kind == kind]
        if right:
            table[kind] = Accuracy(sum(right), len(right))
    return table


def write_ranked_data(
    questions: Sequence[Question],
    answers: Sequence[Sequence[str]],
    folder: Path,
    *,
    noise: float,
    rng: np.random.Generator,
) -> RankedData:
    """Grade answers and write them as a data set in the ranked-responses layout, the pictures beside it.

    Equal answers to one question are one response with one grade. A question whose responses all got the same
    grade teaches no preference and is left out.

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
    responses = 0
    for question, texts in zip(questions, answers, strict=True):
        distinct = [text for text in dict.fromkeys(texts) if text]
        scored = [{"text": text, "score": noisy_grade(question, text, rng, noise=noise)} for text in distinct]
        if len({response["score"] for response in scored}) < 2:
            continue
        name = f"images/{len(lines) + 1:04d}.png"
        question.image.save(folder / name)
        row = {"prompt": f"<image>{question.prompt}", "images": [name], "responses": scored}
        lines.append(json.dumps(row) + "\n")
        responses += len(scored)
    path = folder / "ranked.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return RankedData(path, rows=len(lines), responses=responses, left_out=len(questions) - len(lines))


def write_benchmark(questions: Sequence[Question], folder: Path) -> Path:
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
