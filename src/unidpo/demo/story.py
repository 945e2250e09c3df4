"""The story of `unidpo demo`: sample, grade, check, train, measure, show; each step the one any user would take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template

import numpy as np
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unidpo.config import load_recipe
from unidpo.data.check import check_data
from unidpo.demo import CHECKPOINT
from unidpo.demo.answers import (
    Measured,
    accuracies,
    sampled_answers,
    write_benchmark,
    write_ranked_data,
)
from unidpo.demo.digits import DigitQuestion, DigitsWorld, Kind, is_correct, load_world
from unidpo.errors import UserError
from unidpo.evaluate.own import load_benchmark
from unidpo.evaluate.predictions import PREDICTIONS, read_answers
from unidpo.evaluate.running import evaluate_all
from unidpo.evaluate.selection import candidates
from unidpo.generate.questions import GenerationFailed, LoadOptions
from unidpo.model.load import load_policy, load_processor
from unidpo.progress import Stages
from unidpo.report import write_report
from unidpo.run.train import run
from unidpo.run_folder.folder import RunFolder
from unidpo.terminal import Terminal, print_to_copy

TRAIN_PROMPTS = 800
SAMPLES_PER_PROMPT = 4
GRADING_NOISE = 0.10
HELD_OUT_QUESTIONS = 1200
# Half of all questions ask to read: that is where the base model is sloppy.
ASKED: tuple[Kind, ...] = ("read", "read", "yes_no", "choice")

_NAMES: dict[Kind, str] = {"read": "read the number", "yes_no": "yes or no", "choice": "multiple choice"}
_RECIPE = Path(__file__).with_name("recipe.yaml")
# Written into a demo's folder, so that a later demo knows it may replace what is there.
_MARK = ".unidpo-demo"
_OURS = ("data", "run", "evals", "recipe.yaml", "accuracy.json", "answers.png")


def run_demo(out: Path, seed: int = 0, console: Console | None = None) -> None:
    """Mend a sloppy vision-language model with Uni-DPO on its own graded answers, and show what changed.

    Args:
        out: receives data, recipe, run folder and pictures. An earlier demo there is replaced.
        seed: every random choice follows from it.
        console: where the story is told; standard output by default.

    Raises:
        UserError: `out` holds something that is no demo, or scikit-learn is missing.
    """
    console = console or Terminal()
    transformers.logging.disable_progress_bar()
    world = load_world()
    _make_folder(out)
    console.print(
        "A small Qwen2-VL (2.3 M parameters, shipped with this package) sees handwritten digits well and answers "
        "sloppily: asked in some ways, it often reverses a number or drops its last digit. Uni-DPO is to mend that, "
        "from the model's own graded answers.",
        highlight=False,
    )

    _step(console, 1, f"Sample {SAMPLES_PER_PROMPT} answers to each of {TRAIN_PROMPTS} questions, and grade them")
    data = _make_data(world, out / "data", seed, console)
    console.print(f"A program graded them 1 to 5; {GRADING_NOISE:.0%} of the grades are random, as graders err.")

    _step(console, 2, "Check the data", f"unidpo data check {data}")
    report = check_data(data)
    report.render(console)

    recipe = _write_recipe(out, data, seed)
    _step(console, 3, "Train with Uni-DPO", f"unidpo train {recipe}")
    trained = run(load_recipe(recipe), console=console)

    questions = world.questions(HELD_OUT_QUESTIONS, split="held_out", rng=_rng(seed, "held-out"), kinds=ASKED)
    benchmark = write_benchmark(questions, out / "data" / "held-out")
    title = f"Ask both models {HELD_OUT_QUESTIONS} questions on digits neither has seen"
    _step(console, 4, title, f"unidpo eval {CHECKPOINT} {trained} --benchmarks {benchmark} --out {out / 'evals'}")
    before, after = _ask([CHECKPOINT, trained], benchmark, out / "evals", console)
    found = {"base": accuracies(questions, before), "trained": accuracies(questions, after)}
    console.print(_accuracy_table(**found))
    (out / "accuracy.json").write_text(json.dumps(found, default=asdict, indent=1) + "\n", encoding="utf-8")

    _step(console, 5, "Draw", f"unidpo report {trained} --eval {out / 'evals'}")
    draw_answers(questions, before, after, out / "answers.png")
    page = write_report([trained], RunFolder(trained).report, evaluations=[out / "evals"])
    console.print()
    print_to_copy(
        console,
        {
            str(page): "what the run taught, in a browser",
            str(out / "answers.png"): "held-out pictures with both answers",
            str(trained): "the run: the trained model, metrics, and every pair with its weights",
            str(out / "evals"): "all answers of both models",
            f"unidpo train {recipe} loss.beta=4 output={out / 'run-beta-4'}": "the same with another beta",
        },
    )


def _rng(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose.encode()])


def _step(console: Console, number: int, title: str, command: str = "") -> None:
    console.print()
    heading = Text.assemble((f"{number}/5  {title}", "bold"), "   ", (command, "cyan"))
    console.print(heading, soft_wrap=True)


def _make_folder(out: Path) -> None:
    """Make the folder ready, without an earlier demo's files."""
    mark = out / _MARK
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: this is a file; name a folder for the demo")
    if not mark.exists() and out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: this folder holds something else than a demo; name an empty or a new one")
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()
    for name in _OURS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _make_data(world: DigitsWorld, folder: Path, seed: int, console: Console) -> Path:
    questions = world.questions(TRAIN_PROMPTS, split="train", rng=_rng(seed, "train"), kinds=ASKED)
    model, processor = load_policy(CHECKPOINT), load_processor(CHECKPOINT)
    with Stages(console) as stages:
        answers = sampled_answers(
            model,
            processor,
            questions,
            count=SAMPLES_PER_PROMPT,
            seed=seed,
            on_progress=lambda done, total: stages.update("sampling, questions", done, total),
        )
    return write_ranked_data(questions, answers, folder, noise=GRADING_NOISE, rng=_rng(seed, "grades"))


def _write_recipe(out: Path, data: Path, seed: int) -> Path:
    path = out / "recipe.yaml"
    template = Template(_RECIPE.read_text("utf-8"))
    places = {"output": out / "run", "model": CHECKPOINT, "data": data}
    quoted = {key: json.dumps(str(place)) for key, place in places.items()}
    path.write_text(template.substitute(quoted, file=path, seed=seed), encoding="utf-8")
    return path


def _ask(models: Sequence[Path], benchmark: Path, out: Path, console: Console) -> list[list[str]]:
    """What each model answers, asked as `unidpo eval MODELS --benchmarks BENCHMARK --out OUT` does."""
    exam = load_benchmark(benchmark)
    with Stages(console) as stages:
        named = candidates([str(model) for model in models])
        found = evaluate_all(named, [exam], out, LoadOptions(), on_progress=stages.update)
    if reasons := [str(result.failure) for model in found.models for result in model.failed]:
        raise GenerationFailed("; ".join(reasons))
    kept = [read_answers(model.folder / exam.name / PREDICTIONS) for model in found.models]
    return [[answers[question.index].text.strip() for question in exam.questions()] for answers in kept]


def _accuracy_table(base: dict[Kind, Measured], trained: dict[Kind, Measured]) -> Table:
    title = "Correct answers on held-out digits (greedy, ± standard error)"
    table = Table("kind", title=title, title_justify="left", title_style="")
    for column in ("questions", "base", "trained"):
        table.add_column(column, justify="right")
    for kind, before in base.items():
        table.add_row(_NAMES[kind], str(before.questions), str(before), str(trained[kind]))
    return table


def draw_answers(
    questions: Sequence[DigitQuestion],
    base: Sequence[str],
    trained: Sequence[str],
    path: Path,
) -> None:
    """Save the first pictures on which the two models differ, each with both answers; right ones are green."""
    from matplotlib.figure import Figure

    columns, rows = 4, 3
    differing = [(q, b, t) for q, b, t in zip(questions, base, trained, strict=True) if b != t][: columns * rows]
    figure = Figure(figsize=(3 * columns, 2.3 * rows), layout="constrained")
    figure.suptitle("The first held-out questions on which the two models differ")
    for place, (question, before, after) in enumerate(differing, start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(np.asarray(question.image))
        axes.set_xlim(-0.5, 95.5)  # three cells, so that digits are equally large everywhere
        axes.set_axis_off()
        axes.set_title(question.prompt.replace("? A)", "?\nA)"), fontsize=9, loc="left")
        for line, (name, text) in enumerate((("base", before), ("trained", after))):
            color = "tab:green" if is_correct(question, text) else "tab:red"
            axes.text(0, -0.1 - 0.25 * line, f"{name}: {text}", color=color, transform=axes.transAxes, va="top")
    figure.savefig(path, dpi=120)
