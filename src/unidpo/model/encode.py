"""One prompt group → token ids, image tensors and positions."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import PIL.Image
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from unidpo.data.images import cap_pixels, open_image
from unidpo.data.pairs import IMAGE, ImageSource, Message, PromptGroup, Response
from unidpo.errors import ImageError, ModelError, UserError
from unidpo.files.regular import read_regular
from unidpo.model.features import ImageFeatures
from unidpo.model.pixels import RAW, as_bytes, pixel_table

PositionIds: TypeAlias = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Int[Tensor, "axes tokens"]]
"""(input_ids (tokens,), mm_token_type_ids (tokens,), image tensors) → position ids of the prompt."""

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with Qwen's vision marks and default system prompt: the template the authors train Qwen2-VL with."""
TEMPLATES: Mapping[str, str] = {"chatml": CHATML}

# Stands for a response where only the text that closes it is wanted; plain letters survive every template.
_PLACEHOLDER = "UNIDPORESPONSE"


class PromptTooLong(UserError):
    """A prompt that leaves no room for a response within the length limit."""


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """A prompt and its responses as the model takes them.

    Attributes:
        prompt_ids: every image stands as its run of image tokens.
        position_ids: of the prompt; 3 axes (time, height, width) for M-RoPE models, else 1. Every response
            begins at `next_position`, in each axis.
        response_ids: each with what closes a turn in the chat template; cut on the right at the length limit.
        cut_tokens: how many tokens each response lost to the limit.
        mm_token_type_ids: 1 at image tokens, else 0.
        vision: the image processor's tensors for all images of the prompt in order; empty for a text prompt.
        features: what the model makes of the images, where it is known; `vision` is then without pixels.
    """

    prompt_ids: Int[Tensor, " prompt"]
    position_ids: Int[Tensor, "axes prompt"]
    mm_token_type_ids: Int[Tensor, " prompt"]
    response_ids: tuple[Int[Tensor, " _"], ...]
    cut_tokens: tuple[int, ...]
    vision: Mapping[str, Tensor]
    features: ImageFeatures | None = None

    @property
    def next_position(self) -> int:
        return int(self.position_ids.max()) + 1

    @property
    def has_images(self) -> bool:
        return bool(self.vision) or self.features is not None


@runtime_checkable
class GroupEncoder(Protocol):
    """What encodes groups: an `Encoder`, or one that knows the images already."""

    def encode(self, group: PromptGroup, responses: Sequence[int] | None = None) -> EncodedGroup:
        """See `Encoder.encode`."""
        ...


class Encoder:
    """Chat template and processor behind one call.

    Prompt and responses are tokenised apart and concatenated, so that a response has the same tokens whatever precedes
    it. Images above `max_pixels` (or under 32·32) are resized before the model's own processor sees them. The authors'
    implementation does both, too. Where we differ: theirs shares the limit between prompt and the longer response and
    may cut image tokens; here a prompt is never cut.

    Args:
        processor: a processor for a vision-language model, a tokenizer for a text model.
        position_ids: the model's positions of a prompt, see `prompt_positions`.
        template: `None` for the model's own chat template, a name in `TEMPLATES`, or a Jinja file.
        max_length: limit in tokens on prompt plus response, image tokens included.
        max_pixels: limit on width times height of an image.

    Raises:
        ModelError: there is no chat template, or it renders messages to nothing.
    """

    def __init__(
        self,
        processor: ProcessorMixin | PreTrainedTokenizerBase,
        position_ids: PositionIds,
        *,
        template: str | None = None,
        max_length: int = 4096,
        max_pixels: int = 768 * 768,
    ) -> None:
        self.processor = processor
        self.tokenizer: PreTrainedTokenizerBase = (
            processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer
        )
        self.sees_images = not isinstance(processor, PreTrainedTokenizerBase)
        self.max_length = max_length
        self.max_pixels = max_pixels
        self._position_ids = position_ids
        self._pixel_table: Tensor | None = None
        self._template = _template_text(template, processor)
        self._turn_end = self._find_turn_end()

    def in_bytes(self, groups: Sequence[PromptGroup]) -> Encoder:
        """An encoder whose pixels travel as bytes, see `pixels`, unless that would change them.

        Args:
            groups: the first of their images that can be read is compared on.
        """
        made = copy.copy(self)
        for source in (source for group in groups for source in group.images if self.sees_images):
            with contextlib.suppress(ImageError):  # it is named where it is met
                made._pixel_table = pixel_table(self.processor, self._opened(source))
                break
        return made

    def encode(self, group: PromptGroup, responses: Sequence[int] | None = None) -> EncodedGroup:
        """Everything the model needs of a group, or of its prompt and some of its responses.

        Raises:
            PromptTooLong: the prompt alone reaches `max_length`.
            ImageError: an image cannot be read, or the model's processor refuses it.
            ModelError: the group has images and the model takes none, or the template leaves a prompt empty.
        """
        images = [self._opened(source) for source in group.images]
        prompt_ids, types, vision = self.tokenize(self.prompt_text(group.messages), images)
        positions = self._position_ids(prompt_ids, types, vision)
        prompt = EncodedGroup(prompt_ids, positions, types, response_ids=(), cut_tokens=(), vision=vision)
        return self.with_responses(prompt, group, responses)

    def _opened(self, source: ImageSource) -> PIL.Image.Image:
        return cap_pixels(open_image(source), self.max_pixels)

    def with_responses(
        self, prompt: EncodedGroup, group: PromptGroup, responses: Sequence[int] | None = None
    ) -> EncodedGroup:
        """A group's encoded prompt with all or some of the group's responses. Raises `PromptTooLong`."""
        room = self.max_length - len(prompt.prompt_ids)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt.prompt_ids)} tokens and leaves no room for a response within "
                f"data.max_length={self.max_length}"
            )
        wanted = range(len(group.responses)) if responses is None else responses
        ids = [self.response_ids(group.responses[i]) for i in wanted]
        return replace(
            prompt,
            response_ids=tuple(torch.tensor(each[:room]) for each in ids),
            cut_tokens=tuple(max(0, len(each) - room) for each in ids),
        )

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The prompt as the chat template renders it, up to where the assistant begins to speak.

        Raises:
            ModelError: the template leaves it empty, or does not mark the images as the model's processor expects.
        """
        text = self._render(messages, add_generation_prompt=True)
        if not text.strip():
            raise ModelError(
                "the chat template renders this prompt to nothing; set data.template=chatml (or a Jinja file), "
                "or use the Instruct version of the model"
            )
        images = sum(part is IMAGE for message in messages for part in message.content)
        mark = getattr(self.processor, "image_token", None)
        if images and mark is not None and text.count(mark) != images:
            raise ModelError(
                f"the rendered prompt has {text.count(mark)} of this model's image marks ({mark}) for {images} images; "
                "set data.template to a template that writes them, and leave them out of the text"
            )
        return text

    def response_text(self, response: Response) -> str:
        """The response and what closes the turn."""
        return response.text + self._turn_end

    def response_ids(self, response: Response) -> list[int]:
        """The response's tokens and those that close the turn."""
        ids: list[int] = self.tokenizer(self.response_text(response), add_special_tokens=False)["input_ids"]
        return ids

    def fingerprint(self) -> str:
        """Equal where two encoders turn every group into the same tensors."""
        described = {
            "tokenizer": described_tokenizer(self.tokenizer),
            "processor": self.processor.to_dict() | {"video_processor": None} if self.sees_images else None,
            "template": self._template,
            "turn_end": self._turn_end,
            "max_length": self.max_length,
            "max_pixels": self.max_pixels,
        }
        text = json.dumps(described, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def tokenize(self, text: str, images: Sequence[PIL.Image.Image]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Ids (tokens,), token types (tokens,) and image tensors of a rendered prompt with scaled images.

        Raises:
            ImageError: the model's processor refuses the images.
            ModelError: there are images and the model takes none.
        """
        if not images:
            ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            return ids, torch.zeros_like(ids), {}
        if not self.sees_images:
            raise ModelError("the data has images and this model takes none; use a vision-language model")
        try:
            encoded = dict(
                self.processor(
                    text=[text],
                    # One list per prompt, as chat templates pass them: some models tile only images that are alone.
                    images=[list(images)],
                    return_tensors="pt",
                    return_mm_token_type_ids=True,
                    text_kwargs={"add_special_tokens": False},
                    images_kwargs={} if self._pixel_table is None else dict(RAW),
                )
            )
        except ValueError as error:
            raise refused_images([image.size for image in images], error) from error
        ids = encoded.pop("input_ids")[0]
        encoded.pop("attention_mask", None)
        # Gemma 3 calls them `token_type_ids`; under that name other tokenizers number sentences.
        types = [encoded.pop(name, None) for name in ("mm_token_type_ids", "token_type_ids")]
        vision = encoded if self._pixel_table is None else as_bytes(encoded, self._pixel_table)
        return ids, next(found for found in types if found is not None)[0], vision

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        conversation = [{"role": m.role, "content": self._content(m)} for m in messages]
        try:
            # The tokenizer's, which renders as the processor's does; some of those reach for a video processor first.
            text: str = self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt, chat_template=self._template
            )
        except Exception as error:  # a template is a program: it divides by zero, too, or refuses a system prompt
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ModelError(
                f"the chat template cannot render this conversation ({reason}); set data.template to another one"
            ) from error
        return text

    def _content(self, message: Message) -> str | list[dict[str, Any]]:
        # Text models' templates expect a string, those of vision-language models take parts.
        if not self.sees_images:
            return message.text
        return [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image"} for p in message.content]

    def _find_turn_end(self) -> str:
        """What the template writes after an assistant's answer; the end-of-text token where it writes nothing."""
        turns = [Message("user", ("?",)), Message("assistant", (_PLACEHOLDER,))]
        _, found, end = self._render(turns, add_generation_prompt=False).rpartition(_PLACEHOLDER)
        return end if found and end.strip() else str(self.tokenizer.eos_token or "")


def described_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that decides into which tokens it cuts a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = {"slow": repr(tokenizer)} if backend is None else json.loads(backend.to_str())
    # What the tokenizer was last asked for, and no part of what it is.
    return {**described, "padding": None, "truncation": None}


def refused_images(sizes: Sequence[tuple[int, int]], error: Exception) -> ImageError:
    """What to raise where the processor does not take images of these sizes, once scaled."""
    listed = ", ".join(f"{width} x {height}" for width, height in sizes)
    return ImageError(
        f"the model's processor refuses the images (scaled to {listed} pixels): {error}; leave the row out"
    )


def plain_positions(ids: Tensor, types: Tensor, vision: Mapping[str, Tensor]) -> Int[Tensor, "1 tokens"]:
    """0, 1, 2, ...: the positions of models without M-RoPE."""
    return torch.arange(len(ids))[None]


def prompt_positions(model: PreTrainedModel) -> PositionIds:
    """How a model numbers the tokens of a prompt: its own M-RoPE index where it has one, else 0, 1, 2, ...

    Only the model's configuration is read, so a model on the `meta` device will do.
    """
    rope_index = getattr(model.base_model, "get_rope_index", None)
    if rope_index is None:
        return plain_positions

    def positions(ids: Tensor, types: Tensor, vision: Mapping[str, Tensor]) -> Int[Tensor, "axes tokens"]:
        if not vision:
            return torch.arange(len(ids)).expand(3, -1)
        grids = {name: tensor for name, tensor in vision.items() if name.endswith("_grid_thw")}
        found, _ = rope_index(ids[None], mm_token_type_ids=types[None], **grids)
        return torch.as_tensor(found)[:, 0]

    return positions


def _template_text(template: str | None, processor: ProcessorMixin | PreTrainedTokenizerBase) -> str:
    if template is None:
        own: str | dict[str, str] | None = processor.chat_template
        if own is None and not isinstance(processor, PreTrainedTokenizerBase):
            own = processor.tokenizer.chat_template
        if own is None:
            raise ModelError("this model has no chat template; set data.template=chatml or to a Jinja file")
        return own if isinstance(own, str) else own["default"]
    if template in TEMPLATES:
        return TEMPLATES[template]
    try:
        return read_regular(Path(template)).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        names = ", ".join(TEMPLATES)
        raise UserError(
            f"data.template={template}: neither a known name ({names}) nor a readable file: {error}"
        ) from error
