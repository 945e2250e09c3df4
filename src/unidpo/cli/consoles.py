"""Where commands write, and what they exit with."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import IO, Any

from unidpo.errors import UserError
from unidpo.terminal import Terminal

WORK_FAILED, INPUT_WRONG, INTERRUPTED = 1, 2, 130
"""Exit codes besides 0: the work failed; the input was wrong; Ctrl-C."""
_NOBODY_READS = (errno.EPIPE, errno.EIO)
"""What a write meets behind `| head`, and on a terminal that was closed."""
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAYS_NO_SPACE = re.compile("|".join([*map(os.strerror, _NO_SPACE), "PytorchStreamWriter failed writing file"]))
"""Libraries in other languages give only the text of such an error."""


class OutputError(UserError):
    """What was asked for cannot be written."""

    exit_code = WORK_FAILED


def results() -> Terminal:
    """Standard output: what was asked for."""
    return Terminal()


def messages() -> Terminal:
    """Standard error: progress, warnings and errors."""
    return Terminal(stderr=True)


@contextlib.contextmanager
def kept_open() -> Iterator[None]:
    """Within it the work continues when nobody reads its standard output or standard error any more.

    Raises:
        OutputError: standard output cannot be written for another reason, such as a full disk.
    """
    before = sys.stdout, sys.stderr
    # A stream that was closed before the start is None, and everybody who writes knows it.
    if sys.stdout is not None:
        sys.stdout = _KeptOpen(sys.stdout, "standard output")
    if sys.stderr is not None:
        sys.stderr = _KeptOpen(sys.stderr, None)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _KeptOpen:
    """A standard stream that leads nowhere once a write to it has failed.

    Args:
        stream: the stream.
        required: what to call it where its text must not be lost silently; `None` where it may.
    """

    def __init__(self, stream: IO[Any], required: str | None) -> None:
        self._stream = stream
        self._required = required
        self._lost: OutputError | None = None

    @property
    def buffer(self) -> _KeptOpen:
        return _KeptOpen(self._stream.buffer, self._required)  # type: ignore[attr-defined]

    def write(self, text: str | bytes) -> int:
        with self._without_lost_reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._without_lost_reader():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _without_lost_reader(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Beneath the stream, so that what it still holds goes nowhere too, and what other libraries write.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if self._required is not None and error.errno not in _NOBODY_READS:
                self._lost = OutputError(f"{self._required} cannot be written: {error.strerror}")
        # Each time: a library that only tries whether it can write swallows the first.
        if self._lost is not None:
            raise self._lost


def out_of_space(error: BaseException) -> str | None:
    """Why nothing can be written, where an error comes of a full disk or a limit on files; `None` for all others."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NO_SPACE:
            return " ".join(filter(None, [str(seen.filename or ""), os.strerror(seen.errno)]))
        if found := _SAYS_NO_SPACE.search(str(seen)):
            return found.group()
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None
