"""From a data set, in a file or in memory, to prompt groups and findings."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unidpo.data.formats import tables
from unidpo.data.formats.dataset_info import PLAIN, ColumnNames, columns_of, declared
from unidpo.data.formats.detection import read_row
from unidpo.data.formats.files import rows_of
from unidpo.data.formats.layouts.rated import joined
from unidpo.data.formats.row import Row
from unidpo.data.pairs import ImageSource, PromptGroup
from unidpo.errors import DataError, Finding, from_findings, shown

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageUse:
    """One mention of an image: the row (from 1) and key that name it, and the image."""

    row: int
    key: str
    source: ImageSource


@dataclass(frozen=True, slots=True)
class Read:
    """What a data file holds.

    Attributes:
        file: the file, or the name of the data set.
        rows: how many rows it has, good and bad.
        groups: one prompt group per usable row, in file order; a row of ranked responses has several pairs.
        findings: what was found, in file order. A row with an error has no group.
        image_uses: every mention of an image, those of bad rows included. Nothing was opened yet.
    """

    file: Path
    rows: int
    groups: list[PromptGroup]
    findings: list[Finding]
    image_uses: list[ImageUse]

    @property
    def errors(self) -> list[Finding]:
        """The findings for which a row cannot be used."""
        return [finding for finding in self.findings if finding.severity == "error"]


def read_groups(path: str | Path, *, images: str | Path | None = None, require_scores: bool = False) -> Read:
    """Read every row of a data set. A bad row becomes a finding and never raises.

    Args:
        path: a JSON, JSONL or Parquet file; a folder that `datasets` saved or reads; or a hub data set. The last two
            are named ``name[:config][@split]``. Columns declared in a ``dataset_info.json`` beside a file are used; a
            data set declared there may be given by its name, see `dataset_info.declared`.
        images: the folder relative image paths start from; the file's own folder by default.
        require_scores: a pair without scores is an error.

    Raises:
        DataError: there is no such file, data set or image folder, it cannot be read as a whole, or has no rows.
    """
    return _collected(path, read_rows(path, images=images, require_scores=require_scores))


def groups_of(
    dataset: Any, *, name: str, require_scores: bool = False, on_bad_row: Literal["error", "skip"] = "error"
) -> list[PromptGroup]:
    """The prompt groups of what a user gives as a data set in memory. Images are not opened.

    Args:
        dataset: prompt groups, which are taken as they are; or a `datasets.Dataset` or a sequence of rows, in any
            layout that is read from files. Images may be decoded; relative paths start from the working directory.
        name: what findings call it.
        require_scores: a pair without scores is a bad row.
        on_bad_row: ``error`` raises if any row cannot be used, ``skip`` names them in a warning and leaves them out.

    Raises:
        DataError: this is no data set in memory, or a row cannot be used (all are listed).
    """
    if isinstance(dataset, (str, Path)):
        raise DataError(f"{name}: this is a path; give what `load_pairs({shown(dataset)})` reads")
    if hasattr(dataset, "keys"):
        splits = ", ".join(map(str, list(dataset.keys())[:8]))
        raise DataError(f"{name}: a list of rows is expected, not one object with {splits}; give one of its splits")
    if not hasattr(dataset, "__len__"):
        raise DataError(f"{name}: this has no length; load a streamed data set without `streaming=True`")
    if isinstance(dataset, Sequence) and all(isinstance(group, PromptGroup) for group in dataset):
        return list(dataset)
    # The table of a `datasets.Dataset` holds images undecoded; with a format "custom" the user's function makes rows.
    is_table = hasattr(dataset, "with_format") and dataset.format["type"] != "custom"
    values = enumerate(tables.rows_of_dataset(dataset) if is_table else dataset, start=1)
    read = _collected(
        name, (_read(Row(value, number, name, Path(), require_scores)) for number, value in joined(values))
    )
    report_rows([read], name, on_bad_row=on_bad_row)
    return read.groups


def report_rows(reads: Sequence[Read], name: str, *, on_bad_row: Literal["error", "skip"]) -> None:
    """Warn of what is worth knowing about rows that are to be trained on, and of those left out.

    Raises:
        DataError: rows cannot be used, and are not to be left out. All are listed.
    """
    rows = sum(read.rows for read in reads)
    errors = [finding for read in reads for finding in read.errors]
    bad_rows = len({(finding.file, finding.row) for finding in errors})
    if bad_rows and on_bad_row == "error":
        raise from_findings(DataError, f"{name}: {bad_rows} of {rows} rows cannot be used", errors)
    if bad_rows:
        _LOG.warning(str(from_findings(DataError, f"{name}: skipped {bad_rows} of {rows} rows", errors)))
    for read in reads:
        kinds: dict[str, list[Finding]] = {}
        for finding in read.findings:
            if finding.severity == "warning":
                kinds.setdefault(finding.kind, []).append(finding)
        for kind, found in kinds.items():
            _LOG.warning("%d %s, the first in %s", len(found), kind, found[0])


def read_rows(
    path: str | Path,
    *,
    images: str | Path | None = None,
    require_scores: bool = False,
    layout: str | None = None,
    weights: Mapping[str, float] | None = None,
) -> Iterator[Row]:
    """The same as `read_groups`, row by row.

    Args:
        path: see `read_groups`.
        images: see `read_groups`.
        require_scores: see `read_groups`.
        layout: read every row as of this layout, instead of by its keys.
        weights: how much each rating counts in a score, where rows have ratings; by default as `rated.KNOWN` says.

    Raises:
        DataError: as `read_groups`, while iterating.
    """
    if not str(path).strip():
        raise DataError("the path of the data is empty; give a file, a folder or a data set of the hub")
    if images is not None and not Path(images).is_dir():
        raise DataError(f"{images}: there is no such image folder; give the one that the image paths start from")
    source = _source(path)
    root, empty = source.folder if images is None else Path(images), True
    shared: dict[bytes, bytes] = {}
    for number, value in joined(source.values):
        empty = False
        yield _read(Row(value, number, source.name, root, require_scores, source.columns, shared, weights), layout)
    if empty:
        raise DataError(f"{path}: the file holds no rows")


def files_of(path: str | Path) -> tuple[Path, ...]:
    """The files that a path, or the name of a declared data set, is read from. Raises as `declared`."""
    return (Path(path),) if (found := declared(path)) is None else found.files


@dataclass(frozen=True, slots=True)
class _Source:
    """Numbered rows, what findings call where they stand, how it names its columns, and where its images start."""

    values: Iterator[tuple[int, Any]]
    name: str | Path
    columns: ColumnNames
    folder: Path


def _source(path: str | Path) -> _Source:
    found = declared(path)
    if found is not None and found.hub is not None:
        return _Source(enumerate(tables.dataset_rows(found.hub), start=1), path, found.columns, found.folder)
    if found is not None and len(found.files) == 1:
        return _Source(rows_of(found.files[0]), found.files[0], found.columns, found.folder)
    if found is not None:
        every = (value for file in found.files for _, value in rows_of(file))
        return _Source(enumerate(every, start=1), path, found.columns, found.folder)
    if tables.is_dataset(path):
        return _Source(enumerate(tables.dataset_rows(path), start=1), path, PLAIN, tables.dataset_folder(path))
    return _Source(rows_of(Path(path)), path, columns_of(Path(path)), Path(path).parent)


def _read(row: Row, layout: str | None = None) -> Row:
    """Read what a row was given; a `Finding` in its place is its error."""
    if isinstance(row.given, Finding):
        row.error(row.given.kind, row.given.key, row.given.message)
    else:
        read_row(row, layout)
    return row


def _collected(name: str | Path, rows: Iterable[Row]) -> Read:
    """The rows of one data set together."""
    count, groups, findings, uses = 0, [], [], []
    for row in rows:
        count += 1
        if row.group is not None:
            groups.append(row.group)
        findings += row.findings
        uses += [ImageUse(row.number, key, source) for key, source in row.images]
    return Read(Path(name), count, groups, findings, uses)
