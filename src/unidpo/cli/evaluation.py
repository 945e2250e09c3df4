"""`unidpo eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from unidpo.cli.consoles import INTERRUPTED, WORK_FAILED, messages, results
from unidpo.errors import Interrupted


def _batch_size(text: str) -> int | None:
    """A whole number from 1; `None` for "auto"."""
    if text == "auto":
        return None
    if text.isascii() and text.isdecimal() and int(text):
        return int(text)
    raise typer.BadParameter(f"a whole number from 1, or auto, not {text!r}", param_hint="--batch-size")


def evaluation(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="Run folder, model folder, adapter or hub id.", show_default=False),
    ] = None,
    benchmarks: Annotated[
        str | None, typer.Option(help="paper, names or .yaml files, with commas.", show_default="paper, the nine")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration of VLMEvalKit: models and benchmarks.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.", show_default="evals/MODEL")] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Ask only the first N questions of each benchmark.", min=1)
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N|auto", help="Questions answered together.")] = "auto",
    prompt_style: Annotated[
        Literal["auto", "chat", "plain"], typer.Option(help="The model's chat template, or the bare question.")
    ] = "auto",
    backend: Annotated[Literal["hf", "vllm"], typer.Option(help="What generates the answers.")] = "hf",
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Server for --backend vllm.", show_default="vLLM in this process")
    ] = None,
    judge: Annotated[
        str,
        typer.Option(metavar="none|URL+MODEL", help="Asked which choice an answer means where no rule can tell."),
    ] = "none",
    nproc: Annotated[int, typer.Option(help="Processes, each with the model on a GPU of its own.", min=1)] = 1,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the weights.", show_default="bfloat16 on a GPU, float32 on a CPU"),
    ] = "auto",
    data: Annotated[
        Path | None, typer.Option(help="Folder of VLMEvalKit's files.", show_default="$LMUData or ~/LMUData")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch files of benchmarks that are missing.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Put benchmarks to models, and score and compare their answers. Exits with 1 where a benchmark failed."""
    from unidpo.evaluate.judge import read_judge
    from unidpo.evaluate.selection import candidates, read_config, select
    from unidpo.evaluate.vlmeval import Worker, data_folder
    from unidpo.progress import Stages

    size = _batch_size(batch_size)
    reader = read_judge(judge)
    kit = None if config is None else read_config(config)
    for key in () if kit is None else kit.ignored:
        messages().print(f"{config}: `{key}` has no meaning here", markup=False, highlight=False, soft_wrap=True)
    given = models or ([] if kit is None else kit.models)
    if not given:
        raise typer.BadParameter("name a model, or a --config that does", param_hint="MODEL")
    words = ["paper"] if kit is None else kit.benchmarks
    if benchmarks is not None:
        words = [word.strip() for word in benchmarks.split(",") if word.strip()]
    named = candidates(given)
    try:
        with Worker() as worker, Stages(messages()) as stages:
            chosen = select(
                words,
                data=data_folder(data),
                worker=worker,
                generation=None if kit is None else kit.generation,
                download=download,
                on_progress=stages.update,
            )

            from unidpo.evaluate.running import evaluate_all
            from unidpo.generate.questions import LoadOptions
            from unidpo.run.logs import log_to

            log_to(stages.console)
            found = evaluate_all(
                named,
                chosen,
                out or (Path("evals") / named[0].label if len(named) == 1 else Path("evals")),
                LoadOptions(
                    prompt_style=None if prompt_style == "auto" else prompt_style,
                    batch_size=size,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    processes=nproc,
                    backend=backend,
                    server=server,
                ),
                limit=limit,
                judge=reader,
                on_progress=stages.update,
            )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command resumes it", exit_code=INTERRUPTED) from None
    results().print(str(found), markup=False, highlight=False, soft_wrap=True)
    if found.failed:
        raise typer.Exit(WORK_FAILED)
