"""`unidpo train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from unidpo.cli.consoles import INTERRUPTED, messages

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as train.seed=1; the last wins.", show_default=False),
]


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
) -> None:
    """Train the model of a recipe on its data."""
    from unidpo.config import load_recipe
    from unidpo.runs import RunFolder

    resolved = load_recipe(recipe, overrides or ())
    RunFolder(resolved.output).refuse_unless_free(resume=resume)  # before torch takes its seconds to import
    from unidpo.train import run

    try:
        run(resolved, resume=resume, console=messages())
    except KeyboardInterrupt:
        command = shlex.join(["unidpo", "train", str(recipe), *(overrides or ()), "--resume"])
        messages().print(f"interrupted; go on from the last checkpoint with: {command}", markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
