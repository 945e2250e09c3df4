"""Prompts, their scored responses, and the pairs among them."""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

if TYPE_CHECKING:
    import PIL.Image


class ImageMark(enum.Enum):
    """Where an image stands inside a message; the n-th mark of a prompt belongs to its n-th image."""

    IMAGE = "<image>"


IMAGE: Final = ImageMark.IMAGE
ImageSource: TypeAlias = "Path | bytes | PIL.Image.Image"
"""An image as the data names it: a file, the encoded bytes of one, or a decoded image."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a prompt: a role and its content, text and image marks in the order they are read."""

    role: Literal["system", "user", "assistant"]
    content: tuple[str | ImageMark, ...]

    @property
    def text(self) -> str:
        """The content as text, image marks written as ``<image>``."""
        return "".join(part if isinstance(part, str) else part.value for part in self.content)


@dataclass(frozen=True, slots=True)
class Response:
    """An answer to a prompt, with its score where the data has one (any scale, higher is better)."""

    text: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses of one group, by index, and the row (from 1) and file that say so."""

    chosen: int
    rejected: int
    row: int
    file: str | Path | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """A prompt, its images, its responses, and the pairs among the responses.

    An ordinary preference pair is a group of two responses and one pair.

    Raises:
        ValueError: a pair points outside ``responses`` or at one response twice, there is no pair, or the
            number of image marks in ``messages`` differs from the number of images. Readers report such rows
            before they get here; the check guards code that builds groups itself.
    """

    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...]
    responses: tuple[Response, ...]
    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("a prompt group needs at least one pair")
        indices = range(len(self.responses))
        for pair in self.pairs:
            if pair.chosen not in indices or pair.rejected not in indices or pair.chosen == pair.rejected:
                raise ValueError(f"pair {pair} does not name two of {len(self.responses)} responses")
        marks = sum(part is IMAGE for message in self.messages for part in message.content)
        if marks != len(self.images):
            raise ValueError(f"{marks} image marks but {len(self.images)} images")

    def prompt_key(self) -> Hashable:
        """Equal for groups that ask the same thing about the same images; decoded images count by identity."""
        images = tuple(i if isinstance(i, (Path, bytes)) else id(i) for i in self.images)
        return self.messages, images

    def score_margin(self, pair: Pair) -> float | None:
        """Chosen minus rejected score, or ``None`` where one of the two has no score."""
        chosen, rejected = self.responses[pair.chosen].score, self.responses[pair.rejected].score
        return None if chosen is None or rejected is None else chosen - rejected

    def keep_pairs(self, pairs: Sequence[Pair]) -> PromptGroup:
        """The same prompt with some of its pairs, and only the responses those name."""
        used = sorted({i for pair in pairs for i in (pair.chosen, pair.rejected)})
        at = {old: new for new, old in enumerate(used)}
        return replace(
            self,
            responses=tuple(self.responses[i] for i in used),
            pairs=tuple(replace(p, chosen=at[p.chosen], rejected=at[p.rejected]) for p in pairs),
        )


@dataclass(frozen=True, slots=True)
class GroupTokens:
    """Lengths of a group in tokens.

    Attributes:
        prompt: of the prompt, images included.
        responses: of each response, with what closes its turn.
        images: of each image.
    """

    prompt: int
    responses: tuple[int, ...]
    images: tuple[int, ...] = ()

    def within(self, limit: int) -> GroupTokens | None:
        """The same with responses as long as a limit on prompt plus response leaves them; `None` if it leaves none."""
        room = limit - self.prompt
        return replace(self, responses=tuple(min(room, each) for each in self.responses)) if room > 0 else None

    def in_batch(self, responses: Sequence[int], *, packs: bool) -> int:
        """Of some responses with their prompt, which stands once in a pack, else before each of them."""
        return sum(self.responses[i] for i in responses) + self.prompt * (1 if packs else len(responses))


def ranked_pairs(responses: Sequence[Response], row: int) -> tuple[Pair, ...]:
    """Every pair of responses whose first has the strictly larger score, in index order.

    Raises:
        ValueError: a response has no score.
    """
    scores = [response.score for response in responses]
    if any(score is None or math.isnan(score) for score in scores):
        raise ValueError("ranked responses need a score each")
    every = itertools.permutations(range(len(scores)), 2)
    return tuple(Pair(i, j, row) for i, j in every if scores[i] > scores[j])  # type: ignore[operator]


def merge_by_prompt(groups: Iterable[PromptGroup]) -> list[PromptGroup]:
    """Join groups that share prompt and images into one, in order of first appearance.

    Equal responses (same text and score) are kept once, so a response shared by several pairs is encoded once.
    A text that appears with two different scores stays two responses: nothing the user gave is dropped.
    """
    members: dict[Hashable, list[PromptGroup]] = {}
    for group in groups:
        members.setdefault(group.prompt_key(), []).append(group)
    return [_merge(same) for same in members.values()]


def _merge(groups: Sequence[PromptGroup]) -> PromptGroup:
    if len(groups) == 1:
        return groups[0]
    index: dict[Response, int] = {}
    pairs = []
    for group in groups:
        at = [index.setdefault(response, len(index)) for response in group.responses]
        pairs += [replace(p, chosen=at[p.chosen], rejected=at[p.rejected]) for p in group.pairs]
    return replace(groups[0], responses=tuple(index), pairs=tuple(pairs))
