"""Where commands write, and what they exit with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WORK_FAILED, INPUT_WRONG, INTERRUPTED = 1, 2, 130
"""Exit codes besides 0: the work failed; the input was wrong; Ctrl-C."""


def results() -> Console:
    """Standard output: what was asked for."""
    from rich.console import Console

    return Console()


def messages() -> Console:
    """Standard error: progress, warnings and errors."""
    from rich.console import Console

    return Console(stderr=True)
