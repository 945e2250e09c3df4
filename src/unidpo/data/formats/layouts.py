"""The layouts people keep scored pairs in: how a row of each is read, and how a group is written as rows of it.

A row says by its keys which layout it is in, so one file may mix them. What a new layout needs is a function that
reads, one that writes, and a line in `LAYOUTS`; the functions stand in `llama_factory` and `trl`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unidpo.data.formats.dataset_info import PLAIN
from unidpo.data.formats.files import json_type
from unidpo.data.formats.llama_factory import alpaca_prompt, read_alpaca, read_sharegpt, sharegpt_prompt
from unidpo.data.formats.rows import LayoutName, Row
from unidpo.data.formats.texts import joined, texts_of
from unidpo.data.formats.trl import Form, content_as, prompt_columns, ranked_columns, read_ranked, read_trl
from unidpo.data.formats.unread import unread_columns
from unidpo.data.pairs import IMAGE, Message, Pair, PromptGroup
from unidpo.errors import DataError, Finding, shown

_EXPECTED = (
    "`instruction`, `chosen`, `rejected` (LLaMA-Factory), `conversations`, `chosen`, `rejected` (sharegpt), "
    "`prompt`, `chosen`, `rejected` (TRL) or `prompt`, `responses` (ranked)"
)
_IMAGES = ("images", "image")
_PAIR = ("chosen", "rejected", "score_chosen", "score_rejected", *_IMAGES)
_UNSUPPORTED = ("videos", "video", "audios", "audio", "tools")
_NOWHERE = Path()


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to write a row.

    Attributes:
        name: how it is called on the command line.
        columns: every column it reads.
        main: the column without which a row is of another layout.
        read: reads a row into ``row.group``.
        prompt: the prompt's columns of a row to be written.
    """

    name: LayoutName
    columns: tuple[str, ...]
    main: str
    read: Callable[[Row], None]
    prompt: Callable[[PromptGroup, Form], dict[str, Any]]


def read_row(row: Row, layout: LayoutName | None = None) -> None:
    """Read a row into ``row.group``, or leave it ``None`` with at least one error among the findings."""
    if not isinstance(row.given, dict):
        row.error("wrong-type", None, f"a row is an object with keys, not {json_type(row.given)}")
        return
    if not _is_declared(row, layout):
        row.columns = PLAIN
    name = layout or row.columns.layout
    chosen = _layout_of(row.given) if name is None else LAYOUTS[name]
    if chosen is None:
        keys = shown(sorted(map(str, row.given))[:20], most=400)
        row.error("unknown-layout", None, f"the keys {keys} are of no known layout; expected {_EXPECTED}")
        return
    row.layout = chosen.name
    names = row.columns.names
    row.values = {name: row.given[user] for name in chosen.columns if (user := names.get(name, name)) in row.given}
    try:
        for key in _UNSUPPORTED:
            if row.given.get(names.get(key, key)):
                row.error("unsupported", key, f"{key} cannot be trained on; remove the row, or the column")
        chosen.read(row)
        _note_unread(row, chosen)
    except RecursionError:
        row.error("wrong-type", None, "the values are nested too deeply to be a row")


def extra_columns(row: Row) -> dict[str, Any]:
    """The columns of a row that its layout does not read, nulls left out."""
    if row.layout is None:
        return {}
    names = row.columns.names
    known = {names.get(name, name) for name in LAYOUTS[row.layout].columns}
    return {key: value for key, value in row.given.items() if key not in known and value is not None}


def detected(given: dict[str, Any]) -> LayoutName | None:
    """The layout a row of these columns is read as."""
    layout = _layout_of(given)
    return None if layout is None else layout.name


def form_of(group: PromptGroup, layout: LayoutName) -> Form:
    """The plainest form of prompt that can hold a group. Of a file, the least plain one that any group needs."""
    spelled = any(IMAGE.value in text for text in texts_of(group.messages))
    system_image = any(message.role == "system" and IMAGE in message.content for message in group.messages)
    if layout in ("alpaca", "sharegpt"):
        return "messages"
    if spelled or system_image or (layout == "trl" and group.images):
        return "parts"
    return "text" if layout == "ranked" and [m.role for m in group.messages] == ["user"] else "messages"


def write_group(group: PromptGroup, layout: LayoutName, form: Form) -> list[dict[str, Any]]:
    """A group as rows of a layout, without the images: one row, or one for each pair in the layouts of pairs.

    Raises:
        DataError: the layout cannot hold the prompt.
    """
    row = group.pairs[0].row
    try:
        prompt = LAYOUTS[layout].prompt(group, form)
    except ValueError as error:
        finding = Finding("not-expressible", f"the {layout} layout cannot hold {error}", group.pairs[0].file, row)
        raise DataError(str(finding), findings=[finding]) from error
    if layout == "ranked":
        return [{**prompt, **ranked_columns(group)}]
    return [{**prompt, **_pair_columns(group, pair, layout, form)} for pair in group.pairs]


def check_writable(group: PromptGroup, layout: LayoutName, form: Form) -> dict[str, Any]:
    """Make sure that rows of a layout would say all that a group says; gives the first of them.

    Raises:
        DataError: the layout cannot hold the group, or its rows could not be read again.
    """
    pairs = []
    rows = write_group(group, layout, form)
    for values in rows:
        images = [{"bytes": b""}] * len(group.images)
        again = Row({**values, "images": images}, group.pairs[0].row, group.pairs[0].file, _NOWHERE)
        read_row(again, layout)
        if again.group is None:
            raise DataError(f"not written: {again.findings[0]}", findings=again.findings)
        if again.group.messages != tuple(Message(m.role, joined(m.content)) for m in group.messages):
            again.error("not-expressible", None, f"the {layout} layout cannot hold this prompt")
            raise DataError(str(again.findings[-1]), findings=again.findings[-1:])
        pairs += [(again.group.responses[p.chosen], again.group.responses[p.rejected]) for p in again.group.pairs]
    if pairs != [(group.responses[p.chosen], group.responses[p.rejected]) for p in group.pairs]:
        raise AssertionError(f"the {layout} layout turned {group.pairs} into other pairs")
    return rows[0]


def _note_unread(row: Row, layout: Layout) -> None:
    names = row.columns.names
    known = _KNOWN[layout.name] if not names else {names.get(name, name) for name in _KNOWN[layout.name]}
    if row.given.keys() <= known:
        return
    unread = [key for key, value in row.given.items() if value is not None and key not in known]
    absent = [name for name in layout.columns if row.values.get(name) is None]
    others = () if names else _EVERY  # where columns are declared, the others are meant to be left
    for key, problem in unread_columns([key for key in unread if isinstance(key, str)], absent, others):
        row.findings.append(Finding("unread-column", problem, row.file, row.number, key, "warning"))


# --- detection


def _is_declared(row: Row, layout: LayoutName | None) -> bool:
    """Whether what is declared of the file's columns is true of this row."""
    declared = row.columns.layout
    if declared is None or layout not in (None, declared):
        return False
    main = LAYOUTS[declared].main
    return row.columns.names.get(main, main) in row.given


def _layout_of(given: dict[str, Any]) -> Layout | None:
    fitting = [LAYOUTS[name] for name, fits in _FITS.items() if fits(given)]
    # In a table every row has every column; the empty ones say nothing.
    filled = {key: value for key, value in given.items() if value is not None}
    sure = (layout for layout in fitting if _FITS[layout.name](filled) and _is_filled(layout, filled))
    return next(sure, next(iter(fitting), None))


def _is_filled(layout: Layout, filled: dict[str, Any]) -> bool:
    if layout.name != "ranked" and "chosen" not in filled and "rejected" not in filled:
        return False
    return layout.main in filled or isinstance(filled.get("chosen"), list)


_FITS: dict[LayoutName, Callable[[dict[str, Any]], bool]] = {
    "ranked": lambda given: "responses" in given,
    "alpaca": lambda given: "instruction" in given and not _is_conversation(given),
    "sharegpt": lambda given: "conversations" in given and ("chosen" in given or "rejected" in given),
    "trl": lambda given: "prompt" in given or ("chosen" in given and "rejected" in given),
}


def _is_conversation(given: dict[str, Any]) -> bool:
    """Whether the responses are message lists as in TRL's layout, with their prompt before them or beside them."""
    chosen = given.get("chosen")
    if not isinstance(chosen, list):
        return False
    return "prompt" in given or (len(chosen) > 1 and all(isinstance(message, dict) for message in chosen))


def _pair_columns(group: PromptGroup, pair: Pair, layout: LayoutName, form: Form) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for name, index in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        text, score = group.responses[index].text, group.responses[index].score
        if layout == "sharegpt":
            columns[name] = {"from": "gpt", "value": text}
        elif layout == "trl":
            columns[name] = [{"role": "assistant", "content": content_as(form, Message("assistant", (text,)))}]
        else:
            columns[name] = text
        if score is not None:
            columns[f"score_{name}"] = score
    return columns


LAYOUTS: dict[LayoutName, Layout] = {
    "ranked": Layout("ranked", ("prompt", "responses", "pairs", *_IMAGES), "responses", read_ranked, prompt_columns),
    "alpaca": Layout(
        "alpaca",
        ("instruction", "input", "system", "history", *_PAIR),
        "instruction",
        read_alpaca,
        lambda group, form: alpaca_prompt(group),
    ),
    "sharegpt": Layout(
        "sharegpt",
        ("conversations", "system", *_PAIR),
        "conversations",
        read_sharegpt,
        lambda group, form: sharegpt_prompt(group),
    ),
    "trl": Layout("trl", ("prompt", *_PAIR), "prompt", read_trl, prompt_columns),
}
_KNOWN = {name: frozenset({*layout.columns, *_UNSUPPORTED}) for name, layout in LAYOUTS.items()}
_EVERY = frozenset().union(*_KNOWN.values())
