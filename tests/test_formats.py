"""Every kind of file and every declaration of columns the readers take; mixtures; the held-out split."""

import base64
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unidpo.data.formats import Source, load_pairs, mix, read_groups, split_by_prompt
from unidpo.data.pairs import IMAGE, Message, Pair, PromptGroup, Response
from unidpo.errors import DataError, Finding

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001"
    "a5f645400000000049454e44ae426082"
)
TURNS = [{"from": "human", "value": "<image>Which?"}]
SHAREGPT = {
    "conversations": TURNS,
    "chosen": {"from": "gpt", "value": "good"},
    "rejected": {"from": "gpt", "value": "bad"},
    "images": ["a.png"],
}
SEED = {"instruction": "Which?", "chosen": "good", "rejected": "bad"}


def save(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


def read_one(path: Path) -> PromptGroup:
    read = read_groups(path)
    assert not read.findings
    [group] = read.groups
    return group


def findings(path: Path) -> list[tuple[str, int | None, str | None]]:
    return [(finding.kind, finding.row, finding.key) for finding in read_groups(path).findings]


# --- sharegpt


def test_sharegpt_as_llama_factory_writes_it(tmp_path: Path) -> None:
    row = SHAREGPT | {
        "system": "Be <image>.",
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello"},
            {"from": "human", "value": "<image>Which?"},
        ],
        "score_chosen": 4,
        "score_rejected": 1.5,
    }
    group = read_one(save(tmp_path / "pairs.json", [row]))
    assert group.messages == (
        Message("system", ("Be <image>.",)),
        Message("user", ("Hi",)),
        Message("assistant", ("Hello",)),
        Message("user", (IMAGE, "Which?")),
    )
    assert group.images == (tmp_path / "a.png",)
    assert group.responses == (Response("good", 4.0), Response("bad", 1.5))


def test_a_system_turn_is_the_system_message(tmp_path: Path) -> None:
    row = SHAREGPT | {"conversations": [{"from": "system", "value": "Be brief."}, *TURNS]}
    assert read_one(save(tmp_path / "pairs.json", [row])).messages[0] == Message("system", ("Be brief.",))


def test_turns_of_tools_become_plain_ones_with_a_warning(tmp_path: Path) -> None:
    row = SHAREGPT | {
        "conversations": [*TURNS, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": "7"}]
    }
    read = read_groups(save(tmp_path / "pairs.json", [row]))
    assert [message.role for message in read.groups[0].messages] == ["user", "assistant", "user"]
    assert [(f.kind, f.key, f.severity) for f in read.findings] == [
        ("tool-turn", "conversations[1]", "warning"),
        ("tool-turn", "conversations[2]", "warning"),
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"conversations": "x"}, [("wrong-type", "conversations")]),
        ({"conversations": []}, [("empty-prompt", "conversations")]),
        ({"conversations": [None]}, [("wrong-type", "conversations[0]")]),
        ({"conversations": [{"from": 1, "value": "x"}]}, [("wrong-type", "conversations[0]")]),
        ({"conversations": [{"from": "human"}]}, [("missing-key", "conversations[0].value")]),
        ({"conversations": [{"from": "bot", "value": "x"}, *TURNS]}, [("bad-role", "conversations[0]")]),
        ({"conversations": [*TURNS, {"from": "gpt", "value": "x"}]}, [("bad-role", "conversations")]),
        (
            {"conversations": [{"from": "system", "value": "a"}, *TURNS], "system": "b"},
            [("bad-role", "conversations[0]")],
        ),
        ({"chosen": {"from": "human", "value": "x"}}, [("bad-role", "chosen")]),
        ({"chosen": {"from": "gpt", "value": ""}}, [("empty-response", "chosen")]),
        ({"chosen": {"value": "x"}}, [("wrong-type", "chosen")]),
        ({"rejected": None}, [("missing-key", "rejected")]),
        ({"images": []}, [("image-marks", "conversations")]),
        ({"videos": ["a.mp4"]}, [("unsupported", "videos")]),
    ],
)
def test_bad_sharegpt_rows(tmp_path: Path, change: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    path = save(tmp_path / "pairs.json", [SHAREGPT | change])
    assert findings(path) == [(kind, 1, key) for kind, key in expected]


# --- dataset_info.json


def declare(folder: Path, **entries: Any) -> None:
    (folder / "dataset_info.json").write_text(json.dumps(entries))


def test_alpaca_columns_by_other_names(tmp_path: Path) -> None:
    names = {"prompt": "question", "query": "more", "system": "sys", "history": "before", "chosen": "yes"}
    names |= {"rejected": "no", "images": "pictures", "score_chosen": "yes_score", "score_rejected": "no_score"}
    row = {"question": "<image>Which", "more": "one?", "sys": "Be brief.", "before": [["Hi", "Hello"]], "yes": "good"}
    row |= {"no": "bad", "pictures": ["a.png"], "yes_score": 5, "no_score": 2, "instruction": "something else"}
    path = save(tmp_path / "mine.json", [row, row | {"yes": "", "no_score": "x"}])
    declare(
        tmp_path, other={"file_name": "other.json"}, mine={"file_name": "mine.json", "ranking": True, "columns": names}
    )
    read = read_groups(path)
    assert [message.text for message in read.groups[0].messages] == ["Be brief.", "Hi", "Hello", "<image>Which\none?"]
    assert read.groups[0].responses == (Response("good", 5.0), Response("bad", 2.0))
    assert [(f.row, f.kind, f.key) for f in read.findings] == [
        (2, "empty-response", "yes"),
        (2, "bad-score", "no_score"),
    ]


def test_sharegpt_columns_and_tags_by_other_names(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "sys", "content": "Be brief."}, {"role": "user", "content": "Which?"}],
        "yes": {"role": "assistant", "content": "good"},
        "no": {"role": "assistant", "content": "bad"},
        "good": 3,
        "bad": 1,
    }
    path = save(tmp_path / "mine.json", [row])
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {
        "messages": "messages",
        "chosen": "yes",
        "rejected": "no",
        "score_chosen": "good",
        "score_rejected": "bad",
    }
    entry = {"file_name": "mine.json", "formatting": "sharegpt", "ranking": True, "columns": columns}
    declare(tmp_path, mine=entry | {"tags": tags | {"system_tag": "sys"}})
    group = read_one(path)
    assert [(m.role, m.text) for m in group.messages] == [("system", "Be brief."), ("user", "Which?")]
    assert group.responses == (Response("good", 3.0), Response("bad", 1.0))


def test_an_unmapped_column_keeps_its_name(tmp_path: Path) -> None:
    row = {"question": "<image>?", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}
    path = save(tmp_path / "mine.json", [row | {"images": ["a.png"]}])
    declare(tmp_path, mine={"file_name": "mine.json", "ranking": True, "columns": {"prompt": "question"}})
    group = read_one(path)
    assert (group.responses[0].score, len(group.images)) == (2.0, 1)


@pytest.mark.parametrize(
    "info",
    [
        [],
        {"features": {"a": 1}, "builder_name": "json"},
        {"other": {"file_name": "other.json", "columns": {"prompt": "x"}}},
        {"mine": {"file_name": "mine.json"}},
        {"mine": {"file_name": "mine.json", "ranking": True, "columns": {"prompt": "not in the rows"}}},
        {
            "mine": {"file_name": "mine.json", "columns": {"prompt": "x"}},
            "pref": {"file_name": "mine.json", "ranking": True},
        },
    ],
)
def test_a_declaration_about_something_else_changes_nothing(tmp_path: Path, info: Any) -> None:
    path = save(tmp_path / "mine.json", [SEED])
    save(tmp_path / "dataset_info.json", info)
    assert read_one(path).messages == (Message("user", ("Which?",)),)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"formatting": "chatml"}, "`formatting` is one of alpaca, sharegpt, openai, not 'chatml'"),
        ({"columns": {"choosen": "a"}}, "no column 'choosen'; there are .* did you mean `chosen`"),
        ({"columns": ["a"]}, "`columns` maps names to names"),
        ({"columns": {"chosen": 7}}, "`columns` maps names to names"),
        ({"tags": {"user": "x"}}, "no tag 'user'"),
    ],
)
def test_a_wrong_declaration_is_named(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    path = save(tmp_path / "mine.json", [SEED])
    declare(tmp_path, mine={"file_name": "mine.json", **entry})
    with pytest.raises(DataError, match=message) as caught:
        read_groups(path)
    assert "dataset_info.json, `mine`" in str(caught.value)


def test_two_declarations_that_differ_are_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "mine.json", [SEED])
    declare(tmp_path, **{name: {"file_name": "mine.json", "columns": {"prompt": name}} for name in ("a", "b")})
    with pytest.raises(DataError, match="'a', 'b' name the columns"):
        read_groups(path)


def test_a_broken_declaration_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="not readable as JSON"):
        read_groups(save(tmp_path / "mine.json", [SEED]))


# --- Parquet


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    table = pa.table(columns) if schema is None else pa.table(columns, schema=schema)
    pq.write_table(table, path, row_group_size=2)
    return path


def test_a_table_of_several_layouts(tmp_path: Path) -> None:
    ranked = {"prompt": "Which?", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 3.5}]}
    trl = {"prompt": "What?", "chosen": "good", "rejected": "bad", "score_chosen": 4.5, "score_rejected": 2.0}
    rows = [ranked, trl, SEED, trl | {"prompt": None}]
    read = read_groups(write_table(tmp_path / "pairs.parquet", rows))
    assert [[m.text for m in group.messages] for group in read.groups] == [["Which?"], ["What?"], ["Which?"]]
    assert [group.pairs for group in read.groups] == [(Pair(1, 0, 1),), (Pair(0, 1, 2),), (Pair(0, 1, 3),)]
    assert {finding.row for finding in read.errors} == {4}


def test_messages_in_a_table(tmp_path: Path) -> None:
    """Arrow gives every part every key, null where it has none."""
    part = {"type": "text", "text": "Which?", "image": None}
    image = {"type": "image", "text": None, "image": "a.png"}
    row = {"prompt": [{"role": "user", "content": [image, part]}], "chosen": "a", "rejected": "b"}
    group = read_one(write_table(tmp_path / "pairs.parquet", [row]))
    assert group.messages == (Message("user", (IMAGE, "Which?")),)
    assert group.images == (tmp_path / "a.png",)


@pytest.mark.parametrize("image", [PNG, {"bytes": PNG, "path": "a.png"}])
def test_images_in_a_table_are_bytes(tmp_path: Path, image: Any) -> None:
    rows = [SEED | {"instruction": "<image>", "images": [image]}, SEED | {"instruction": "<image>?", "images": [image]}]
    read = read_groups(write_table(tmp_path / "pairs.parquet", rows))
    assert [group.images for group in read.groups] == [(PNG,), (PNG,)]
    assert read.groups[0].images[0] is read.groups[1].images[0]


def test_a_row_that_is_no_text_is_one_finding(tmp_path: Path) -> None:
    texts = pa.array([b"Which?", b"\xff", b"What?"]).view(pa.string())
    table = pa.table({"prompt": texts, "chosen": ["a"] * 3, "rejected": ["b"] * 3})
    pq.write_table(table, tmp_path / "pairs.parquet")
    read = read_groups(tmp_path / "pairs.parquet")
    assert [group.pairs[0].row for group in read.groups] == [1, 3]
    assert [(finding.kind, finding.row) for finding in read.findings] == [("wrong-encoding", 2)]


# --- images inside messages and as text


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image", "image": {"bytes": base64.b64encode(PNG).decode()}}, PNG),
        ({"type": "image", "image": f"data:image/png;base64,{base64.b64encode(PNG).decode()}"}, PNG),
        ({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(PNG).decode()}"}}, PNG),
    ],
)
def test_an_image_inside_a_message(tmp_path: Path, part: dict[str, Any], source: Any) -> None:
    row = {
        "prompt": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}],
        "chosen": "a",
        "rejected": "b",
    }
    group = read_one(save(tmp_path / "pairs.json", [row]))
    assert group.images == ((tmp_path / source) if isinstance(source, str) else source,)
    assert group.messages == (Message("user", (IMAGE, "?")),)


@pytest.mark.parametrize(
    ("parts", "kind", "key"),
    [
        ([{"type": "image", "url": "https://example.org/a.png"}], "remote-image", "prompt[0].content[0].url"),
        ([{"type": "image", "image": "a.png"}, {"type": "image"}], "image-marks", "prompt"),
        ([{"type": "image", "image": 7}], "wrong-type", "prompt[0].content[0].image"),
        ([{"type": "image", "image": "data:image/png;base64,?"}], "broken-image", "prompt[0].content[0].image"),
    ],
)
def test_bad_images_inside_a_message(tmp_path: Path, parts: Any, kind: str, key: str) -> None:
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": "a", "rejected": "b"}
    assert findings(save(tmp_path / "pairs.json", [row])) == [(kind, 1, key)]


# --- explicit pairs of ranked responses


def test_ranked_responses_may_name_their_pairs(tmp_path: Path) -> None:
    items = [{"text": "a"}, {"text": "b", "score": 2}, {"text": "c", "score": 1}, {"text": "d"}]
    row = {"prompt": "?", "responses": items, "pairs": [[0, 3], [2, 1]]}
    read = read_groups(save(tmp_path / "pairs.json", [row]))
    assert [(pair.chosen, pair.rejected) for pair in read.groups[0].pairs] == [(0, 3), (2, 1)]
    assert [(finding.kind, finding.key) for finding in read.findings] == [("reversed-scores", "pairs[1]")]


@pytest.mark.parametrize(
    ("pairs", "kind", "key"),
    [
        ([[0, 2]], "bad-pair", "pairs[0]"),
        ([[0, 0]], "bad-pair", "pairs[0]"),
        ([[0, -1]], "bad-pair", "pairs[0]"),
        ([[0, True]], "bad-pair", "pairs[0]"),
        ([0, 1], "bad-pair", "pairs[0]"),
        ("x", "bad-pair", "pairs[0]"),
        ([[0, 1]], "missing-score", "pairs[0]"),
        ([], "no-pair", "responses"),
    ],
)
def test_bad_pairs_of_ranked_responses(tmp_path: Path, pairs: Any, kind: str, key: str) -> None:
    row = {"prompt": "?", "responses": [{"text": "a", "score": 1}, {"text": "b"}], "pairs": pairs}
    assert findings(save(tmp_path / "pairs.json", [row]))[0] == (kind, 1, key)


# --- folders and the hub


def hub_rows() -> dict[str, Any]:
    return {
        "prompt": ["Which?", "What?"],
        "chosen": ["good", "right"],
        "rejected": ["bad", "wrong"],
        "score_chosen": [4.0, 3.0],
        "score_rejected": [1.0, 2.0],
        "images": [[{"bytes": PNG, "path": None}], []],
    }


def dataset() -> datasets.Dataset:
    features = datasets.Features(
        dict.fromkeys(["prompt", "chosen", "rejected"], datasets.Value("string"))
        | dict.fromkeys(["score_chosen", "score_rejected"], datasets.Value("float64"))
        | {"images": datasets.List(datasets.Image())}
    )
    return datasets.Dataset.from_dict(hub_rows(), features=features)


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    match request.param:
        case "saved":
            dataset().save_to_disk(tmp_path / "data")
        case "saved splits":
            datasets.DatasetDict({"train": dataset(), "test": dataset().select([1])}).save_to_disk(tmp_path / "data")
        case "parquet":
            (tmp_path / "data").mkdir()
            dataset().to_parquet(tmp_path / "data" / "train.parquet")
            dataset().select([1]).to_parquet(tmp_path / "data" / "test.parquet")
    return tmp_path / "data"


@pytest.mark.parametrize("folder", ["saved", "saved splits", "parquet"], indirect=True)
def test_a_folder_of_datasets_is_read_where_it_lies(folder: Path) -> None:
    read = read_groups(folder)
    assert not read.findings
    assert [[m.text for m in group.messages] for group in read.groups] == [["<image>Which?"], ["What?"]]
    assert read.groups[0].images == (PNG,)
    assert read.groups[1].responses == (Response("right", 3.0), Response("wrong", 2.0))


@pytest.mark.parametrize("folder", ["saved splits", "parquet"], indirect=True)
def test_a_split_is_named_behind_an_at_sign(folder: Path) -> None:
    assert read_groups(f"{folder}@test").rows == 1
    assert read_groups(f"{folder}@train").rows == 2
    with pytest.raises(DataError, match="no split 'valid'; add @SPLIT with one of: train, test"):
        read_groups(f"{folder}@valid")


@pytest.mark.parametrize("folder", ["parquet"], indirect=True)
def test_a_configuration_is_named_behind_a_colon(folder: Path) -> None:
    (folder / "one").mkdir()
    dataset().select([0]).to_parquet(folder / "one" / "test.parquet")
    configs = (
        "configs:\n- config_name: first\n  data_files: one/*.parquet\n- config_name: all\n  data_files: '*.parquet'\n"
    )
    (folder / "README.md").write_text(f"---\n{configs}---\n")
    assert read_groups(f"{folder}:first").rows == 1
    assert read_groups(f"{folder}:all@train").rows == 3
    with pytest.raises(DataError, match="BuilderConfig"):
        read_groups(f"{folder}:none")


def test_a_name_of_the_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder here, nor a data set of the hub"):
        read_groups("nobody/nothing@train")


def test_a_name_of_the_hub_is_loaded_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(name: str, config: str | None) -> datasets.DatasetDict:
        asked.append((name, config))
        return datasets.DatasetDict({"test": dataset()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [group.images for group in read_groups("some-one/pairs_1.0:first@test").groups] == [(PNG,), ()]
    assert read_groups("some-one/pairs_1.0").rows == 2
    assert asked == [("some-one/pairs_1.0", "first"), ("some-one/pairs_1.0", None)]


@pytest.mark.parametrize("name", ["x" * 5000, "x/" + "y" * 5000 + ".json", "\0", "a/b/c", "a@b@c"])
def test_what_is_no_name_of_anything(name: str) -> None:
    with pytest.raises(DataError):
        read_groups(name)


def test_what_looks_like_a_file_never_asks_the_hub() -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_groups("data/pairs.json")


# --- mixtures


def group(text: str, *, image: Path | None = None, row: int = 1) -> PromptGroup:
    content = (text,) if image is None else (IMAGE, text)
    images = () if image is None else (image,)
    return PromptGroup((Message("user", content),), images, (Response("a", 2), Response("b", 1)), (Pair(0, 1, row),))


@given(st.integers(0, 30), st.floats(0.01, 5), st.integers(0, 3))
def test_a_weight_is_how_often_a_group_is_met(count: int, weight: float, seed: int) -> None:
    groups = [group(str(i)) for i in range(count)]
    mixed = mix([(groups, weight)], seed=seed)
    assert len(mixed) == round(weight * count)
    times = [sum(g is other for other in mixed) for g in groups]
    assert not times or max(times) - min(times) <= 1
    assert mixed == mix([(groups, weight), ([], 7)], seed=seed)


def test_a_seed_chooses_which_groups_are_met() -> None:
    groups = [group(str(i)) for i in range(40)]
    half = [tuple(g.messages for g in mix([(groups, 0.5)], seed=seed)) for seed in (0, 0, 1)]
    assert half[0] == half[1] != half[2]


def test_sources_keep_their_files_rows_and_image_folders(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    one = save(tmp_path / "one.json", [SEED, SEED | {"chosen": ""}])
    two = save(tmp_path / "two.json", [SEED | {"instruction": "<image>", "images": ["a.png"]}, SEED | {"rejected": 7}])
    sources = [one, Source(two, weight=2, images=tmp_path / "images")]
    with pytest.raises(DataError) as caught:
        load_pairs(sources)
    assert [(finding.file, finding.row) for finding in caught.value.findings] == [(one, 2), (two, 2)]
    assert f"{one}, {two}: 2 of 4 rows cannot be used" in str(caught.value)
    groups = load_pairs(sources, on_bad_row="skip")
    assert [(g.pairs[0].file, g.pairs[0].row) for g in groups] == [(one, 1), (two, 1), (two, 1)]
    assert groups[1].images == (tmp_path / "images" / "a.png",)


def test_pairs_joined_over_files_keep_their_files(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, [SEED | {"rejected": name}]) for name in ("one.json", "two.json")]
    [joined] = load_pairs(paths, group_by_prompt=True)
    assert [pair.file for pair in joined.pairs] == paths
    assert [pair.file for pair in joined.keep_pairs(joined.pairs[1:]).pairs] == paths[1:]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_is_a_positive_number(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        Source("a.json", weight=weight)


# --- held out


@given(
    st.lists(st.integers(0, 30), max_size=60), st.floats(0, 0.99), st.integers(0, 3), st.randoms(use_true_random=False)
)
def test_no_prompt_is_on_both_sides(prompts: list[int], fraction: float, seed: int, random: Any) -> None:
    groups = [group(str(prompt), row=row) for row, prompt in enumerate(prompts)]
    train, held_out = split_by_prompt(groups, fraction, seed)
    keys = [{g.prompt_key() for g in side} for side in (train, held_out)]
    assert not keys[0] & keys[1]
    assert len(keys[1]) == round(fraction * len(set(prompts)))
    rows = [[g.pairs[0].row for g in side] for side in (train, held_out)]
    assert sorted(rows[0] + rows[1]) == list(range(len(prompts)))
    assert rows[0] == sorted(rows[0])
    random.shuffle(groups)
    assert {g.prompt_key() for g in split_by_prompt(groups, fraction, seed)[1]} == keys[1]


def test_the_split_does_not_depend_on_where_images_lie() -> None:
    sides = []
    for folder in ("here", "over/there"):
        groups = [group("What is it?", image=Path(folder) / f"{i}.png", row=i) for i in range(40)]
        sides.append([g.pairs[0].row for g in split_by_prompt(groups, 0.25, 0)[1]])
    assert sides[0] == sides[1]
    assert len(sides[0]) == 10


def test_prompts_that_differ_only_in_folder_or_mark_are_told_apart() -> None:
    groups = [group("?", image=Path(folder) / "a.png") for folder in ("x", "y")] + [group("<image>?")]
    train, held_out = split_by_prompt(groups, 0.34, 0)
    assert (len(train), len(held_out)) == (2, 1)


def test_another_seed_holds_out_others() -> None:
    groups = [group(str(i)) for i in range(40)]
    assert split_by_prompt(groups, 0.5, 0) != split_by_prompt(groups, 0.5, 1)
    assert split_by_prompt(groups, 0, 0) == (groups, [])


@pytest.mark.parametrize("fraction", [-0.1, 1, float("nan")])
def test_a_fraction_is_below_one(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        split_by_prompt([], fraction, 0)


def test_a_line_in_another_encoding_is_one_finding(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(SEED).encode() + b'\n{"prompt": "caf\xe9"}\n' + json.dumps(SEED).encode())
    read = read_groups(path)
    assert [group.pairs[0].row for group in read.groups] == [1, 3]
    [finding] = read.findings
    assert isinstance(finding, Finding)
    assert (finding.kind, finding.row, finding.file) == ("wrong-encoding", 2, path)
    path.write_bytes("[]".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        read_groups(path)
