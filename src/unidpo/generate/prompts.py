"""How a question becomes what a model reads: through its chat template, or as it stands."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from PIL.Image import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unidpo.data.images import cap_pixels, open_image
from unidpo.errors import ImageError, ModelError
from unidpo.generate.questions import EMPTY_PROMPT, UNREADABLE_IMAGE, Answer, Generation, Part, PromptStyle, Question
from unidpo.model.encode import CHATML, described_tokenizer
from unidpo.model.load import Processor

STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""End an answer wherever the vocabulary has them, besides what the model itself ends with."""
_PROBE = "UNIDPOQUESTION"
_QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question that can be asked: its text, with a mark for each image, and the images decoded."""

    question: Question
    text: str
    images: list[Image]


class Prompter:
    """Writes prompts in one style.

    `chat` renders a user's message with the model's own chat template, or in ChatML (`data.template: chatml`) where
    that cannot be used and the model knows ChatML's marks. `plain` writes texts and images one after the other and
    nothing else, as the template of the base Qwen2-VL-2B does and the authors' evaluation with it.

    Args:
        processor: a processor, or the tokenizer of a text model.
        style: `None` for `chat` where the model's template lets the question through, else `plain`.

    Attributes:
        template: of the style `chat`: `None` for the model's own, else ChatML.

    Raises:
        ModelError: the style is `chat`, and no template can be used.
    """

    def __init__(self, processor: Processor, style: PromptStyle | None = None) -> None:
        self.processor: Any = processor
        self.sees_images = not isinstance(processor, PreTrainedTokenizerBase)
        self.tokenizer: Any = self.processor.tokenizer if self.sees_images else processor
        self.template: str | None = None
        problem = self._problem_of_the_template() if style != "plain" else ""
        if style == "chat" and problem:
            if "<|im_start|>" not in self.tokenizer.get_vocab():
                raise ModelError(f"the model's chat template {problem}; use --prompt-style plain, or auto")
            self.template, problem = CHATML, ""
        self.style: PromptStyle = "plain" if style == "plain" or problem else "chat"

    def prompt(self, question: Question, generation: Generation) -> Prompt | Answer:
        """What the model reads, or the empty answer to a question that cannot be asked. Raises `ModelError`."""
        text = self.text(question)
        if not text.strip():
            return Answer("", 0, problem=EMPTY_PROMPT)
        try:
            images = [self._limited(open_image(source), generation) for source in question.images]
        except ImageError as error:
            _LOG.warning("question %s: %s", question.index, error)
            return Answer("", 0, problem=UNREADABLE_IMAGE)
        return Prompt(question, text, images)

    def text(self, question: Question) -> str:
        """The prompt, with the mark of an image where one stands.

        Raises:
            ModelError: the question has an image and the model takes none.
        """
        if question.images and not self.sees_images:
            raise ModelError("the questions have images and this model takes none; use a vision-language model")
        if self.style == "chat":
            return self._chat(question.parts)
        return "".join(part if isinstance(part, str) else self.image_mark for part in question.parts)

    def pixel_limits(self, generation: Generation) -> dict[str, Any]:
        """The limits as an image processor takes them that scales by itself; empty where there are none."""
        if not (generation.min_pixels or generation.max_pixels) or not self._scales_itself():
            return {}
        own = dict(self.processor.image_processor.size)
        least, most = generation.min_pixels or own["shortest_edge"], generation.max_pixels or own["longest_edge"]
        return {"size": {"shortest_edge": least, "longest_edge": most}}

    def identity(self, stops: Iterable[int]) -> dict[str, Any]:
        """What answers depend on besides the weights."""
        return {"processor": processor_fingerprint(self, stops), "prompt_style": self.style}

    @property
    def image_mark(self) -> str:
        """What stands for an image in a plain prompt."""
        known = self.tokenizer.get_vocab()
        if "<|vision_start|>" in known and "<|image_pad|>" in known:
            return _QWEN_MARK
        return str(self.processor.image_token) if self.sees_images else ""

    def _chat(self, parts: Sequence[Part]) -> str:
        content: Any = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in parts]
        if not self.sees_images:  # text models' templates expect a string
            content = "".join(part for part in parts if isinstance(part, str))
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            chat_template=self.template,
        )
        return text

    def _problem_of_the_template(self) -> str:
        """Why the chat template cannot be used, as the rest of a sentence; "" where it can."""
        if not getattr(self.processor, "chat_template", None):
            return "is missing"
        try:
            text = self._chat([_PROBE])
        except jinja2.TemplateError as error:
            return f"cannot render a question ({error})"
        return "" if _PROBE in text else "leaves the question out (the base Qwen2-VL's does)"

    def _scales_itself(self) -> bool:
        """Whether the image processor keeps pixels between two limits, as Qwen's do."""
        images = getattr(self.processor, "image_processor", None)
        size = dict(getattr(images, "size", None) or {})
        return hasattr(images, "merge_size") and {"shortest_edge", "longest_edge"} <= size.keys()

    def _limited(self, image: Image, generation: Generation) -> Image:
        if self._scales_itself():
            return image
        width, height = image.size
        return cap_pixels(image, generation.max_pixels or width * height, generation.min_pixels or 1)


def stop_ids(processor: Processor, model: PreTrainedModel | None = None) -> list[int]:
    """Tokens that end an answer: `STOP_TOKENS`, what the model itself ends with, else the tokenizer's own."""
    tokenizer: Any = processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer
    known = tokenizer.get_vocab()
    settings = None if model is None else model.generation_config
    own = None if settings is None else settings.eos_token_id
    stops = {known[token] for token in STOP_TOKENS if token in known}
    stops |= set(own) if isinstance(own, list) else set() if own is None else {own}
    return sorted(stops or ({tokenizer.eos_token_id} - {None}))


def processor_fingerprint(prompter: Prompter, stops: Iterable[int]) -> str:
    """Equal where two processors turn every question into the same tensors, and end answers alike."""
    processor = prompter.processor
    described = {
        "tokenizer": described_tokenizer(prompter.tokenizer),
        "images": processor.image_processor.to_dict() if prompter.sees_images else None,
        "template": prompter.template or processor.chat_template if prompter.style == "chat" else None,
        "stops": sorted(stops),
    }
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
