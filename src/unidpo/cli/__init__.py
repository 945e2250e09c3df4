"""The command line. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import unidpo
from unidpo.cli.consoles import INPUT_WRONG, INTERRUPTED, WORK_FAILED, kept_open, messages, out_of_space, results
from unidpo.cli.data import data
from unidpo.cli.evaluation import evaluation
from unidpo.cli.planning import plan
from unidpo.cli.recipes import recipe
from unidpo.cli.reporting import report
from unidpo.cli.training import WithOverrides, train
from unidpo.errors import Interrupted, UserError, printable

app = typer.Typer(
    name="unidpo",
    help="Preference training for vision-language models on scored pairs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data, name="data")
app.add_typer(recipe, name="recipe")
app.command(cls=WithOverrides)(train)
app.command(cls=WithOverrides)(plan)
app.command("eval")(evaluation)
app.command()(report)


def main() -> None:
    """Run the command in `sys.argv` and exit: 0 done, 1 the work failed, 2 the input was wrong, 130 interrupted."""
    with kept_open():
        try:
            try:
                app(prog_name="unidpo", standalone_mode=True)
            finally:
                print(end="", flush=True)  # noqa: T201 -- a full disk may show only here
        except SystemExit as done:
            if done.code == INTERRUPTED:
                _complain("interrupted")
            raise
        except UserError as error:
            _complain(str(error))
            sys.exit(WORK_FAILED if out_of_space(error) else error.exit_code)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
                _complain(f"{printable(str(error.filename), most=200)}: this name is too long for a file")
                sys.exit(INPUT_WRONG)
            if reason := out_of_space(error):
                remedy = "free some space and give the command again, `unidpo train` with `--resume`"
                _complain(f"nothing more can be written ({reason}); {remedy}")
            else:
                messages().print_exception()
                _complain("internal error: a bug in unidpo; please report it with the lines above")
            sys.exit(WORK_FAILED)


def _complain(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    speaker = "" if rank == "0" else f"process {rank}: "
    messages().print(speaker + message, style="bold red", markup=False, highlight=False, soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unidpo {unidpo.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    # transformers imports peft, which imports bitsandbytes where it is installed. On a CPU with avx512_bf16 this logger
    # then warns of a kernel for generating text that is not installed; it has nothing else to say.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Source of every random choice.")] = 0,
) -> None:
    """Tell the whole story on real handwritten digits, on a CPU: data, check, training, before and after."""
    from unidpo.demo import require_digits

    require_digits()  # before torch takes its seconds to import
    from unidpo.demo.story import run_demo

    try:
        run_demo(out, seed=seed, console=results())
    except (KeyboardInterrupt, Interrupted) as stopped:
        reason = f"{str(stopped) or 'interrupted'}; {out} keeps what is done, the same command starts over"
        code = stopped.exit_code if isinstance(stopped, Interrupted) else INTERRUPTED
        raise Interrupted(reason, exit_code=code) from None
