"""The command line from outside: what it prints where, its exit codes, and that it answers at once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import unidpo
from unidpo import cli
from unidpo.run_folder.folder import RunFolder

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "recipes" / "tiny.yaml")


@pytest.fixture
def unidpo_command(monkeypatch, capfd):
    """Runs a command in this process; returns (exit code, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["unidpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, err = capfd.readouterr()
        return done.value.code or 0, out, err

    return run


def cpu_seconds(*command):
    """Processor time, which other work on the machine does not change, of the best of three."""
    best = float("inf")
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, *command], capture_output=True, check=True)
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
    return best


class TestAnswersAtOnce:
    @pytest.mark.parametrize("command", [("--help",), ("train", "--help"), ("recipe", "check", TINY)])
    def test_in_less_than_seven_tenths_of_a_second(self, command):
        assert cpu_seconds("-m", "unidpo", *command) < 0.7

    @pytest.mark.parametrize("command", [["--help"], ["recipe", "check", TINY], ["recipe", "show", TINY]])
    def test_without_torch(self, command):
        code = f"""
import sys
sys.argv = ["unidpo", *{command!r}]
from unidpo.cli import main
try:
    main()
except SystemExit as done:
    assert not done.code
assert not {{"torch", "transformers", "datasets", "pyarrow"}} & sys.modules.keys()
"""
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


class TestExitCodes:
    def test_help_and_version(self, unidpo_command):
        code, out, _ = unidpo_command("--version")
        assert (code, out) == (0, f"unidpo {unidpo.__version__}\n")
        code, out, _ = unidpo_command("--help")
        assert code == 0
        assert all(name in out for name in ("demo", "train", "data", "recipe"))

    @pytest.mark.parametrize(
        "arguments", [("trian",), ("train",), ("train", TINY, "--resum"), ("data", "check"), ("data", "x")]
    )
    def test_wrong_usage(self, unidpo_command, arguments):
        code, out, err = unidpo_command(*arguments)
        assert code == 2
        assert out == ""
        assert "Traceback" not in err
        assert "Usage: unidpo" in err

    def test_user_errors_are_printed_as_they_are(self, unidpo_command, tmp_path):
        recipe = tmp_path / "[red]recipe[bold].yaml"
        recipe.write_text("output: x\n", "utf-8")
        code, out, err = unidpo_command("recipe", "check", recipe, "train.sed=1")
        assert (code, out) == (2, "")
        assert str(recipe) in err
        assert all(key in err for key in ("`model`", "`data`", "`train.sed`", "did you mean `seed`?"))
        assert "Traceback" not in err

    def test_bugs_fail_with_a_traceback_and_a_request(self, unidpo_command, monkeypatch):
        def broken(*_):
            raise ZeroDivisionError("on purpose")

        monkeypatch.setattr("unidpo.config.load_recipe", broken)
        code, _, err = unidpo_command("recipe", "show", TINY)
        assert code == 1
        assert "on purpose" in err
        assert "please report" in err

    def test_interrupted_training_says_how_to_go_on(self, unidpo_command, monkeypatch, tmp_path):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("unidpo.run.train.run", interrupted)
        monkeypatch.chdir(ROOT)
        output = f"output={tmp_path / 'my run'}"
        code, _, err = unidpo_command("train", TINY, output)
        assert code == 130
        assert f"unidpo train {TINY} '{output}' --resume" in err

    def test_an_interrupted_demo_says_what_is_kept_and_how_to_go_on(self, unidpo_command, monkeypatch, tmp_path):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("unidpo.demo.story.run_demo", interrupted)
        code, _, err = unidpo_command("demo", "--out", tmp_path)
        assert code == 130
        assert f"{tmp_path} keeps what is done, the same command starts over" in err

    def test_interrupted_otherwise(self, unidpo_command, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("unidpo.data.check.check_data", interrupted)
        code, _, err = unidpo_command("data", "check", "x.json")
        assert (code, err) == (130, "interrupted\n")

    @pytest.mark.parametrize("command", [("train", TINY), ("recipe", "show", TINY), ("plan", TINY)])
    def test_a_key_given_like_an_option_says_how_to_give_it(self, unidpo_command, command):
        code, _, err = unidpo_command(*command, "--output", "x")
        assert code == 2
        assert "keys of the recipe stand without dashes, such as output=FOLDER" in " ".join(
            err.replace("│", " ").split()
        )


class TestRecipeCommands:
    def test_show_prints_a_recipe(self, unidpo_command, tmp_path):
        code, out, _ = unidpo_command("recipe", "show", TINY, "train.seed=7")
        assert code == 0
        (tmp_path / "shown.yaml").write_text(out, "utf-8")
        assert unidpo_command("recipe", "show", tmp_path / "shown.yaml")[1] == out
        assert "seed: 7" in out

    def test_check(self, unidpo_command):
        code, out, err = unidpo_command("recipe", "check", TINY)
        assert (code, err) == (0, "")
        assert "valid" in out


class TestDataCheck:
    def test_good_data(self, unidpo_command, golden):
        code, out, err = unidpo_command("data", "check", golden / "data" / "golden48.json")
        assert code == 0
        assert "48 of 48 rows are usable" in out
        assert "Traceback" not in err

    def test_json_alone_on_standard_output(self, unidpo_command, golden):
        code, out, _ = unidpo_command("data", "check", golden / "data" / "golden48.json", "--json")
        assert code == 0
        report = json.loads(out)
        assert (report["rows"], report["errors"]) == (48, 0)

    def test_bad_rows(self, unidpo_command, golden, tmp_path):
        code, out, _ = unidpo_command("data", "check", golden / "data" / "golden48.json", "--images", tmp_path)
        assert code == 2
        assert "missing-image" in out
        assert "row 1," in out

    def test_missing_file(self, unidpo_command, tmp_path):
        code, out, err = unidpo_command("data", "check", tmp_path / "none.json")
        assert (code, out) == (2, "")
        assert "none.json" in err


class TestTrain:
    def test_a_finished_run_is_not_written_over(self, unidpo_command, tmp_path, monkeypatch):
        monkeypatch.chdir(ROOT)
        run = RunFolder(tmp_path / "run")
        run.create({"output": "x"})
        run.finish(lambda folder: (folder / "config.json").write_text("{}"))
        before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
        started = time.monotonic()
        code, _, err = unidpo_command("train", TINY, f"output={run.path}")
        assert code == 2
        assert "finished run" in err
        assert time.monotonic() - started < 60
        assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
