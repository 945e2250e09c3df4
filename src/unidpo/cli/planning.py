"""`unidpo plan`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from unidpo.cli.consoles import messages, results
from unidpo.cli.training import Overrides, RecipeFile

if TYPE_CHECKING:
    from unidpo.plan import Speed


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Estimate the time for this card, e.g. H100.")] = None,
    tflops: Annotated[
        float | None, typer.Option(metavar="X", help="Estimate it for so many TFLOP/s reached by each GPU.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(metavar="PAIRS_PER_S", help="Estimate it for so many pairs/s on all GPUs.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, metavar="N", help="GPUs that share the work.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Estimate tokens, floating-point work, memory and time of a recipe, without loading weights."""
    from unidpo.config import load_recipe

    given = [name for name, value in (("--gpu", gpu), ("--tflops", tflops), ("--rate", rate)) if value is not None]
    if len(given) > 1:
        raise typer.BadParameter("give one of --gpu, --tflops and --rate", param_hint=" and ".join(given))
    for name, value in (("--tflops", tflops), ("--rate", rate)):
        if value is not None and not 0 < value < float("inf"):
            raise typer.BadParameter(f"must be a number above 0, not {value}", param_hint=name)
    resolved = load_recipe(recipe, overrides or (), look=True)
    from unidpo.plan import plan_recipe

    found = plan_recipe(resolved, speeds=_speeds(gpu, tflops, rate), gpus=gpus, console=messages())
    if as_json:
        typer.echo(json.dumps(found.to_json(), ensure_ascii=False, indent=2))
    else:
        found.render(results())


def _speeds(gpu: str | None, tflops: float | None, rate: float | None) -> tuple[Speed, ...]:
    from unidpo.plan import Speed, gpu_by_name

    if tflops is not None or rate is not None:
        return (Speed(tflops=tflops, pairs_per_second=rate),)
    return tuple(Speed(gpu=gpu_by_name(name)) for name in ((gpu,) if gpu else ("RTX 4090", "A100", "H100")))
