"""Write groups in a layout, and turn a data set from one layout into another without losing anything."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from unidpo.data.formats import tables
from unidpo.data.formats.files import LINE_SUFFIXES, is_same, json_bytes, write_json
from unidpo.data.formats.layouts import LAYOUTS, check_writable, detected, extra_columns, form_of, write_group
from unidpo.data.formats.reading import read_rows
from unidpo.data.formats.rows import ADDRESS, LayoutName, Row
from unidpo.data.formats.trl import Form
from unidpo.data.images import open_image
from unidpo.data.pairs import ImageSource, PromptGroup, merge_by_prompt
from unidpo.errors import DataError, Finding, from_findings, shown
from unidpo.files.regular import is_regular

if TYPE_CHECKING:
    import pyarrow as pa

Item: TypeAlias = tuple[PromptGroup, dict[str, Any]]
"""A group and the columns that go with its rows."""
_SUFFIXES = (".json", *LINE_SUFFIXES, ".parquet")


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        to: the file written.
        layout: its layout.
        rows_read: rows of the source, good and bad.
        rows_written: rows of the new file.
        pairs: preference pairs in it.
        findings: what was noticed in the source. Rows with an error were left out, which only ``on_bad_row="skip"``
            allows.
        images: distinct image files that the source names.
        images_not_found: those that are not there, with the first row that names each.
        dropped: columns and nested keys left out because ``keep_extra=False`` said so, with the number of rows.
    """

    to: Path
    layout: LayoutName
    rows_read: int
    rows_written: int
    pairs: int
    findings: list[Finding]
    dropped: dict[str, int]
    images: int = 0
    images_not_found: dict[Path, int] = field(default_factory=dict)


def write_pairs(groups: Iterable[PromptGroup], path: str | Path, layout: LayoutName = "ranked") -> int:
    """Write groups as JSON, JSONL or Parquet, by the suffix of the path; returns how many rows that took.

    A layout of pairs takes a row for each pair; ``group_by_prompt`` and `merge_by_prompt` bring the groups back. Image
    paths are written relative to the file's folder where they lie below it, else absolute; images in memory go into
    the file, decoded ones as PNG. The file appears complete or not at all.

    Raises:
        DataError: a layout cannot hold a group, its rows could not be read again, or the file cannot be written.
    """
    items: list[Item] = [(group, {}) for group in groups]
    form = _least_plain({form_of(group, layout) for group, _ in items})
    for group, _ in items:
        check_writable(group, layout, form)
    return _write(lambda: iter(items), _target(path), layout, form)


def convert(
    source: str | Path,
    to: str | Path,
    *,
    from_layout: LayoutName | None = None,
    to_layout: LayoutName = "ranked",
    images: str | Path | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    keep_extra: bool = True,
    group_by_prompt: bool | None = None,
) -> ConvertReport:
    """Turn a data set into another layout, another kind of file, or both. Nothing is lost without being named.

    Columns the layout does not know go along with their row, into each row that is made of it; nulls count as absent.
    What has no place in the new layout is an error, unless it is only extra and ``keep_extra`` is off.

    Args:
        source: see `unidpo.data.formats.read_groups`.
        to: the new file, ``.json``, ``.jsonl`` or ``.parquet``; not the source itself.
        from_layout: the layout of every row of the source; by default each row says it by its keys.
        to_layout: the layout of the new file. ``ranked`` can hold everything.
        images: the folder relative image paths start from; the source's own folder by default.
        on_bad_row: ``error`` writes nothing if a row cannot be used, ``skip`` leaves such rows out.
        keep_extra: carry columns along that no layout knows; without it they are left out and counted.
        group_by_prompt: join rows that share prompt, images and extra columns; by default only for ``ranked``.

    Raises:
        DataError: the source cannot be read, a row cannot be used or does not fit (all are listed), or the file
            cannot be written.
    """
    target = _target(to)
    if is_same(target, Path(source)):
        raise DataError(f"{to}: this is the source itself; give another file")
    if to_layout not in LAYOUTS or from_layout not in {None, *LAYOUTS}:
        raise ValueError(f"a layout is one of {', '.join(LAYOUTS)}")
    joins = to_layout == "ranked" if group_by_prompt is None else group_by_prompt
    survey = _Survey(target, to_layout, keep_extra)
    kept: list[Item] = []
    for row in read_rows(source, images=images, layout=from_layout, shared={} if joins else None):
        item = survey.add(row)
        if item is not None and joins:
            kept.append(item)
    errors = [finding for finding in survey.findings if finding.severity == "error"]
    if errors and (on_bad_row == "error" or not survey.forms):
        title = f"{source}: {len(survey.bad_rows)} of {survey.rows} rows cannot be converted"
        raise from_findings(DataError, title, errors)

    def items() -> Iterator[Item]:
        # A second reading, so that only what is joined need be in memory at once.
        for row in read_rows(source, images=images, layout=from_layout):
            if row.group is not None and row.number not in survey.bad_rows:
                yield row.group, extra_columns(row) if keep_extra else {}

    joined = _join(kept)
    written = _write((lambda: iter(joined)) if joins else items, target, to_layout, _least_plain(survey.forms))
    not_found = {path: row for path, row in survey.images.items() if not is_regular(path)}
    return ConvertReport(
        target,
        to_layout,
        survey.rows,
        written,
        survey.pairs,
        survey.findings,
        survey.dropped,
        images=len(survey.images),
        images_not_found=not_found,
    )


class _Survey:
    """The first reading: what there is, and what of it could not be written."""

    def __init__(self, target: Path, layout: LayoutName, keep_extra: bool) -> None:
        self.rows = self.pairs = 0
        self.findings: list[Finding] = []
        self.bad_rows: set[int] = set()
        self.forms: set[Form] = set()
        self.dropped: dict[str, int] = {}
        self.images: dict[Path, int] = {}
        self._target = target
        self._layout: LayoutName = layout
        self._keep_extra = keep_extra

    def add(self, row: Row) -> Item | None:
        """Take a row; gives what is to be written of it."""
        self.rows += 1
        for _, source in row.sources:
            if isinstance(source, Path):
                self.images.setdefault(source, row.number)
        extra = extra_columns(row) if row.group is not None else {}
        form: Form = "text"
        if row.group is not None:
            form = form_of(row.group, self._layout)
            try:
                columns = check_writable(row.group, self._layout, form)
                if self._keep_extra:
                    self._check_extra(row, extra, columns)
            except DataError as error:
                row.findings += error.findings
        self.findings += row.findings
        if row.is_bad or row.group is None:
            self.bad_rows.add(row.number)
            return None
        if not self._keep_extra:
            for key in (*extra, *row.lost):
                self.dropped[key] = self.dropped.get(key, 0) + 1
            extra = {}
        self.pairs += len(row.group.pairs)
        self.forms.add(form)
        return row.group, extra

    def _check_extra(self, row: Row, extra: dict[str, Any], columns: dict[str, Any]) -> None:
        """Note what of a row's own columns could not go along."""
        problems = [(key, "the value has no place in a preference pair and would be lost") for key in row.lost]
        clash = f"the {self._layout} layout has a column of this name for something else"
        problems += [(key, clash) for key in extra if key in LAYOUTS[self._layout].columns]
        turn = f"beside it the row would not be read as of the {self._layout} layout"
        problems += [(key, turn) for key in extra if detected({key: 1, **columns}) != self._layout]
        if extra and self._target.suffix != ".parquet":
            try:
                json_bytes(extra, self._target)
            except DataError as error:
                problems.append((min(extra), str(error)))
        for key, problem in problems:
            remedy = "rename or remove it, or leave out what is extra (`--drop-extra`, `keep_extra=False`)"
            row.findings.append(Finding("lost-value", f"{problem}; {remedy}", row.file, row.number, key))


def _join(items: Sequence[Item]) -> list[Item]:
    """Groups of one prompt joined where their other columns agree, in order of first appearance."""
    members: dict[Any, list[Item]] = {}
    for group, extra in items:
        key = group.prompt_key(), json.dumps(extra, sort_keys=True, default=repr)
        members.setdefault(key, []).append((group, extra))
    return [(merge_by_prompt(group for group, _ in same)[0], same[0][1]) for same in members.values()]


def _least_plain(forms: set[Form]) -> Form:
    return max(forms, key=get_args(Form).index, default="text")


def _target(to: str | Path) -> Path:
    if Path(to).suffix not in _SUFFIXES:
        raise DataError(f"{to}: the suffix says how to write a file; give one of {', '.join(_SUFFIXES)}")
    return Path(to)


def _write(items: Callable[[], Iterator[Item]], path: Path, layout: LayoutName, form: Form) -> int:
    folder, binary = path.parent.absolute(), path.suffix == ".parquet"
    written = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal written
        written = 0
        for group, extra in items():
            images = [_image(image, folder, binary, group) for image in group.images]
            for columns in write_group(group, layout, form):
                written += 1
                yield {**columns, **({"images": images} if images else {}), **extra}

    if binary:
        tables.write_parquet(rows, path, _types(layout, form))
    else:
        write_json(rows(), path)
    return written


def _image(image: ImageSource, folder: Path, binary: bool, group: PromptGroup) -> Any:
    """An image as a row names it: a path, or its encoded bytes."""
    if isinstance(image, Path):
        path = image.absolute()
        text = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
        text = f"./{text}" if ADDRESS.match(text) or not text.strip() else text
        try:
            text.encode()
        except UnicodeEncodeError as error:
            finding = Finding(
                "bad-text", f"{shown(text)} is no UTF-8; rename the file", None, group.pairs[0].row, "images"
            )
            raise DataError(str(finding), findings=[finding]) from error
        return {"bytes": None, "path": text} if binary else text
    if not isinstance(image, bytes):
        buffer = io.BytesIO()
        open_image(image).save(buffer, "PNG")
        image = buffer.getvalue()
    return {"bytes": image, "path": None} if binary else {"bytes": base64.b64encode(image).decode()}


def _types(layout: LayoutName, form: Form) -> dict[str, pa.DataType]:
    """The types of a layout's columns in a table, the same whichever of them a file fills."""
    import pyarrow as pa

    text, number = pa.string(), pa.float64()
    content = pa.list_(pa.struct({"type": text, "text": text})) if form == "parts" else text
    messages = pa.list_(pa.struct({"role": text, "content": content}))
    turn = pa.struct({"from": text, "value": text})
    response = {"sharegpt": turn, "trl": messages}.get(layout, text)
    return {
        "instruction": text,
        "system": text,
        "history": pa.list_(pa.list_(text)),
        "conversations": pa.list_(turn),
        "prompt": text if form == "text" else messages,
        "chosen": response,
        "rejected": response,
        "score_chosen": number,
        "score_rejected": number,
        "responses": pa.list_(pa.struct({"text": text, "score": number})),
        "pairs": pa.list_(pa.list_(pa.int64())),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": text})),
    }
