"""Answers of a Hugging Face model, in batches that give the same answers as one question at a time."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, GenerationConfig, PreTrainedModel

from unidpo.cache.keys import weights_fingerprint
from unidpo.data.images import image_size
from unidpo.devices import best_device, empty_cache
from unidpo.errors import ImageError
from unidpo.generate.prompts import Prompt, Prompter, stop_ids
from unidpo.generate.questions import Answer, Generation, LoadOptions, PromptStyle, Question, Sampling
from unidpo.model.load import Processor, base_of_adapter, load_policy, load_processor

BATCH_ON_CPU, BATCH_ON_GPU = 16, 64
"""Where the user leaves the choice to us. On a GPU a batch that does not fit is halved."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Questions as the model takes them, and the empty answers to those that cannot be asked."""

    asked: Sequence[Question]
    inputs: BatchFeature | None
    refused: Mapping[str, list[Answer]]


class HuggingFace:
    """A model in memory.

    Args:
        model: answers on the device it is on; its mode and generation settings are as before afterwards.
        processor: its processor, or the tokenizer of a text model.
        prompt_style: `None` to choose by the chat template, see `Prompter`.
        batch_size: questions answered together; `None` for 16 on a CPU, 64 on a GPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Processor,
        *,
        prompt_style: PromptStyle | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.model: Any = model
        self.prompter = Prompter(processor, prompt_style)
        self.stops = stop_ids(processor, model)
        self.batch_size = batch_size or (BATCH_ON_CPU if model.device.type == "cpu" else BATCH_ON_GPU)

    def identity(self) -> dict[str, Any]:
        return {
            "model": weights_fingerprint(self.model),
            **self.prompter.identity(self.stops),
            "backend": "hf",
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def answer(self, questions: Sequence[Question], generation: Generation) -> Iterator[dict[str, Answer]]:
        """Greedy answers by index, batch by batch, the longest prompts first: what does not fit shows at once."""
        for batch in self._batches(longest_first(questions, generation), generation):
            yield {index: answer for index, [answer] in batch.items()}

    def sample(
        self,
        questions: Sequence[Question],
        generation: Generation,
        sampling: Sampling,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, list[Answer]]:
        """Several answers to each question, by index. The caller's random state is left as it was."""
        answers: dict[str, list[Answer]] = {}
        device = self.model.device
        own_state = [] if device.type in ("cpu", "mps") else [device]  # MPS gives its state by no number of a device
        with torch.random.fork_rng(own_state, device_type=device.type if own_state else "cuda"):
            torch.manual_seed(sampling.seed)
            for batch in self._batches(questions, generation, sampling):
                answers |= batch
                if on_progress is not None:
                    on_progress(len(answers), len(questions))
        return answers

    def _batches(
        self, questions: Sequence[Question], generation: Generation, sampling: Sampling | None = None
    ) -> Iterator[dict[str, list[Answer]]]:
        """While the model answers one batch, the images of the next are decoded."""
        start, size = 0, self.batch_size
        with ThreadPoolExecutor(1) as pool, self._settings(generation, sampling) as settings:
            coming = pool.submit(self._make_batch, questions[:size], generation)
            while start < len(questions):
                batch = coming.result()
                following = questions[start + size : start + 2 * size]
                coming = pool.submit(self._make_batch, following, generation)
                try:
                    answers = self._generate(batch, settings)
                except torch.OutOfMemoryError:
                    if len(batch.asked) < 2:
                        raise
                    answers = None  # the error holds tensors, so memory is freed behind this block
                if answers is not None:
                    yield {**batch.refused, **answers}
                    start += size
                    continue
                size = len(batch.asked) // 2  # of all that follow
                _LOG.warning("%d questions do not fit into memory together: %d from now on", len(batch.asked), size)
                empty_cache()
                coming = pool.submit(self._make_batch, questions[start : start + size], generation)

    def _make_batch(self, questions: Sequence[Question], generation: Generation) -> _Batch:
        prompts = {question.index: self.prompter.prompt(question, generation) for question in questions}
        asked = [prompt for prompt in prompts.values() if isinstance(prompt, Prompt)]
        refused = {index: [answer] for index, answer in prompts.items() if isinstance(answer, Answer)}
        inputs = self._encode(asked, generation) if asked else None
        return _Batch([prompt.question for prompt in asked], inputs, refused)

    def _encode(self, prompts: Sequence[Prompt], generation: Generation) -> BatchFeature:
        texts, images = [prompt.text for prompt in prompts], [prompt.images for prompt in prompts]
        # A chat template writes the special tokens itself.
        options: dict[str, Any] = {
            "padding": True,
            "padding_side": "left",
            "return_tensors": "pt",
            "add_special_tokens": self.prompter.style == "plain",
        }
        if not self.prompter.sees_images:
            return BatchFeature(dict(self.prompter.tokenizer(texts, **options)))
        # Processors want no list at all where no question of the batch has an image.
        if any(images):
            options |= {"images": images, "images_kwargs": self.prompter.pixel_limits(generation)}
        encoded: BatchFeature = self.prompter.processor(text=texts, **options)
        return encoded

    @torch.inference_mode()
    def _generate(self, batch: _Batch, settings: GenerationConfig) -> dict[str, list[Answer]]:
        if batch.inputs is None:
            return {}
        inputs = batch.inputs.to(self.model.device)
        tokens = self.model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :].tolist()
        answers = [self._read(ids, settings.max_new_tokens) for ids in tokens]
        each = len(answers) // len(batch.asked)
        return {question.index: answers[i * each : (i + 1) * each] for i, question in enumerate(batch.asked)}

    def _read(self, ids: list[int], most: int) -> Answer:
        """What was generated up to the first stop token; the rest of a row is padding."""
        length = next((i for i, token in enumerate(ids) if token in self.stops), None)
        text = self.prompter.tokenizer.decode(ids[:length], skip_special_tokens=True)
        return Answer(text, len(ids) if length is None else length, truncated=length is None and len(ids) >= most)

    @contextlib.contextmanager
    def _settings(self, generation: Generation, sampling: Sampling | None) -> Iterator[GenerationConfig]:
        """Ours, whatever the model's own settings say: `generate` fills gaps in ours from those."""
        before, was_training = self.model.generation_config, self.model.training
        pad = self.prompter.tokenizer.pad_token_id
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=generation.max_new_tokens,
            eos_token_id=self.stops or None,
            pad_token_id=min(self.stops, default=0) if pad is None else pad,
        )
        if sampling is not None:
            whole = {"top_k": 0, "top_p": 1.0}
            settings.update(
                do_sample=True, temperature=sampling.temperature, num_return_sequences=sampling.count, **whole
            )
        self.model.generation_config = copy.deepcopy(settings)
        self.model.eval()
        try:
            yield settings
        finally:
            self.model.generation_config = before
            self.model.train(was_training)


def longest_first(questions: Sequence[Question], generation: Generation) -> list[Question]:
    """Sorted by about how many tokens a prompt has: equal neighbours need no padding."""
    return sorted(questions, key=lambda question: _length(question, generation), reverse=True)


def _length(question: Question, generation: Generation) -> int:
    pixels = 0
    for source in question.images:
        with contextlib.suppress(ImageError):  # counted when it is opened
            width, height = image_size(source)
            pixels += min(max(width * height, generation.min_pixels or 0), generation.max_pixels or width * height)
    return pixels // 28**2 + len(question.text) // 4


def load_model(name: str, options: LoadOptions, *, gpu: int = 0) -> HuggingFace:
    """A model from a folder or hub id, ready to answer on a GPU, or on the CPU where there is none.

    Raises:
        ModelError: there is no such model, or its chat template cannot be used as asked.
    """
    place = best_device(gpu)
    auto = torch.float32 if place.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = auto if options.dtype == "auto" else getattr(torch, options.dtype)
    model = load_policy(name, dtype=dtype, trust_remote_code=options.trust_remote_code)
    processor = load_processor(_with_tokenizer(name), trust_remote_code=options.trust_remote_code)
    model.to(place)
    return HuggingFace(model, processor, prompt_style=options.prompt_style, batch_size=options.batch_size)


def _with_tokenizer(name: str) -> str:
    """The folder itself, or for an adapter that comes without a tokenizer the model it belongs to."""
    base = base_of_adapter(name)
    return name if base is None or (Path(name) / "tokenizer_config.json").is_file() else base
