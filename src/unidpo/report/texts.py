"""Prompts, answers and small pictures of pairs, read from the data files where these still lie."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from unidpo.data.formats import read_groups
from unidpo.data.images import open_image
from unidpo.data.pairs import ImageSource, PromptGroup
from unidpo.errors import ImageError, UserError
from unidpo.report.pairs import Pairs
from unidpo.report.reading import Note, Run
from unidpo.run_folder.inputs import data_file

MOST_TEXT = 10_000_000
"""Characters of all texts in one page."""
LONGEST_TEXT = 4_000
PICTURES, PICTURE_BYTES = 400, 2_000_000
"""Small pictures in one page, and their bytes together."""
PICTURE_SIDE = 160


@dataclass(slots=True)
class Texts:
    """Every text and picture of a page, each once.

    Attributes:
        texts: in the order of their first use.
        pictures: names of the images, paths where they are files.
    """

    texts: dict[str, int] = field(default_factory=dict)
    pictures: dict[str, int] = field(default_factory=dict)
    sources: list[ImageSource] = field(default_factory=list)

    def text(self, text: str) -> int:
        """The place of a text."""
        return self.texts.setdefault(text, len(self.texts))

    def picture(self, source: ImageSource) -> int:
        """The place of an image."""
        name = str(source) if isinstance(source, Path) else f"image {id(source)}"
        if name not in self.pictures:
            self.pictures[name] = len(self.sources)
            self.sources.append(source)
        return self.pictures[name]

    def cut(self) -> tuple[list[str], dict[int, int]]:
        """The texts, none longer than what they all fit with; and the whole length of those that were cut."""
        lengths = sorted(map(len, self.texts))
        limit, left = LONGEST_TEXT, MOST_TEXT
        for place, length in enumerate(lengths):
            share = left // (len(lengths) - place)
            if length > share:
                limit = min(limit, share)
                break
            left -= length
        return [text[:limit] for text in self.texts], {
            place: len(text) for place, text in enumerate(self.texts) if len(text) > limit
        }


@dataclass(frozen=True, slots=True)
class PairTexts:
    """Where the texts of each pair stand in `Texts`; -1 where they are unknown."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    pictures: list[list[int]]


def texts_of(run: Run, pairs: Pairs, into: Texts, notes: list[Note]) -> PairTexts:
    """Find the texts of each pair in the data files that the run was trained on, as far as they lie there unchanged.

    Args:
        into: receives them.
        notes: receives what could not be read.
    """
    files = [_groups_by_row(run, file, notes) for file in run.files]
    columns = {name: pairs.columns[name] for name in ("file", "row", "chosen", "rejected")}
    scores = [pairs.columns[name] for name in ("chosen_score", "rejected_score")]
    found = PairTexts([], [], [], [])
    for place, (file, row, *index) in enumerate(zip(*columns.values(), strict=True)):
        group = files[int(file)].get(int(row))
        named = None if group is None else _answers(group, (int(index[0]), int(index[1])), [s[place] for s in scores])
        if group is None or named is None:
            for texts in (found.prompt, found.chosen, found.rejected):
                texts.append(-1)
            found.pictures.append([])
            continue
        found.prompt.append(into.text(_prompt(group)))
        found.chosen.append(into.text(group.responses[named[0]].text))
        found.rejected.append(into.text(group.responses[named[1]].text))
        found.pictures.append([into.picture(image) for image in group.images])
    return found


def _groups_by_row(run: Run, file: str | None, notes: list[Note]) -> Mapping[int, PromptGroup]:
    """The prompt groups of a data file by its rows; nothing, and a note, where it is not what was trained on."""
    if file is None or not Path(file).exists():
        notes.append(Note("note-data-gone", {"file": file or "?"}))
        return {}
    known = next((each.sha256 for each in run.data if each.path == file), None)
    if known is not None and data_file(file, 1.0).sha256 != known:
        notes.append(Note("note-data-changed", {"file": file}))
        return {}
    try:
        read = read_groups(file, images=_image_folder(run, file))
    except UserError as error:
        notes.append(Note("note-data-unread", {"file": file, "reason": str(error)}))
        return {}
    return {group.pairs[0].row: group for group in read.groups}


def _image_folder(run: Run, file: str) -> str | None:
    """Where relative image paths of a data file start, where that folder is still there."""
    data: Mapping[str, Any] = run.config.get("data", {})
    sources = data["path"] if isinstance(data.get("path"), list) else []
    own = next((s.get("images") for s in sources if isinstance(s, dict) and str(s.get("path")) == file), None)
    folder = own or data.get("images")
    return str(folder) if folder and Path(folder).is_dir() else None


def _answers(group: PromptGroup, index: tuple[int, int], scores: Sequence[float]) -> tuple[int, int] | None:
    """Which answers of a row a pair means. Its indices are those of the group that was trained on, which may have been
    joined of several rows or have lost answers; then the scores decide, if they leave one choice.
    """

    def fits(chosen: int, rejected: int) -> bool:
        given = (group.responses[i].score for i in (chosen, rejected))
        return all(mine == his or (mine is None and his != his) for mine, his in zip(given, scores, strict=True))

    there = [(pair.chosen, pair.rejected) for pair in group.pairs]
    if index in there and fits(*index):
        return index
    fitting = [pair for pair in there if fits(*pair)]
    return fitting[0] if len(fitting) == 1 else None


def _prompt(group: PromptGroup) -> str:
    if len(group.messages) == 1:  # its only picture stands above it
        text = group.messages[0].text.strip()
        return text.removeprefix("<image>").strip() if len(group.images) == 1 else text
    return "\n\n".join(f"[{message.role}] {message.text.strip()}" for message in group.messages)


def small_pictures(sources: Sequence[ImageSource], wanted: Iterable[int], on_done: Callable[[int], None]) -> list[str]:
    """Images as small `data:` addresses, "" for those that do not fit or cannot be read.

    Args:
        sources: the images.
        wanted: which of them matter most, first.
        on_done: called with how many are done.
    """
    small, left = [""] * len(sources), PICTURE_BYTES
    for done, place in enumerate(list(dict.fromkeys(wanted))[:PICTURES], start=1):
        on_done(done)
        try:
            address = _address(sources[place])
        except (ImageError, OSError, ValueError):
            continue
        if len(address) <= left:
            small[place] = address
            left -= len(address)
    return small


def _address(source: ImageSource) -> str:
    image = open_image(source)
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=70)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
