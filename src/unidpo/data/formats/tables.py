"""Rows of Arrow tables: Parquet files, folders and hub data sets of the `datasets` library.

Both libraries are imported when a table is met: most data is JSON, and a command should answer at once.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from unidpo.data.formats.writing import new_data_file
from unidpo.errors import DataError, Finding, shown
from unidpo.files.places import missing_here

if TYPE_CHECKING:
    import pyarrow as pa

_TABLES = ".csv .tsv .xlsx .xls .feather .arrow"
_SPECIAL = ".yaml .yml .gz .bz2 .xz .zst .zip .tar .tgz .pkl .pickle .pt .pth .joblib"
OTHER_SUFFIXES = (*_TABLES.split(), *_SPECIAL.split())
"""Suffixes of files that hold data and are not read."""
_BATCH = 64
"""Rows read at a time: their images may be inside."""
_WRITTEN_ROWS, _WRITTEN_BYTES = 1024, 1 << 26
"""A row group of a written file is no larger; the bytes are those of images."""
_NAME = re.compile(r"(?P<name>[^:@]+)(?::(?P<config>[^:@]+))?(?:@(?P<split>[^:@]+))?")
_FILE = re.compile(rf".*(\.jsonl?|\.ndjson|\.parquet|\.txt|{'|'.join(map(re.escape, OTHER_SUFFIXES))})", re.IGNORECASE)


def parquet_rows(file: BinaryIO, path: Path) -> Iterator[Any]:
    """The rows of a Parquet file, a batch at a time. A row that cannot be decoded comes as a `Finding`.

    Raises:
        DataError: the file is no Parquet file, or is damaged.
    """
    with refusing_damage(path):
        for batch in open_parquet(file, path).iter_batches(batch_size=_BATCH):
            yield from _values(batch)


def open_parquet(file: BinaryIO, path: Path) -> Any:
    """A Parquet file. Raises `DataError` where it has two columns of one name, of which readers take the last."""
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file, pre_buffer=False)
    names = parquet.schema_arrow.names
    if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
        raise DataError(f"{path}: the table has the column {shown(repeated[0])} twice; remove or rename one of them")
    return parquet


@contextlib.contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    """Whatever pyarrow says of a damaged file becomes a `DataError`."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({_first_line(error)}); write it again") from error


def write_parquet(rows: Callable[[], Iterator[dict[str, Any]]], path: Path) -> None:
    """Write rows as Parquet; the file appears complete or not at all. Types are inferred over all rows.

    Args:
        rows: gives the rows, each time it is called; it is called once to learn the types and once to write.
        path: the file.

    Raises:
        DataError: a column holds values of types that do not go together, or the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pa.schema({})
        for batch in _batches(rows()):
            schema = pa.unify_schemas([schema, _schema(batch)], promote_options="permissive")
        with new_data_file(path) as file, pq.ParquetWriter(file, schema) as writer:
            for batch in _batches(rows()):
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
    except (pa.ArrowException, OSError, OverflowError, UnicodeEncodeError) as error:
        raise DataError(f"{path}: Parquet cannot hold these rows ({_first_line(error)}); write JSONL") from error


def is_dataset(path: str | Path) -> bool:
    """Whether a path means a folder or hub data set rather than a file: ``name[:config][@split]``."""
    name, *_ = _named(path)
    if _exists(name):
        return Path(name).is_dir()
    if not _NAME.fullmatch(str(path)) or _FILE.fullmatch(name):
        return False
    return missing_here(name) is None


def dataset_folder(path: str | Path) -> Path:
    """Where relative image paths of a data set start: in its folder, or for one of the hub in the current one."""
    folder = Path(_named(path)[0])
    return folder if _exists(folder) else Path()


def dataset_rows(path: str | Path) -> Iterator[Any]:
    """The rows of a local folder, as `datasets` saves or reads it, or of a hub data set.

    A folder is read where it lies. What comes from the hub is downloaded once into the cache of `datasets`, since the
    check and every run read it again. Scripts of a data set are never run.

    Args:
        path: ``name[:config][@split]``; without a split, ``train`` or the only one.

    Raises:
        DataError: there is no such data set, configuration or split, or it cannot be read.
    """
    name, config, split = _named(path)
    try:
        loaded = _load(name, config)
        if hasattr(loaded, "keys"):  # one data set per split
            splits = list(loaded.keys())
            chosen = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
            if chosen not in splits:
                known = ", ".join(map(str, splits))
                raise DataError(f"{path}: there is no split {shown(chosen)}; add @SPLIT with one of: {known}")
            loaded = loaded[chosen]
        elif split is not None:
            raise DataError(f"{path}: the folder holds one data set without splits; leave out @{split}")
        yield from rows_of_dataset(loaded)
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # network, cache, a dozen formats: nearly anything is raised
        problem = "this is a folder that cannot be loaded as a data set; give the data file in it"
        if not Path(name).is_dir():
            problem = "there is no such file or folder here, nor a data set of the hub that can be loaded"
        raise DataError(f"{path}: {problem} ({_first_line(error)})") from error


def rows_of_dataset(dataset: Any) -> Iterator[Any]:
    """The rows of a loaded data set. As Arrow: nothing is decoded, an image stays what the table holds."""
    for table in dataset.with_format("arrow").iter(batch_size=_BATCH):
        yield from _values(table)


def _named(path: str | Path) -> tuple[str, str | None, str | None]:
    """Name, configuration and split."""
    match = None if _exists(path) else _NAME.fullmatch(str(path))
    return (str(path), None, None) if match is None else (match["name"], match["config"], match["split"])


def _exists(path: str | Path) -> bool:
    with contextlib.suppress(OSError):  # a name too long for a file
        return Path(path).exists()
    return False


def _load(name: str, config: str | None) -> Any:
    import datasets

    folder = Path(name)
    if not folder.is_dir():
        return datasets.load_dataset(name, config)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)
    _refuse_special_files(folder)
    return datasets.load_dataset(name, config, streaming=True)


def _refuse_special_files(folder: Path) -> None:
    """`datasets` opens whatever it finds in a folder, and would wait at a named pipe without end."""
    for here, _, files in os.walk(folder):
        for name in files:
            path = Path(here, name)
            if path.exists() and not path.is_file():
                raise DataError(f"{path}: this is a pipe, a socket or a device, not a file; move it out of the folder")


def _values(table: Any) -> Iterator[Any]:
    """The rows of a table or batch; one by one where a value of them is damaged."""
    try:
        yield from table.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond what Python knows
        for i in range(table.num_rows):
            try:
                yield table.slice(i, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                yield Finding("wrong-encoding", f"the row cannot be decoded: {_first_line(error)}")


def _schema(rows: Sequence[dict[str, Any]]) -> pa.Schema:
    import pyarrow as pa

    images = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))  # the type of `bytes` where all are paths
    types = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            types[name] = pa.array([row.get(name) for row in rows]).type if name != "images" else images
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise pa.ArrowInvalid(f"column {shown(name)}: {_first_line(error)}") from error
    return pa.schema(types)


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += sum(len(image["bytes"] or b"") for image in row.get("images", ()))
        if len(batch) == _WRITTEN_ROWS or size >= _WRITTEN_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
