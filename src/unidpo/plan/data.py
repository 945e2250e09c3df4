"""A data set in tokens, and the micro-batches that an epoch of it makes."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import PIL.Image

from unidpo.cache.reference import ReferencePass
from unidpo.config import Recipe
from unidpo.data.pairs import IMAGE, GroupTokens, Message, Pair, PromptGroup, Response
from unidpo.model.encode import Encoder
from unidpo.model.lengths import Fitted, TokenCounter
from unidpo.model.packs import used_responses
from unidpo.plan.work import Load, PatchCounter, packed, padded
from unidpo.training.steps import Dealer, StepSampler, share_tokens


def patch_counter_of(encoder: Encoder, *, patch_size: int, side: int = 448) -> PatchCounter:
    """How the processor cuts images, found on a grey one."""
    encoder = copy.copy(encoder)
    encoder.max_length = sys.maxsize
    grey = PIL.Image.new("RGB", (side, side))
    message = Message("user", (IMAGE, "?"))
    group = PromptGroup((message,), (grey,), (Response("a"), Response("b")), (Pair(0, 1, row=1),))
    [tokens] = TokenCounter(encoder).one(group).images
    pixels = encoder.encode(group).vision["pixel_values"]
    if pixels.dim() == 2:  # a patch per row: images of any size
        return PatchCounter(len(pixels) / tokens)
    tile = math.prod(pixels.shape[-2:]) // patch_size**2
    return PatchCounter(math.prod(pixels.shape[:-3]) * tile / tokens, tile)


@dataclass(frozen=True, slots=True)
class LoadCounter:
    """Counts what a forward pass on groups takes.

    Attributes:
        packs: each prompt once; else a padded row per response.
        patches: those of images.
    """

    packs: bool
    patches: PatchCounter

    def load(self, shares: Sequence[tuple[GroupTokens, Sequence[int]]]) -> Load:
        """The load of some groups, each with the responses that take part."""
        found = Load()
        if self.packs:
            for tokens, used in shares:
                images = self.patches.load(tokens.images)
                found += packed(tokens.prompt, [tokens.responses[i] for i in used], images)
            return found
        rows = [(tokens.prompt, tokens.responses[i]) for tokens, used in shares for i in used]
        for tokens, used in shares:
            found += self.patches.load(tokens.images).times(len(used))
        return padded(rows, found)


def micro_batches(recipe: Recipe, fitted: Fitted, counter: LoadCounter, *, gpus: int) -> Iterator[list[Load]]:
    """The micro-batches of each step of an epoch, as one process would see them all."""
    train = recipe.train
    accumulation = train.given().get("gradient_accumulation_steps") or 1
    steps = StepSampler(
        [len(group.pairs) for group in fitted.groups],
        pairs_per_step=train.global_batch_pairs or train.per_device_train_batch_size * accumulation * gpus,
        shuffle=recipe.data.shuffle,
        seed=train.seed,
    )
    dealer = Dealer(train.per_device_train_batch_size, train.max_tokens_per_pack)
    tokens = share_tokens(fitted.groups, fitted.tokens, packs=counter.packs)
    for step in steps:
        yield [counter.load([_share(fitted, *share) for share in shares]) for shares in dealer.deal(step, tokens)]


def reference_batches(fitted: Fitted, counter: LoadCounter) -> Iterator[Load]:
    """The forward passes that give every distinct response its reference log-probability."""
    seen: set[tuple[Hashable, str]] = set()
    batches: list[list[tuple[GroupTokens, Sequence[int]]]] = []
    together = 0
    for group, tokens in zip(fitted.groups, fitted.tokens, strict=True):
        prompt = group.prompt_key()
        missing = [i for i, response in enumerate(group.responses) if (prompt, response.text) not in seen]
        seen.update((prompt, group.responses[i].text) for i in missing)
        if not missing:
            continue
        size = tokens.in_batch(missing, packs=True)
        if not batches or together + size > ReferencePass.batch_tokens:
            batches.append([])
            together = 0
        batches[-1].append((tokens, missing))
        together += size
    return map(counter.load, batches)


def distinct_prompts(fitted: Fitted) -> list[GroupTokens]:
    """The tokens of every distinct prompt, once."""
    keys = (group.prompt_key() for group in fitted.groups)
    return list(dict(zip(keys, fitted.tokens, strict=True)).values())


def prompt_packs(fitted: Fitted, counter: LoadCounter) -> Iterator[Load]:
    """An epoch with a pack per distinct prompt that holds all its distinct responses."""
    prompts: dict[Hashable, tuple[GroupTokens, dict[str, int]]] = {}
    for group, tokens in zip(fitted.groups, fitted.tokens, strict=True):
        _, lengths = prompts.setdefault(group.prompt_key(), (tokens, {}))
        lengths.update(zip((response.text for response in group.responses), tokens.responses, strict=True))
    for tokens, lengths in prompts.values():
        yield packed(tokens.prompt, list(lengths.values()), counter.patches.load(tokens.images))


def padded_pairs(fitted: Fitted, patches: PatchCounter, *, every_logit: bool) -> Load:
    """An epoch as other trainers lay it out: chosen and rejected as two padded rows, images in both."""
    found = Load()
    for group, tokens in zip(fitted.groups, fitted.tokens, strict=True):
        images = patches.load(tokens.images).times(2)
        for pair in group.pairs:
            rows = [(tokens.prompt, tokens.responses[i]) for i in (pair.chosen, pair.rejected)]
            found += padded(rows, images, every_logit=every_logit)
    return found


def _share(fitted: Fitted, index: int, places: Sequence[int]) -> tuple[GroupTokens, list[int]]:
    """A group's tokens, and those of its responses that some of its pairs name."""
    pairs = fitted.groups[index].pairs
    return fitted.tokens[index], used_responses([pairs[place] for place in places])
