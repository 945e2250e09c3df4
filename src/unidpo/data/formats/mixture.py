"""Data sets for training: the usable pairs of one or several, in what shares, and what is held out."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unidpo.data.formats.reading import read_groups, report_rows
from unidpo.data.images import content_digest
from unidpo.data.pairs import PromptGroup, merge_by_prompt
from unidpo.errors import DataError

logger = logging.getLogger("unidpo")


@dataclass(frozen=True, slots=True)
class Source:
    """One data set of a mixture.

    Attributes:
        path: see `unidpo.data.formats.read_groups`.
        weight: how often each of its groups is met in an epoch. With 0.5 half of them are met; with 2.5 each is met
            twice and half of them once more. The same ones in every epoch.
        images: the folder its relative image paths start from; the file's own folder by default.

    Raises:
        ValueError: the weight is not a number above 0 and at most 1000.
    """

    path: str | Path
    weight: float = 1.0
    images: str | Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1000:
            raise ValueError(f"a weight is a number above 0 and at most 1000, not {self.weight}")


def load_pairs(
    path: str | Path | Source | Sequence[str | Path | Source],
    *,
    images: str | Path | None = None,
    group_by_prompt: bool = False,
    min_score_margin: float | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    require_scores: bool = False,
    seed: int = 0,
) -> list[PromptGroup]:
    """Read a preference data set for training. Images are not opened here; `unidpo.data.check.check_data` does that.

    What is left out or worth knowing is counted on the logger ``unidpo``.

    Args:
        path: see `unidpo.data.formats.read_groups`; or several of them, with weights as `Source`.
        images: the folder relative image paths start from, for every source that names none of its own; a file's own
            folder by default.
        group_by_prompt: join rows that share prompt and images into one group, over all sources.
        min_score_margin: leave out pairs whose chosen minus rejected score is smaller. Needs scores.
        on_bad_row: ``error`` raises if any row cannot be used, ``skip`` leaves those rows out.
        require_scores: a pair without scores is a bad row.
        seed: which groups of a source with a broken weight are met once more.

    Raises:
        DataError: a data set cannot be read, a row cannot be used (all are listed), or no pair is left.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is 'error' or 'skip', not {on_bad_row!r}")
    several = [path] if isinstance(path, (str, Path, Source)) else path
    sources = [given if isinstance(given, Source) else Source(given) for given in several]
    needed = require_scores or min_score_margin is not None
    reads = [read_groups(s.path, images=s.images or images, require_scores=needed) for s in sources]
    name = ", ".join(str(source.path) for source in sources)
    report_rows(reads, name, on_bad_row=on_bad_row)
    groups = mix([(read.groups, source.weight) for read, source in zip(reads, sources, strict=True)], seed=seed)
    return select_pairs(groups, min_score_margin=min_score_margin, group_by_prompt=group_by_prompt)


def mix(weighted: Sequence[tuple[Sequence[PromptGroup], float]], *, seed: int) -> list[PromptGroup]:
    """The groups of several sources, each as often as its weight says; see `Source`. In the order of the sources.

    The number of groups taken is exact: weight times groups, rounded.
    """
    mixed: list[PromptGroup] = []
    for index, (groups, weight) in enumerate(weighted):
        times, rest = divmod(round(weight * len(groups)), len(groups)) if groups else (0, 0)
        # Every source draws by itself, so that adding one changes nothing in those before it.
        once_more = set(random.Random(f"{seed} {index}").sample(range(len(groups)), rest))
        mixed += [group for i, group in enumerate(groups) for _ in range(times + (i in once_more))]
    return mixed


def select_pairs(
    groups: Sequence[PromptGroup], *, min_score_margin: float | None = None, group_by_prompt: bool = False
) -> list[PromptGroup]:
    """What a recipe makes of the usable rows: pairs of at least a margin, joined by prompt. See `load_pairs`.

    Raises:
        DataError: no pair is left.
    """
    before = sum(len(group.pairs) for group in groups)
    if min_score_margin is not None:
        groups = _above_margin(groups, min_score_margin)
        after = sum(len(group.pairs) for group in groups)
        logger.info("left out %d of %d pairs, score margin under %g", before - after, before, min_score_margin)
    if not groups:
        reason = f"all {before} have a score margin under {min_score_margin}" if before else "no row can be used"
        raise DataError(f"no pair is left to train on: {reason}")
    return merge_by_prompt(groups) if group_by_prompt else list(groups)


def split_by_prompt(
    groups: Sequence[PromptGroup], fraction: float, seed: int
) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """Hold out a part of the prompts: ``(train, held_out)``, both in the order given.

    A prompt with all its groups is on one side. Which side follows from what the prompt says, the names of its image
    files and the seed: not from the order of the rows, nor from where the files lie.

    Args:
        groups: in any order.
        fraction: of the distinct prompts (text and images), from 0 to below 1; exact to rounding.
        seed: another one holds out others.

    Raises:
        ValueError: the fraction is outside of its range.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the fraction held out is from 0 to below 1, not {fraction}")
    prompts = {group.prompt_key(): group for group in groups}
    order = sorted(prompts, key=lambda key: _digest(prompts[key], seed))
    held_out = set(order[: round(fraction * len(order))])
    sides: tuple[list[PromptGroup], list[PromptGroup]] = [], []
    for group in groups:
        sides[group.prompt_key() in held_out].append(group)
    return sides


def _digest(group: PromptGroup, seed: int) -> tuple[bytes, str]:
    """What orders prompts: their content, and where two say the same over files of one name, the paths."""
    says = [str(seed)]
    for message in group.messages:
        says += [message.role, *(f"text {part}" if isinstance(part, str) else "image" for part in message.content)]
    digest = hashlib.blake2b(digest_size=16)
    for image in group.images:
        says.append(image.name if isinstance(image, Path) else content_digest(image).hex())
    for said in says:
        data = said.encode(errors="surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest(), "\0".join(str(image) for image in group.images if isinstance(image, Path))


def _above_margin(groups: Sequence[PromptGroup], minimum: float) -> list[PromptGroup]:
    kept = []
    for group in groups:
        # Rounded because 4.3 - 4.2 is a little under 0.1 in binary.
        pairs = [pair for pair in group.pairs if round(group.score_margin(pair) or 0.0, 9) >= minimum]
        if pairs:
            kept.append(group.keep_pairs(pairs))
    return kept
