"""`unidpo train`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unidpo.cli.consoles import INTERRUPTED, messages
from unidpo.errors import Interrupted, RecipeError, TrainingError

if TYPE_CHECKING:
    from unidpo.run_folder.folder import RunFolder

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides such as train.seed=1; the last wins.", show_default=False),
]


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
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
            raise TrainingError(f"{error}\ngo on from the last checkpoint with: {again}") from error
        raise typer.Exit(code)
    from unidpo.run.train import run

    try:
        run(resolved, resume=resume, console=messages())
    except Interrupted as stopped:
        raise Interrupted(f"{stopped}; go on with: {again}", exit_code=stopped.exit_code) from None
    except KeyboardInterrupt:
        messages().print(f"interrupted; go on from the last checkpoint with: {again}", markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    if push_to_hub is not None:
        _push(RunFolder(resolved.output).model, push_to_hub)
    _next_steps(RunFolder(resolved.output))


def _next_steps(run: RunFolder) -> None:
    from unidpo.distributed import is_main
    from unidpo.terminal import print_to_copy

    if not is_main():
        return
    messages().print("next:")
    evaluate = shlex.join(["unidpo", "eval", str(run.path), "--benchmarks", "paper"])
    steps = {
        evaluate: "the nine benchmarks, or files of your own",
        f"unidpo.load_policy({str(run.model)!r})": "the model in Python; its processor: unidpo.load_processor",
        str(run.ledger): "the ledger: each visit of each pair; metrics.jsonl lies beside it",
    }
    print_to_copy(messages(), steps)


def _push(model: Path, repo_id: str) -> None:
    from unidpo.distributed import is_main
    from unidpo.run.hub import push, push_command

    if not is_main():
        return
    messages().print(f"pushing {model} to {repo_id}", markup=False, soft_wrap=True)
    try:
        address = push(model, repo_id)
    except KeyboardInterrupt:
        command = push_command(model, repo_id)
        messages().print(f"interrupted; the run is finished, push it with: {command}", markup=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    messages().print(f"pushed: {address}", markup=False, soft_wrap=True)
