"""A named pipe, a socket, a device or a folder where a file is expected: refused at once, by every command."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from unidpo.cli import app
from unidpo.data.formats.dataset_info import columns_of
from unidpo.data.images import content_digest, image_size, inspect_image, open_image
from unidpo.data.mm_rlhf.archives import ArchiveError, extract
from unidpo.errors import DataError, UserError
from unidpo.evaluate.own import load_benchmark
from unidpo.files.regular import open_regular, read_regular
from unidpo.model.encode import _template_text
from unidpo.model.load import load_processor

PAIR = {"prompt": "?", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 1}
KINDS = ["pipe", "link", "socket", "device", "endless", "folder"]


@pytest.fixture(autouse=True)
def _in_time():
    """What would wait without end fails instead."""

    def stop(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=KINDS)
def special(request, tmp_path, monkeypatch):
    """Puts something that is no file to a place."""
    monkeypatch.chdir(tmp_path)  # a socket's path is short

    def make(place: Path) -> Path:
        match request.param:
            case "pipe":
                os.mkfifo(place)
            case "link":
                os.mkfifo(tmp_path / "pipe")
                place.symlink_to(tmp_path / "pipe")
            case "socket":
                with socket.socket(socket.AF_UNIX) as server:
                    server.bind(os.path.relpath(place))
            case "device":
                place.symlink_to("/dev/null")
            case "endless":
                place.symlink_to("/dev/zero")
            case "folder":
                place.mkdir()
        return place

    return make


def unidpo(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_file_is_opened_through_links_too(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_regular(tmp_path / "link") == b"x"
    for missing in ("gone", "a" * 300):
        with pytest.raises(OSError, match=missing):
            open_regular(tmp_path / missing)
    with pytest.raises(ValueError, match="null"):
        open_regular(Path("a\0"))


def test_as_a_data_file(special, tmp_path):
    place = special(tmp_path / "pairs.jsonl")
    for command in (
        ("check", place),
        ("convert", place, "--to", tmp_path / "new.json"),
        ("relocate", place, "--images", tmp_path, "--to", tmp_path / "new.jsonl"),
    ):
        done = unidpo("data", *command)
        assert isinstance(done.exception, DataError), done.output
        assert "pairs.jsonl" in str(done.exception)


def test_as_an_image(special, tmp_path):
    place = special(tmp_path / "a.png")
    inspection = inspect_image(place)
    assert [finding.kind for finding in inspection.findings] == ["broken-image"]
    assert "not a regular file" in inspection.findings[0].message or place.is_dir()
    for read in (open_image, image_size, content_digest):
        with pytest.raises(UserError, match=r"a\.png"):
            read(place)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({**PAIR, "images": ["a.png"]}) + "\n" + json.dumps(PAIR) + "\n")
    done = unidpo("data", "check", pairs, "--json")
    assert [(f["kind"], f["row"]) for f in json.loads(done.stdout)["findings"]] == [("broken-image", 1)]


def test_as_what_lies_beside_the_data(special, tmp_path):
    place = special(tmp_path / "dataset_info.json")
    with pytest.raises(DataError, match=r"dataset_info\.json"):
        columns_of(tmp_path / "pairs.json")
    with pytest.raises(ArchiveError):
        extract(place, tmp_path / "out", max_bytes=1)
    with pytest.raises(UserError, match=r"dataset_info\.json"):
        load_benchmark(place)


def test_inside_a_folder_of_data(special, tmp_path):
    (tmp_path / "data").mkdir()
    special(tmp_path / "data" / "train.jsonl")
    done = unidpo("data", "check", tmp_path / "data")
    assert isinstance(done.exception, DataError), done.output


def test_as_recipe_template_or_benchmark(special, golden, tmp_path):
    place = special(tmp_path / "a.yaml")
    for command in (
        ("recipe", "check", place),
        ("train", place),
        ("plan", place),
        ("eval", "model", "--config", place),
    ):
        done = unidpo(*command)
        assert isinstance(done.exception, UserError), done.output
        assert "a.yaml" in str(done.exception)
    with pytest.raises(UserError, match=r"a\.yaml"):
        _template_text(str(place), load_processor(golden / "model"))
