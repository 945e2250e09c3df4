"""20,000 damaged inputs: every one is read or refused with a `UserError`, and every row is a group or has an error.

Hypothesis chooses the seeds; each stands for a batch of inputs, since an example of its own would cost more than the
reading. A failure prints the input itself.
"""

import base64
import contextlib
import copy
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unidpo.data.formats.convert import check_writable
from unidpo.data.formats.dataset_info import PLAIN, ColumnNames
from unidpo.data.formats.detection import extra_columns, read_row
from unidpo.data.formats.files import rows_in
from unidpo.data.formats.layouts import LAYOUTS
from unidpo.data.formats.layouts.rated import joined
from unidpo.data.formats.relocate import RelocateReport, move_images
from unidpo.data.formats.row import Row
from unidpo.errors import Finding, UserError

BATCHES, IN_A_BATCH = 100, 50  # of each of the four kinds of damage below
MARKED = {"type": "image"}, {"type": "text", "text": "Which <image>?"}
ANSWERS = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
SCORES = {"score_chosen": 4.5, "score_rejected": 2}
ROWS: list[dict[str, Any]] = [
    {"instruction": "<image>Which?", "input": "x", "system": "Be brief.", "history": [["Hi", "Hello"]],
     "chosen": "good", "rejected": "bad", "images": ["a.png"], **SCORES},
    {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "<image>?"}],
     "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}, "images": ["a.png"]},
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": list(MARKED)}], **ANSWERS, **SCORES,
     "images": [{"bytes": base64.b64encode(b"png").decode(), "path": None}]},
    {"prompt": "Which?", "chosen": "good", "rejected": "bad", "image": "a.png", "own": {"column": [1, None]}},
    {"prompt": [{"role": "user", "content": [{"type": "image", "image": "data:image/png;base64,AAAA"}]}], **ANSWERS},
    {"prompt": "<image>?", "images": ["a.png"], "pairs": [[0, 1]],
     "responses": [{"text": t, "score": s} for t, s in (("a", 1), ("b", 2.5), ("c", None))]},
    {"prompt": "?", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 3}]},
    {"messages": [{"role": "user", "content": "<image>?"}, *ANSWERS["chosen"]], "rejected_response": "b", "margin": 1.5,
     "images": ["a.png"]},
    {"messages": [{"role": "user", "content": "?"}, *ANSWERS["chosen"]],
     "rejected_messages": [{"role": "user", "content": "?"}, *ANSWERS["rejected"]]},
    {"prompt": "?", "img_path": "a.png", "completions": {"response": ["a", "b", "c"], "annotations": [
        {axis: {"Rating": r} for axis in ("Helpfulness", "Visual Faithfulness")} for r in ("1", "5", "5")]}},
    {"instruction": "?", "completions": [
        {"response": str(s), "overall_score": 11 - s, "annotations": {axis: {"Rating": s} for axis in
         ("helpfulness", "honesty", "truthfulness", "instruction_following")}} for s in (1, 3)] + [
        {"response": "c", "overall_score": 9, "annotations": {axis: {"Rating": "5"} for axis in
         ("helpfulness", "honesty", "truthfulness", "instruction_following")}}]},
    *({"prompt": "?\n<extra_id_1>Assistant\na\n<extra_id_1>User\n?", "response": str(s), "helpfulness": s,
       "correctness": 3} for s in (4, 2)),
    {"context": [{"role": "user", "content": "?"}], "response1": "a", "response2": "b", "overall_preference": -2},
    {"conversations": [{"from": "human", "value": "?"}], "output_1": {"from": "llm", "value": "a"},
     "output_2": {"from": "llm", "value": "b"}, "preference": 2},
    {"text": '{"question": "?", "chosen": "a", "rejected": "b"}', "image": {"bytes": None, "path": "a.png"}},
    {"chosen": "\n\nHuman: ?\n\nAssistant: a", "rejected": "\n\nHuman: ?\n\nAssistant: b"},
    {"question": "?", "chosen": "a", "rejected": "b", "image": ["a.png"]},
]  # fmt: skip
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        7,
        1e39,
        10**400,
        float("nan"),
        float("inf"),
        "",
        " ",
        "\ud800",
        "\0",
        "<image>",
        "a.png",
    ),
    *("https://x", "data:,", "data:image/png;base64,!", "user", "assistant", "system", "human", "text", "image"),
    *([], {}, [[]], [None], [{}], {"role": "user"}, {"from": "human", "value": 1}, {"bytes": "AAAA"}, {"path": 3}),
    *(b"\xff", b"", ["a", "b"], [["a", "b"]], [0, 1], {"type": "image"}, {"text": "a", "score": 1}, object),
]
MAPPED = ColumnNames("sharegpt", {"conversations": "prompt", "chosen": "rejected", "images": "own"})


def check_row(value: Any, number: int = 1, columns: ColumnNames = PLAIN, **options: Any) -> None:
    """Read, write in every layout, relocate: whatever the row is, nothing but a `UserError` comes of it."""
    row = Row(value, number, "memory", Path("root"), columns=columns, **options)
    read_row(row)
    assert (row.group is None) == row.is_bad
    assert all(str(finding).isprintable() for finding in row.findings)
    report = RelocateReport(Path(), Path())
    move_images(copy.deepcopy(value), number, ("images", "image", "img_path"), lambda old: f"new/{old}", report)
    extra_columns(row)
    if row.group is not None:
        for layout in LAYOUTS:
            try:
                check_writable(row.group, layout)
            except UserError:
                assert layout != "ranked"


def check_file(data: bytes, name: str) -> None:
    with contextlib.suppress(UserError):
        for number, value in joined(rows_in(io.BytesIO(data), Path(name))):
            if not isinstance(value, Finding):
                check_row(value, number)


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    result = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        at, end = sorted(chance.randrange(len(result) + 1) for _ in range(2))
        end = min(end, at + chance.choice([1, 4, 64]))
        match chance.randrange(6):
            case 0:
                result[at:end] = chance.randbytes(end - at)
            case 1:
                del result[at:end]
            case 2:
                result[at:at] = result[at:end]
            case 3:
                result[at:at] = chance.choice(TOKENS)
            case 4:
                result[at:end] = chance.choice(TOKENS)
            case 5 if at < len(result):
                result[at] ^= 1 << chance.randrange(8)
    return bytes(result)


TOKENS = [
    *(
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\n",
        b"\\",
        b"\\u",
        b"\\ud800",
        b"null",
        b"NaN",
        b"1e999",
        b"-",
        b"\0",
    ),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"PAR1", b"<image>", b"\r"),
]


def damage_values(value: Any, chance: random.Random) -> Any:
    """The same structure with one place of it replaced, left out, doubled or renamed."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        match chance.randrange(6):
            case 0:
                del value[key]
            case 1:
                value[chance.choice(KEYS)] = value.pop(key)
            case 2:
                value[chance.choice(KEYS)] = copy.deepcopy(chance.choice(ODD))
            case _:
                value[key] = damage_values(value[key], chance)
        return value
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        match chance.randrange(5):
            case 0:
                del value[at]
            case 1:
                value.append(copy.deepcopy(value[at]))
            case _:
                value[at] = damage_values(value[at], chance)
        return value
    return copy.deepcopy(chance.choice([*ODD, *ROWS]))


KEYS = sorted(
    {key for row in ROWS for key in row} | {"path", "type", "content", "role", "videos", "tools", "", "x.y[0]"}
)
JSON = json.dumps(ROWS, indent=1).encode()
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


def parquet_bytes(**options: Any) -> bytes:
    rows = [ROWS[0], {**ROWS[6], "score_chosen": None}]
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer.getvalue()


TABLES = [
    parquet_bytes(),
    parquet_bytes(compression="none", use_dictionary=False),
    parquet_bytes(compression="zstd", data_page_version="2.0", version="1.0"),
]

batches = settings(max_examples=BATCHES, deadline=None, database=None)
seeds = st.integers(0, 2**32 - 1)


@batches
@given(seeds)
@pytest.mark.parametrize(("data", "name"), [(JSON, "pairs.json"), (LINES, "pairs.jsonl")])
def test_damaged_text(data: bytes, name: str, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(IN_A_BATCH):
        check_file(damage_bytes(data, chance), name)


@batches
@given(seeds)
def test_damaged_tables(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(IN_A_BATCH):
        check_file(damage_bytes(chance.choice(TABLES), chance), "pairs.parquet")


@batches
@given(seeds)
def test_damaged_rows(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(IN_A_BATCH):
        row: Any = copy.deepcopy(chance.choice(ROWS))
        for _ in range(chance.choice([1, 1, 2, 5])):
            row = damage_values(row, chance)
        columns = MAPPED if chance.random() < 0.2 else PLAIN
        check_row(row, columns=columns, require_scores=chance.random() < 0.3)


@pytest.mark.parametrize(("data", "name"), [(JSON, "a.json"), (LINES, "a.jsonl"), *((t, "a.parquet") for t in TABLES)])
def test_what_is_damaged_is_good_before(data: bytes, name: str) -> None:
    """Else the damage would only ever meet the first check."""
    for number, value in joined(rows_in(io.BytesIO(data), Path(name))):
        row = Row(value, number, name, Path())
        read_row(row)
        assert not row.is_bad, row.findings
