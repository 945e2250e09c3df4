"""How a data file is written: whole, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from unidpo.errors import DataError
from unidpo.files import writing


@contextlib.contextmanager
def new_data_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place only when all is written; until then, and on failure, the old one stays.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        path = path.resolve()  # of a link, the file behind it is replaced
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: this is a folder, a device or a pipe, and is not replaced; give another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing.replacing(path) as unfinished, unfinished.open("wb") as file:
            yield file
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: the file cannot be written: {getattr(error, 'strerror', None) or error}") from error
