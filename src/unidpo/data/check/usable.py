"""Write the rows that can be used as they were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unidpo.data.check.report import CheckReport
from unidpo.data.formats import read_groups
from unidpo.data.formats.files import is_same, write_json_rows
from unidpo.data.formats.reading import files_of, read_rows
from unidpo.data.pairs import PromptGroup
from unidpo.errors import DataError
from unidpo.files.writing import replacing


def write_usable(report: CheckReport, to: str | Path) -> int:
    """Write the usable rows of a checked data set to a new file, untouched and in order.

    They are read from the data set again. The new file is read back before it takes its name, so that it is known to
    hold the same data, whatever folder it lies in; an existing file is replaced in one step.

    Args:
        report: of `check_data`.
        to: a ``.jsonl`` file gets a row per line, a ``.json`` file one list.

    Returns:
        How many rows were written.

    Raises:
        DataError: there is no usable row, ``to`` is the checked file itself, is no JSON by its name or cannot be
            written, or it would not be read as the checked file is, mostly because image paths are relative to the
            folder of that one.
    """
    target = Path(to)
    if target.suffix not in (".json", ".jsonl", ".ndjson"):
        raise DataError(f"{target}: rows are written as JSON; name the file .json or .jsonl")
    if not report.groups:
        raise DataError(f"{target}: nothing to write, no row of {report.file} can be used")
    if any(is_same(target, file) for file in files_of(report.file)):
        raise DataError(f"{target}: this is the checked file itself; give another one")
    usable = {group.pairs[0].row for group in report.groups}
    try:
        with replacing(target) as unproved:
            write_json_rows((row.given for row in read_rows(report.file) if row.number in usable), unproved)
            _require_same(unproved, report, target)
    except OSError as error:
        raise DataError(f"{target}: the file cannot be written: {error.strerror}") from error
    return len(usable)


def _require_same(written: Path, report: CheckReport, target: Path) -> None:
    groups = read_groups(written, images=report.image_root).groups
    if _texts(groups) != _texts(report.groups):
        raise DataError(
            f"{target}: it would not be read as {report.file} is (which may have changed since the check, or be "
            "described by a dataset_info.json); convert that first: unidpo data convert"
        )
    if _images(groups) != _images(report.groups):
        raise DataError(
            f"{target}: relative image paths would lead elsewhere; write it to the folder of {report.file}, "
            "or name the image folder with --images"
        )


def _texts(groups: Sequence[PromptGroup]) -> list[Any]:
    return [(group.messages, group.responses) for group in groups]


def _images(groups: Sequence[PromptGroup]) -> list[Any]:
    return [image.absolute() if isinstance(image, Path) else image for group in groups for image in group.images]
