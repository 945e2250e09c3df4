"""One process at a time in a folder. The lock is the operating system's, which releases it when the process dies."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from unidpo.errors import FolderInUse, shown

_LOG = logging.getLogger(__name__)
_LOCK, _HOLDER = ".lock", ".lock.json"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
LOCK_FILES = frozenset({_LOCK, _HOLDER})
"""Names of what lies in a folder while it is locked."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it, no other process gets this lock, on this machine or on one that shares the file system.

    Where the file system knows no locks, a file stands for one (filelock's `SoftFileLock`), which a killed process
    leaves behind; where that cannot be either, a warning says that nothing keeps others out. Nothing is left behind
    at the end.

    Args:
        folder: made where it is not there.

    Raises:
        FolderInUse: another process holds it; names host and process.
        OSError: the folder cannot be made or written.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        _acquire(lock)
        if lock.is_locked:
            (folder / _HOLDER).write_text(json.dumps(_this_process()), "utf-8")
        yield
    finally:
        if lock.is_locked:
            for name in (_HOLDER, _LOCK):
                (folder / name).unlink(missing_ok=True)
            lock.release()
            if made:
                with contextlib.suppress(OSError):  # there is something in it
                    folder.rmdir()


def _acquire(lock: BaseFileLock) -> None:
    folder = Path(lock.lock_file).parent
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # filelock's, of the file that stands for a lock
            lock.acquire(timeout=0)
    except Timeout:
        raise _in_use(folder, lock) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        _LOG.warning("%s: its file system knows no locks (%s); make sure that nothing else works there", folder, error)


def refuse_if_in_use(folder: Path) -> None:
    """Raise `FolderInUse` where another process holds the lock of a folder. Makes no folder."""
    if (folder / _LOCK).exists():
        with contextlib.suppress(OSError), locked(folder):
            pass


def _this_process() -> dict[str, str | int]:
    return {
        "host": platform.node(),
        "process": os.getpid(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _in_use(folder: Path, lock: BaseFileLock) -> FolderInUse:
    who = "another process"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # it may be about to write this file
        holder = json.loads((folder / _HOLDER).read_text("utf-8"))
        started = datetime.datetime.fromisoformat(holder["started"])
        who = f"process {int(holder['process'])} on {shown(holder['host'])}"
        who += f" ({shown(holder['command'])}, started {started:%Y-%m-%d %H:%M} UTC)"
    left = f", or delete {folder / _LOCK} if that process is gone" if isinstance(lock, SoftFileLock) else ""
    return FolderInUse(f"{folder}: {who} is at work in this folder; wait for its end or stop it{left}")
