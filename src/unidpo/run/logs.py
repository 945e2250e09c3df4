"""Where a run's log goes: onto its console, above the progress bar."""

from __future__ import annotations

import logging
import warnings

import transformers
from rich.console import Console


class ConsoleLog(logging.Handler):
    """What this package logs, as plain lines above the progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


def log_to(console: Console) -> None:
    """What this package says goes to the console, and so do errors of transformers; its chatter stays out."""
    log = logging.getLogger("unidpo")
    log.handlers = [ConsoleLog(console)]
    logging.getLogger("transformers").handlers = [ConsoleLog(console)]  # its own writes a file's text as it is
    log.setLevel(logging.INFO)
    log.propagate = False
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # DeepSpeed's, once per step
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each rounding
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
