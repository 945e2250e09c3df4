"""Data as users of ms-swift and LLaMA-Factory have it: their layouts, and data sets by the names they gave them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unidpo.config import load_recipe
from unidpo.data.formats import convert, load_pairs, read_groups
from unidpo.data.pairs import IMAGE, Message, Response
from unidpo.errors import DataError, UserError

ASK = {"role": "user", "content": "<image>Which animal?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("A cat.", "A dog."))
SWIFT = {"messages": [ASK, GOOD], "rejected_response": "A dog.", "images": ["cat.png"]}


def save(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), "utf-8")
    return path


def findings(path: Path) -> list[tuple[str, str | None, str]]:
    return [(finding.kind, finding.key, finding.severity) for finding in read_groups(path).findings]


# --- ms-swift


@pytest.mark.parametrize(
    ("change", "scores"),
    [
        ({}, (None, None)),
        ({"rejected_response": None, "rejected_messages": [ASK, BAD]}, (None, None)),
        ({"margin": 1.5}, (1.5, 0.0)),
        ({"margin": 1.5, "score_chosen": 4.5, "score_rejected": 3}, (4.5, 3.0)),
        ({"margin": 0.1, "score_chosen": 4.3, "score_rejected": 4.2}, (4.3, 4.2)),
    ],
)
def test_rows_of_ms_swift(tmp_path: Path, change: dict[str, Any], scores: tuple[float | None, ...]) -> None:
    path = save(tmp_path / "swift.json", [SWIFT | change])
    read = read_groups(path)
    assert read.findings == []
    [group] = read.groups
    assert group.messages == (Message("user", (IMAGE, "Which animal?")),)
    assert group.images == (tmp_path / "cat.png",)
    assert group.responses == (Response("A cat.", scores[0]), Response("A dog.", scores[1]))


def test_a_conversation_of_ms_swift(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, GOOD]
    row = {
        "messages": [*turns, {"role": "user", "content": "And?"}, BAD],
        "rejected_response": "x",
        "images": ["a.png"],
    }
    [group] = read_groups(save(tmp_path / "swift.json", [row])).groups
    assert [message.role for message in group.messages] == ["system", "user", "assistant", "user"]
    assert group.messages[1].text == "<image>Hi"  # without a mark, images come before the first question


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"messages": []}, [("wrong-type", "messages", "error")]),
        ({"messages": [ASK]}, [("empty-prompt", "messages", "error"), ("wrong-type", "messages[-1]", "error")]),
        ({"rejected_response": ""}, [("empty-response", "rejected_response", "error")]),
        ({"rejected_messages": [ASK, BAD]}, [("wrong-type", "rejected_messages", "error")]),
        (
            {"rejected_response": None, "rejected_messages": [{"role": "user", "content": "?"}, BAD]},
            [("different-prompts", "rejected_messages", "error")],
        ),
        ({"rejected_images": ["other.png"]}, [("unsupported", "rejected_images", "error")]),
        ({"margin": "1"}, [("bad-score", "margin", "error")]),
        ({"margin": -1}, [("reversed-scores", "margin", "warning")]),
        ({"margin": 2, "score_chosen": 4, "score_rejected": 3}, [("other-margin", "margin", "warning")]),
        ({"videos": ["a.mp4"]}, [("unsupported", "videos", "error")]),
    ],
)
def test_bad_rows_of_ms_swift(
    tmp_path: Path, change: dict[str, Any], expected: list[tuple[str, str | None, str]]
) -> None:
    assert findings(save(tmp_path / "swift.json", [SWIFT | change])) == expected


def test_ms_swift_gets_scores_with_their_margin(tmp_path: Path) -> None:
    row = {"prompt": "?", "chosen": "a", "rejected": "b", "score_chosen": 4.5, "score_rejected": 3.0}
    convert(save(tmp_path / "trl.json", [row]), tmp_path / "swift.jsonl", to_layout="swift")
    assert json.loads((tmp_path / "swift.jsonl").read_text("utf-8")) == {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}],
        "rejected_response": "b",
        "score_chosen": 4.5,
        "score_rejected": 3.0,
        "margin": 1.5,
    }


# --- LLaMA-Factory: `formatting: openai`

OPENAI = {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which?"}],
    "chosen": {"role": "assistant", "content": "good"},
    "rejected": {"role": "assistant", "content": "bad"},
}
DECLARED = {"file_name": "shop.json", "formatting": "openai", "ranking": True}


@pytest.mark.parametrize(
    "tags", [{}, {"tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "system_tag": "system"}}]
)
def test_openai_formatting(tmp_path: Path, tags: dict[str, Any]) -> None:
    save(tmp_path / "dataset_info.json", {"shop": DECLARED | {"columns": {"messages": "messages"}} | tags})
    [group] = read_groups(save(tmp_path / "shop.json", [OPENAI])).groups
    assert [(message.role, message.text) for message in group.messages] == [("system", "Be brief."), ("user", "Which?")]
    assert group.responses == (Response("good"), Response("bad"))


# --- LLaMA-Factory: data sets by name

ROW = {"question": "<image>?", "chosen": "a", "rejected": "b", "images": ["a.png"]}
ENTRY = {"ranking": True, "columns": {"prompt": "question"}}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """LLaMA-Factory's folder `data`: a file, a folder of files, and data without preferences."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "data" / "sub" / "one.json", [ROW, ROW | {"chosen": "c"}])
    save(tmp_path / "data" / "parts" / "b.json", [ROW | {"chosen": "third"}])
    (tmp_path / "data" / "parts" / "a.jsonl").write_text(f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n")
    entries = {"one": ENTRY | {"file_name": "sub/one.json"}, "parts": ENTRY | {"file_name": "parts"}}
    save(tmp_path / "data" / "dataset_info.json", {**entries, "sft": {"file_name": "sft.json"}})
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("path", "answers"),
    [
        ("one", ["a", "c"]),
        ("data:one", ["a", "c"]),
        ("data:parts", ["a", "a", "third"]),
        ("data/parts", ["a", "a", "third"]),
    ],
)
def test_a_data_set_by_its_name(data: Path, path: str, answers: list[str]) -> None:
    read = read_groups(path)
    assert read.findings == []
    assert [group.responses[0].text for group in read.groups] == answers
    assert [group.pairs[0].row for group in read.groups] == list(range(1, len(answers) + 1))
    assert {image for group in read.groups for image in group.images} == {Path("data/a.png")}


def test_a_recipe_takes_the_name(data: Path) -> None:
    recipe = Path(__file__).parent.parent / "recipes" / "tiny.yaml"
    changes = ["loss={name: dpo}", f"model.name={recipe.parent.parent / 'tests' / 'golden' / 'model'}"]
    for path in ("one", "data:parts", "data/parts"):
        [source] = load_recipe(recipe, [*changes, f"data.path={path}"], look=True).data.sources
        assert load_pairs(source.path)
    with pytest.raises(UserError, match="there is no such file: 'two'"):
        load_pairs("two")


def test_a_folder_that_declares_one_data_set(data: Path) -> None:
    entries = json.loads((data / "dataset_info.json").read_text("utf-8"))
    with pytest.raises(DataError, match=r"declares several data sets; give one of them, such as data:one \(there are"):
        read_groups("data")
    save(data / "dataset_info.json", {name: entries[name] for name in ("one", "sft")})
    assert len(read_groups("data").groups) == 2


def test_a_declared_hub_data_set(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    table = datasets.DatasetDict({"test": datasets.Dataset.from_list([{**ROW, "images": [], "question": "?"}])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or table)
    save(data / "dataset_info.json", {"far": ENTRY | {"hf_hub_url": "a/b", "subset": "en", "split": "test"}})
    assert [group.responses[0].text for group in read_groups("data").groups] == ["a"]
    assert asked == [("a/b", "en")]


@pytest.mark.parametrize(
    ("path", "entry", "message"),
    [
        ("data:on", None, r"data/dataset_info.json: there is no data set 'on'; .* did you mean `one`"),
        ("data:x", {"script_url": "x.py"}, "`x`: neither `file_name` nor `hf_hub_url` is given"),
        ("data:x", {"file_name": "nowhere.json"}, r"data/nowhere.json: there is no such file"),
        ("data:x", {"file_name": "empty"}, "data/empty: the folder holds no data file"),
        ("data:x", {"file_name": "parts", "formatting": "x"}, "`x`: `formatting` is one of alpaca, sharegpt, openai"),
    ],
)
def test_names_that_lead_nowhere(data: Path, path: str, entry: Any, message: str) -> None:
    (data / "empty").mkdir()
    if entry is not None:
        save(data / "dataset_info.json", {"x": entry})
    with pytest.raises(DataError, match=message):
        read_groups(path)


def test_what_is_read_by_name_is_not_written_over(data: Path) -> None:
    with pytest.raises(DataError, match="this is the source itself"):
        convert("data:one", data / "sub" / "one.json")


def test_a_folder_that_datasets_saved_declares_nothing(tmp_path: Path) -> None:
    import datasets

    row = {"prompt": "?", "chosen": "a", "rejected": "b"}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "saved")
    assert len(read_groups(tmp_path / "saved").groups) == 1
