"""The layouts people keep scored pairs in. Each is a module that reads a row and writes a group, and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unidpo.data.formats.layouts import alpaca, ranked, sharegpt, swift, trl
from unidpo.data.formats.row import Row
from unidpo.data.formats.texts import Form, plainest_form
from unidpo.data.pairs import PromptGroup


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to keep prompt groups in rows.

    Attributes:
        main: the column without which a row is of another layout.
        columns: every column it reads.
        fits: whether a row has the keys of this layout; the first layout that fits is taken.
        read: reads a row into ``row.group``.
        write: the rows of a group without their images, whose prompts are in a form that can hold every group of the
            file. Raises `ValueError` for a prompt that the layout cannot hold.
        form: the plainest form that a group can be written in.
    """

    main: str
    columns: tuple[str, ...]
    fits: Callable[[dict[str, Any]], bool]
    read: Callable[[Row], None]
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
