"""The digits world: pictures of real handwritten digits, questions about them, and a program that grades answers.

The scans are scikit-learn's ``load_digits`` (1,797 scans of 8x8 pixels, 43 writers). They are split by scan, so no
stroke of a held-out picture was ever in a training picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from PIL import Image

from unidpo.demo import require_digits

if TYPE_CHECKING:
    from numpy.typing import NDArray

Kind: TypeAlias = Literal["read", "yes_no", "choice"]
Split: TypeAlias = Literal["train", "held_out"]
KINDS: tuple[Kind, ...] = get_args(Kind)

CELL = 32
"""Pixels per side of the square cell that holds one digit: one vision token of the demo's checkpoint."""
INK = 28
"""Pixels per side of a digit inside its cell; the rest is room for it to sit off-centre."""
MOST_DIGITS = 3
HELD_OUT_SCANS = 360
LETTERS = "ABCD"

READ_WORDINGS = ("Read the number.", "What number is this?", "Which digits do you see?")

# The split belongs to the checkpoint, which was trained on one side of it: no other seed may move it.
_SPLIT_SEED = 0


@dataclass(frozen=True, slots=True)
class DigitQuestion:
    """A picture, a question about it, and the right answer.

    Attributes:
        kind: reading, yes/no or multiple choice.
        prompt: the question as the user asks it, without the mark of the image.
        answer: the only answer counted as correct.
        digits: what is written in the picture, left to right.
        image: ``CELL`` pixels high, ``CELL`` wide per digit, RGB.
        options: what ``LETTERS`` stand for in a multiple choice, else empty.
    """

    kind: Kind
    prompt: str
    answer: str
    digits: tuple[int, ...]
    image: Image.Image = field(compare=False, repr=False)
    options: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DigitsWorld:
    """All scans, and which of them are held out.

    Attributes:
        ink: (scans, INK, INK) float32 in [0, 1], 1 is black.
        labels: (scans,) the digit each scan shows.
        train: indices of the scans that training may see.
        held_out: indices of the others.
    """

    ink: NDArray[np.float32]
    labels: NDArray[np.int64]
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]

    def questions(
        self, count: int, *, split: Split, rng: np.random.Generator, kinds: Sequence[Kind] = KINDS
    ) -> list[DigitQuestion]:
        """``count`` questions on pictures of scans of one split, the kinds in turn."""
        return [self._question(kinds[i % len(kinds)], split, rng) for i in range(count)]

    def _question(self, kind: Kind, split: Split, rng: np.random.Generator) -> DigitQuestion:
        scans = rng.choice(getattr(self, split), size=rng.integers(1, MOST_DIGITS + 1), replace=False)
        digits = tuple(int(digit) for digit in self.labels[scans])
        image = draw(self.ink[scans], rng)
        if kind == "read":
            return DigitQuestion(kind, str(rng.choice(READ_WORDINGS)), "".join(map(str, digits)), digits, image)
        if kind == "yes_no":
            present = bool(rng.integers(2))
            candidates = sorted(set(digits)) if present else sorted(set(range(10)) - set(digits))
            asked = int(rng.choice(candidates))
            return DigitQuestion(kind, f"Is there a {asked}?", "Yes" if present else "No", digits, image)
        right = int(rng.choice(digits))
        absent = [digit for digit in range(10) if digit not in digits]
        wrong = rng.choice(absent, size=len(LETTERS) - 1, replace=False)
        options = tuple(int(digit) for digit in rng.permutation([right, *wrong]))
        listed = " ".join(f"{letter}) {digit}" for letter, digit in zip(LETTERS, options, strict=True))
        prompt = f"Which digit do you see? {listed}"
        return DigitQuestion(kind, prompt, LETTERS[options.index(right)], digits, image, options)


def load_world() -> DigitsWorld:
    """Read the scans and split them; always the same split.

    Raises:
        UserError: scikit-learn, which carries the scans, is not installed.
    """
    require_digits()
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    ink = np.stack([_enlarge(scan) for scan in raw.images])
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(ink))
    return DigitsWorld(
        ink=ink,
        labels=raw.target.astype(np.int64),
        train=np.sort(order[HELD_OUT_SCANS:]),
        held_out=np.sort(order[:HELD_OUT_SCANS]),
    )


def _enlarge(scan: NDArray[np.float64]) -> NDArray[np.float32]:
    """An 8x8 scan of greys 0..16 as (INK, INK) in [0, 1]."""
    small = Image.fromarray((scan / 16 * 255).astype(np.uint8))
    large = small.resize((INK, INK), Image.Resampling.BICUBIC)
    return np.asarray(large, dtype=np.float32) / np.float32(255)


def draw(ink: NDArray[np.float32], rng: np.random.Generator) -> Image.Image:
    """Write digits side by side, each a little off the centre of its own cell.

    Args:
        ink: (digits, INK, INK) in [0, 1].
        rng: where in their cells they come to lie.
    """
    paper = np.zeros((CELL, CELL * len(ink)), dtype=np.float32)
    for cell, digit in enumerate(ink):
        top, left = rng.integers(0, CELL - INK + 1, size=2)
        paper[top : top + INK, cell * CELL + left : cell * CELL + left + INK] = digit
    grey = Image.fromarray(np.round(255 * (1 - paper)).astype(np.uint8))
    return grey.convert("RGB")


def is_correct(question: DigitQuestion, text: str) -> bool:
    """Whether the text is the answer, character by character; surrounding blanks do not count."""
    return text.strip() == question.answer


def grade(question: DigitQuestion, text: str) -> int:
    """Grade an answer from 1 (useless) to 5 (right, and in the form asked for).

    Reading: the share of digits that are right in their place, over the longer of answer and truth; 2 points less
    where something other than digits stands in the answer. Yes/no and multiple choice: 5 or 1, and 3 where the
    content is right but the form is not (a sentence around it, the digit instead of its letter).
    """
    text = text.strip()
    if is_correct(question, text):
        return 5
    if question.kind == "read":
        read = "".join(c for c in text if c.isdecimal())
        length = max(len(read), len(question.answer))
        share = sum(a == b for a, b in zip(read, question.answer, strict=False)) / length
        return max(1, round(1 + 4 * share) - (0 if read == text else 2))
    if question.kind == "choice" and text == str(question.options[LETTERS.index(question.answer)]):
        return 3
    first_word = "".join(c for c in text.split()[0] if c.isalpha()) if text else ""
    return 3 if first_word.lower() == question.answer.lower() else 1


def noisy_grade(question: DigitQuestion, text: str, rng: np.random.Generator, *, noise: float) -> int:
    """The grade, or with probability ``noise`` one drawn from 1..5 by chance: graders err."""
    return int(rng.integers(1, 6)) if rng.random() < noise else grade(question, text)
