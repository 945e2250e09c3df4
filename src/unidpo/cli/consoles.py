"""Where commands write, and what they exit with."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unidpo.terminal import Terminal

WORK_FAILED, INPUT_WRONG, INTERRUPTED = 1, 2, 130
"""Exit codes besides 0: the work failed; the input was wrong; Ctrl-C."""


def results() -> Terminal:
    """Standard output: what was asked for."""
    from unidpo.terminal import Terminal

    return Terminal()


def messages() -> Terminal:
    """Standard error: progress, warnings and errors."""
    from unidpo.terminal import Terminal

    return Terminal(stderr=True)
