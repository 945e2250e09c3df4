"""Files that are no data as they stand: another kind, keys that stand twice, the wrong bytes."""

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from unidpo.cli import app, main
from unidpo.data.formats import read_groups
from unidpo.data.formats.tables import OTHER_SUFFIXES
from unidpo.errors import DataError

PAIR = {
    "prompt": "Which, 漢字?",
    "chosen": 'a "quoted", text',
    "rejected": "b",
    "score_chosen": 2.0,
    "score_rejected": 1.0,
}


def unidpo(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.mark.parametrize("suffix", [*OTHER_SUFFIXES, ".CSV", ".json.gz"])
def test_every_other_kind_is_named_and_never_looked_for_on_a_hub(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    path = Path("data", f"pairs{suffix}")
    assert "there is no such file" in str(unidpo("check", path).exception)
    path.parent.mkdir()
    path.write_bytes(b"prompt,chosen,rejected\n")
    found = unidpo("check", path).exception
    assert isinstance(found, DataError)
    assert "not read" in str(found)


@pytest.mark.parametrize(
    "command",
    [
        "check LONG.json",
        "check good.jsonl --images LONG",
        "check good.jsonl --fix LONG.json",
        "convert good.jsonl --to LONG.json",
        "convert good.jsonl --to new.json --images LONG",
        "relocate LONG.jsonl --images . --in-place",
        "from-mm-rlhf LONG --to new.json",
        "from-mm-rlhf . --to LONG.json",
        "fetch mm-rlhf --to LONG",
    ],
)
def test_a_name_too_long_for_a_file(tmp_path, monkeypatch, capfd, command):
    monkeypatch.chdir(tmp_path)
    Path("good.jsonl").write_text(json.dumps(PAIR))
    monkeypatch.setattr(sys, "argv", ["unidpo", "data", *command.replace("LONG", "n" * 300).split()])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    error = capfd.readouterr().err
    assert "nnn" in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["good.jsonl"]


TWICE = [
    # the row as it stands, the key
    ('{"prompt": "?", "chosen": "a", "rejected": "b", "chosen": "c"}', "chosen"),
    ('{"prompt": "?", "chosen": "a", "rejected": "b", "rejected": "b"}', "rejected"),
    ('{"prompt": "?", "chosen": "a", "rejected": "b", "images": ["x"], "images": []}', "images"),
    ('{"prompt": "?", "chosen": "a", "rejected": "b", "own": {"x": [1, {"y": 1, "y": 2}]}}', "own.x[1].y"),
    (
        '{"prompt": "?", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 3, "score": 2}]}',
        "responses[1].score",
    ),
    (
        '{"prompt": [{"role": "user", "role": "system", "content": "?"}], "chosen": "a", "rejected": "b"}',
        "prompt[0].role",
    ),
    ('{"chosen": "a", "chosen": "b"}', "chosen"),
    ('{"\\u0061": 1, "a": 2}', "a"),
]


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "lines.json"])
def test_a_key_that_stands_twice_is_an_error_of_its_row(tmp_path, name):
    good = [json.dumps({**PAIR, "prompt": str(n)}) for n in range(3)]
    rows = [good[0], *(row for row, _ in TWICE), good[1], good[2]]
    path = tmp_path / name
    path.write_text(f"[{','.join(rows)}]" if name == "pairs.json" else "\n".join(rows))
    checked = unidpo("check", path, "--json")
    assert checked.exit_code == 2
    found = json.loads(checked.stdout)
    assert [(f["row"], f["kind"], f["key"]) for f in found["findings"] if f["severity"] == "error"] == [
        (n, "repeated-key", key) for n, (_, key) in enumerate(TWICE, start=2)
    ]
    assert found["usable_rows"] == 3
    for command in (
        ("convert", path, "--to", tmp_path / "new.json"),
        ("relocate", path, "--images", tmp_path, "--to", tmp_path / f"new{path.suffix}"),
    ):
        done = unidpo(*command)
        assert isinstance(done.exception, DataError)
        assert "'chosen' stands twice" in str(done.exception)
        assert [p.name for p in tmp_path.iterdir()] == [name]
    assert unidpo("convert", path, "--to", tmp_path / "new.jsonl", "--skip-bad-rows").exit_code == 0
    assert read_groups(tmp_path / "new.jsonl").rows == 3


def test_a_key_that_stands_twice_beside_the_data(tmp_path):
    (tmp_path / "pairs.json").write_text(json.dumps([PAIR]))
    info = '{"a": {"file_name": "pairs.json", "columns": {"chosen": "good", "chosen": "chosen"}}}'
    (tmp_path / "dataset_info.json").write_text(info)
    done = unidpo("check", tmp_path / "pairs.json")
    assert isinstance(done.exception, DataError)
    assert "'a.columns.chosen' stands twice" in str(done.exception)


def test_a_column_that_stands_twice(tmp_path):
    path = tmp_path / "pairs.parquet"
    names = ["prompt", "chosen", "rejected", "chosen"]
    pq.write_table(pa.Table.from_arrays([pa.array([name]) for name in names], names=names), path)
    for command in (
        ("check", path),
        ("convert", path, "--to", tmp_path / "new.json"),
        ("relocate", path, "--images", tmp_path, "--to", tmp_path / "new.parquet"),
    ):
        done = unidpo(*command)
        assert isinstance(done.exception, DataError)
        assert "column 'chosen' twice" in str(done.exception)


BYTES = [
    # name, bytes, part of the message
    ("empty.json", b"", "no rows"),
    ("blank.jsonl", b"\n\n \n", "no rows"),
    ("list.json", b"[]", "no rows"),
    ("object.json", b'{"rows": [1], "x": 2}', "'rows'"),
    ("object.jsonl", b"null", "wrong-type"),
    ("number.json", b"7", "a number"),
    ("string.json", b'"text"', "a string"),
    ("utf16.json", json.dumps([PAIR]).encode("utf-16"), "UTF-16"),
    ("utf16le.json", json.dumps([PAIR]).encode("utf-16-le"), "not valid JSON"),
    ("utf32.json", json.dumps([PAIR]).encode("utf-32"), "UTF-16"),
    ("latin1.json", json.dumps([{**PAIR, "chosen": "é"}], ensure_ascii=False).encode("gbk"), "not UTF-8"),
    ("cut.json", json.dumps([PAIR] * 3).encode()[:-9], "not valid JSON"),
    ("comma.json", json.dumps([PAIR]).encode()[:-1] + b",]", "not valid JSON"),
    ("single.json", str([PAIR]).encode(), "not valid JSON"),
    ("comment.json", b"// pairs\n" + json.dumps([PAIR]).encode(), "not valid JSON"),
    ("twice.json", json.dumps([PAIR]).encode() * 2, "not valid JSON"),
    ("deep.json", b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
    ("digits.json", b"[" + b"9" * 6000 + b"]", "too many digits"),
    ("nul.json", b"\0" * 64, "not valid JSON"),
    ("table.json", b"PAR1" + os.urandom(64), "Parquet"),
    ("table.parquet", b"PAR1", "Parquet"),
    ("none.parquet", b"", "Parquet"),
    ("page.json", b"<!DOCTYPE html><html>404</html>", "not valid JSON"),
    ("lfs.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "LFS"),
    ("lfs.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "LFS"),
    ("zipped.json", b"PK\x03\x04" + bytes(30), "unpack it first, with unzip"),
    ("packed.jsonl", b"\x1f\x8b\x08" + bytes(30), "unpack it first, with gunzip"),
]


@pytest.mark.parametrize(("name", "data", "reason"), BYTES, ids=[name for name, *_ in BYTES])
def test_a_file_that_is_no_data(tmp_path, name, data, reason):
    path = tmp_path / name
    path.write_bytes(data)
    done = unidpo("check", path)
    assert isinstance(done.exception, (DataError, SystemExit))
    assert done.exit_code in (1, 2)  # 1: the runner's own, for an error that `main` would print
    assert reason in (str(done.exception) if isinstance(done.exception, DataError) else done.output)


@pytest.mark.parametrize("command", [["check", ""], ["convert", " ", "--to", "out.json", "--layout", "trl"]])
def test_no_path_at_all(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="the path of the data is empty; give a file"):
        raise unidpo(*command).exception
