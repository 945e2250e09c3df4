"""Greedy answers of a Hugging Face model, in batches that give the same answers as one question at a time."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from transformers import BatchFeature, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from unidpo.cache.store import weights_fingerprint
from unidpo.data.images import cap_pixels, image_size, open_image
from unidpo.errors import ImageError
from unidpo.evaluate.benchmarks import Generation, Question
from unidpo.evaluate.predictions import EMPTY_PROMPT, UNREADABLE_IMAGE, Answer
from unidpo.evaluate.prompting import Prompter, PromptStyle
from unidpo.model.load import Processor

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""End an answer wherever the vocabulary has them, besides what the model itself ends with."""
BATCH_ON_CPU, BATCH_ON_GPU = 16, 64
"""Where the user leaves the choice to us. On a GPU a batch that does not fit is halved."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Questions as the model takes them, and those that cannot be asked."""

    questions: Sequence[Question]
    inputs: BatchFeature | None
    refused: Mapping[str, Answer]


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
        self.processor: Any = processor
        self.prompter = Prompter(processor, prompt_style)
        self.tokenizer: PreTrainedTokenizerBase = (
            self.processor.tokenizer if self.prompter.sees_images else self.processor
        )
        self.batch_size = batch_size or (BATCH_ON_GPU if model.device.type == "cuda" else BATCH_ON_CPU)
        self._stops = stop_ids(processor, model)
        self._fits = self.batch_size

    def identity(self) -> dict[str, Any]:
        return {
            "model": weights_fingerprint(self.model),
            "processor": processor_fingerprint(self.processor, self.prompter, self._stops),
            "prompt_style": self.prompter.style,
            "backend": "hf",
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def answer(self, questions: Sequence[Question], generation: Generation) -> Iterator[dict[str, Answer]]:
        """Answers by index, batch by batch, the longest prompts first: what does not fit shows at once."""
        ordered = sorted(questions, key=lambda question: self._length(question, generation), reverse=True)
        batches = [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]
        self._fits = self.batch_size
        # While the model answers one batch, the images of the next are decoded.
        with ThreadPoolExecutor(1) as pool, self._settings(generation) as settings:
            coming = pool.submit(self._prepare, batches[0], generation) if batches else None
            for following in [*batches[1:], None]:
                prepared = coming.result() if coming is not None else None
                coming = pool.submit(self._prepare, following, generation) if following else None
                if prepared is not None:
                    yield from self._batch(prepared, settings, generation)

    def _batch(
        self, prepared: _Prepared, settings: GenerationConfig, generation: Generation
    ) -> Iterator[dict[str, Answer]]:
        count = len(prepared.questions)
        if count <= self._fits:
            try:
                answers = self._generate(prepared, settings)
            except torch.OutOfMemoryError:
                if count < 2:
                    raise
                self._fits = count // 2  # of those to come, which are shorter, too
                _LOG.warning("%d questions do not fit into memory together: %d from now on", count, self._fits)
            else:
                yield {**prepared.refused, **answers}
                return
        torch.cuda.empty_cache()
        half = (count + 1) // 2
        yield dict(prepared.refused)
        for part in (prepared.questions[:half], prepared.questions[half:]):
            yield from self._batch(self._prepare(part, generation), settings, generation)

    @torch.inference_mode()
    def _generate(self, prepared: _Prepared, settings: GenerationConfig) -> dict[str, Answer]:
        if prepared.inputs is None:
            return {}
        inputs = prepared.inputs.to(self.model.device)
        tokens = self.model.generate(**inputs, generation_config=settings)[:, inputs["input_ids"].shape[1] :].tolist()
        return {
            question.index: self._read(ids, settings.max_new_tokens)
            for question, ids in zip(prepared.questions, tokens, strict=True)
        }

    def _read(self, ids: list[int], most: int) -> Answer:
        """What was generated up to the first stop token; the rest of a row is padding."""
        length = next((i for i, token in enumerate(ids) if token in self._stops), None)
        text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
        return Answer(text, len(ids) if length is None else length, truncated=length is None and len(ids) >= most)

    def _prepare(self, questions: Sequence[Question], generation: Generation) -> _Prepared:
        refused: dict[str, Answer] = {}
        asked: list[Question] = []
        texts: list[str] = []
        images: list[list[Image]] = []
        for question in questions:
            text = self.prompter.text(question)
            try:
                opened = [self._limited(open_image(source), generation) for source in question.images]
            except ImageError as error:
                _LOG.warning("question %s: %s", question.index, error)
                refused[question.index] = Answer("", 0, problem=UNREADABLE_IMAGE)
                continue
            if not text.strip():
                refused[question.index] = Answer("", 0, problem=EMPTY_PROMPT)
                continue
            asked.append(question)
            texts.append(text)
            images.append(opened)
        return _Prepared(asked, self._encode(texts, images, generation) if asked else None, refused)

    def _encode(self, texts: list[str], images: list[list[Image]], generation: Generation) -> BatchFeature:
        # A chat template writes the special tokens itself.
        options = {
            "padding": True,
            "padding_side": "left",
            "return_tensors": "pt",
            "add_special_tokens": self.prompter.style == "plain",
        }
        if not self.prompter.sees_images:
            return BatchFeature(dict(self.tokenizer(texts, **options)))
        # Processors want no list at all where no question of the batch has an image.
        given = [each for each in images if each] and images
        size = {"images_kwargs": {"size": self._size(generation)}} if given and self._scales_itself() else {}
        encoded: BatchFeature = self.processor(text=texts, images=given or None, **options, **size)
        return encoded

    def _scales_itself(self) -> bool:
        """Whether the image processor keeps pixels between two limits, as Qwen's do."""
        size = dict(getattr(self.processor.image_processor, "size", None) or {})
        return (
            "shortest_edge" in size and "longest_edge" in size and hasattr(self.processor.image_processor, "merge_size")
        )

    def _size(self, generation: Generation) -> dict[str, int]:
        own = dict(self.processor.image_processor.size)
        return {
            "shortest_edge": generation.min_pixels or own["shortest_edge"],
            "longest_edge": generation.max_pixels or own["longest_edge"],
        }

    def _limited(self, image: Image, generation: Generation) -> Image:
        if self.prompter.sees_images and self._scales_itself():
            return image
        width, height = image.size
        return cap_pixels(image, generation.max_pixels or width * height, generation.min_pixels or 1)

    def _length(self, question: Question, generation: Generation) -> int:
        """About how many tokens the prompt has: equal neighbours need no padding."""
        pixels = 0
        for source in question.images:
            with contextlib.suppress(ImageError):  # counted when it is opened
                width, height = image_size(source)
                pixels += min(max(width * height, generation.min_pixels or 0), generation.max_pixels or width * height)
        return pixels // 28**2 + len(question.text) // 4

    @contextlib.contextmanager
    def _settings(self, generation: Generation) -> Iterator[GenerationConfig]:
        """Greedy, whatever the model's own settings say: `generate` fills gaps in ours from those."""
        before, was_training = self.model.generation_config, self.model.training
        pad = self.tokenizer.pad_token_id
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=generation.max_new_tokens,
            eos_token_id=sorted(self._stops) or None,
            pad_token_id=min(self._stops, default=0) if pad is None else pad,
        )
        self.model.generation_config = copy.deepcopy(settings)
        self.model.eval()
        try:
            yield settings
        finally:
            self.model.generation_config = before
            self.model.train(was_training)


def stop_ids(processor: Processor, model: PreTrainedModel | None = None) -> frozenset[int]:
    """Tokens that end an answer: `STOP_TOKENS`, what the model itself ends with, else the tokenizer's own."""
    tokenizer: Any = processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer
    known = tokenizer.get_vocab()
    settings = None if model is None else model.generation_config
    own = None if settings is None else settings.eos_token_id
    stops = {known[token] for token in STOP_TOKENS if token in known}
    stops |= set(own) if isinstance(own, list) else set() if own is None else {own}
    return frozenset(stops or ({tokenizer.eos_token_id} - {None}))


def processor_fingerprint(processor: Any, prompter: Prompter, stops: Iterable[int]) -> str:
    """Equal where two processors turn every question into the same tensors, and end answers alike."""
    is_tokenizer = isinstance(processor, PreTrainedTokenizerBase)
    tokenizer = processor if is_tokenizer else processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = {"slow": repr(tokenizer)} if backend is None else json.loads(backend.to_str())
    # What the tokenizer was last asked for, and no part of what it is.
    words |= {"padding": None, "truncation": None}
    described = {
        "tokenizer": words,
        "images": None if is_tokenizer else processor.image_processor.to_dict(),
        "template": prompter.template or processor.chat_template if prompter.style == "chat" else None,
        "stops": sorted(stops),
    }
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
