"""A data set in tokens, and the passes that an epoch of it makes."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import PIL.Image

from unidpo.cache.reference import ReferencePass
from unidpo.config import Recipe
from unidpo.data.pairs import IMAGE, Message, Pair, PromptGroup, Response
from unidpo.errors import DataError, Finding, ImageError, UserError, from_findings
from unidpo.model.encode import Encoder
from unidpo.model.lengths import GroupTokens, TokenCounter
from unidpo.model.packs import used_responses
from unidpo.plan.work import Load, Vision, packed, padded
from unidpo.training.steps import Dealer, StepSampler, share_tokens

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Counted:
    """A data set in tokens.

    Attributes:
        groups: those that fit, and the tokens of each, as far as the length limit lets them.
        too_long: prompts that leave no room for a response and are skipped.
        cut: responses that lose their end.
        unreadable: groups left out because an image cannot be read.
    """

    groups: list[PromptGroup]
    tokens: list[GroupTokens]
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
    counted = Counted([], [], 0, 0, 0)
    too_long = cut = 0
    unreadable: list[Finding] = []
    found = TokenCounter(encoder).count(groups, lambda done, total: on_progress("counting tokens, groups", done, total))
    for group, tokens in zip(groups, found, strict=True):
        if isinstance(tokens, ImageError):
            unreadable.append(Finding("unreadable-image", str(tokens), group.pairs[0].file, group.pairs[0].row))
            continue
        if isinstance(tokens, UserError):
            raise tokens
        fitting = tokens.within(encoder.max_length)
        if fitting is None:
            too_long += 1
            continue
        cut += sum(now < before for now, before in zip(fitting.responses, tokens.responses, strict=True))
        counted.groups.append(group)
        counted.tokens.append(fitting)
    if unreadable and not skip_unreadable:
        raise from_findings(DataError, f"{len(unreadable)} groups have images that cannot be read", unreadable)
    if not counted.groups:
        raise DataError(f"no prompt fits data.max_length={encoder.max_length}; there is nothing to plan")
    return Counted(counted.groups, counted.tokens, too_long, cut, len(unreadable))


def vision_of(encoder: Encoder, *, patch_size: int, side: int = 448) -> Vision:
    """How the processor cuts images, found on a grey one."""
    encoder = copy.copy(encoder)
    encoder.max_length = sys.maxsize
    grey = PIL.Image.new("RGB", (side, side))
    message = Message("user", (IMAGE, "?"))
    group = PromptGroup((message,), (grey,), (Response("a"), Response("b")), (Pair(0, 1, row=1),))
    [tokens] = TokenCounter(encoder).one(group).images
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

    def load(self, shares: Sequence[tuple[GroupTokens, Sequence[int]]]) -> Load:
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


def micro_batches(recipe: Recipe, counted: Counted, layout: Layout, *, gpus: int) -> Iterator[list[Load]]:
    """The micro-batches of each step of an epoch, as one process would see them all."""
    steps = StepSampler(
        [len(group.pairs) for group in counted.groups],
        pairs_per_step=pairs_per_step(recipe, gpus=gpus),
        shuffle=recipe.data.shuffle,
        seed=recipe.train.seed,
    )
    dealer = Dealer(recipe.train.per_device_train_batch_size, recipe.train.max_tokens_per_pack)
    tokens = share_tokens(counted.groups, counted.tokens, packs=layout.packs)
    for step in steps:
        yield [layout.load([_share(counted, *share) for share in shares]) for shares in dealer.deal(step, tokens)]


def pairs_per_step(recipe: Recipe, *, gpus: int) -> int:
    """Pairs of an optimizer step over all GPUs."""
    train = recipe.train
    accumulation = train.given().get("gradient_accumulation_steps") or 1
    return train.global_batch_pairs or train.per_device_train_batch_size * accumulation * gpus


def reference_passes(counted: Counted, layout: Layout) -> Iterator[Load]:
    """The forward passes that give every distinct response its reference log-probability."""
    seen: set[tuple[Hashable, str]] = set()
    shares: list[tuple[GroupTokens, Sequence[int]]] = []
    together = 0
    for group, tokens in zip(counted.groups, counted.tokens, strict=True):
        prompt = group.prompt_key()
        missing = [i for i, response in enumerate(group.responses) if (prompt, response.text) not in seen]
        seen.update((prompt, group.responses[i].text) for i in missing)
        if not missing:
            continue
        size = tokens.prompt + sum(tokens.responses[i] for i in missing)
        if shares and together + size > ReferencePass.batch_tokens:
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
    prompts: dict[Hashable, tuple[GroupTokens, dict[str, int]]] = {}
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


def _share(counted: Counted, index: int, places: Sequence[int]) -> tuple[GroupTokens, list[int]]:
    """A group's tokens, and those of its responses that some of its pairs name."""
    pairs = counted.groups[index].pairs
    return counted.tokens[index], used_responses([pairs[place] for place in places])
