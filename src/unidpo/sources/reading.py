"""From a data set, whatever it is kept in, to prompt groups and findings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unidpo.errors import DataError, Finding
from unidpo.pairs import PromptGroup
from unidpo.sources import tables
from unidpo.sources.dataset_info import PLAIN, columns_of
from unidpo.sources.files import rows_of
from unidpo.sources.layouts import read_row
from unidpo.sources.rows import LayoutName, Row


@dataclass(frozen=True, slots=True)
class ImageUse:
    """One mention of an image: the row (from 1) and key that name it, and the image."""

    row: int
    key: str
    source: Path | bytes


@dataclass(frozen=True, slots=True)
class Read:
    """What a data file holds.

    Attributes:
        file: the file, or the name of the data set.
        rows: how many rows it has, good and bad.
        groups: one prompt group per usable row, in file order; a row of ranked responses has several pairs.
        findings: what was noticed, in file order. A row with an error has no group.
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
            are named ``name[:config][@split]``. Columns declared in a ``dataset_info.json`` beside a file are used.
        images: the folder relative image paths start from; the file's own folder by default.
        require_scores: a pair without scores is an error.

    Raises:
        DataError: there is no such file, data set or image folder, it cannot be read as a whole, or has no rows.
    """
    count, groups, findings, uses = 0, [], [], []
    for row in read_rows(path, images=images, require_scores=require_scores, shared={}):
        count += 1
        if row.group is not None:
            groups.append(row.group)
        findings += row.findings
        uses += [ImageUse(row.number, key, source) for key, source in row.sources]
    return Read(Path(path), count, groups, findings, uses)


def read_rows(
    path: str | Path,
    *,
    images: str | Path | None = None,
    require_scores: bool = False,
    layout: LayoutName | None = None,
    shared: dict[bytes, bytes] | None = None,
) -> Iterator[Row]:
    """The same, row by row, for what need not be in memory at once.

    Args:
        path: see `read_groups`.
        images: see `read_groups`.
        require_scores: see `read_groups`.
        layout: read every row as of this layout, instead of by its keys.
        shared: where embedded images are kept while equal ones become one object.

    Raises:
        DataError: as `read_groups`, while iterating.
    """
    if images is not None and not Path(images).is_dir():
        raise DataError(f"{images}: there is no such image folder; give the one that the image paths start from")
    values: Iterator[tuple[int, Any]]
    if tables.is_dataset(path):
        values, columns, folder = enumerate(tables.dataset_rows(path), start=1), PLAIN, tables.dataset_folder(path)
    else:
        values, columns, folder = rows_of(Path(path)), columns_of(Path(path)), Path(path).parent
    root, empty = folder if images is None else Path(images), True
    for number, value in values:
        empty = False
        row = Row(value, number, path, root, require_scores, columns, shared)
        if isinstance(value, Finding):
            row.error(value.kind, value.key, value.message)
        else:
            read_row(row, layout)
        yield row
    if empty:
        raise DataError(f"{path}: the file holds no rows")
