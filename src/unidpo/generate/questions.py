"""What a generator takes and gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from unidpo.data.pairs import ImageSource
from unidpo.errors import UserError

Part: TypeAlias = "str | ImageSource"
"""A piece of a question in the order it is read: text, or an image."""
PromptStyle: TypeAlias = Literal["chat", "plain"]
UNREADABLE_IMAGE, EMPTY_PROMPT = "unreadable-image", "empty-prompt"
"""Why a question was not put to the model."""


class GenerationFailed(UserError):
    """Answers could not be generated although nothing was wrong with what the user gave."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask.

    Attributes:
        index: names the question among those asked together.
        parts: texts and images in the order they are read.
    """

    index: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """All its text."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """Its images in order."""
        return tuple(part for part in self.parts if not isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Generation:
    """How answers are generated.

    Attributes:
        max_new_tokens: an answer that is longer is cut, and counted as truncated.
        min_pixels: images with less width times height are enlarged; `None` for the model's own limit.
        max_pixels: images with more are scaled down; `None` for the model's own limit.
    """

    max_new_tokens: int = 2048
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Several answers to each question, drawn by chance.

    Attributes:
        count: answers to each question.
        temperature: of the distribution that each token is drawn from, whole: no top-k, no top-p.
        seed: every draw follows from it, the order of the questions and the batch size.
    """

    count: int
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered.

    Attributes:
        text: without special tokens; "" where the question was not asked.
        tokens: generated, the closing one not counted.
        truncated: it was cut at the longest answer allowed.
        problem: why the question was not asked; `None` where it was.
    """

    text: str
    tokens: int
    truncated: bool = False
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How models are loaded.

    Attributes:
        prompt_style: `None` to choose by the chat template, see `Prompter`.
        batch_size: questions answered together; `None` for what suits the backend.
        dtype: of the weights; "auto" is bfloat16 on a GPU and float32 on a CPU.
        trust_remote_code: run code that comes with a model.
        processes: how many load the model, each on a GPU of its own.
        backend: "hf" for Hugging Face, "vllm" for vLLM.
        server: address of a server that speaks OpenAI's protocol; `None` for vLLM in this process.
    """

    prompt_style: PromptStyle | None = None
    batch_size: int | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    processes: int = 1
    backend: Literal["hf", "vllm"] = "hf"
    server: str | None = None


class Answerer(Protocol):
    """What answers questions."""

    def identity(self) -> dict[str, Any]:
        """What its answers depend on: weights, prompt style, number format."""

    def answer(self, questions: Sequence[Question], generation: Generation) -> Iterator[dict[str, Answer]]:
        """Greedy answers by index, in batches, in any order."""
