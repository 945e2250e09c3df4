"""Files that appear whole or not at all: written beside their place under another name, and renamed at the end."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MARK = "unfinished"


@contextlib.contextmanager
def unfinished_file(folder: Path, suffix: str = "") -> Iterator[Path]:
    """A hidden name in a folder for a file that is being written; what still has that name at the end is removed.

    No other process writes under the same name.
    """
    path = folder / f".{platform.node()}-{os.getpid()}-{uuid.uuid4().hex}.{_MARK}{suffix}"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within it, a file is written under the name it yields, which ends as `path` does; then it replaces `path`.

    It is on the disk before it takes its place. Where writing fails, the old file stays.
    """
    with unfinished_file(path.parent, path.suffix) as unfinished:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole, on disk, or not at all."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_atomically(path, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes of this machine were writing; others may be writing now."""
    for path in folder.glob(f".{platform.node()}-*.{_MARK}*"):
        if not _is_alive(int(path.name.removeprefix(f".{platform.node()}-").partition("-")[0])):
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
