"""Write groups in a layout, and turn a data set from one layout into another without losing anything."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from unidpo.data.formats import tables
from unidpo.data.formats.detection import detect, extra_columns, read_row
from unidpo.data.formats.files import LINE_SUFFIXES, is_same, write_json_rows
from unidpo.data.formats.layouts import LAYOUTS, READ_LAYOUTS
from unidpo.data.formats.ratings import check_weights
from unidpo.data.formats.reading import files_of, read_rows
from unidpo.data.formats.row import ADDRESS, Row
from unidpo.data.formats.texts import Form, joined
from unidpo.data.images import open_image
from unidpo.data.pairs import ImageSource, Message, PromptGroup, merge_by_prompt
from unidpo.errors import DataError, Finding, from_findings, require_known
from unidpo.files.regular import is_regular

GroupAndExtra: TypeAlias = tuple[PromptGroup, dict[str, Any]]
"""A group and the columns that go with its rows."""
_SUFFIXES = (".json", *LINE_SUFFIXES, ".parquet")


@dataclass(slots=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        to: the file written.
        layout: its layout.
        rows_read: rows of the source, good and bad.
        rows_written: rows of the new file.
        pairs: preference pairs in it.
        findings: what was found in the source. Rows with an error were left out, which only ``on_bad_row="skip"``
            allows.
        dropped: columns and nested keys left out because ``keep_extra=False`` said so, with the number of rows.
        images: distinct image files that the source names.
        images_not_found: those that are not there, with the first row that names each.
    """

    to: Path
    layout: str
    rows_read: int = 0
    rows_written: int = 0
    pairs: int = 0
    findings: list[Finding] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    images: int = 0
    images_not_found: dict[Path, int] = field(default_factory=dict)


def write_pairs(groups: Iterable[PromptGroup], path: str | Path, layout: str = "ranked") -> int:
    """Write groups as JSON, JSONL or Parquet, by the suffix of the path; returns how many rows that took.

    A layout of pairs takes a row for each pair; ``group_by_prompt`` and `merge_by_prompt` bring the groups back. Image
    paths are written relative to the file's folder where they lie below it, else absolute; images in memory go into
    the file, decoded ones as PNG. The file appears complete or not at all.

    Raises:
        DataError: a layout cannot hold a group, its rows could not be read again, or the file cannot be written.
    """
    items: list[GroupAndExtra] = [(group, {}) for group in groups]
    for group, _ in items:
        check_writable(group, layout)
    return _write(items, _target(path, layout), layout)


def convert(
    source: str | Path,
    to: str | Path,
    *,
    from_layout: str | None = None,
    to_layout: str = "ranked",
    images: str | Path | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    keep_extra: bool = True,
    group_by_prompt: bool | None = None,
    weights: Mapping[str, float] | None = None,
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
        weights: how much each rating counts in a score, for rows that have ratings; see `rated.KNOWN`.

    Raises:
        DataError: the source cannot be read, there is no such layout, a row cannot be used or does not fit (all are
            listed), or the file cannot be written.
    """
    target = _target(to, to_layout)
    require_known(str(source), "layout", [from_layout] if from_layout else [], READ_LAYOUTS)
    if weights is not None:
        check_weights(weights)
    if any(is_same(target, file) for file in files_of(source)):
        raise DataError(f"{to}: this is the source itself; give another file")
    report = ConvertReport(target, to_layout)
    items: list[GroupAndExtra] = []
    named: dict[Path, int] = {}
    bad_rows = 0
    for row in read_rows(source, images=images, layout=from_layout, weights=weights):
        report.rows_read += 1
        for _, image in row.images:
            if isinstance(image, Path):
                named.setdefault(image, row.number)
        extra = extra_columns(row) if row.group is not None else {}
        _check_row(row, extra if keep_extra else None, report)
        report.findings += row.findings
        if row.is_bad or row.group is None:
            bad_rows += 1
            continue
        for key in () if keep_extra else (*extra, *row.lost):
            report.dropped[key] = report.dropped.get(key, 0) + 1
        report.pairs += len(row.group.pairs)
        items.append((row.group, extra if keep_extra else {}))
    errors = [finding for finding in report.findings if finding.severity == "error"]
    if errors and (on_bad_row == "error" or not items):
        raise from_findings(DataError, f"{source}: {bad_rows} of {report.rows_read} rows cannot be converted", errors)
    if to_layout == "ranked" if group_by_prompt is None else group_by_prompt:
        items = _join(items)
    report.rows_written = _write(items, target, to_layout)
    report.images = len(named)
    report.images_not_found = {path: row for path, row in named.items() if not is_regular(path)}
    return report


def check_writable(group: PromptGroup, layout: str) -> list[dict[str, Any]]:
    """Make sure that rows of a layout would say all that a group says; gives these rows.

    Raises:
        DataError: the layout cannot hold the group, or its rows could not be read again.
    """
    messages = tuple(Message(m.role, joined(m.content)) for m in group.messages)
    images = [image.absolute() if isinstance(image, Path) else b"" for image in group.images]
    pairs = []
    rows = _rows(group, layout, LAYOUTS[layout].form(group))
    for values in rows:
        again = Row({**values, "images": images}, group.pairs[0].row, group.pairs[0].file, Path())
        read_row(again, layout)
        if again.group is None:
            raise DataError(f"not written: {again.findings[0]}", findings=again.findings)
        if again.group.messages != messages:
            raise _not_expressible(group, f"the {layout} layout cannot hold this prompt")
        pairs += [(again.group.responses[p.chosen], again.group.responses[p.rejected]) for p in again.group.pairs]
    if pairs != [(group.responses[p.chosen], group.responses[p.rejected]) for p in group.pairs]:
        raise _not_expressible(group, f"the {layout} layout cannot hold these pairs")
    return rows


def _check_row(row: Row, extra: dict[str, Any] | None, report: ConvertReport) -> None:
    """Note what of a row could not be written, its own columns included where they are to go along."""
    if row.group is None:
        return
    try:
        columns = check_writable(row.group, report.layout)[0]
    except DataError as error:
        row.findings += error.findings
        return
    if extra is None:
        return
    problems = [(key, "the value has no place in a preference pair and would be lost") for key in row.lost]
    for key in extra:
        if key in LAYOUTS[report.layout].columns:
            problems.append((key, f"the {report.layout} layout has a column of this name for something else"))
        if detect({key: 1, **columns}) != report.layout:
            problems.append((key, f"beside it the row would not be read as of the {report.layout} layout"))
    for key, problem in problems:
        remedy = "rename or remove it, or leave out what is extra (`--drop-extra`, `keep_extra=False`)"
        row.findings.append(Finding("lost-value", f"{problem}; {remedy}", row.file, row.number, key))


def _rows(group: PromptGroup, layout: str, form: Form) -> list[dict[str, Any]]:
    """A group as rows of a layout, without the images. Raises `DataError` where the layout cannot hold the prompt."""
    try:
        return LAYOUTS[layout].write(group, form)
    except ValueError as error:
        problem = f"the {layout} layout cannot hold {error}; use the trl or ranked layout"
        raise _not_expressible(group, problem) from error


def _not_expressible(group: PromptGroup, problem: str) -> DataError:
    finding = Finding("not-expressible", problem, group.pairs[0].file, group.pairs[0].row)
    return DataError(str(finding), findings=[finding])


def _join(items: Sequence[GroupAndExtra]) -> list[GroupAndExtra]:
    """Groups of one prompt joined where their other columns agree, in order of first appearance."""
    members: dict[Any, list[GroupAndExtra]] = {}
    for group, extra in items:
        key = group.prompt_key(), json.dumps(extra, sort_keys=True, default=repr)
        members.setdefault(key, []).append((group, extra))
    return [(merge_by_prompt(group for group, _ in same)[0], same[0][1]) for same in members.values()]


def _target(to: str | Path, layout: str) -> Path:
    require_known(str(to), "layout", [layout], LAYOUTS)
    if Path(to).suffix not in _SUFFIXES:
        raise DataError(f"{to}: the suffix says how to write a file; give one of {', '.join(_SUFFIXES)}")
    return Path(to)


def _write(items: Sequence[GroupAndExtra], path: Path, layout: str) -> int:
    """Write the rows of groups; returns their number."""
    forms: set[Form] = {LAYOUTS[layout].form(group) for group, _ in items}
    form: Form = max(forms, key=get_args(Form).index, default="text")
    written = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal written
        written = 0
        for group, extra in items:
            images = [_image(image, path) for image in group.images]
            for columns in _rows(group, layout, form):
                written += 1
                yield {**columns, **({"images": images} if images else {}), **extra}

    if path.suffix == ".parquet":
        tables.write_parquet(rows, path)
    else:
        write_json_rows(rows(), path)
    return written


def _image(image: ImageSource, file: Path) -> Any:
    """An image as a row of a file names it: a path, or its encoded bytes."""
    binary = file.suffix == ".parquet"
    if isinstance(image, Path):
        folder, path = file.parent.absolute(), image.absolute()
        text = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()
        text = f"./{text}" if ADDRESS.match(text) or not text.strip() else text
        return {"bytes": None, "path": text} if binary else text
    if not isinstance(image, bytes):
        buffer = io.BytesIO()
        open_image(image).save(buffer, "PNG")
        image = buffer.getvalue()
    return {"bytes": image, "path": None} if binary else {"bytes": base64.b64encode(image).decode()}
