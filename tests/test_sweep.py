"""`unidpo train --sweep`: what a sweep file may hold, which runs it makes, and what becomes of them."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console

import unidpo.run.sweep
from unidpo import cli
from unidpo.config import load_sweep
from unidpo.errors import Interrupted, RecipeError, RunError, TrainingError
from unidpo.run.sweep import run_sweep
from unidpo.run_folder.folder import RunFolder
from unidpo.run_folder.records import Metrics

ROOT = Path(__file__).parent.parent
TINY = f"{{recipe: {ROOT / 'recipes' / 'tiny.yaml'}, grid: {{train.learning_rate: [1.0e-3, 1e-2]}}}}"


@pytest.fixture
def sweep_file(tmp_path):
    def write(text):
        path = tmp_path / "sweep.yaml"
        path.write_text(text, "utf-8")
        return path

    return write


@pytest.fixture
def two_runs_file(sweep_file, tmp_path):
    return sweep_file(f"output: {tmp_path / 'out'}\nmethods: [{TINY}]\n")


@pytest.fixture
def two_runs(two_runs_file):
    return load_sweep(two_runs_file)


@pytest.fixture
def commands(monkeypatch):
    """Runs finish at once, or exit with the code `ends` holds for their learning rate; what was called is returned."""
    calls, ends = [], {}

    def exit_code(command):
        calls.append(command)
        values = dict(word.split("=", 1) for word in command if "=" in word)
        code = ends.get(float(values["train.learning_rate"]), 0)
        if code == 0:
            folder = RunFolder(json.loads(values["output"]))
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.config.write_text("{}")
            Metrics(folder.metrics).add({"step": 3, "loss": 0.25})
            Metrics(folder.metrics, resume_step=9).add({"step": 3, "eval_loss": 0.5, "eval_rewards/accuracies": 1.0})
            folder.model.mkdir()
        return code

    monkeypatch.setattr(unidpo.run.sweep, "_exit_code", exit_code)
    monkeypatch.setattr(RunFolder, "refuse_other_config", lambda *_: None)
    return calls, ends


def problems(path, *overrides):
    with pytest.raises(RecipeError) as error:
        load_sweep(path, overrides)
    return str(error.value)


class TestTheFile:
    def test_a_grid_makes_every_combination_once(self, sweep_file):
        text = f"""
output: out
overrides: {{data.eval_fraction: 0.1, loss.beta: 1.0}}
methods:
- recipe: {ROOT}/recipes/tiny.yaml
  grid: {{loss.beta: [2.0, 3.0], train.learning_rate: [1.0e-3, 1e-2]}}
- recipe: {ROOT}/recipes/tiny.yaml
  name: plain
  overrides: {{loss: {{name: dpo, beta: 0.5}}, data.eval_fraction: 0.2}}
"""
        runs = load_sweep(sweep_file(text), ["train.seed=7"])
        assert [run.name for run in runs] == [
            "tiny-beta=2.0-learning_rate=0.001", "tiny-beta=2.0-learning_rate=0.01",
            "tiny-beta=3.0-learning_rate=0.001", "tiny-beta=3.0-learning_rate=0.01",
            "plain",
        ]  # fmt: skip
        assert [(run.recipe.loss.name, run.recipe.loss.beta) for run in runs] == [
            ("uni_dpo", 2.0), ("uni_dpo", 2.0), ("uni_dpo", 3.0), ("uni_dpo", 3.0), ("dpo", 0.5),
        ]  # fmt: skip
        assert [run.recipe.data.eval_fraction for run in runs] == [0.1] * 4 + [0.2]
        assert {run.recipe.train.seed for run in runs} == {7}
        assert [run.recipe.output for run in runs] == [Path("out") / run.name for run in runs]

    def test_values_that_no_folder_is_called_by(self, sweep_file):
        text = f"output: o\nmethods: [{{recipe: {ROOT}/recipes/tiny.yaml, grid: {{train.run_name: [a/b, null]}}}}]"
        assert [run.name for run in load_sweep(sweep_file(text))] == ["tiny-run_name=a_b", "tiny-run_name=None"]

    def test_everything_wrong_is_said_at_once_and_once(self, sweep_file):
        text = f"""
output: out
methods:
- recipe: {ROOT}/recipes/tiny.yaml
  grid: {{train.learning_rat: [1.0e-3, 1e-2], loss.beta: [1.0], train.weight_decay: [-1.0]}}
- recipe: nowhere.yaml
"""
        path = sweep_file(text)
        said = problems(path, "train.sede=1", "loss.beta=3")
        for part in (
            "`train.weight_decay`: must be greater than or equal to 0, not -1.0 (from train.weight_decay=",
            "nowhere.yaml: there is no such recipe",
            "`train.sede`: is not a key of `train`; did you mean `seed`?",
            f"`loss.beta=3`: a grid varies this key; change it in {path}",
        ):
            assert said.count(part) == 1, part
        assert "`train.learning_rat`: is not a key of `train`; did you mean `learning_rate`?" in said

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("methods: [{recipe: r}]\n", "`output`: is required"),
            ("output: o\nmethods: []\n", "`methods`: must not be empty"),
            ("output: o\nmethods: [{recipe: r, gird: {}}]\n", "`methods[0].gird`: is not a key of `methods`; did you"),
            ("output: o\nmethods: [{recipe: r}]\nmethod: 3\n", "is not a key; did you mean `methods`?"),
            ("output: o\nmethods: [{recipe: r, grid: {a: 1}}]\n", "`methods[0].grid.a`: must be a list, not 1"),
            ("output: o\nmethods: [{recipe: r, grid: {a: []}}]\n", "`methods[0].grid.a`: must not be empty"),
            ("output: o\nmethods: [{recipe: r, name: a/b}]\n", "`methods[0].name`: must"),
            ("output: o\nmethods: [3]\n", "`methods[0]`: is a section"),
            ("- 1\n", "a sweep is a mapping of sections"),
            ("output: o\nmodel: {name: m}\n", "this is a recipe, not a sweep; train it without `--sweep`"),
        ],
    )
    def test_wrong_keys_and_values(self, sweep_file, text, expected):
        assert expected in problems(sweep_file(text))

    @pytest.mark.parametrize("methods", ["{recipe: R, grid: {train.seed: [1, 1]}}", "{recipe: R}, {recipe: R}"])
    def test_two_runs_never_share_a_folder(self, sweep_file, methods):
        methods = methods.replace("R", str(ROOT / "recipes" / "tiny.yaml"))
        assert "several runs would be called tiny" in problems(sweep_file(f"output: o\nmethods: [{methods}]"))

    def test_output_on_the_command_line_moves_all_of_it(self, two_runs_file, tmp_path):
        moved = load_sweep(two_runs_file, [f"output={tmp_path}/else where"])
        assert {run.recipe.output.parent for run in moved} == {tmp_path / "else where"}


class TestRunning:
    def test_a_failing_run_does_not_stop_the_others_and_is_named(self, two_runs, commands):
        calls, ends = commands
        ends[1e-3] = 2
        with pytest.raises(TrainingError, match=r"1 of 2 runs failed: tiny-learning_rate=0\.001;"):
            run_sweep(two_runs, options=["--nproc", "2"], console=Console(quiet=True))
        assert len(calls) == 2
        assert all(call[-2:] == ["--nproc", "2"] for call in calls)
        assert (two_runs[0].recipe.output.parent / "summary.md").read_text().splitlines() == [
            "| run | status | step | eval accuracy | eval margin | eval loss | train loss |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            "| tiny-learning_rate=0.001 | failed |  |  |  |  |  |",
            "| tiny-learning_rate=0.01 | finished | 3 | 1.0000 |  | 0.5000 | 0.2500 |",
        ]

    def test_the_second_call_skips_what_is_finished_and_resumes_what_is_not(self, two_runs, commands):
        calls, ends = commands
        ends[1e-2] = 1
        with pytest.raises(TrainingError):
            run_sweep(two_runs, console=Console(quiet=True))
        begun = two_runs[1].recipe.output
        begun.mkdir()
        (begun / "config.json").write_text("{}")
        ends.clear()
        calls.clear()
        run_sweep(two_runs, console=Console(quiet=True))
        ((*_, last),) = calls
        assert last == "--resume"
        assert f'output="{begun}"' in calls[0]

    def test_a_run_that_was_interrupted_stops_the_sweep(self, two_runs, commands):
        calls, ends = commands
        ends[1e-3] = 130
        with pytest.raises(Interrupted, match=r"stopped in tiny-learning_rate=0\.001") as error:
            run_sweep(two_runs, console=Console(quiet=True))
        assert error.value.exit_code == 130
        assert len(calls) == 1

    def test_nothing_starts_where_a_run_began_with_another_recipe(self, two_runs, monkeypatch):
        monkeypatch.setattr(unidpo.run.sweep, "_exit_code", lambda *_: pytest.fail("started"))
        second = two_runs[1].recipe.output
        second.mkdir(parents=True)
        (second / "config.json").write_text(json.dumps({"train": {"learning_rate": 5}}))
        (second / "model").mkdir()
        with pytest.raises(RunError, match="this run began with another recipe"):
            run_sweep(two_runs, console=Console(quiet=True))

    def test_sigterm_reaches_the_run_and_its_end_is_waited_for(self, two_runs, monkeypatch, tmp_path):
        begun, ended = tmp_path / "begun", tmp_path / "ended"
        code = f"""
import pathlib, signal, sys, time
def end(*_):
    time.sleep(0.3)
    pathlib.Path({str(ended)!r}).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
pathlib.Path({str(begun)!r}).touch()
time.sleep(60)
"""

        def start(_, **__):
            threading.Thread(target=stop_once_begun, daemon=True).start()
            return subprocess.Popen([sys.executable, "-c", code])

        def stop_once_begun():
            while not begun.exists():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(unidpo.run.sweep, "start", start)
        with pytest.raises(Interrupted) as error:
            run_sweep(two_runs, console=Console(quiet=True))
        assert error.value.exit_code == 143
        assert ended.exists()


def test_no_torch_is_imported_by_the_sweeping_process():
    code = "import sys, unidpo.run.sweep; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


class TestTheRealCommand:
    def test_trains_all_runs_over_one_reference(self, sweep_file, tmp_path, monkeypatch, capfd):
        monkeypatch.chdir(tmp_path)  # where runs go, should the sweep's output be lost
        for name in ("recipes", "tests"):
            (tmp_path / name).symlink_to(ROOT / name)
        out = tmp_path / "runs of [a] sweep"
        text = f"""
output: {json.dumps(str(out))}
overrides: {{train.max_steps: 1, data.eval_fraction: 0.1, train.run_name: "null, or so"}}
methods:
- recipe: recipes/tiny.yaml
- recipe: recipes/tiny.yaml
  name: dpo
  overrides: {{loss: {{name: dpo}}}}
"""
        path = sweep_file(text)
        assert unidpo_command("train", "--sweep", path) == 0
        found = re.findall(r"reference: (\d+) responses found in .*, (\d+) to compute", capfd.readouterr().err)
        assert found == [("0", "96"), ("96", "0")]
        summary = (out / "summary.md").read_text()
        for name, loss in {"tiny": "uni_dpo", "dpo": "dpo"}.items():
            config = json.loads((out / name / "config.json").read_text())
            assert (config["loss"]["name"], config["train"]["run_name"]) == (loss, "null, or so")
            records = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
            accuracy, trained = records[-1]["eval_rewards/accuracies"], records[0]["loss"]
            assert re.search(rf"^\| {name} \| finished \| 1 \| {accuracy:.4f} \|.*\| {trained:.4f} \|$", summary, re.M)
        assert unidpo_command("train", "--sweep", path) == 0
        again = capfd.readouterr().err
        assert again.count("finished before") == 2
        assert "reference:" not in again

    def test_starts_processes_and_fails_where_they_do(self, two_runs, capfd):
        lost = [dataclasses.replace(run, recipe_file=Path("gone.yaml")) for run in two_runs]
        with pytest.raises(TrainingError, match="2 of 2 runs failed"):
            run_sweep(lost, console=Console(quiet=True))
        assert capfd.readouterr().err.count("gone.yaml: there is no such recipe") == 2

    def test_recipe_check_takes_a_sweep(self, two_runs_file, capfd):
        assert unidpo_command("recipe", "check", two_runs_file) == 0
        assert "a valid sweep of 2 runs" in capfd.readouterr().out
        assert unidpo_command("recipe", "check", two_runs_file, "train.sede=1") == 2

    def test_a_sweep_is_not_pushed(self, two_runs_file, capfd):
        assert unidpo_command("train", "--sweep", two_runs_file, "--push-to-hub", "me/model") == 2
        assert "a sweep trains many models" in capfd.readouterr().err

    def test_a_sweep_in_the_place_of_a_recipe_is_called_one(self, two_runs_file, capfd):
        assert unidpo_command("train", two_runs_file) == 2
        assert capfd.readouterr().err.endswith(f"train them with `unidpo train --sweep {two_runs_file}`\n")

    def test_an_interrupted_sweep_says_how_to_resume(self, two_runs_file, commands, capfd):
        calls, ends = commands
        ends[1e-3] = 143
        assert unidpo_command("train", "--sweep", two_runs_file, "train.seed=7", "--nproc", "2") == 143
        assert "the same command resumes it" in capfd.readouterr().err
        assert calls[0][-2:] == ["--nproc", "2"]


def unidpo_command(*arguments):
    """The exit code of a command in this process."""
    with mock.patch.object(sys, "argv", ["unidpo", *map(str, arguments)]), pytest.raises(SystemExit) as done:
        cli.main()
    return done.value.code or 0
