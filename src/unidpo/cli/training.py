"""`unidpo train`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperCommand

from unidpo.cli.consoles import INTERRUPTED, messages
from unidpo.errors import Interrupted, RecipeError, TrainingError

if TYPE_CHECKING:
    from unidpo.run_folder.folder import RunFolder


class WithOverrides(TyperCommand):
    """A command that takes keys of a recipe, and says how where one is given like an option."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if hasattr(error, "possibilities"):  # there is no such option
                error.message += "; keys of the recipe stand without dashes, such as output=FOLDER"  # type: ignore[attr-defined]
            raise


RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as train.seed=1; the last wins.", show_default=False),
]


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the run's last checkpoint.")] = False,
    nproc: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes on this machine, one per GPU.", show_default=True)
    ] = 1,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO_ID", help="Upload the finished model to this hub repository.", show_default=False),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="RECIPE is a sweep file: train all its runs that are not finished.")
    ] = False,
) -> None:
    """Train the model of a recipe on its data."""
    from unidpo.config import is_sweep, load_recipe, load_sweep

    if sweep:
        if push_to_hub is not None:
            raise typer.BadParameter("a sweep trains many models; push the one you choose", param_hint="--push-to-hub")
        from unidpo.run.sweep import run_sweep

        runs = load_sweep(recipe, overrides or (), look=True)
        run_sweep(runs, options=["--nproc", str(nproc)] if nproc > 1 else [], console=messages())
        return
    from unidpo.files.locks import refuse_if_in_use
    from unidpo.run_folder.folder import RunFolder

    if is_sweep(recipe):
        raise RecipeError(f"{recipe}: this is a sweep of several runs; train them with `unidpo train --sweep {recipe}`")
    resolved = load_recipe(recipe, overrides or (), look=True)
    if os.environ.get("RANK", "0") == "0":  # another process of this training may have begun
        # Before torch takes its seconds to import.
        refuse_if_in_use(resolved.output)
        RunFolder(resolved.output).refuse_unless_free(resume=resume)
    if push_to_hub is not None:
        from unidpo.run.hub import check_hub_repository

        check_hub_repository(push_to_hub)
    command = ["train", str(recipe), *(overrides or ())]
    push = ["--push-to-hub", push_to_hub] if push_to_hub is not None else []
    again = shlex.join(["unidpo", *command, "--resume", *push, *(["--nproc", str(nproc)] if nproc > 1 else [])])
    if nproc > 1:
        from unidpo.run.launch import launch

        try:
            code = launch([*command, *push, *(["--resume"] if resume else [])], nproc)
        except TrainingError as error:
            raise TrainingError(f"{error}\nresume from the last checkpoint with: {again}") from error
        raise typer.Exit(code)
    from unidpo.run.train import run

    try:
        run(resolved, resume=resume, console=messages())
    except (Interrupted, KeyboardInterrupt) as stopped:
        code = stopped.exit_code if isinstance(stopped, Interrupted) else INTERRUPTED
        raise Interrupted(f"{str(stopped) or 'interrupted'}; resume with: {again}", exit_code=code) from None
    from unidpo.distributed import is_main

    if is_main():
        _after(RunFolder(resolved.output), push_to_hub)


def _after(run: RunFolder, push_to_hub: str | None) -> None:
    """Push the model where that is asked for, and say what to do next."""
    from unidpo.terminal import print_to_copy

    if push_to_hub is not None:
        from unidpo.run.hub import push

        messages().print(f"pushed: {push(run.model, push_to_hub)}", markup=False, soft_wrap=True)
    messages().print("next:")
    evaluate = shlex.join(["unidpo", "eval", str(run.path), "--benchmarks", "paper"])
    steps = {
        **({str(run.report): "the report: what the run taught, in a browser"} if run.report.is_file() else {}),
        evaluate: "the nine benchmarks, or files of your own",
        f"unidpo.load_policy({str(run.model)!r})": "the model in Python; its processor: unidpo.load_processor",
        str(run.ledger): "the ledger: each visit of each pair; metrics.jsonl lies beside it",
    }
    print_to_copy(messages(), steps)
