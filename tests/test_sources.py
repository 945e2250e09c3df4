"""Every layout, every bad row, every unreadable file."""

import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unidpo.data.formats import Read, load_pairs, read_groups
from unidpo.data.pairs import IMAGE, Message, Pair, PromptGroup, Response
from unidpo.errors import DataError

GOLDEN = Path(__file__).parent / "golden" / "data" / "golden48.json"
SEED = {"instruction": "Which?", "chosen": "good", "rejected": "bad", "score_chosen": 4.5, "score_rejected": 2}
TRL = {"prompt": "Which?", "chosen": "good", "rejected": "bad", "score_chosen": 4.5, "score_rejected": 2}
RANKED = {"prompt": "Which?", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 3.5}]}


def save(folder: Path, rows: Any, name: str = "pairs.json") -> Path:
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def read_one(folder: Path, row: dict[str, Any], **options: Any) -> PromptGroup:
    read = read_groups(save(folder, [row]), **options)
    assert not read.errors
    [group] = read.groups
    return group


def user(*content: Any) -> tuple[Message, ...]:
    return (Message("user", content),)


# --- layouts


def test_golden_rows_become_pairs_in_file_order() -> None:
    read = read_groups(GOLDEN)
    rows = json.loads(GOLDEN.read_text())
    assert read.rows == len(read.groups) == 48
    for number, (row, group) in enumerate(zip(rows, read.groups, strict=True), start=1):
        assert group.pairs == (Pair(0, 1, number),)
        assert group.responses[0] == Response(row["chosen"], row["score_chosen"])
        assert group.responses[1] == Response(row["rejected"], row["score_rejected"])
        assert [message.text for message in group.messages] == [row["instruction"]]
        assert group.images == tuple(GOLDEN.parent / name for name in row["images"])
    said = [(finding.kind, finding.row, finding.severity) for finding in read.findings]
    reversed_rows, tied_rows = {4, 21, 38}, {6, 19, 26, 32, 45}
    assert said == [
        ("reversed-scores" if row in reversed_rows else "tied-scores", row, "warning")
        for row in sorted(reversed_rows | tied_rows)
    ]


def test_alpaca_with_everything(tmp_path: Path) -> None:
    row = SEED | {
        "instruction": "<image>Compare\n<image>",
        "input": "in one word",
        "system": "Be brief.",
        "history": [["Hello <image>", "Hi."], ["Ready?", "Yes."]],
        "images": ["a.png", "/abs/b.png", {"path": "c.png"}],
        "extra column": {"is": "fine"},
    }
    group = read_one(tmp_path, row)
    assert group.messages == (
        Message("system", ("Be brief.",)),
        Message("user", ("Hello ", IMAGE)),
        Message("assistant", ("Hi.",)),
        Message("user", ("Ready?",)),
        Message("assistant", ("Yes.",)),
        Message("user", (IMAGE, "Compare\n", IMAGE, "\nin one word")),
    )
    assert group.images == (tmp_path / "a.png", Path("/abs/b.png"), tmp_path / "c.png")


@pytest.mark.parametrize("nothing", [None, "", []])
def test_alpaca_without_the_optional_parts(tmp_path: Path, nothing: Any) -> None:
    text = None if nothing == [] else nothing
    history = None if nothing == "" else nothing
    row = SEED | {"input": text, "system": text, "history": history, "images": history, "score_chosen": 4.5}
    assert read_one(tmp_path, row).messages == user("Which?")


QUESTION = {"role": "user", "content": "Which?"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "Which?", "chosen": "good", "rejected": "bad"}, user("Which?")),
        ({"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}, user("Which?")),
        ({"prompt": [QUESTION], "chosen": "good", "rejected": [BAD]}, user("Which?")),
        ({"prompt": "Which?", "chosen": [GOOD], "rejected": [BAD]}, user("Which?")),
        ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, user("Which?")),
        ({"prompt": [QUESTION], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, user("Which?")),
        # Beside whole conversations a prompt string is a label, as in the published UltraFeedback.
        ({"prompt": "label", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, user("Which?")),
        (
            {"chosen": [QUESTION, GOOD, QUESTION, GOOD], "rejected": [QUESTION, GOOD, QUESTION, BAD]},
            (*user("Which?"), Message("assistant", ("good",)), *user("Which?")),
        ),
        (
            {"prompt": [{"role": "system", "content": "Be <image>."}, QUESTION], "chosen": "good", "rejected": "bad"},
            (Message("system", ("Be <image>.",)), *user("Which?")),
        ),
        # Parts that touch are one text, so that equal prompts are equal however they were cut up.
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("Wh", "", "ich?")]}],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "good"}]}],
                "rejected": "bad",
            },
            user("Which?"),
        ),
    ],
)
def test_trl_prompts(tmp_path: Path, row: dict[str, Any], messages: tuple[Message, ...]) -> None:
    group = read_one(tmp_path, row)
    assert group.messages == messages
    assert group.responses == (Response("good"), Response("bad"))
    assert group.pairs == (Pair(0, 1, 1),)


TEXT = {"type": "text", "text": "a <image> b"}


@pytest.mark.parametrize(
    ("prompt", "content"),
    [
        ("Which?", (IMAGE, IMAGE, "Which?")),
        ("<image>Which <image>?", (IMAGE, "Which ", IMAGE, "?")),
        ([QUESTION], (IMAGE, IMAGE, "Which?")),
        ([{"role": "user", "content": "<image><image>?"}], (IMAGE, IMAGE, "?")),
        # In a list of parts only image parts are marks; what the text says is text.
        ([{"role": "user", "content": [{"type": "image"}, TEXT, {"type": "image"}]}], (IMAGE, "a <image> b", IMAGE)),
        ([{"role": "user", "content": [TEXT]}], (IMAGE, IMAGE, "a <image> b")),
    ],
)
@pytest.mark.parametrize("layout", ["pair", "ranked"])
def test_marks_in_trl_prompts(tmp_path: Path, prompt: Any, content: tuple[Any, ...], layout: str) -> None:
    row = (TRL if layout == "pair" else RANKED) | {"prompt": prompt, "images": ["a.png", "b.png"]}
    assert read_one(tmp_path, row).messages == user(*content)


def test_placed_marks_go_before_the_first_user_text(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, QUESTION, GOOD, QUESTION]
    group = read_one(tmp_path, TRL | {"prompt": prompt, "image": "a.png"})
    assert [m.text for m in group.messages] == ["Be brief.", "<image>Which?", "good", "Which?"]


def test_ranked_responses_become_every_strictly_larger_pair(tmp_path: Path) -> None:
    ratings = [("a", 2), ("b", 3.5), ("c", 2), ("d", 1)]
    row = {"prompt": "Which?", "responses": [{"text": t, "score": s} for t, s in ratings]}
    path = save(tmp_path, [TRL, row])
    group = read_groups(path).groups[1]
    assert group.responses == tuple(Response(text, float(score)) for text, score in ratings)
    said = [(ratings[pair.chosen][0] + ratings[pair.rejected][0], pair.row) for pair in group.pairs]
    assert said == [("ad", 2), ("ba", 2), ("bc", 2), ("bd", 2), ("cd", 2)]


def test_a_repeated_response_is_a_warning_and_never_preferred_to_itself(tmp_path: Path) -> None:
    items = [{"text": "a", "score": 1}, {"text": "a", "score": 2}, {"text": "b", "score": 0}]
    read = read_groups(save(tmp_path, [{"prompt": "Which?", "responses": items}]))
    [finding] = read.findings
    assert (finding.kind, finding.key, finding.severity) == ("duplicate-response", "responses[1].text", "warning")
    assert [(pair.chosen, pair.rejected) for pair in read.groups[0].pairs] == [(0, 2), (1, 2)]


def test_images_as_bytes_and_under_another_root(tmp_path: Path) -> None:
    data = b"\x89PNG\r\n"
    images = [{"bytes": base64.b64encode(data).decode(), "path": "x.png"}, {"bytes": None, "path": "y.png"}, "z.png"]
    root = tmp_path / "elsewhere"
    root.mkdir()
    group = read_one(tmp_path, TRL | {"images": images}, images=root)
    assert group.images == (data, root / "y.png", root / "z.png")


def test_images_of_bad_rows_are_still_mentioned(tmp_path: Path) -> None:
    read = read_groups(save(tmp_path, [TRL, TRL | {"chosen": "", "images": ["a.png", "b.png"]}]))
    assert [(use.row, use.key, use.source) for use in read.image_uses] == [
        (2, "images[0]", tmp_path / "a.png"),
        (2, "images[1]", tmp_path / "b.png"),
    ]


# --- bad rows: the row, and each finding's kind and key


def without(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}


def ranked(*scores: Any, text: Any = "c") -> dict[str, Any]:
    return RANKED | {"responses": [*RANKED["responses"][:1], *({"text": text, "score": s} for s in scores)]}  # type: ignore[misc]


BAD_ROWS: list[tuple[Any, list[tuple[str, str | None]]]] = [
    # no row at all
    (None, [("wrong-type", None)]),
    ([SEED], [("wrong-type", None)]),
    ("text", [("wrong-type", None)]),
    ({}, [("unknown-layout", None)]),
    ({"conversations": [1]}, [("unknown-layout", None)]),
    ({"chosen": "good"}, [("unknown-layout", None)]),
    # missing and mistyped keys
    (without(SEED, "chosen"), [("missing-key", "chosen")]),
    (without(SEED, "chosen", "rejected"), [("missing-key", "chosen"), ("missing-key", "rejected")]),
    (without(TRL, "rejected"), [("missing-key", "rejected")]),
    (without(TRL, "prompt"), [("missing-key", "prompt")]),
    (without(RANKED, "prompt"), [("missing-key", "prompt")]),
    (SEED | {"instruction": None}, [("missing-key", "instruction")]),
    (SEED | {"instruction": 7}, [("wrong-type", "instruction")]),
    (SEED | {"input": ["x"]}, [("wrong-type", "input")]),
    (SEED | {"chosen": 7}, [("wrong-type", "chosen")]),
    (SEED | {"rejected": {"text": "bad"}}, [("wrong-type", "rejected")]),
    (SEED | {"history": "x"}, [("wrong-type", "history")]),
    (SEED | {"history": [["a", "b"], ["a"]]}, [("wrong-type", "history[1]")]),
    (SEED | {"history": [["a", 1]]}, [("wrong-type", "history[0][1]")]),
    (TRL | {"prompt": [QUESTION, 3]}, [("wrong-type", "prompt[1]")]),
    (TRL | {"prompt": [QUESTION | {"role": "tool"}, QUESTION]}, [("bad-role", "prompt[0].role")]),
    (TRL | {"prompt": [QUESTION, GOOD]}, [("bad-role", "prompt")]),
    (TRL | {"prompt": [{"role": "user"}]}, [("missing-key", "prompt[0].content")]),
    (TRL | {"prompt": [{"role": "user", "content": [{"type": "video"}]}]}, [("wrong-type", "prompt[0].content[0]")]),
    (
        TRL | {"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "images": ["a.png"]},
        [("inline-image", "prompt[0].content[0]")],
    ),
    (TRL | {"chosen": [QUESTION]}, [("wrong-type", "chosen")]),
    (TRL | {"chosen": [GOOD, GOOD]}, [("wrong-type", "chosen")]),
    (TRL | {"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, [("wrong-type", "chosen")]),
    # a conversation that differs before its last message has no single response
    (
        {"chosen": [QUESTION, GOOD, QUESTION, GOOD], "rejected": [QUESTION, BAD, QUESTION, BAD]},
        [("wrong-type", "chosen"), ("wrong-type", "rejected")],
    ),
    # empty and equal
    (SEED | {"chosen": ""}, [("empty-response", "chosen")]),
    (SEED | {"rejected": " \n\t"}, [("empty-response", "rejected")]),
    (TRL | {"chosen": [GOOD | {"content": " "}]}, [("empty-response", "chosen")]),
    (ranked(5, text=""), [("empty-response", "responses[1].text")]),
    (SEED | {"rejected": "good"}, [("equal-responses", "rejected")]),
    ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, GOOD]}, [("equal-responses", "rejected")]),
    (SEED | {"instruction": ""}, [("empty-prompt", "instruction")]),
    (TRL | {"prompt": " "}, [("empty-prompt", "prompt")]),
    (TRL | {"prompt": []}, [("empty-prompt", "prompt")]),
    (SEED | {"chosen": "\ud83d"}, [("bad-text", "chosen")]),
    # scores
    (without(SEED, "score_rejected"), [("missing-score", "score_rejected")]),
    (SEED | {"score_chosen": None}, [("missing-score", "score_chosen")]),
    (SEED | {"score_chosen": "high"}, [("bad-score", "score_chosen")]),
    (SEED | {"score_chosen": "4.5"}, [("bad-score", "score_chosen")]),
    (SEED | {"score_rejected": float("nan")}, [("bad-score", "score_rejected")]),
    (SEED | {"score_rejected": float("-inf")}, [("bad-score", "score_rejected")]),
    (SEED | {"score_rejected": 10**400}, [("bad-score", "score_rejected")]),
    (SEED | {"score_rejected": 1e39}, [("bad-score", "score_rejected")]),
    (SEED | {"score_chosen": True}, [("bad-score", "score_chosen")]),
    (SEED | {"score_chosen": [4.5]}, [("bad-score", "score_chosen")]),
    (ranked(None), [("missing-score", "responses[1].score")]),
    (ranked("3", True), [("bad-score", "responses[1].score"), ("duplicate-response", "responses[2].text"),
                         ("bad-score", "responses[2].score")]),
    # ranked responses
    (RANKED | {"responses": None}, [("too-few-responses", "responses")]),
    (RANKED | {"responses": []}, [("too-few-responses", "responses")]),
    (ranked(), [("too-few-responses", "responses")]),
    (ranked(1), [("no-pair", "responses")]),
    (RANKED | {"responses": ["a", "b"]}, [("wrong-type", "responses[0]"), ("wrong-type", "responses[1]")]),
    # images
    (SEED | {"images": ["a.png"]}, [("image-marks", "instruction")]),
    (SEED | {"instruction": "<image>?"}, [("image-marks", "instruction")]),
    (SEED | {"instruction": "<image><image>?", "images": ["a.png"]}, [("image-marks", "instruction")]),
    (TRL | {"prompt": "<image>?", "images": ["a.png", "b.png"]}, [("image-marks", "prompt")]),
    (TRL | {"prompt": "<image>?"}, [("image-marks", "prompt")]),
    (RANKED | {"prompt": "<image><image>", "image": "a.png"}, [("image-marks", "prompt")]),
    (TRL | {"images": [""]}, [("wrong-type", "images[0]")]),
    (TRL | {"images": ["a.png", 7]}, [("wrong-type", "images[1]")]),
    (TRL | {"image": {"path": None}}, [("wrong-type", "image")]),
    (TRL | {"image": {"bytes": "no base64!"}}, [("broken-image", "image")]),
    (TRL | {"image": {"bytes": [137, 80]}}, [("wrong-type", "image")]),
    (TRL | {"image": "https://example.org/a.png"}, [("remote-image", "image")]),
    (TRL | {"image": "a.png", "images": ["a.png"]}, [("wrong-type", "image")]),
    # all that is wrong with a row is said at once
    (
        SEED | {"chosen": "", "score_chosen": "x", "images": ["a.png"]},
        [("image-marks", "instruction"), ("empty-response", "chosen"), ("bad-score", "score_chosen")],
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
def test_every_bad_row_is_found_and_no_good_one_touched(tmp_path: Path, name: str) -> None:
    rows = [row for bad, _ in BAD_ROWS for row in (SEED, bad, RANKED)]
    expected = [(3 * i + 2, kind, key) for i, (_, findings) in enumerate(BAD_ROWS) for kind, key in findings]
    path = save(tmp_path, rows, name)
    read = read_groups(path)
    assert [(finding.row, finding.kind, finding.key) for finding in read.findings] == expected
    assert {finding.file for finding in read.findings} == {path}
    assert [group.pairs[0].row for group in read.groups] == [n for n in range(1, len(rows) + 1) if n % 3 != 2]
    assert read.rows == len(rows)


@pytest.mark.parametrize(("row", "findings"), BAD_ROWS, ids=lambda value: None)
def test_a_message_is_one_printable_line(tmp_path: Path, row: Any, findings: list[Any]) -> None:
    for finding in read_groups(save(tmp_path, [row])).findings:
        assert finding.message.isprintable()
        assert len(finding.message) < 400


def test_what_the_data_says_is_quoted(tmp_path: Path) -> None:
    row = SEED | {"score_chosen": "\x1b[31m\ud800" + "9" * 10_000}
    [finding] = read_groups(save(tmp_path, [row])).findings
    assert finding.message.isprintable()
    assert len(finding.message) < 400


@pytest.mark.parametrize(
    "row", [without(SEED, "score_chosen", "score_rejected"), TRL | {"score_chosen": None, "score_rejected": None}]
)
def test_scores_are_optional_until_they_are_required(tmp_path: Path, row: dict[str, Any]) -> None:
    path = save(tmp_path, [SEED, row])
    assert [response.score for response in read_groups(path).groups[1].responses] == [None, None]
    [finding] = read_groups(path, require_scores=True).findings
    assert (finding.kind, finding.row, finding.key) == ("missing-score", 2, "score_chosen")
    assert "score_rejected" in finding.message


# --- files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.json", None, "no such file"),
        ("pairs.json", b"", "no rows"),
        ("pairs.json", b"[]", "no rows"),
        ("pairs.jsonl", b"\n \n", "no rows"),
        ("pairs.json", b'[{"a": 1},\n {"b" 2}]', "line 2, column 7"),
        ("pairs.json", b'[{"a": 1}', "not valid JSON"),
        ("pairs.json", b'{"data": [{"a": 1}]}', "save the list under 'data'"),
        ("pairs.json", b'{"a": 1}', r"put the rows into \[ \]"),
        ("pairs.json", b"7", "holds a number, but a list"),
        ("pairs.json", b'[\n"caf\xe9"]', "line 2: the file is not UTF-8"),
        ("pairs.json", '["é"]'.encode("utf-16"), "not UTF-8"),
        ("pairs.json", b"[" * 100_000, "nested too deeply"),
        ("pairs.json", b"[" + b"1" * 5000 + b"]", "too many digits"),
        ("pairs.parquet", b"PAR1....", "not a whole Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_groups(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_data_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder"):
        read_groups(tmp_path)


def test_an_image_root_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such image folder"):
        read_groups(save(tmp_path, [SEED]), images=tmp_path / "gone")


def test_lines_are_counted_as_in_an_editor_and_a_broken_one_is_one_finding(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    odd = json.dumps(SEED | {"chosen": "a\u2028b\u0085c"}, ensure_ascii=False)
    path.write_text("\ufeff" + "\r\n".join([json.dumps(SEED), "", odd, '{"chosen": ', "1" * 5000, json.dumps(TRL)]))
    read = read_groups(path)
    assert [group.pairs[0].row for group in read.groups] == [1, 3, 6]
    assert read.groups[1].responses[0].text == "a\u2028b\u0085c"
    assert [(finding.kind, finding.row) for finding in read.findings] == [("broken-json", 4), ("broken-json", 5)]
    assert "Expecting value at column 13" in read.findings[0].message
    assert read.rows == 5


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lines.json", f"{json.dumps(SEED)}\n{json.dumps(TRL)}\n"),
        ("list.jsonl", json.dumps([SEED, TRL], indent=1)),
        ("list.txt", json.dumps([SEED, TRL])),
    ],
)
def test_content_counts_more_than_the_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    read = read_groups(tmp_path / name)
    assert [group.pairs[0].row for group in read.groups] == [1, 2]
    assert not read.findings


# --- load_pairs


def test_all_bad_rows_stand_in_one_error(tmp_path: Path) -> None:
    path = save(tmp_path, [SEED, SEED | {"chosen": ""}, SEED | {"score_chosen": "x"}])
    with pytest.raises(DataError) as caught:
        load_pairs(path)
    assert str(caught.value).splitlines() == [
        f"{path}: 2 of 3 rows cannot be used",
        f"  {path}, row 2, `chosen`: the response is empty; give its text or remove the row",
        f"  {path}, row 3, `score_chosen`: 'x' is no score; a score is a finite number, higher is better, "
        "without quotes",
    ]
    assert [finding.row for finding in caught.value.findings] == [2, 3]


def test_skipped_rows_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path, [SEED, SEED | {"chosen": ""}, RANKED])
    groups = load_pairs(path, on_bad_row="skip")
    assert [group.pairs[0].row for group in groups] == [1, 3]
    assert "skipped 1 of 3 rows" in caplog.text
    assert "row 2, `chosen`" in caplog.text


def test_ties_and_reversed_margins_are_kept_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    assert len(load_pairs(GOLDEN)) == 48
    assert "5 tied-scores" in caplog.text
    assert "3 reversed-scores" in caplog.text


def test_a_minimum_margin_leaves_out_smaller_ones_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "unidpo")
    # 4.3 - 4.2 is 0.0999... in binary, and still a margin of 0.1.
    scores = [(4.3, 4.2), (4.25, 4.2), (2, 2), (1, 5), (5, 1)]
    rows = [SEED | {"score_chosen": chosen, "score_rejected": rejected} for chosen, rejected in scores]
    items = [{"text": text, "score": score} for text, score in (("a", 1.0), ("b", 1.05), ("c", 3.0))]
    groups = load_pairs(save(tmp_path, [*rows, {"prompt": "Which?", "responses": items}]), min_score_margin=0.1)
    assert [(group.pairs[0].row, len(group.pairs)) for group in groups] == [(1, 1), (5, 1), (6, 2)]
    assert "left out 4 of 8 pairs, score margin under 0.1" in caplog.text


def test_a_minimum_margin_of_zero_leaves_out_reversed_pairs() -> None:
    rows = {group.pairs[0].row for group in load_pairs(GOLDEN, min_score_margin=0)}
    assert set(range(1, 49)) - rows == {4, 21, 38}


def test_a_minimum_margin_needs_scores(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="score_chosen"):
        load_pairs(save(tmp_path, [without(SEED, "score_chosen", "score_rejected")]), min_score_margin=0.5)


@pytest.mark.parametrize("options", [{"min_score_margin": 9}, {"on_bad_row": "skip"}])
def test_nothing_left_is_an_error(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = [SEED | {"chosen": ""}] if "on_bad_row" in options else [SEED]
    with pytest.raises(DataError, match="no pair is left"):
        load_pairs(save(tmp_path, rows), **options)


def test_rows_of_one_prompt_become_one_group(tmp_path: Path) -> None:
    rows = [SEED, SEED | {"instruction": "What?"}, TRL | {"rejected": "worse", "score_rejected": 1}]
    path = save(tmp_path, rows)
    assert [len(group.responses) for group in load_pairs(path)] == [2, 2, 2]
    grouped = load_pairs(path, group_by_prompt=True)
    assert [[response.text for response in group.responses] for group in grouped] == [
        ["good", "bad", "worse"],
        ["good", "bad"],
    ]
    assert [pair.row for pair in grouped[0].pairs] == [1, 3]


def test_a_mistyped_choice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_bad_row"):
        load_pairs(save(tmp_path, [SEED]), on_bad_row="ignore")  # type: ignore[arg-type]


# --- whatever a file holds

KEYS = [
    *SEED,
    *RANKED,
    "input",
    "system",
    "history",
    "images",
    "image",
    "bytes",
    "text",
    "score",
    "role",
    "content",
    "type",
]
words = st.sampled_from(["", " ", "a", "b", "<image>", "user", "assistant", "system", "image", "text", "\ud800", "\0"])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=2), inner),
    max_leaves=12,
)
turns = st.lists(st.fixed_dictionaries({"role": words, "content": words | values}), max_size=3)
columns = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(["instruction", "prompt", "chosen", "rejected"], words | turns | values),
        **dict.fromkeys(["score_chosen", "score_rejected"], st.floats() | st.integers() | values),
        "responses": st.lists(st.fixed_dictionaries({"text": words, "score": leaves | st.floats()}), max_size=4)
        | values,
        "images": st.lists(words, max_size=2) | values,
    },
)
# Half of them good rows with something put over some of their columns, so that some are still good.
rows = values | st.builds(lambda good, bad: good | bad, st.sampled_from([SEED, TRL, RANKED]), columns)


def complete(read: Read) -> None:
    """Every row is either a group or has an error, never both, never neither."""
    good = [group.pairs[0].row for group in read.groups]
    bad = {finding.row for finding in read.errors}
    assert len(good) == len(set(good))
    assert not bad & set(good)
    assert len(good) + len(bad) == read.rows


@settings(max_examples=200, deadline=None)
@given(st.lists(rows, min_size=1, max_size=4), st.booleans())
def test_any_json_row_is_a_group_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, some: list[Any], strict: bool
) -> None:
    path = save(tmp_path_factory.getbasetemp(), some, "any.json")
    complete(read_groups(path, require_scores=strict))


deep = b'[{"prompt": [{"role": "user", "content": %s"x"%s}], "chosen": "a", "rejected": "b"}]' % (
    b"[" * 900,
    b"]" * 900,
)


@settings(max_examples=200, deadline=None)
@example(deep, ".json")
@example(b'{"a": 1}\n[1]', ".jsonl")
@example(b"[1]\n{}", ".jsonl")
@given(
    st.binary(max_size=30) | st.text(alphabet='[]{}",:1eE-\n abn\\u', max_size=30).map(str.encode),
    st.sampled_from([".json", ".jsonl"]),
)
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(data)
    try:
        read = read_groups(path)
    except DataError:
        return
    complete(read)
