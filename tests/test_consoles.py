"""Where a command writes can go away or be full: the work goes on, or ends in one line, and never in a traceback."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from unidpo import cli
from unidpo.run_folder.folder import RunFolder

ROOT = Path(__file__).parent.parent
DATA = "tests/golden/data/golden48.json"


@pytest.fixture
def gone():
    """A stream whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        yield stream


@pytest.fixture
def command(monkeypatch):
    def run(*arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["unidpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code or 0

    return run


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("recipe", "show", "recipes/tiny.yaml"), 0),
        (("data", "check", DATA), 0),
        (("data", "check", DATA, "--json"), 0),
        (("data", "check", DATA, "--images", "src"), 2),
        (("recipe", "check", "recipes/tiny.yaml", "lss=1"), 2),
        (("--help",), 0),
    ],
)
def test_output_nobody_reads_is_dropped_and_the_exit_code_stays(command, monkeypatch, gone, arguments, code):
    monkeypatch.setattr(sys, "stdout", gone)
    monkeypatch.setattr(sys, "stderr", gone)
    assert command(*arguments) == code
    assert sys.stderr is gone


@pytest.mark.parametrize(
    "arguments", [("recipe", "show", "recipes/tiny.yaml"), ("data", "check", DATA, "--json"), ("--help",)]
)
def test_standard_output_on_a_full_disk_is_one_line(command, monkeypatch, capsys, arguments):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert command(*arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if " in 0:" not in line]
    assert lines == ["standard output cannot be written: No space left on device"]


def test_training_goes_on_without_its_console(command, monkeypatch, gone, tmp_path):
    monkeypatch.setattr(sys, "stdout", gone)
    monkeypatch.setattr(sys, "stderr", gone)
    assert command("train", "recipes/tiny.yaml", f"output={tmp_path / 'run'}", "train.max_steps=2") == 0
    run = RunFolder(tmp_path / "run")
    assert run.finished
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines() if '"loss"' in line] == [1, 2]


@pytest.mark.parametrize("to", ["new.jsonl", "new.parquet"])
def test_a_full_disk_under_a_new_file_is_one_line(tmp_path, to):
    def little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))

    words = [sys.executable, "-m", "unidpo", "data", "convert", ROOT / DATA, "--to", tmp_path / to]
    done = subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=little_room)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_elsewhere_is_no_bug(command, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr("unidpo.config.load_recipe", full)
    assert command("recipe", "show", "recipes/tiny.yaml") == 1
    said = capsys.readouterr().err
    assert "free some space" in said
    assert "Traceback" not in said


def test_a_device_is_never_replaced(command, capsys, tmp_path):
    target = tmp_path / "pipe.jsonl"
    os.mkfifo(target)
    assert command("data", "convert", DATA, "--to", target) == 2
    assert "a device or a pipe, and is not replaced" in capsys.readouterr().err
    assert target.is_fifo()
