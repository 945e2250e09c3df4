"""How a question becomes the text a model reads: through its chat template, or as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jinja2
from transformers import PreTrainedTokenizerBase

from unidpo.errors import ModelError
from unidpo.evaluate.benchmarks import Part, Question
from unidpo.model.encode import CHATML
from unidpo.model.load import Processor

PromptStyle: TypeAlias = Literal["chat", "plain"]
_PROBE = "UNIDPOQUESTION"
_QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"


class Prompter:
    """Writes prompts in one style.

    `chat` renders a user's message with the model's own chat template, or in ChatML (`data.template: chatml`) where
    that cannot be used and the model knows ChatML's marks. `plain` writes texts and images one after the other and
    nothing else, as the template of the base Qwen2-VL-2B does and the reference's evaluation with it.

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
        self.template: str | None = None
        problem = self._problem_of_the_template() if style != "plain" else ""
        if style == "chat" and problem:
            if "<|im_start|>" not in self._tokenizer.get_vocab():
                raise ModelError(f"the model's chat template {problem}; use --prompt-style plain, or auto")
            self.template, problem = CHATML, ""
        self.style: PromptStyle = "plain" if style == "plain" or problem else "chat"

    def text(self, question: Question) -> str:
        """The prompt, with the mark of an image where one stands.

        Raises:
            ModelError: the question has an image and the model takes none.
        """
        if question.images and not self.sees_images:
            raise ModelError("the benchmark has images and this model takes none; use a vision-language model")
        if self.style == "chat":
            return self._chat(question.parts)
        return "".join(part if isinstance(part, str) else self.image_mark for part in question.parts)

    @property
    def image_mark(self) -> str:
        """What stands for an image in a plain prompt."""
        known = self._tokenizer.get_vocab()
        if "<|vision_start|>" in known and "<|image_pad|>" in known:
            return _QWEN_MARK
        return str(self.processor.image_token)

    @property
    def _tokenizer(self) -> Any:
        return self.processor.tokenizer if self.sees_images else self.processor

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
