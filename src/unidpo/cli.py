"""The command line. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import unidpo
from unidpo.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

WORK_FAILED, INPUT_WRONG, INTERRUPTED = 1, 2, 130
"""Exit codes besides 0: the work failed; the input was wrong; Ctrl-C."""

app = typer.Typer(
    name="unidpo",
    help="Preference training for vision-language models on scored pairs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Look at preference data.", no_args_is_help=True)
recipe = typer.Typer(help="Look at recipes.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(recipe, name="recipe")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as train.seed=1; the last wins.", show_default=False),
]


def main() -> None:
    """Run the command in `sys.argv` and exit: 0 done, 1 the work failed, 2 the input was wrong, 130 interrupted."""
    try:
        app(prog_name="unidpo", standalone_mode=True)
    except UserError as error:
        _messages().print(str(error), style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(INPUT_WRONG)
    except Exception:
        _messages().print_exception()
        _messages().print("internal error: a bug in unidpo; please report it with the lines above", style="bold red")
        sys.exit(WORK_FAILED)


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"unidpo {unidpo.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Source of every random choice.")] = 0,
) -> None:
    """Tell the whole story on real handwritten digits, on a CPU: data, check, training, before and after."""
    from unidpo.demo.story import run_demo

    run_demo(out, seed=seed, console=_results())


@data.command("check")
def data_check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Preference data (JSON or JSONL).", show_default=False)],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder that relative image paths start from.", show_default="the folder of FILE"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Report every problem of a data set, with its row. Exits with 2 where a row cannot be used."""
    from unidpo.check import check_data
    from unidpo.progress import Stages

    with Stages(_messages()) as stages:
        report = check_data(file, images=images, on_progress=stages.update)
    if as_json:
        typer.echo(json.dumps(report.to_json(), ensure_ascii=False, indent=2))
    else:
        report.render(_results())
    if report.errors:
        raise typer.Exit(INPUT_WRONG)


@app.command()
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
        run(resolved, resume=resume, console=_messages())
    except KeyboardInterrupt:
        command = shlex.join(["unidpo", "train", str(recipe), *(overrides or ()), "--resume"])
        _messages().print(f"interrupted; go on from the last checkpoint with: {command}", markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None


@recipe.command("check")
def recipe_check(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Report every problem of a recipe and its overrides."""
    from unidpo.config import load_recipe

    resolved = load_recipe(recipe, overrides or ())
    typer.echo(f"{recipe}: a valid recipe, {resolved.loss.name} on {resolved.model.name}")


@recipe.command("show")
def recipe_show(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Print a recipe with overrides applied and every default filled in."""
    from unidpo.config import load_recipe

    typer.echo(load_recipe(recipe, overrides or ()).to_yaml(), nl=False)


def _results() -> Console:
    from rich.console import Console

    return Console()


def _messages() -> Console:
    """Where progress and errors go; results go to standard output."""
    from rich.console import Console

    return Console(stderr=True)
