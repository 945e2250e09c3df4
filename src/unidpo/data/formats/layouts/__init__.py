"""The layouts people keep scored pairs in. Each is a module that reads a row and writes a group, and an entry here."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from unidpo.data.formats.layouts import alpaca, published, ranked, rated, sharegpt, swift, trl
from unidpo.data.formats.row import Row
from unidpo.data.formats.texts import Form, plainest_form
from unidpo.data.pairs import PromptGroup


@dataclass(frozen=True, slots=True)
class ReadLayout:
    """One way in which rows hold prompt groups.

    Attributes:
        main: the column without which a row is of another layout.
        columns: every column it reads.
        fits: whether a row has the keys of this layout; the first layout that fits is taken.
        read: reads a row into ``row.group``.
    """

    main: str
    columns: tuple[str, ...]
    fits: Callable[[dict[str, Any]], bool]
    read: Callable[[Row], None]


@dataclass(frozen=True, slots=True)
class Layout(ReadLayout):
    """One that is written, too.

    Attributes:
        write: the rows of a group without their images, whose prompts are in a form that can hold every group of the
            file. Raises `ValueError` for a prompt that the layout cannot hold.
        form: the plainest form that a group can be written in.
    """

    write: Callable[[PromptGroup, Form], list[dict[str, Any]]]
    form: Callable[[PromptGroup], Form] = plainest_form


LAYOUTS: dict[str, Layout] = {
    "ranked": Layout("responses", ranked.COLUMNS, ranked.fits, ranked.read, ranked.write),
    "alpaca": Layout("instruction", alpaca.COLUMNS, alpaca.fits, alpaca.read, alpaca.write),
    "sharegpt": Layout("conversations", sharegpt.COLUMNS, sharegpt.fits, sharegpt.read, sharegpt.write),
    "swift": Layout("messages", swift.COLUMNS, swift.fits, swift.read, swift.write, swift.form),
    "trl": Layout("prompt", trl.COLUMNS, trl.fits, trl.read, trl.write, trl.form),
}
"""Those that are read and written, by name. Detection takes the first that fits."""

PUBLISHED: dict[str, ReadLayout] = {
    "rated": ReadLayout("completions", rated.COLUMNS, rated.fits, rated.read),
    "compared": ReadLayout("", published.COMPARED_COLUMNS, published.is_compared, published.read_compared),
    "json": ReadLayout("text", published.JSON_COLUMNS, published.is_json, published.read_json),
    "dialogue": ReadLayout("chosen", published.DIALOGUE_COLUMNS, published.is_dialogue, published.read_dialogue),
    "question": ReadLayout("question", published.QUESTION_COLUMNS, published.is_question, published.read_question),
}
"""Those of published data sets, which are read only: docs/datasets.md says whose each is."""
READ_LAYOUTS = cast(Mapping[str, ReadLayout], ChainMap(cast(dict[str, ReadLayout], LAYOUTS), PUBLISHED))
"""All that are read, by name, those of published data first, whose rows are told by more than one key."""
