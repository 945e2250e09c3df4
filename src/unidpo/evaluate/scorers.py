"""Rules that score one answer to a question of one's own benchmarks. Nothing here evaluates what data or models say.

A rule of one's own is a function and its line in `ANSWER_TYPES`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

VERSION = 1
"""Raised whenever a rule changes what some answer is worth."""
RELAXED_TOLERANCE = 0.05
"""ChartQA's: a number may be off by 5 %."""
HUMAN_AGREEMENT = 3
"""VQA's: an answer that three people gave earns full credit."""

_LETTER_ALONE = re.compile(r"[(\[*]*([A-Z])[)\].:,*]*(?=\s|$)")
_LETTER_NAMED = re.compile(r"\b(?i:answer|option|choice)\b(?i:\s+is)?[\s:*(\[]*([A-Z])\b")
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, slots=True)
class Truth:
    """What is right.

    Attributes:
        answers: those accepted; of multiple choice the letter.
        options: of multiple choice, the text behind each letter.
    """

    answers: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule says of one answer.

    Attributes:
        value: credit in [0, 1].
        said: what was made out in the answer; `None` where nothing was.
    """

    value: float
    said: str | None


Rule: TypeAlias = Callable[[str, Truth], Verdict]
"""(what the model wrote, what is right) → verdict."""


@dataclass(frozen=True, slots=True)
class AnswerType:
    """What kind of answer a benchmark expects, its `type`.

    Attributes:
        instruction: follows the question, on a line of its own, where the benchmark says nothing else.
        rules: by metric, the default first.
    """

    instruction: str
    rules: dict[str, Rule]


def multiple_choice(text: str, truth: Truth) -> Verdict:
    """Right if the text names the letter, or nothing else but the option itself.

    Made out in this order: a letter at the beginning (`B`, `(B)`, `B. seven`), a letter that is called the answer
    (`The answer is B`), the text of exactly one option.
    """
    said = _letter(text.strip(), truth.options)
    return Verdict(float(said in truth.answers), said)


def _letter(text: str, options: Mapping[str, str]) -> str | None:
    first = _LETTER_ALONE.match(text)
    if first is not None:
        letter: str = first[1]
        # "A dog" is an article; "A" alone, "A." and "A) dog" are letters.
        if letter in options and (first[0] != letter or first.end() == len(text)):
            return letter
    named = set(_LETTER_NAMED.findall(text)) & options.keys()
    if len(named) == 1:
        return str(named.pop())
    same = [letter for letter, option in options.items() if normalized(option) == normalized(text)]
    return same[0] if len(same) == 1 else None


def yes_or_no(text: str, truth: Truth) -> Verdict:
    """Right if the text holds the right one of the words "yes" and "no", and not the other."""
    words = {word.lower() for word in _WORD.findall(text)} & {"yes", "no"}
    said = words.pop() if len(words) == 1 else None
    return Verdict(float(said in truth.answers), said)


def exact(text: str, truth: Truth) -> Verdict:
    """Right if the text is an answer, character by character; surrounding blanks do not count."""
    said = text.strip()
    return Verdict(float(said in {answer.strip() for answer in truth.answers}), said or None)


def same_words(text: str, truth: Truth) -> Verdict:
    """Right if the text is an answer once both are `normalized`."""
    said = normalized(text)
    return Verdict(float(said in map(normalized, truth.answers)), said or None)


def contains(text: str, truth: Truth) -> Verdict:
    """Right if an answer stands somewhere in the text; case and line breaks do not count (OCRBench's rule)."""
    said = " ".join(text.lower().split())
    found = any(" ".join(answer.lower().split()) in said for answer in truth.answers)
    return Verdict(float(found), said or None)


def relaxed(text: str, truth: Truth) -> Verdict:
    """ChartQA's rule (arXiv:2203.10244): numbers may be off by 5 %, everything else must be equal but for case.

    A per cent sign divides by 100. An answer of 0 wants a 0.
    """

    def agrees(answer: str) -> bool:
        right, number = _number(answer), _number(said)
        if right and number is not None:
            return abs(number - right) <= RELAXED_TOLERANCE * abs(right)
        return said.lower() == answer.strip().lower() or (right == 0 and number == 0)

    said = text.strip()
    return Verdict(float(any(map(agrees, truth.answers))), said or None)


def vqa_score(text: str, truth: Truth) -> Verdict:
    """VQA's rule (arXiv:1505.00468) over several people's answers: the mean over leaving each of them out.

    Of the others, as many as agree count a third each, up to one. A question with one answer is right or wrong.
    """
    said = normalized(text)
    agreeing = [normalized(answer) == said for answer in truth.answers]
    if len(agreeing) == 1:
        return Verdict(float(agreeing[0]), said or None)
    credit = [min(1.0, (sum(agreeing) - left_out) / HUMAN_AGREEMENT) for left_out in agreeing]
    return Verdict(sum(credit) / len(credit), said or None)


def anls(text: str, truth: Truth) -> Verdict:
    """Average normalised Levenshtein similarity (arXiv:1905.13648): 1 - edits / length, 0 below a half."""
    said = " ".join(text.lower().split())

    def similarity(answer: str) -> float:
        right = " ".join(answer.lower().split())
        longest = max(len(right), len(said))
        value = 1.0 if not longest else 1 - _edits(right, said) / longest
        return value if value >= 0.5 else 0.0

    return Verdict(max(map(similarity, truth.answers)), said or None)


ANSWER_TYPES: dict[str, AnswerType] = {
    "mcq": AnswerType("Answer with the letter of the right option.", {"accuracy": multiple_choice}),
    "yesno": AnswerType("Answer with yes or no.", {"accuracy": yes_or_no, "f1": yes_or_no}),
    "vqa": AnswerType(
        "Answer with a word or a short phrase.",
        {
            "accuracy": same_words,
            "relaxed": relaxed,
            "vqa_score": vqa_score,
            "anls": anls,
            "contains": contains,
        },
    ),
    "exact": AnswerType("", {"accuracy": exact}),
}
"""All types of benchmarks, and the rules each can be scored by."""


def normalized(text: str) -> str:
    """Lower case, one blank between words, compatibility forms unified, no closing full stop."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split()).removesuffix(".").rstrip()


def _number(text: str) -> float | None:
    """The finite number a text is, per cent signs heeded; "1e999", "nan" and "1_000" are none."""
    text = text.strip()
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)\s*%?", text, re.ASCII):
        return None
    return float(text.rstrip("% ")) / (100 if text.endswith("%") else 1)


def _edits(one: str, other: str) -> int:
    """Levenshtein distance."""
    before = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        row = [i]
        for j, b in enumerate(other, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b)))
        before = row
    return before[-1]
