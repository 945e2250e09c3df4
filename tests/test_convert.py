"""What is written is read back the same, in every layout and kind of file; what cannot be written is named."""

import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from unidpo.data.formats import LAYOUTS, convert, read_groups, write_pairs
from unidpo.data.formats.texts import is_visible
from unidpo.data.pairs import IMAGE, ImageMark, Message, Pair, PromptGroup, Response, ranked_pairs
from unidpo.errors import DataError

LAYOUT_NAMES = ["alpaca", "sharegpt", "swift", "trl", "ranked"]
SUFFIXES = [".json", ".jsonl", ".parquet"]
GOLDEN = Path(__file__).parent / "golden" / "data" / "golden48.json"

# --- any group

words = [
    *(
        "a",
        "b c",
        "<image>",
        "image>",
        "<",
        '"',
        "'",
        "\\",
        "\n",
        "\r\n",
        "\t",
        "\u2028",
        "\x00",
        "{",
        "[",
        ",",
        "./",
        "1e5",
    ),
    *("é", "e\u0301", "漢字", "مرحبا", "हिन्दी", "👩\u200d👧", "\ufeff", "<|im_end|>", "data:", "null", " "),
]
texts = st.lists(st.sampled_from(words) | st.text(max_size=3), max_size=5).map(" ".join)
texts = texts.filter(lambda text: not any("\ud800" <= letter <= "\udfff" for letter in text))
spoken = texts.filter(is_visible)
scores = st.integers(-10, 10).map(float) | st.floats(-1e6, 1e6)
names = st.sampled_from(
    ["a.png", "sub/b.jpg", "c d.png", "漢.webp", "data:x", "http:/y", "-1", "../up.png", "back\\slash"]
)


@st.composite
def prompts(draw: st.DrawFn, marks: int) -> tuple[Message, ...]:
    turns = draw(st.integers(0, 2))
    roles = ["user", "assistant"] * turns + ["user"]
    at = [draw(st.integers(0, len(roles) - 1)) for _ in range(marks)]
    messages = [Message("system", (draw(spoken),))] if draw(st.booleans()) else []
    for i, role in enumerate(roles):
        parts: list[str | ImageMark] = [draw(texts)]
        for _ in range(at.count(i)):
            parts += [IMAGE, draw(texts)]
        messages.append(Message(role, joined(parts)))  # type: ignore[arg-type]
    said = [part for message in messages for part in message.content]
    if not any(part is IMAGE or is_visible(str(part)) for part in said):
        messages[-1] = Message("user", (draw(spoken),))
    return tuple(messages)


def joined(parts: list[str | ImageMark]) -> tuple[str | ImageMark, ...]:
    runs = itertools.groupby(parts, key=lambda part: isinstance(part, str))
    flat = [["".join(run)] if text else list(run) for text, run in runs]  # type: ignore[arg-type]
    return tuple(part for run in flat for part in run if part != "")


@st.composite
def groups(draw: st.DrawFn, literal: bool = True) -> PromptGroup:
    """A prompt with 0 to 3 images; a pair, or ranked responses, or any pairs among some."""
    images = tuple(draw(st.lists(names.map(lambda name: ROOT / name) | st.binary(min_size=1, max_size=4), max_size=3)))
    messages = draw(prompts(len(images)))
    answers = draw(st.lists(spoken, min_size=2, max_size=4, unique=True))
    if draw(st.booleans()):
        responses = tuple(Response(text, draw(scores)) for text in answers)
        pairs = ranked_pairs(responses, 1) or (Pair(0, 1, 1),)
    else:
        score = draw(st.none() | st.just(1.0))
        responses = tuple(Response(text, score and draw(scores)) for text in answers)
        every = [(i, j) for i in range(len(answers)) for j in range(len(answers)) if i != j]
        some = draw(st.lists(st.sampled_from(every), min_size=1, max_size=3))
        pairs = tuple(Pair(i, j, 1) for i, j in some)
    return PromptGroup(messages, images, responses, pairs)


ROOT = Path("/data/images")


def is_spelled(group: PromptGroup) -> bool:
    """Whether a text of the prompt says `<image>` without meaning one."""
    said = [part for message in group.messages if message.role != "system" for part in message.content]
    return any(isinstance(part, str) and "<image>" in part for part in said)


def said_pairs(some: list[PromptGroup]) -> Counter[Any]:
    """Everything a data set says, whatever its rows: prompt, images, both responses with their scores."""
    return Counter((*g.prompt_key(), g.responses[p.chosen], g.responses[p.rejected]) for g in some for p in g.pairs)  # type: ignore[misc]


def read(path: Path) -> list[PromptGroup]:
    result = read_groups(path)
    assert not result.errors
    return result.groups


def rows_of(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()  # type: ignore[no-any-return]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().split("\n") if line]
    return json.loads(path.read_text())  # type: ignore[no-any-return]


# --- round trips


@settings(max_examples=120, deadline=None)
@given(st.lists(groups(), min_size=1, max_size=3), st.sampled_from(LAYOUT_NAMES), st.sampled_from(SUFFIXES))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, some: list[PromptGroup], layout: str, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"written{suffix}"
    spelled = [group for group in some if is_spelled(group)]
    if spelled and layout in ("alpaca", "sharegpt"):
        with pytest.raises(DataError, match="the text `<image>`, which it reads as an image; use the trl or ranked"):
            write_pairs(some, path, layout)
        some = [group for group in some if not is_spelled(group)]
    assert write_pairs(some, path, layout) == sum(1 if layout == "ranked" else len(group.pairs) for group in some)
    if not some:
        return
    again = read(path)
    assert said_pairs(again) == said_pairs(some)
    if layout == "ranked":
        assert [(g.messages, g.images, g.responses, pair_indices(g)) for g in again] == [
            (g.messages, g.images, g.responses, pair_indices(g)) for g in some
        ]
    assert {LAYOUTS[layout].main} <= set(rows_of(path)[0])


def pair_indices(group: PromptGroup) -> list[tuple[int, int]]:
    return [(pair.chosen, pair.rejected) for pair in group.pairs]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(groups().filter(lambda group: not is_spelled(group)), min_size=1, max_size=3),
    st.permutations(LAYOUT_NAMES),
    st.lists(st.sampled_from(SUFFIXES), min_size=5, max_size=5),
)
def test_a_way_through_all_layouts_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, some: list[PromptGroup], layouts: list[str], suffixes: list[str]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    at = folder / "start.json"
    write_pairs(some, at, "ranked")
    for step, (layout, suffix) in enumerate(zip(layouts, suffixes, strict=True)):
        to = folder / f"step{step}{suffix}"
        report = convert(at, to, to_layout=layout)
        assert report.rows_written == len(rows_of(to))
        assert report.pairs == sum(len(group.pairs) for group in some)
        at = to
    assert said_pairs(read(at)) == said_pairs(some)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_golden_goes_anywhere_and_comes_back(tmp_path: Path, layout: str, suffix: str) -> None:
    there, back = tmp_path / f"there{suffix}", GOLDEN.parent / "never written.json"
    report = convert(GOLDEN, there, to_layout=layout, group_by_prompt=False)
    assert (report.rows_read, report.rows_written, report.pairs) == (48, 48, 48)
    back = tmp_path / "back.json"
    convert(there, back, from_layout=layout, to_layout="alpaca")
    rows = [row | {"images": [str(GOLDEN.parent / name) for name in row["images"]]} for row in rows_of(GOLDEN)]
    if layout == "ranked":  # two pairs of reversed scores say so by their order
        rows = [{key: row[key] for key in row} for row in rows]
    assert rows_of(back) == rows


@pytest.mark.parametrize("layout", ["alpaca", "sharegpt", "trl"])
def test_pairs_of_one_prompt_become_ranked_responses_and_come_back(tmp_path: Path, layout: str) -> None:
    items = [{"text": text, "score": score} for text, score in (("a", 3.0), ("b", 1.0), ("c", 2.0))]
    ranked = tmp_path / "ranked.json"
    ranked.write_text(
        json.dumps([{"prompt": "Which?", "responses": items, "id": 7}, {"prompt": "What?", "responses": items}])
    )
    pairs, back = tmp_path / "pairs.json", tmp_path / "back.json"
    assert convert(ranked, pairs, to_layout=layout).rows_written == 6
    assert [row.get("id") for row in rows_of(pairs)] == [7, 7, 7, None, None, None]
    assert convert(pairs, back).rows_written == 2
    first = rows_of(back)[0]
    assert (first["id"], first["prompt"]) == (7, "Which?")
    assert said_pairs(read(back)) == said_pairs(read(ranked))


def test_images_are_relative_where_they_lie_below_the_file(tmp_path: Path) -> None:
    (tmp_path / "source" / "images").mkdir(parents=True)
    row = {"prompt": "<image><image>", "images": ["images/a.png", "/abs/b.png"], "chosen": "a", "rejected": "b"}
    source = tmp_path / "source" / "pairs.json"
    source.write_text(json.dumps([row]))
    convert(source, tmp_path / "above.json", to_layout="trl")
    assert rows_of(tmp_path / "above.json")[0]["images"] == ["source/images/a.png", "/abs/b.png"]
    convert(source, tmp_path / "aside" / "pairs.parquet", to_layout="trl")
    [row] = rows_of(tmp_path / "aside" / "pairs.parquet")
    assert [image["path"] for image in row["images"]] == [str(tmp_path / "source/images/a.png"), "/abs/b.png"]


def test_a_decoded_image_is_written_as_png(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), "red")
    group = PromptGroup((Message("user", (IMAGE,)),), (image,), (Response("a"), Response("b")), (Pair(0, 1, 1),))
    write_pairs([group], tmp_path / "pairs.jsonl", "alpaca")
    [again] = read(tmp_path / "pairs.jsonl")
    assert isinstance(again.images[0], bytes)
    assert Image.open(io.BytesIO(again.images[0])).tobytes() == image.tobytes()


# --- columns that no layout knows

TRL = {"prompt": "?", **{name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}}


def test_columns_of_ones_own_go_along_with_their_row(tmp_path: Path) -> None:
    row = {"instruction": "?", "chosen": "a", "rejected": "b", "id": 1, "meta": {"from": ["x", None]}, "none": None}
    source = tmp_path / "source.jsonl"
    source.write_text("\n".join(json.dumps(r) for r in (row, row | {"id": 2, "odd": "\ud800"})))
    convert(source, tmp_path / "to.json", to_layout="trl")
    rows = rows_of(tmp_path / "to.json")
    assert [(r["id"], r["meta"], "none" in r) for r in rows] == [(i, {"from": ["x", None]}, False) for i in (1, 2)]
    assert rows[1]["odd"] == "\ud800"
    # Rows whose own columns differ stay rows of their own.
    assert convert(source, tmp_path / "ranked.json").rows_written == 2
    report = convert(source, tmp_path / "plain.json", keep_extra=False)
    assert (report.rows_written, report.dropped) == (1, {"id": 2, "meta": 2, "odd": 1})


@pytest.mark.parametrize(
    ("row", "to_layout", "key"),
    [
        ({"instruction": "?", "chosen": "a", "rejected": "b", "prompt": "x"}, "trl", "prompt"),
        (TRL | {"instruction": "x"}, "alpaca", "instruction"),
        (TRL | {"instruction": "x"}, "sharegpt", "instruction"),  # there it would make the row one of alpaca
        ({"instruction": "?", "chosen": "a", "rejected": "b", "conversations": "x"}, "sharegpt", "conversations"),
        ({"prompt": "?", "responses": [{"text": "a", "score": 1, "model": "m"}, {"text": "b", "score": 0}]},
         "alpaca", "responses[0].model"),
        ({"prompt": [{"role": "user", "content": "?", "name": "Ann"}], "chosen": "a", "rejected": "b"},
         "ranked", "prompt[0].name"),
        ({"prompt": "a label", "chosen": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}],
          "rejected": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "b"}]}, "trl", "prompt"),
        ({"conversations": [{"from": "observation", "value": "?"}], "chosen": "a", "rejected": "b"},
         "sharegpt", "conversations[0].from"),
    ],
)  # fmt: skip
def test_what_would_be_lost_is_named(tmp_path: Path, row: dict[str, Any], to_layout: str, key: str) -> None:
    source, to = tmp_path / "source.json", tmp_path / "to.json"
    source.write_text(json.dumps([row]))
    with pytest.raises(DataError) as caught:
        convert(source, to, to_layout=to_layout)
    errors = [finding for finding in caught.value.findings if finding.severity == "error"]
    assert [(finding.kind, finding.row, finding.key) for finding in errors] == [("lost-value", 1, key)]
    assert "keep_extra=False" in str(caught.value)
    assert not to.exists()
    report = convert(source, to, to_layout=to_layout, keep_extra=False)
    assert report.dropped == {key: 1}
    assert len(read(to)) == 1


def test_values_that_a_kind_of_file_cannot_hold(tmp_path: Path) -> None:
    rows = [{"prompt": "?", "chosen": "a", "rejected": "b", "id": value} for value in (1, "x")]
    source = tmp_path / "source.json"
    source.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"Parquet cannot hold these rows \(.*\); write JSONL"):
        convert(source, tmp_path / "to.parquet", to_layout="trl")
    assert list(tmp_path.iterdir()) == [source]


# --- refusals


def one(messages: tuple[Message, ...], **changes: Any) -> PromptGroup:
    given = {"images": (), "responses": (Response("a"), Response("b")), "pairs": (Pair(0, 1, 12),), **changes}
    return PromptGroup(messages, **given)


ASK = Message("user", ("?",))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            one((ASK, ASK)),
            "row 12: the alpaca layout cannot hold a prompt in which user and assistant do not take turns",
        ),
        (one((Message("system", ()), ASK)), "row 12: the alpaca layout cannot hold an empty system message"),
        (
            one((Message("system", (IMAGE,)), ASK), images=(b"x",)),
            "row 12: the alpaca layout cannot hold an image in the system message",
        ),
        (
            one((ASK,), responses=(Response("a"), Response(""))),
            "not written: row 12, `rejected`: the response is empty",
        ),
        (one((ASK,), responses=(Response("a", 1.0), Response("b"))), "not written: row 12, `score_rejected`"),
        (one((Message("user", ("\ud800",)),)), "not written: row 12, `instruction`: the text holds half"),
        (one((Message("user", (IMAGE,)),), images=(Path("\udcff.png"),)), "row 12, `images.0.`: the path holds half"),
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_could_not_be_read_again_is_not_written(
    tmp_path: Path, group: PromptGroup, message: str, suffix: str
) -> None:
    path = tmp_path / f"pairs{suffix}"
    with pytest.raises(DataError, match=message):
        write_pairs([one((ASK,)), group], path, "alpaca")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["trl", "ranked"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_alpaca_cannot_hold_others_can(tmp_path: Path, layout: str, suffix: str) -> None:
    some = [
        one((ASK, ASK)),
        one((Message("system", ()), ASK)),
        one((Message("system", (IMAGE,)), ASK), images=(b"x",)),
        one((Message("user", ("<image>",)),)),
        one((Message("user", (IMAGE, "<image>", IMAGE)),), images=(b"x", b"y")),
    ]
    write_pairs(some, tmp_path / f"pairs{suffix}", layout)
    assert said_pairs(read(tmp_path / f"pairs{suffix}")) == said_pairs(some)


def test_a_bad_row_stops_a_conversion_or_is_left_out(tmp_path: Path) -> None:
    source, to = tmp_path / "source.jsonl", tmp_path / "to.json"
    good = {"instruction": "?", "chosen": "a", "rejected": "b"}
    spelled = {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "<image>"}]}],
        "chosen": "a",
        "rejected": "b",
    }
    source.write_text("\n".join([json.dumps(good), "{", json.dumps(good | {"chosen": ""}), json.dumps(spelled)]))
    with pytest.raises(DataError, match="3 of 4 rows cannot be converted") as caught:
        convert(source, to, to_layout="alpaca")
    said = [(finding.row, finding.kind) for finding in caught.value.findings]
    assert said == [(2, "broken-json"), (3, "empty-response"), (4, "not-expressible")]
    assert not to.exists()
    report = convert(source, to, to_layout="alpaca", on_bad_row="skip")
    assert (report.rows_read, report.rows_written, report.pairs, len(report.findings)) == (4, 1, 1, 3)
    with pytest.raises(DataError, match="cannot be converted"):
        convert(source, to, from_layout="ranked", on_bad_row="skip")


def test_a_source_is_never_written_over(tmp_path: Path) -> None:
    source = tmp_path / "pairs.json"
    source.write_text(json.dumps([{"instruction": "?", "chosen": "a", "rejected": "b"}]))
    (tmp_path / "link.json").symlink_to(source)
    for to in (source, tmp_path / "link.json", tmp_path / "." / "pairs.json"):
        with pytest.raises(DataError, match="the source itself"):
            convert(source, to)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs"])
def test_the_suffix_says_what_to_write(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="the suffix says how to write"):
        convert(GOLDEN, tmp_path / name)


def test_a_file_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for suffix in SUFFIXES:
        with pytest.raises(DataError, match="cannot be written"):
            convert(GOLDEN, tmp_path / "file" / f"pairs{suffix}")


def test_an_unknown_layout_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are ranked, alpaca, sharegpt, swift, trl; did you mean `ranked`"):
        convert(GOLDEN, tmp_path / "to.json", to_layout="ranking")


@settings(max_examples=50, deadline=None)
@example("x\ud800")
@given(st.text(st.characters(codec=None), min_size=1))
def test_half_characters_are_findings(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "half.json"
    path.write_text(json.dumps([{"prompt": "?", "chosen": text, "rejected": "\0x"}]))
    result = read_groups(path)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        assert [(finding.kind, finding.key) for finding in result.findings] == [("bad-text", "chosen")]
    else:
        assert all(finding.kind in ("empty-response", "equal-responses") for finding in result.findings)
