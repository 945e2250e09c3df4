"""Floating-point work: what goes through a model, and what that costs.

A multiplication with an addition counts as two. Elementwise work (norms, activations, softmax) is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace

from unidpo.config.schema import ModelPart
from unidpo.model.head import LOGITS_CHUNK_BYTES
from unidpo.plan.shape import ModelShape, Transformer


@dataclass(frozen=True, slots=True)
class Load:
    """What goes through a model, in one forward pass or many. Loads add up.

    Attributes:
        tokens: of the language model, image tokens included.
        attended: pairs of a token and one it sees, within prompts and responses.
        targets: positions whose logits are computed.
        again: those of `targets` whose logits are computed a second time in the backward pass, see `head`.
        image_tokens: those of `tokens` that stand for images.
        projected: image tokens that the projector makes; the features of others are read from disk.
        patches: image patches through the vision tower.
        patch_pairs: pairs of patches that see each other where a layer sees a whole image (or tile).
    """

    tokens: int = 0
    attended: int = 0
    targets: int = 0
    again: int = 0
    image_tokens: int = 0
    projected: int = 0
    patches: int = 0
    patch_pairs: int = 0

    def __add__(self, other: Load) -> Load:
        # Not `astuple`, which copies deeply: data sets add up hundreds of thousands.
        return Load(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def times(self, count: int) -> Load:
        """The same load `count` times."""
        return Load(*(count * getattr(self, name) for name in self.__slots__))

    def with_features(self) -> Load:
        """The same where the features of all images are read from disk: neither vision tower nor projector runs."""
        return replace(self, projected=0, patches=0, patch_pairs=0)


@dataclass(frozen=True, slots=True)
class PatchCounter:
    """Counts the patches that a processor cuts images into.

    Attributes:
        patches_per_token: patches of the vision tower for one token of the language model.
        tile: patches that see each other, where images are cut into tiles of one size; 0 for whole images.
        stored: whether the features of images are read from disk.
    """

    patches_per_token: float = 0.0
    tile: int = 0
    stored: bool = False

    def load(self, image_tokens: Iterable[int]) -> Load:
        """The load of images that have so many tokens each."""
        total = patches = pairs = 0
        for tokens in image_tokens:
            found = round(tokens * self.patches_per_token)
            total += tokens
            patches += found
            pairs += found * (min(self.tile, found) if self.tile else found)
        load = Load(image_tokens=total, projected=total, patches=patches, patch_pairs=pairs)
        return load.with_features() if self.stored else load


def packed(prompt: int, responses: Sequence[int], images: Load = Load()) -> Load:
    """A prompt once with responses that see it and themselves."""
    tokens = sum(responses)
    seen = _causal(prompt) + sum(prompt * length + _causal(length) for length in responses)
    return images + Load(tokens=prompt + tokens, attended=seen, targets=tokens)


def padded(rows: Sequence[tuple[int, int]], images: Load = Load(), *, every_logit: bool = False) -> Load:
    """One row per response, `(prompt, response)`, all as long as the longest.

    Args:
        images: of all rows.
        every_logit: compute the logits of every position.
    """
    width = max(prompt + response for prompt, response in rows)
    tokens = len(rows) * width
    targets = tokens if every_logit else sum(response for _, response in rows)
    return images + Load(tokens=tokens, attended=len(rows) * _causal(width), targets=targets)


def in_chunks(load: Load, shape: ModelShape) -> Load:
    """The load of one micro-batch, with the logits that are computed twice: all but those of the last chunk."""
    chunk = max(1, LOGITS_CHUNK_BYTES // (4 * shape.vocabulary))
    return load + Load(again=max(0, load.targets - 1) // chunk * chunk)


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations by part of the model."""

    language: float
    attention: float
    head: float
    projector: float
    vision: float

    @property
    def total(self) -> float:
        return self.language + self.attention + self.head + self.projector + self.vision

    def times(self, count: float) -> Work:
        """The same work `count` times."""
        return Work(*(count * part for part in astuple(self)))


def forward(shape: ModelShape, load: Load) -> Work:
    """Work of a forward pass."""
    language = shape.language
    return Work(
        language=2 * language.matrices * load.tokens,
        attention=4 * language.query * language.layers * load.attended,
        head=2 * shape.vocabulary * language.hidden * load.targets,
        projector=2 * shape.projector_matrices * load.projected,
        vision=0 if shape.vision is None else _tower(shape.vision, load),
    )


def training(
    shape: ModelShape, load: Load, *, trainable_parts: Iterable[ModelPart], checkpointing: bool, adapter: int = 0
) -> Work:
    """Work of forward and backward passes.

    The gradient of a weight costs a forward pass of that weight, and so does handing the gradient on to what lies
    below, which happens down to the lowest trainable part. Checkpointed layers go forward once more.

    Args:
        trainable_parts: parts whose weights are trained.
        adapter: weights of an adapter on the language model, which are trained.
    """
    trainable_parts = set(trainable_parts)
    once = forward(shape, load)
    again = 1 if checkpointing else 0
    added = 2 * adapter * load.tokens * (3 + again)
    own, tower = "language" in trainable_parts, "vision" in trainable_parts
    second_logits = once.head * load.again / load.targets if load.targets else 0
    return Work(
        language=once.language * (2 + own + again) + added,
        attention=once.attention * (3 + again),
        head=once.head * (2 + own) + second_logits,
        projector=once.projector * (1 + ("projector" in trainable_parts) + tower),
        vision=once.vision * (3 + again if tower else 1),
    )


def _causal(tokens: int) -> int:
    """Pairs in which a token sees itself or one before it."""
    return tokens * (tokens + 1) // 2


def _tower(vision: Transformer, load: Load) -> float:
    windowed = vision.layers - vision.whole_layers if vision.window else 0
    seen = (vision.layers - windowed) * load.patch_pairs + windowed * vision.window * load.patches
    return 2 * vision.matrices * load.patches + 4 * vision.query * seen
