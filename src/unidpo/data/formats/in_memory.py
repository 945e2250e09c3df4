"""Rows that are in memory already: a `datasets.Dataset`, or a list of rows as a file would hold them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from unidpo.data.formats import tables
from unidpo.data.formats.reading import collected, read_value, report_rows
from unidpo.data.formats.rows import Row
from unidpo.data.pairs import PromptGroup
from unidpo.errors import DataError, shown


def groups_of(
    dataset: Any, *, name: str, require_scores: bool = False, on_bad_row: Literal["error", "skip"] = "error"
) -> list[PromptGroup]:
    """The prompt groups of what a user gives as a data set. Images are not opened.

    Args:
        dataset: prompt groups, which are taken as they are; or a `datasets.Dataset` or a sequence of rows, in any
            layout that is read from files. Images may be decoded; relative paths start from the working directory.
        name: what findings call it.
        require_scores: a pair without scores is a bad row.
        on_bad_row: ``error`` raises if any row cannot be used, ``skip`` names them in a warning and goes on.

    Raises:
        DataError: this is no data set in memory, or a row cannot be used (all are listed).
    """
    _refuse_what_is_no_dataset(dataset, name)
    if isinstance(dataset, Sequence) and all(isinstance(group, PromptGroup) for group in dataset):
        return list(dataset)
    rows = (Row(value, number, name, Path(), require_scores) for number, value in enumerate(_values(dataset), start=1))
    read = collected(name, map(read_value, rows))
    report_rows([read], name, on_bad_row=on_bad_row)
    return read.groups


def _refuse_what_is_no_dataset(dataset: Any, name: str) -> None:
    if isinstance(dataset, (str, Path)):
        raise DataError(f"{name}: this is a path; give what `load_pairs({shown(dataset)})` reads")
    if hasattr(dataset, "keys"):
        splits = ", ".join(map(str, list(dataset.keys())[:8]))
        raise DataError(f"{name}: a list of rows is expected, not one object with {splits}; give one of its splits")
    if not hasattr(dataset, "__len__"):
        raise DataError(f"{name}: this has no length; load a streamed data set without `streaming=True`")


def _values(dataset: Any) -> Iterator[Any]:
    """The rows; those of a `datasets.Dataset` as its table holds them, so that no image is decoded."""
    # A format of its own is a function of the user's that makes the rows.
    if not hasattr(dataset, "with_format") or dataset.format["type"] == "custom":
        yield from dataset
    else:
        yield from tables.rows_of_dataset(dataset)
