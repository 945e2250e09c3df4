"""A data set in tokens, and the passes that an epoch of it makes."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import PIL.Image

from unidpo.batches import StepSampler
from unidpo.config import Recipe
from unidpo.encode import Encoder
from unidpo.errors import DataError, Finding, ImageError, from_findings
from unidpo.images import capped_size, image_size
from unidpo.packs import used_responses
from unidpo.pairs import IMAGE, Message, Pair, PromptGroup, Response
from unidpo.plan.work import Load, Vision, packed, padded
from unidpo.reference import PASS_TOKENS

_TICK = 500
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt group in tokens.

    Attributes:
        prompt: of the prompt, images included.
        images: of each image.
        responses: of each response, as far as the length limit lets it.
    """

    prompt: int
    images: tuple[int, ...]
    responses: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Counted:
    """A data set in tokens.

    Attributes:
        groups: those that fit, and `tokens` of each.
        too_long: prompts that leave no room for a response and are skipped.
        cut: responses that lose their end.
        unreadable: groups left out because an image cannot be read.
    """

    groups: list[PromptGroup]
    tokens: list[Tokens]
    too_long: int
    cut: int
    unreadable: int

    @property
    def pairs(self) -> int:
        return sum(len(group.pairs) for group in self.groups)


def count_tokens(
    groups: Sequence[PromptGroup], encoder: Encoder, *, skip_unreadable: bool, on_progress: Progress
) -> Counted:
    """Count what the encoder would make of each group. Only the headers of images are read.

    Raises:
        DataError: no group is left; images cannot be read and `skip_unreadable` is not set.
        ModelError: the data and the model do not go together, see `Encoder.encode`.
    """
    counter = _Counter(encoder)
    counted = Counted([], [], 0, 0, 0)
    too_long = cut = 0
    unreadable: list[Finding] = []
    for done, group in enumerate(groups, start=1):
        if done % _TICK == 0 or done == len(groups):
            on_progress("counting tokens, groups", done, len(groups))
        try:
            prompt, images = counter.prompt(group)
        except ImageError as error:
            unreadable.append(Finding("unreadable-image", str(error), group.pairs[0].file, group.pairs[0].row))
            continue
        room = encoder.max_length - prompt
        if room < 1:
            too_long += 1
            continue
        lengths = [counter.response(response) for response in group.responses]
        cut += sum(length > room for length in lengths)
        counted.groups.append(group)
        counted.tokens.append(Tokens(prompt, images, tuple(min(length, room) for length in lengths)))
    if unreadable and not skip_unreadable:
        raise from_findings(DataError, f"{len(unreadable)} groups have images that cannot be read", unreadable)
    if not counted.groups:
        raise DataError(f"no prompt fits data.max_length={encoder.max_length}; there is nothing to plan")
    return Counted(counted.groups, counted.tokens, too_long, cut, len(unreadable))


class _Counter:
    """Counts each distinct prompt and response once."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._prompts: dict[Hashable, tuple[int, tuple[int, ...]]] = {}
        self._responses: dict[str, int] = {}

    def prompt(self, group: PromptGroup) -> tuple[int, tuple[int, ...]]:
        """Tokens of the prompt, and of each of its images."""
        key = group.prompt_key()
        if key not in self._prompts:
            self._prompts[key] = self._count(group)
        return self._prompts[key]

    def response(self, response: Response) -> int:
        if response.text not in self._responses:
            self._responses[response.text] = len(self._encoder.response_ids(response))
        return self._responses[response.text]

    def _count(self, group: PromptGroup) -> tuple[int, tuple[int, ...]]:
        total = self._encoder.prompt_tokens(group)
        if not group.images:
            return total, ()
        text = self._encoder.prompt_text(group.messages)
        # In the text each image is one mark.
        alone = len(self._encoder.tokenizer(text, add_special_tokens=False)["input_ids"]) - len(group.images)
        areas = [math.prod(capped_size(image_size(i), self._encoder.max_pixels)) for i in group.images]
        images = [round((total - alone) * area / sum(areas)) for area in areas]
        images[-1] += total - alone - sum(images)
        return total, tuple(images)


def vision_of(encoder: Encoder, *, patch_size: int, side: int = 448) -> Vision:
    """How the processor cuts images, found on a grey one."""
    encoder = copy.copy(encoder)
    encoder.max_length = sys.maxsize
    grey = PIL.Image.new("RGB", (side, side))
    message = Message("user", (IMAGE, "?"))
    group = PromptGroup((message,), (grey,), (Response("a"), Response("b")), (Pair(0, 1, row=1),))
    _, (tokens,) = _Counter(encoder).prompt(group)
    pixels = encoder.encode(group).vision["pixel_values"]
    if pixels.dim() == 2:  # a patch per row: images of any size
        return Vision(len(pixels) / tokens)
    tile = math.prod(pixels.shape[-2:]) // patch_size**2
    return Vision(math.prod(pixels.shape[:-3]) * tile / tokens, tile)


@dataclass(frozen=True, slots=True)
class Layout:
    """How groups of tokens become a forward pass: packs, or padded rows.

    Attributes:
        packs: each prompt once; else a row per response.
        vision: of the model's processor.
    """

    packs: bool
    vision: Vision

    def load(self, shares: Sequence[tuple[Tokens, Sequence[int]]]) -> Load:
        """The load of some groups, each with the responses that take part."""
        found = Load()
        if self.packs:
            for tokens, used in shares:
                images = self.vision.load(tokens.images)
                found += packed(tokens.prompt, [tokens.responses[i] for i in used], images)
            return found
        rows = [(tokens.prompt, tokens.responses[i]) for tokens, used in shares for i in used]
        for tokens, used in shares:
            found += self.vision.load(tokens.images).times(len(used))
        return padded(rows, found)


def sampler_of(recipe: Recipe, counted: Counted, *, packs: bool, gpus: int) -> StepSampler:
    """The optimizer steps of a run, as one process would see them all."""

    def size(index: int, places: Sequence[int]) -> int:
        tokens, used = _share(counted, index, places)
        return sum(tokens.responses[i] for i in used) + tokens.prompt * (1 if packs else len(used))

    return StepSampler(
        [len(group.pairs) for group in counted.groups],
        size,
        pairs_per_step=pairs_per_step(recipe, gpus=gpus),
        pairs_per_pack=recipe.train.per_device_train_batch_size,
        tokens_per_pack=recipe.train.max_tokens_per_pack,
        shuffle=recipe.data.shuffle,
        seed=recipe.train.seed,
    )


def pairs_per_step(recipe: Recipe, *, gpus: int) -> int:
    """Pairs of an optimizer step over all GPUs."""
    train = recipe.train
    accumulation = train.given().get("gradient_accumulation_steps") or 1
    return train.global_batch_pairs or train.per_device_train_batch_size * accumulation * gpus


def passes(sampler: StepSampler, counted: Counted, layout: Layout) -> Iterator[list[Load]]:
    """The training passes of each step of an epoch."""
    for step in sampler:
        yield [layout.load([_share(counted, *share) for share in plan.shares]) for plan in step]


def reference_passes(counted: Counted, layout: Layout) -> Iterator[Load]:
    """The forward passes that give every distinct response its reference log-probability."""
    seen: set[tuple[Hashable, str]] = set()
    shares: list[tuple[Tokens, Sequence[int]]] = []
    together = 0
    for group, tokens in zip(counted.groups, counted.tokens, strict=True):
        prompt = group.prompt_key()
        missing = [i for i, response in enumerate(group.responses) if (prompt, response.text) not in seen]
        seen.update((prompt, group.responses[i].text) for i in missing)
        if not missing:
            continue
        size = tokens.prompt + sum(tokens.responses[i] for i in missing)
        if shares and together + size > PASS_TOKENS:
            yield layout.load(shares)
            shares, together = [], 0
        shares.append((tokens, missing))
        together += size
    if shares:
        yield layout.load(shares)


def distinct_images(counted: Counted, vision: Vision) -> Load:
    """The images of every distinct prompt, once."""
    prompts = {group.prompt_key(): tokens for group, tokens in zip(counted.groups, counted.tokens, strict=True)}
    return sum((vision.load(tokens.images) for tokens in prompts.values()), Load())


def prompt_packs(counted: Counted, layout: Layout, *, together: bool) -> Iterator[Load]:
    """An epoch with a pack per pair, or with a pack per distinct prompt that holds all its distinct responses."""
    prompts: dict[Hashable, tuple[Tokens, dict[str, int]]] = {}
    for group, tokens in zip(counted.groups, counted.tokens, strict=True):
        if not together:
            for pair in group.pairs:
                yield layout.load([(tokens, used_responses([pair]))])
            continue
        _, lengths = prompts.setdefault(group.prompt_key(), (tokens, {}))
        lengths.update(zip((response.text for response in group.responses), tokens.responses, strict=True))
    for tokens, lengths in prompts.values():
        yield packed(tokens.prompt, list(lengths.values()), layout.vision.load(tokens.images))


def padded_pairs(counted: Counted, vision: Vision, *, every_logit: bool) -> Load:
    """An epoch as other trainers lay it out: chosen and rejected as two padded rows, images in both."""
    found = Load()
    for group, tokens in zip(counted.groups, counted.tokens, strict=True):
        images = vision.load(tokens.images).times(2)
        for pair in group.pairs:
            rows = [(tokens.prompt, tokens.responses[i]) for i in (pair.chosen, pair.rejected)]
            found += padded(rows, images, every_logit=every_logit)
    return found


def _share(counted: Counted, index: int, places: Sequence[int]) -> tuple[Tokens, list[int]]:
    """A group's tokens, and those of its responses that some of its pairs name."""
    pairs = counted.groups[index].pairs
    return counted.tokens[index], used_responses([pairs[place] for place in places])
