"""How many tokens groups have, counted without encoding them, and which of them the length limit leaves."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import PIL.Image

from unidpo.data.images import capped_size, image_size
from unidpo.data.pairs import GroupTokens, PromptGroup
from unidpo.distributed import on_main
from unidpo.errors import DataError, Finding, ImageError, UserError, from_findings
from unidpo.model.encode import Encoder, refused_images

_LOG = logging.getLogger(__name__)
# Groups whose texts the tokenizer gets at once, which it deals to threads of its own.
_TOGETHER = 500


class TokenCounter:
    """Counts what `Encoder.encode` would make of groups: each distinct prompt and response once. Reads image headers.

    Args:
        encoder: whose tokens.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._prompts: dict[Hashable, GroupTokens | UserError] = {}
        # Prompts with decoded images are known by these images, which must stay.
        self._groups: list[PromptGroup] = []
        self._responses: dict[str, int] = {}
        self._added: dict[tuple[tuple[int, int], ...], int] = {}
        self._patches_agree = False

    def count(
        self, groups: Sequence[PromptGroup], on_progress: Callable[[int, int], None] | None = None
    ) -> Iterator[GroupTokens | UserError]:
        """The lengths of each group before any cut, or why it has none.

        Args:
            on_progress: called with groups done and groups to do.
        """
        if on_progress:
            on_progress(0, len(groups))
        for start in range(0, len(groups), _TOGETHER):
            some = groups[start : start + _TOGETHER]
            self._take_in(some)
            for group in some:
                prompt = self._prompts[group.prompt_key()]
                if isinstance(prompt, UserError):
                    yield prompt
                else:
                    responses = tuple(self._responses[response.text] for response in group.responses)
                    yield replace(prompt, responses=responses)
            if on_progress:
                on_progress(start + len(some), len(groups))

    def one(self, group: PromptGroup) -> GroupTokens:
        """The lengths of one group.

        Raises:
            ImageError: an image cannot be read, or the model's processor refuses it.
            ModelError: see `Encoder.encode`.
        """
        [found] = self.count([group])
        if isinstance(found, UserError):
            raise found
        return found

    def findings(self, group: PromptGroup) -> list[Finding]:
        """What `data.max_length` does to a group: see `length_findings`. Raises as `one`."""
        return length_findings(group, self.one(group), self._encoder.max_length)

    def _take_in(self, groups: Sequence[PromptGroup]) -> None:
        """Tokenize the prompts and responses that were not met before, in one call."""
        prompts: dict[Hashable, tuple[PromptGroup, str]] = {}
        responses: dict[str, str] = {}
        for group in groups:
            key = group.prompt_key()
            if key not in self._prompts and key not in prompts:
                try:
                    prompts[key] = group, self._encoder.prompt_text(group.messages)
                except UserError as error:
                    self._prompts[key] = error
            for response in group.responses:
                if response.text not in self._responses:
                    responses[response.text] = self._encoder.response_text(response)
        counts = self._text_tokens([*(text for _, text in prompts.values()), *responses.values()])
        for (key, (group, text)), tokens in zip(prompts.items(), counts[: len(prompts)], strict=True):
            try:
                self._prompts[key] = self._with_images(group, text, tokens)
                self._groups.append(group)
            except UserError as error:
                self._prompts[key] = error
        self._responses |= zip(responses, counts[len(prompts) :], strict=True)

    def _text_tokens(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        encoded = self._encoder.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def _with_images(self, group: PromptGroup, text: str, text_tokens: int) -> GroupTokens:
        if not group.images:
            return GroupTokens(text_tokens, ())
        sizes = tuple(capped_size(image_size(source), self._encoder.max_pixels) for source in group.images)
        added = self._tokens_beside_marks(sizes, text, text_tokens)
        # In the text each image is one mark. Processors do not say which image has how many: large ones have more.
        total = added + len(sizes)
        areas = [math.prod(size) for size in sizes]
        images = [round(total * area / sum(areas)) for area in areas]
        images[-1] += total - sum(images)
        return GroupTokens(text_tokens + added, (), tuple(images))

    def _tokens_beside_marks(self, sizes: tuple[tuple[int, int], ...], text: str, text_tokens: int) -> int:
        """What images of these sizes add to a prompt that has so many tokens with a mark for each of them."""
        if sizes not in self._added:
            counted = self._patch_tokens(sizes)
            if counted is None or not self._patches_agree:
                blanks = [PIL.Image.new("RGB", size) for size in sizes]
                found = len(self._encoder.tokenize(text, blanks)[0]) - text_tokens
                # Counting patches is quick and says for nearly every processor what running it on images would say;
                # the first images show whether this is one of them.
                self._patches_agree = counted == found
                counted = found
            self._added[sizes] = counted
        return self._added[sizes]

    def _patch_tokens(self, sizes: Sequence[tuple[int, int]]) -> int | None:
        """Tokens that images of these sizes add to their marks, by the processor's own count of patches."""
        processor = getattr(self._encoder.processor, "image_processor", None)
        patches: Any = getattr(processor, "get_number_of_image_patches", None)
        merge: int | None = getattr(processor, "merge_size", None)
        if patches is None or merge is None:
            return None
        try:
            return sum(int(patches(height, width)) // merge**2 - 1 for width, height in sizes)
        except ValueError as error:
            raise refused_images(sizes, error) from error


def length_findings(group: PromptGroup, tokens: GroupTokens, max_length: int) -> list[Finding]:
    """What `data.max_length` does to a group: a prompt that is skipped, or responses that are cut; all warnings."""
    file, row = group.pairs[0].file, group.pairs[0].row
    if tokens.prompt >= max_length:
        message = f"the prompt alone has {tokens.prompt} tokens, data.max_length is {max_length}; it is skipped"
        return [Finding("prompt-too-long", message, file, row, severity="warning")]
    lengths = [tokens.prompt + response for response in tokens.responses]
    return [
        Finding(
            "response-cut",
            f"prompt and response have {length} tokens; the response loses its last {length - max_length}",
            file,
            row,
            severity="warning",
        )
        for length in lengths
        if length > max_length
    ]


@dataclass(frozen=True, slots=True)
class Fitted:
    """Groups that fit the length limit, and what became of the others.

    Attributes:
        tokens: of each group, responses as long as the limit leaves them.
        too_long: prompts that leave no room for a response.
        cut: responses that lose their end.
        unreadable: groups with an image that cannot be read, or that the model's processor refuses.
    """

    groups: list[PromptGroup] = field(default_factory=list)
    tokens: list[GroupTokens] = field(default_factory=list)
    too_long: list[Finding] = field(default_factory=list)
    cut: list[Finding] = field(default_factory=list)
    unreadable: list[Finding] = field(default_factory=list)

    @property
    def pairs(self) -> int:
        return sum(len(group.pairs) for group in self.groups)


def fit_to_length(
    groups: Sequence[PromptGroup],
    encoder: Encoder,
    *,
    skip_unreadable: bool = False,
    warn: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Fitted:
    """The groups whose prompts leave room for a response, in tokens.

    Every process must call it; the main one counts for all.

    Args:
        skip_unreadable: leave out groups whose images cannot be read.
        warn: log which prompts are skipped and which responses are cut.
        on_progress: see `TokenCounter.count`.

    Raises:
        DataError: no group is left, or an image cannot be read, or the model's processor refuses it; names the rows.
        ModelError: see `Encoder.encode`.
    """
    fitted = Fitted()
    counted = on_main(lambda: list(TokenCounter(encoder).count(groups, on_progress)))
    for group, tokens in zip(groups, counted, strict=True):
        if isinstance(tokens, ImageError):
            kind = tokens.findings[0].kind if tokens.findings else "refused-row"
            fitted.unreadable.append(Finding(kind, str(tokens), group.pairs[0].file, group.pairs[0].row))
            continue
        if isinstance(tokens, UserError):
            raise tokens
        findings = length_findings(group, tokens, encoder.max_length)
        if (fitting := tokens.within(encoder.max_length)) is None:
            fitted.too_long.extend(findings)
            continue
        fitted.cut.extend(findings)
        fitted.groups.append(group)
        fitted.tokens.append(fitting)
    if fitted.unreadable and not skip_unreadable:
        title = f"{len(fitted.unreadable)} groups have images that cannot be read"
        raise from_findings(DataError, title, fitted.unreadable)
    if groups and not fitted.groups:
        raise from_findings(
            DataError,
            f"no prompt fits data.max_length={encoder.max_length}; raise it, or lower data.max_pixels",
            fitted.too_long,
        )
    for findings, what in ((fitted.too_long, "prompts skipped"), (fitted.cut, "responses cut")):
        if findings and warn:
            rows = ", ".join(str(finding.row) for finding in findings[:10]) + (", ..." if len(findings) > 10 else "")
            _LOG.warning("data.max_length=%d: %d %s (rows %s)", encoder.max_length, len(findings), what, rows)
    return fitted
