"""`unidpo report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unidpo.cli.consoles import messages, results


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders: finished, running or broken off.", show_default=False),
    ],
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval", metavar="DIR", help="Folder that unidpo eval wrote; may be repeated.", show_default=False
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The page.", show_default="report.html in the run, or here for several"),
    ] = None,
) -> None:
    """Draw what runs taught as one HTML page that needs no network."""
    from unidpo.progress import Stages
    from unidpo.report import write_report
    from unidpo.run_folder.folder import RunFolder

    page = to or (RunFolder(runs[0]).report if len(runs) == 1 else Path("report.html"))
    with Stages(messages()) as stages:
        written = write_report(runs, page, evaluations=evaluations or (), on_progress=stages.update)
    results().print(str(written), markup=False, highlight=False, soft_wrap=True)
