"""What is odd about rows that could be read: each by itself, and all of them beside each other."""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from unidpo.data.pairs import Pair, PromptGroup
from unidpo.errors import Finding, shown
from unidpo.files.regular import open_regular

GroupCheck: TypeAlias = Callable[[PromptGroup], Iterable[Finding]]
"""Findings about one usable row; file and row are filled in where the finding has none."""

SPECIAL_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|endofprompt|>", "<|image_pad|>", "<|video_pad|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|object_ref_start|>", "<|box_start|>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image|>"),
    *("<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "[INST]", "[/INST]", "<<SYS>>", "[IMG]"),
    *("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<image_soft_token>", "<|user|>", "<|assistant|>"),
)
"""Special tokens of the families in use, for a check without a model."""
IMAGE_TOKENS = ("<|image_pad|>", "<|video_pad|>")
"""What stands for a piece of an image in Qwen's models. In text, it is an image that is not there: the model raises."""

# UTF-8 that was read as Windows-1252: "Ã©" for "é", "â€™" for a closing quote.
_MISREAD = re.compile("[ÃÂ][\u0080-\u00bf]|â€[\u0080-\u00bf™œ˜“”¦]")
_MARK, _OTHER_MARK = re.compile("<(?:image|video|audio)>"), re.compile("<(?:video|audio)>")
_UNSEEN = re.compile("[\\s\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]+")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def special_token_check(tokens: Iterable[str], *, fatal: Iterable[str] = ()) -> GroupCheck:
    """A check for text that a tokenizer would take for control tokens, by which a turn ends early.

    Args:
        tokens: the model's special tokens, e.g. a tokenizer's ``all_special_tokens``.
        fatal: those of them with which training would stop: an error instead of a warning.
    """
    wanted = sorted({token for token in tokens if token.strip()}, key=len, reverse=True)
    if not wanted:
        return lambda group: ()
    pattern, stops = re.compile("|".join(map(re.escape, wanted))), set(fatal)

    def check(group: PromptGroup) -> Iterator[Finding]:
        for where, text in _texts(group):
            found = set(pattern.findall(text))
            if found & stops:
                problem = f"{where} holds {_listed(found & stops)}, for which the model expects an image; remove it"
                yield Finding("special-token", problem)
            elif found:
                problem = (
                    f"{where} holds {_listed(found)}, which models take for control tokens, not for text; remove it"
                )
                yield _warning("special-token", problem)

    return check


def text_check(group: PromptGroup) -> Iterator[Finding]:
    """Text that was decoded wrongly before it came here, and characters no one writes."""
    for where, text in _texts(group):
        if "<" in text and (marks := (_OTHER_MARK if where == "the prompt" else _MARK).findall(text)):
            problem = f"{where} holds {_listed(set(marks))} as plain text, where nothing is shown; remove it"
            yield _warning("media-mark", problem)
        if text.isascii():
            if _CONTROL.search(text):
                yield _control_characters(where, text)
            continue
        if "\ufffd" in text:
            problem = (
                f"{where} holds U+FFFD, the mark of a character lost in decoding; make the file anew from its source"
            )
            yield _warning("wrong-encoding", problem)
        elif misread := _MISREAD.search(text):
            example = shown(misread.group())
            problem = f"{where} holds {example}, which is UTF-8 read as Windows-1252; decode its source as UTF-8"
            yield _warning("wrong-encoding", problem)
        if "\ufeff" in text:
            yield _warning("byte-order-mark", f"{where} holds a byte-order mark (U+FEFF); remove it")
        if _CONTROL.search(text):
            yield _control_characters(where, text)


def white_space_check(group: PromptGroup) -> Iterator[Finding]:
    """Pairs whose responses differ in white space only: equal to a reader, not to the loss."""
    plain = [" ".join(response.text.split()) for response in group.responses]
    for pair in group.pairs:
        if plain[pair.chosen] == plain[pair.rejected]:
            problem = "chosen and rejected differ in white space only; remove the pair unless that is what is preferred"
            yield _warning("white-space-only", problem)
        elif _look_alike(group.responses[pair.chosen].text, group.responses[pair.rejected].text):
            problem = "chosen and rejected look the same, being other characters for one text (Unicode NFKC); remove it"
            yield _warning("look-alike-responses", problem)


def _look_alike(one: str, other: str) -> bool:
    """Whether two texts are one to a reader: é in one or two characters, Ａ for A, marks of width zero."""
    if one.isascii() and other.isascii():
        return False
    # Most pairs differ at once, and normalising takes time. What stands at the cut may still change.
    begins = _seen(one[:64]), _seen(other[:64])
    same = max(0, min(len(begins[0]), len(begins[1]), 16) - 1)
    return begins[0][:same] == begins[1][:same] and _seen(one) == _seen(other)


def _seen(text: str) -> str:
    return _UNSEEN.sub("", unicodedata.normalize("NFKC", text))


def repeated_pairs(groups: Iterable[PromptGroup]) -> Iterator[Finding]:
    """Pairs that stand in an earlier row already, as they are or the other way round."""
    first: dict[object, tuple[PromptGroup, Pair]] = {}
    for group in groups:
        key = group.prompt_key()
        for pair in group.pairs:
            chosen, rejected = group.responses[pair.chosen].text, group.responses[pair.rejected].text
            earlier = first.setdefault((key, chosen, rejected), (group, pair))
            if earlier[1].row != pair.row:
                yield _duplicate(group, pair, *earlier)
            if (key, rejected, chosen) in first:
                yield _both_orders(group, pair, *first[key, rejected, chosen])


def partly_missing_scores(groups: Sequence[PromptGroup]) -> Iterator[Finding]:
    """Rows without scores, in data of which other rows have them."""
    unscored = [group for group in groups if any(group.score_margin(pair) is None for pair in group.pairs)]
    if len(unscored) == len(groups):
        return
    problem = "there is no score, unlike in other rows; losses that use scores (Uni-DPO) refuse the row"
    yield from (_warning("missing-score", problem, group.pairs[0].row) for group in unscored)


def mixed_scales(groups: Iterable[PromptGroup]) -> Finding | None:
    """Whether some rows are scored on a small scale (0 to 1, 5 or 10) and the others on a larger one.

    Two things must come together, which hardly do on one scale: nearly no row has scores on both sides of the small
    scale's upper end, and the spread of a row's scores is twice as large beyond it.
    """
    ranges = []
    for group in groups:
        scores = [response.score for response in group.responses if response.score is not None]
        if len(scores) > 1 and min(scores) < max(scores):
            ranges.append(_Range(group.pairs[0].row, min(scores), max(scores)))
    for end in (1, 5, 10):
        small = [r for r in ranges if r.low >= 0 and r.high <= end]
        large = [r for r in ranges if r.low >= end and r.high > end]
        fewer = min(len(small), len(large))
        crossing = len(ranges) - len(small) - len(large)
        if fewer < 3 or crossing > fewer / 4 or _median_width(large) < 2 * _median_width(small):
            continue
        problem = (
            f"scores seem to be on different scales: {_described(small)}, but {_described(large)}; bring them to one, "
            "because weights and `tau_good` compare them"
        )
        return _warning("mixed-scales", problem)
    return None


@dataclass(frozen=True, slots=True)
class _Range:
    """The lowest and the highest score of a row."""

    row: int
    low: float
    high: float


def _median_width(ranges: Sequence[_Range]) -> float:
    return statistics.median(r.high - r.low for r in ranges)


def _described(ranges: Sequence[_Range]) -> str:
    low, high = min(r.low for r in ranges), max(r.high for r in ranges)
    examples = ", ".join(str(r.row) for r in ranges[:3])
    return f"{len(ranges):,} rows lie within {low:g} to {high:g} (such as rows {examples})"


def byte_order_mark(path: Path) -> Finding | None:
    """Whether a text file starts with a byte-order mark. It is skipped here; other readers fail on it."""
    try:
        with open_regular(path) as file:
            marked = file.read(3) == b"\xef\xbb\xbf"
    except OSError:
        return None
    problem = "the file starts with a byte-order mark, on which other readers fail; save it as UTF-8 without one"
    return _warning("byte-order-mark", problem) if marked else None


def _texts(group: PromptGroup) -> Iterator[tuple[str, str]]:
    """The texts of a group, each with where it stands. A prompt counts as one."""
    yield "the prompt", "\n".join(p for m in group.messages for p in m.content if isinstance(p, str))
    if len(group.responses) == 2 and len(group.pairs) == 1:
        [pair] = group.pairs
        yield "the chosen response", group.responses[pair.chosen].text
        yield "the rejected response", group.responses[pair.rejected].text
    else:
        yield from ((f"response {n}", response.text) for n, response in enumerate(group.responses, start=1))


def _listed(tokens: Iterable[str]) -> str:
    return ", ".join(shown(token) for token in sorted(tokens))


def _duplicate(group: PromptGroup, pair: Pair, other: PromptGroup, earlier: Pair) -> Finding:
    same = group.score_margin(pair) == other.score_margin(earlier)
    scores = "" if same else ", with other scores"
    problem = f"the same prompt, images and responses stand in row {earlier.row}{scores}; remove one of the two"
    return _warning("duplicate-pair", problem, pair.row)


def _both_orders(group: PromptGroup, pair: Pair, other: PromptGroup, earlier: Pair) -> Finding:
    problem = f"row {earlier.row} prefers the same two responses the other way round"
    margins = group.score_margin(pair), other.score_margin(earlier)
    if None not in margins and margins[0] and margins[1]:
        agree = (margins[0] > 0) != (margins[1] > 0)
        problem += ", though their scores agree" if agree else ", and their scores contradict each other too"
    return _warning("both-orders", f"{problem}; keep the right one", pair.row)


def _control_characters(where: str, text: str) -> Finding:
    found = sorted(set(_CONTROL.findall(text)))
    names = ", ".join(f"U+{ord(character):04X}" for character in found[:5])
    return _warning("control-characters", f"{where} holds control characters ({names}); remove them")


def _warning(kind: str, problem: str, row: int | None = None) -> Finding:
    return Finding(kind, problem, row=row, severity="warning")
