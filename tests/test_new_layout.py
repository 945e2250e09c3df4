"""A new layout, tried and taken away: a function that reads, one that writes, one entry, and everything knows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from unidpo.cli import app
from unidpo.data.formats import LAYOUTS, Layout, groups_of, load_pairs, read_groups
from unidpo.data.formats.row import IMAGE_COLUMNS, Row
from unidpo.data.formats.texts import Form, marked
from unidpo.data.pairs import Message, Pair, PromptGroup, Response
from unidpo.errors import DataError

ROWS = [
    {"question": "Which?", "answers": {"best": "this", "worst": "that"}, "stars": [5, 2.5], "shop": 7},
    {"question": "What?", "answers": {"best": "a", "worst": "b"}, "stars": [4, 1]},
]


def read(row: Row) -> None:
    messages = [Message("user", marked(row.text(row.values.get("question"), "question")))]
    messages = row.prompt(messages, "question", place_marks=True)
    answers, stars = row.values.get("answers"), row.values.get("stars")
    if not isinstance(answers, dict) or not isinstance(stars, list) or len(stars) != 2:
        row.error("wrong-type", "answers", "`answers` has `best` and `worst`, `stars` a number for each")
        return
    responses = [
        Response(row.response(answers.get(name), f"answers.{name}"), row.score(stars[i], f"stars[{i}]"))
        for i, name in enumerate(("best", "worst"))
    ]
    row.make_group(messages, responses, [Pair(0, 1, row.number, row.file)])


def write(group: PromptGroup, form: Form) -> list[dict[str, Any]]:
    if len(group.messages) > 1:
        raise ValueError("a conversation")
    rows = []
    for pair in group.pairs:
        best, worst = group.responses[pair.chosen], group.responses[pair.rejected]
        answers = {"best": best.text, "worst": worst.text}
        rows.append({"question": group.messages[0].text, "answers": answers, "stars": [best.score, worst.score]})
    return rows


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    columns = ("question", "answers", "stars", *IMAGE_COLUMNS)
    monkeypatch.setitem(LAYOUTS, "shop", Layout("answers", columns, lambda given: "answers" in given, read, write))
    path = tmp_path / "shop.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), "utf-8")
    return path


def unidpo(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


def test_it_is_read_checked_and_trained_on(shop: Path) -> None:
    groups = load_pairs(shop, require_scores=True)
    assert [g.responses for g in groups] == [
        (Response("this", 5), Response("that", 2.5)),
        (Response("a", 4), Response("b", 1)),
    ]
    assert groups_of(ROWS, name="train_dataset") == groups
    assert unidpo("check", shop).exit_code == 0


def test_its_bad_rows_are_found(shop: Path) -> None:
    bad = [
        ROWS[0] | {"answers": {"best": " ", "worst": "that"}},
        ROWS[0] | {"stars": [5, "2"]},
        ROWS[0] | {"answers": None},
    ]
    shop.write_text("\n".join(map(json.dumps, [*bad, ROWS[1]])), "utf-8")
    found = [(finding.row, finding.kind, finding.key) for finding in read_groups(shop).errors]
    kinds = [("empty-response", "answers.best"), ("bad-score", "stars[1]"), ("wrong-type", "answers")]
    assert found == [(row, *kind) for row, kind in enumerate(kinds, start=1)]


@pytest.mark.parametrize("layout", [*LAYOUTS, "shop"])
@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_it_is_converted_to_every_layout_and_back(shop: Path, layout: str, suffix: str) -> None:
    there, back = shop.with_name(f"there{suffix}"), shop.with_name("back.jsonl")
    assert unidpo("convert", shop, "--to", there, "--layout", layout).exit_code == 0
    done = unidpo("convert", there, "--to", back, "--layout", "shop", "--from", layout)
    assert done.exit_code == 0, done.output
    assert [json.loads(line) for line in back.read_text("utf-8").splitlines()] == ROWS


def test_what_it_cannot_hold_is_refused(shop: Path) -> None:
    row = {"instruction": "?", "history": [["a", "b"]], "chosen": "a", "rejected": "b"}
    source = shop.with_name("pairs.json")
    source.write_text(json.dumps([row]), "utf-8")
    with pytest.raises(DataError, match="row 1: the shop layout cannot hold a conversation"):
        raise unidpo("convert", source, "--to", shop.with_name("new.json"), "--layout", "shop").exception


def test_taken_away_nothing_knows_it(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(LAYOUTS, "shop")
    assert {finding.kind for finding in read_groups(shop).errors} == {"unknown-layout"}
    with pytest.raises(DataError, match="there is no layout 'shop'"):
        raise unidpo("convert", shop, "--to", shop.with_name("new.json"), "--layout", "shop").exception
