"""Point the image paths of a data file to where the images lie now."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from unidpo.data.formats import tables
from unidpo.data.formats.dataset_info import columns_of
from unidpo.data.formats.files import is_parquet, is_same, json_bytes, rows_of
from unidpo.data.formats.row import ADDRESS, IMAGE_COLUMNS, IMAGE_KEYS, PATH_COLUMN
from unidpo.data.formats.writing import new_data_file
from unidpo.errors import DataError, Finding, from_findings, shown
from unidpo.files.regular import is_regular, open_regular

_PROMPTS = ("prompt", "messages", "chosen", "rejected")


@dataclass(slots=True)
class RelocateReport:
    """What became of the image paths of a file.

    Attributes:
        file: the file read.
        to: the file written.
        rows: how many rows it has.
        found: paths that were found under the new root.
        not_found: those that were not, as findings with row and key. The new file has them unchanged.
        embedded: images that need no path, being in the file themselves.
    """

    file: Path
    to: Path
    rows: int = 0
    found: int = 0
    not_found: list[Finding] = field(default_factory=list)
    embedded: int = 0


def relocate(
    path: str | Path,
    images_root: str | Path,
    to: str | Path | None = None,
    *,
    strip: str | None = None,
    in_place: bool = False,
) -> RelocateReport:
    """Write a data file anew with image paths that lead into another folder. Everything else stays as it is.

    Whatever a path began with on another machine, Windows included, is found out: of each path the longest ending that
    names a file under ``images_root`` is taken. New paths are relative to the new file's folder where they lie below
    it, else absolute.

    Args:
        path: a JSON, JSONL or Parquet file in any layout.
        images_root: the folder the images are in now. Its tree is listed once.
        to: the new file, of the same kind.
        strip: take this off the beginning of every path, and look for the rest, instead of finding out.
        in_place: replace ``path`` itself, in one step; ``to`` is left out.

    Raises:
        DataError: the file cannot be read or written, a row of it is no JSON, the root is no folder, ``to`` is the
            file itself or of another kind, or not a single path was found.
    """
    source, root = Path(path), Path(images_root)
    if (to is None) is not in_place:
        raise DataError(f"{path}: give either a new file, or say that this one is to be replaced (`in_place`)")
    target = source if to is None else Path(to)
    if not in_place and is_same(source, target):
        raise DataError(f"{to}: this is the file itself; give another one, or say `in_place`")
    if source.suffix != target.suffix:
        raise DataError(f"{to}: the new file is of the same kind, {source.suffix or 'without suffix'}")
    if not is_regular(source):
        raise DataError(f"{path}: there is no such file")
    if not root.is_dir():
        raise DataError(f"{root}: there is no such image folder")
    report = RelocateReport(source, target)
    find = _finder(root, target.parent.absolute(), strip)
    names = columns_of(source).names
    columns = (*(names.get(name, name) for name in IMAGE_COLUMNS), PATH_COLUMN)

    move = functools.partial(move_images, columns=columns, find=find, report=report)
    with new_data_file(target) as file:
        if is_parquet(source):
            _move_table(source, file, columns, move)
        else:
            _move_json(source, file, move)
        if report.not_found and not report.found:
            title = f"{path}: none of {len(report.not_found)} image paths was found under {root}; nothing was written"
            raise from_findings(DataError, title, report.not_found)
    return report


def _finder(root: Path, folder: Path, strip: str | None) -> Callable[[str], str | None]:
    """What finds a path under a root by what it ends in, as seen from a folder. It never leads outside of the root."""
    files = set(_tree(root))
    prefix = None if strip is None else strip.replace("\\", "/").rstrip("/")

    def inside(old: str) -> str | None:
        if prefix is None:
            parts = [part for part in old.split("/") if part not in ("", ".")]
            endings = ["/".join(parts[i:]) for i in range(len(parts))]
        else:
            endings = [old[len(prefix) :].lstrip("/")] if not prefix or f"{old}/".startswith(f"{prefix}/") else []
        return next((ending for ending in endings if ending in files), None)

    def find(old: str) -> str | None:
        found = inside(old) or inside(old.replace("\\", "/"))
        if found is None:
            return None
        path = root.absolute() / found
        return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()

    return find


def _tree(root: Path) -> Iterator[str]:
    """Every file under a root, relative to it. Linked folders are gone into, unless that leads round in circles."""
    linked: set[Path] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        here = Path(folder)
        inside = here.relative_to(root).as_posix()
        yield from files if inside == "." else (f"{inside}/{name}" for name in files)
        for name in list(folders):
            if (here / name).is_symlink():
                real = (here / name).resolve()
                if real in linked or here.resolve().is_relative_to(real):
                    folders.remove(name)
                linked.add(real)


def move_images(
    row: Any, number: int, columns: tuple[str, ...], find: Callable[[str], str | None], report: RelocateReport
) -> Any:
    """Put new image paths into a row, as far as they are found; gives the row."""
    report.rows += 1
    for holder, at, key in _image_places(row, columns) if isinstance(row, dict) else ():
        value = holder[at]
        if isinstance(value, bytes) or (isinstance(value, dict) and value.get("bytes") is not None):
            report.embedded += 1
            continue
        if isinstance(value, dict):
            holder, at, value = value, "path", value.get("path")
        elif isinstance(value, str) and ADDRESS.match(value):
            report.embedded += value[:5].lower() == "data:"
            continue
        if not isinstance(value, str):
            continue
        new = find(value)
        if new is None:
            problem = f"no file under the image folder ends like {shown(value)}"
            report.not_found.append(Finding("missing-image", problem, report.file, number, key))
        else:
            report.found += 1
            holder[at] = new
    return row


def _image_places(row: dict[str, Any], columns: tuple[str, ...]) -> Iterator[tuple[Any, Any, str]]:
    """Where a row names images: what holds the value, under which key, and the key as findings call it."""
    for name in columns:
        if isinstance(row.get(name), list):
            yield from ((row[name], i, f"{name}[{i}]") for i in range(len(row[name])))
        elif name in row:
            yield row, name, name
    for name in _PROMPTS:
        for i, message in enumerate(row[name] if isinstance(row.get(name), list) else ()):
            content = message.get("content") if isinstance(message, dict) else None
            for j, part in enumerate(content if isinstance(content, list) else ()):
                if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
                    keys = [key for key in IMAGE_KEYS if part.get(key) is not None]
                    yield from ((part, key, f"{name}[{i}].content[{j}].{key}") for key in keys[:1])


def _move_json(source: Path, file: BinaryIO, move: Callable[[Any, int], Any]) -> None:
    """Write the rows as the file had them, as a list or as lines."""
    with open_regular(source) as given:
        as_list = given.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    rows = (move(_usable(value, source, number), number) for number, value in rows_of(source))
    for value in [list(rows)] if as_list else rows:
        file.write(json_bytes(value, source) + b"\n")


def _usable(value: Any, source: Path, number: int) -> Any:
    if isinstance(value, Finding):
        finding = replace(value, file=source, row=number)
        raise DataError(str(finding), findings=[finding])
    return value


def _move_table(source: Path, file: BinaryIO, columns: tuple[str, ...], move: Callable[[Any, int], Any]) -> None:
    """Write the table again with its schema and metadata; only columns in which a path changed are made anew."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with open_regular(source) as raw, tables.refusing_damage(source):
        parquet = tables.open_parquet(raw, source)
        schema = parquet.schema_arrow
        names = [name for name in (*columns, *_PROMPTS) if name in schema.names]
        with pq.ParquetWriter(file, schema) as writer:
            for batch in parquet.iter_batches(batch_size=1024):
                table = pa.Table.from_batches([batch], schema)
                old = batch.select(names).to_pylist()
                new = [move(copy.deepcopy(row), number + i) for i, row in enumerate(old, start=1)]
                number += len(old)
                for name in names:
                    values = [row[name] for row in new]
                    if values != [row[name] for row in old]:
                        column = schema.field(name)
                        table = table.set_column(schema.get_field_index(name), column, pa.array(values, column.type))
                writer.write_table(table)
