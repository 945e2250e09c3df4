"""Open what a user names, and only if it is a file.

A named pipe waits for a writer without end, `/dev/zero` fills the memory, and opening a device can set it off.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_NAMES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Neither is known on every system.
_WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file, or what a link to one leads to, for reading.

    Raises:
        OSError: there is no such file, it cannot be opened, or it is a folder, a pipe, a socket or a device.
        ValueError: the path holds a NUL character.
    """
    _require_regular(path.stat().st_mode, path)
    descriptor = os.open(path, os.O_RDONLY | _WITHOUT_WAITING)
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)  # another file may have taken the name since
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path) -> bytes:
    """What a regular file holds. Raises as `open_regular`."""
    with open_regular(path) as file:
        return file.read()


def is_regular(path: Path) -> bool:
    """Whether `open_regular` would find a file. Unlike `Path.is_file` it takes a name too long for one, too."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _require_regular(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        name = _NAMES.get(stat.S_IFMT(mode), "a special file")
        raise OSError(errno.EINVAL, f"it is {name}, not a regular file; save what it gives as one", str(path))
