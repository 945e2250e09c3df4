"""What is odd about the texts of rows that could be read, and about pairs beside each other."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
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

_ODD_TEXT = (
    ("media-mark", "<(?:image|video|audio)>", "{}, which is read as plain text; remove it"),
    ("wrong-encoding", "\ufffd", "U+FFFD, a character lost in decoding; make the file anew from its source"),
    # "Ã©" for "é", "â€™" for a closing quote.
    (
        "wrong-encoding",
        "[ÃÂ][\u0080-\u00bf]|â€[\u0080-\u00bf™œ˜“”¦]",
        "{}, which is UTF-8 read as Windows-1252; decode its source as UTF-8",
    ),
    ("byte-order-mark", "\ufeff", "a byte-order mark (U+FEFF); remove it"),
    ("control-characters", "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "control characters ({}); remove them"),
)
"""Kind of finding, pattern, and what the text holds, with what was found."""
_ANY_ODD = re.compile("|".join(pattern for _, pattern, _ in _ODD_TEXT))
_UNSEEN = re.compile("[\\s\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]+")


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
                problem = f"{where} holds {_listed(found)}, which models take for control tokens; remove it"
                yield warning("special-token", problem)

    return check


def text_check(group: PromptGroup) -> Iterator[Finding]:
    """Text that was decoded wrongly before it came here, and what is no text."""
    for where, text in _texts(group):
        if not _ANY_ODD.search(text):
            continue
        for kind, pattern, problem in _ODD_TEXT:
            found = set(re.findall(pattern, text))
            if where == "the prompt":
                found.discard("<image>")
            if found:
                yield warning(kind, f"{where} holds {problem.format(_listed(found))}")


def white_space_check(group: PromptGroup) -> Iterator[Finding]:
    """Pairs whose responses look the same: equal to a reader, not to the loss."""
    for pair in group.pairs:
        chosen, rejected = group.responses[pair.chosen].text, group.responses[pair.rejected].text
        if chosen.split() == rejected.split():
            problem = "chosen and rejected differ in white space only; remove the pair unless that is what is preferred"
            yield warning("white-space-only", problem)
        elif not (chosen.isascii() and rejected.isascii()) and _seen(chosen) == _seen(rejected):
            problem = "chosen and rejected look the same, being other characters for one text (Unicode NFKC); remove it"
            yield warning("look-alike-responses", problem)


def repeated_pairs(groups: Iterable[PromptGroup]) -> Iterator[Finding]:
    """Pairs that an earlier row has already, as they are or the other way round."""
    first: dict[object, tuple[Pair, float | None]] = {}
    for group in groups:
        key = group.prompt_key()
        for pair in group.pairs:
            margin = group.score_margin(pair)
            chosen, rejected = group.responses[pair.chosen].text, group.responses[pair.rejected].text
            earlier, other = first.setdefault((key, chosen, rejected), (pair, margin))
            if earlier.row != pair.row:
                scores = "" if margin == other else ", with other scores"
                problem = f"row {earlier.row} has the same prompt, images and responses{scores}"
                yield warning("duplicate-pair", f"{problem}; remove one of the two", pair.row)
            if (key, rejected, chosen) in first:
                earlier, other = first[key, rejected, chosen]
                problem = f"row {earlier.row} prefers the same two responses the other way round"
                if margin and other:
                    agree = (margin > 0) != (other > 0)
                    problem += f", {'though their scores agree' if agree else 'and their scores contradict each other'}"
                yield warning("both-orders", f"{problem}; keep the right one", pair.row)


def byte_order_mark(path: Path) -> Iterator[Finding]:
    """Whether a text file starts with a byte-order mark. It is skipped here; other readers fail on it."""
    try:
        with open_regular(path) as file:
            is_marked = file.read(3) == b"\xef\xbb\xbf"
    except OSError:
        return
    if is_marked:
        problem = "the file starts with a byte-order mark, on which other readers fail; save it as UTF-8 without one"
        yield warning("byte-order-mark", problem)


def warning(kind: str, problem: str, row: int | None = None) -> Finding:
    """A finding about a row that can be used, or about the file."""
    return Finding(kind, problem, row=row, severity="warning")


def _seen(text: str) -> str:
    """What a reader sees: é in one or two characters, Ａ as A, no marks of width zero."""
    return _UNSEEN.sub("", unicodedata.normalize("NFKC", text))


def _texts(group: PromptGroup) -> Iterator[tuple[str, str]]:
    """The texts of a group, each with where it stands. A prompt counts as one."""
    yield "the prompt", "\n".join(p for m in group.messages for p in m.content if isinstance(p, str))
    if len(group.responses) == 2 and len(group.pairs) == 1:
        [pair] = group.pairs
        yield "the chosen response", group.responses[pair.chosen].text
        yield "the rejected response", group.responses[pair.rejected].text
    else:
        yield from ((f"response {n}", response.text) for n, response in enumerate(group.responses, start=1))


def _listed(found: Iterable[str]) -> str:
    """What was found, at most five of it."""
    return ", ".join(shown(part) for part in sorted(found)[:5])
