"""`unidpo recipe`: look at recipes, and make them of other tools' configurations."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from unidpo.cli.consoles import messages
from unidpo.cli.training import Overrides, RecipeFile, WithOverrides
from unidpo.errors import printable

recipe = typer.Typer(help="Look at recipes; make one of another tool's configuration.", no_args_is_help=True)

_Configuration = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="Its YAML, or the shell script that starts it.", show_default=False)
]
_Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Its own keys, laid over the configuration.", show_default=False),
]
_To = Annotated[
    Path | None,
    typer.Option("--to", metavar="FILE", help="Write the recipe there, not to the screen.", show_default=False),
]


@recipe.command("check", cls=WithOverrides)
def check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Report every problem of a recipe, or of a sweep, and its overrides."""
    from unidpo.config import is_sweep, load_recipe, load_sweep

    if is_sweep(recipe):
        names = [run.name for run in load_sweep(recipe, overrides or (), look=True)]
        typer.echo(printable(f"{recipe}: a valid sweep of {len(names)} runs: {', '.join(names)}"))
        return
    resolved = load_recipe(recipe, overrides or (), look=True)
    typer.echo(printable(f"{recipe}: a valid recipe, {resolved.loss.name} on {resolved.model.name}"))


@recipe.command("show", cls=WithOverrides)
def show(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Print a recipe with overrides applied and every default filled in."""
    from unidpo.config import load_recipe

    typer.echo(load_recipe(recipe, overrides or ()).to_yaml(), nl=False)


@recipe.command("from-llamafactory", cls=WithOverrides)
def from_llamafactory(config: _Configuration, changes: _Changes = None, to: _To = None) -> None:
    """Make a recipe of a LLaMA-Factory configuration, and say what became of each of its keys."""
    _convert("llamafactory", config, changes, to)


@recipe.command("from-trl", cls=WithOverrides)
def from_trl(config: _Configuration, changes: _Changes = None, to: _To = None) -> None:
    """Make a recipe of a configuration of `trl dpo`, and say what became of each of its keys."""
    _convert("trl", config, changes, to)


@recipe.command("from-swift", cls=WithOverrides)
def from_swift(config: _Configuration, changes: _Changes = None, to: _To = None) -> None:
    """Make a recipe of a configuration of ms-swift's `swift rlhf`, and say what became of each of its keys."""
    _convert("swift", config, changes, to)


def _convert(tool: str, config: Path, changes: list[str] | None, to: Path | None) -> None:
    from unidpo.config.converting import convert
    from unidpo.config.launch_files import read_launch
    from unidpo.config.neighbours import NEIGHBOURS
    from unidpo.data.formats.declared import declared_data
    from unidpo.files.writing import write_atomically

    neighbour = NEIGHBOURS[tool]
    launch = read_launch(config, neighbour, changes or ())
    made = convert(neighbour, launch.values, processes=launch.processes, find_data=declared_data)
    console = messages()
    console.print(made.report(), markup=False, highlight=False, soft_wrap=True)
    text = f"# Made of {config.name}, a configuration of {neighbour.name}.\n{made.to_yaml()}"
    if to is None:
        typer.echo(text, nl=False)
        return
    write_atomically(to, text.encode())
    processes = ["--nproc", str(made.processes)] if (made.processes or 1) > 1 else []
    left = [key for line in made.lines if line.kind == "open" for key in line.ours]
    console.print(f"written: {to}", markup=False, highlight=False, soft_wrap=True)
    if left:
        console.print(f"next: fill in {', '.join(left)} there", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"then: {shlex.join(['unidpo', 'train', str(to), *processes])}", markup=False, highlight=False, soft_wrap=True
    )
