"""Published preference data, in rows as its cards describe them: recognised, weighed, counted, converted."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from unidpo.cli import app
from unidpo.data.formats import PUBLISHED, convert, groups_of, read_groups
from unidpo.data.formats.layouts.rated import KNOWN
from unidpo.data.formats.reading import read_rows
from unidpo.data.pairs import IMAGE, PromptGroup
from unidpo.errors import DataError

AXES = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")


def annotated(*ratings: Any) -> dict[str, Any]:
    return {axis: {"Rating": rating, "Rationale": "why"} for axis, rating in zip(AXES, ratings, strict=True)}


VLFEEDBACK = {
    "id": "svit-1",
    "prompt": "What animal is this?",
    "models": ["a", "b", "c", "d"],
    "img_path": "cat.png",
    "completions": {
        "model": ["a", "b", "c", "d"],
        "response": ["A cat on a sofa.", "A cat.", "A dog.", "It is a cat."],
        "annotations": [
            annotated("5", "5", "5"),
            annotated("4", "5", "1"),
            annotated("1", "1", "5"),
            annotated("5", "4", "5"),
        ],
    },
}


def ultra(text: str, overall: float, *ratings: str) -> dict[str, Any]:
    axes = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    rated = {axis: {"Rating": rating, "Rationale": "why"} for axis, rating in zip(axes, ratings, strict=True)}
    return {"model": "m", "response": text, "annotations": rated, "overall_score": overall, "fine-grained_score": 4.0}


ULTRAFEEDBACK = {
    "source": "sharegpt",
    "instruction": "Name a prime number.",
    "models": ["m"] * 4,
    "completions": [
        ultra("11", 8.5, "5", "5", "5", "5"),
        ultra("13", 9.0, "5", "5", "5", "4"),
        ultra("12", 2.0, "1", "1", "1", "1"),
        ultra("Prime?", 3.0, "1", "N/A", "1", "1"),
    ],
    "correct_answers": ["None"],
}


def steer(text: str, *ratings: int, prompt: str = "c#") -> dict[str, Any]:
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": text, **dict(zip(names, ratings, strict=True))}


HELPSTEER2 = [steer("good", 4, 3, 4, 2, 1), steer("bad", 1, 0, 4, 2, 1)]
HELPSTEER3 = {
    "domain": "general",
    "language": "english",
    "context": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "?"},
    ],
    "response1": "first",
    "response2": "second",
    "overall_preference": 2,
    "individual_preference": [{"score": 2, "reasoning": "why", "feedback1": "f", "feedback2": "f"}],
}
RLAIF_V = {
    "ds_name": "RLAIF-V",
    "image": {"bytes": None, "path": "cat.png"},
    "question": "What animal is this?",
    "chosen": "A cat.",
    "rejected": "A dog.",
    "origin_dataset": "coco",
    "origin_split": '{"model": "m", "type": "t"}',
    "idx": 0,
    "image_path": "x.jpg",
}
RLHF_V = {
    "image": {"bytes": None, "path": "cat.png"},
    "text": json.dumps({"question": "What animal is this?", "chosen": "A cat.", "rejected": "A dog."}),
    "origin_dataset": "coco",
    "idx": 1,
}
MMPR = {"image": ["cat.png"], "question": "<image>\nWhat animal is this?", "chosen": "A cat.", "rejected": "A dog."}
LLAVA_RLHF = {
    "id": "1",
    "image": "cat.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": ""}],
    "output_1": {"from": "llm", "value": "A dog."},
    "output_2": {"from": "llm", "value": "A cat."},
    "preference": 2,
}
START = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: A prime?\n\nAssistant: "
HH = {"chosen": f"{START}11", "rejected": f"{START}12"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "VLFeedback": [VLFEEDBACK],
    "UltraFeedback": [ULTRAFEEDBACK],
    "HelpSteer2": HELPSTEER2,
    "HelpSteer3": [HELPSTEER3],
    "RLAIF-V": [RLAIF_V],
    "RLHF-V": [RLHF_V],
    "MMPR": [MMPR],
    "LLaVA-RLHF": [LLAVA_RLHF],
    "hh-rlhf": [HH],
}
SAYS: dict[str, tuple[str, list[tuple[str, float | None]], int]] = {
    "VLFeedback": ("rated", [("A cat on a sofa.", 5), ("A cat.", 4.5), ("A dog.", 1), ("It is a cat.", 4.5)], 5),
    "UltraFeedback": ("rated", [("11", 5), ("13", 4.75), ("12", 1)], 2),
    "HelpSteer2": ("rated", [("good", 3.5), ("bad", 0.5)], 1),
    "HelpSteer3": ("compared", [("second", 2), ("first", 0)], 1),
    "RLAIF-V": ("question", [("A cat.", None), ("A dog.", None)], 1),
    "RLHF-V": ("json", [("A cat.", None), ("A dog.", None)], 1),
    "MMPR": ("question", [("A cat.", None), ("A dog.", None)], 1),
    "LLaVA-RLHF": ("compared", [("A cat.", None), ("A dog.", None)], 1),
    "hh-rlhf": ("dialogue", [("11", None), ("12", None)], 1),
}
"""Layout, answers with scores, and how many pairs: of UltraFeedback one is in conflict with the overall score."""


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    Image.new("RGB", (56, 56), "gray").save(path.with_name("cat.png"))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def said(group: PromptGroup) -> list[tuple[str, float | None]]:
    return [(response.text, response.score) for response in group.responses]


def findings(path: Path) -> list[tuple[str, str | None, str]]:
    return [(finding.kind, finding.key, finding.severity) for finding in read_groups(path).findings]


def unidpo(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.mark.parametrize("name", ROWS)
def test_it_is_recognised_and_read(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "rows.jsonl", ROWS[name])
    layout, answers, pairs = SAYS[name]
    [row] = read_rows(path)
    assert row.layout == layout
    assert not row.is_bad
    assert row.group is not None
    assert said(row.group) == answers
    assert len(row.group.pairs) == pairs
    assert row.group.images == ((tmp_path / "cat.png",) if "cat.png" in path.read_text("utf-8") else ())
    assert sum(part is IMAGE for message in row.group.messages for part in message.content) == len(row.group.images)
    assert groups_of(ROWS[name], name="train_dataset")[0].responses == row.group.responses


def test_every_layout_of_published_data_is_one_of_these() -> None:
    assert {layout for layout, _, _ in SAYS.values()} == set(PUBLISHED)


@pytest.mark.parametrize("name", ROWS)
def test_the_commands_work_on_it(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "rows.jsonl", ROWS[name])
    assert unidpo("check", path).exit_code == 0
    for suffix in (".jsonl", ".parquet"):
        done = unidpo("convert", path, "--to", tmp_path / f"new{suffix}", "--drop-extra")
        assert done.exit_code == 0, done.output
        [old], [new] = read_groups(path).groups, read_groups(tmp_path / f"new{suffix}").groups
        assert (new.messages, new.images, said(new)) == (old.messages, old.images, said(old))
        assert [(pair.chosen, pair.rejected) for pair in new.pairs] == [(p.chosen, p.rejected) for p in old.pairs]
    done = unidpo("check", path, "--fix", tmp_path / "usable.jsonl")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", ["VLFeedback", "UltraFeedback", "HelpSteer2", "RLHF-V"])
def test_what_a_conversion_would_lose_is_named(tmp_path: Path, name: str) -> None:
    rows = ROWS[name]
    if name == "RLHF-V":
        rows = [RLHF_V | {"text": json.dumps(json.loads(str(RLHF_V["text"])) | {"note": "x"})}]
    with pytest.raises(DataError, match="lost") as caught:
        convert(save(tmp_path / "rows.jsonl", rows), tmp_path / "new.jsonl")
    keys = {finding.key for finding in caught.value.findings if finding.kind == "lost-value"}
    assert keys >= {"RLHF-V": {"text.note"}, "HelpSteer2": {"completions.coherence"}}.get(
        name, {"completions.annotations", "completions.model"}
    )


# --- ratings


@pytest.mark.parametrize(
    ("score", "scores"),
    [
        ("helpfulness", [5, 4, 1, 5]),
        ("helpfulness=1,visual_faithfulness=3", [5, 4.75, 1, 4.25]),
        ("ethical_considerations=2,helpfulness=1", [5, 2, 3.666667, 5]),
    ],
)
def test_weights_are_chosen(tmp_path: Path, score: str, scores: list[float]) -> None:
    path = save(tmp_path / "rows.jsonl", [VLFEEDBACK])
    done = unidpo("convert", path, "--to", tmp_path / "new.jsonl", "--drop-extra", "--score", score)
    assert done.exit_code == 0, done.output
    [group] = read_groups(tmp_path / "new.jsonl").groups
    assert [response.score for response in group.responses] == scores


def test_a_grade_may_be_the_score(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.jsonl", [ULTRAFEEDBACK])
    convert(path, tmp_path / "new.jsonl", keep_extra=False, weights={"overall_score": 1.0})
    [group] = read_groups(tmp_path / "new.jsonl").groups
    assert said(group) == [("11", 8.5), ("13", 9.0), ("12", 2.0), ("Prime?", 3.0)]
    assert len(group.pairs) == 6


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"helpfullness": 1.0},
            "no answer has the rating 'helpfullness'; there are 'helpfulness', 'visual_faithfulness'",
        ),
        ({"helpfulness": 0.0}, "the weight of helpfulness is 0; give a number above 0"),
        ({}, "name at least one rating"),
    ],
)
def test_weights_that_make_no_score(tmp_path: Path, weights: dict[str, float], message: str) -> None:
    path = save(tmp_path / "rows.jsonl", [VLFEEDBACK])
    with pytest.raises(DataError) as caught:
        convert(path, tmp_path / "new.jsonl", keep_extra=False, weights=weights)
    assert message in str(caught.value) + "".join(map(str, caught.value.findings))


def test_weights_without_ratings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`--score` weighs ratings, and this row has none"):
        convert(save(tmp_path / "rows.jsonl", [MMPR]), tmp_path / "new.jsonl", weights={"helpfulness": 1.0})


def test_ties_and_conflicts_are_counted(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.jsonl", [VLFEEDBACK, ULTRAFEEDBACK])
    kinds = [(finding.row, finding.kind, finding.key) for finding in read_groups(path).findings]
    assert kinds == [
        (1, "tied-pair", "completions"),
        (2, "missing-rating", "completions[3].honesty"),
        (2, "rating-conflict", "completions"),
    ]
    done = unidpo("convert", path, "--to", tmp_path / "new.jsonl", "--drop-extra")
    for kind in ("tied-pair", "missing-rating", "rating-conflict"):
        assert f"{kind}: 1 left out" in done.output
    assert "tied-pair  1" in unidpo("check", path).output


def rated(*answers: tuple[str, Any]) -> dict[str, Any]:
    items = [{"response": text, "annotations": annotated(rating, rating, "5")} for text, rating in answers]
    return {"prompt": "?", "completions": items}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (rated(("a", "5"), ("b", "5")), [("tied-pair", "completions", "warning"), ("no-pair", "completions", "error")]),
        (rated(("a", "5")), [("too-few-responses", "completions", "error")]),
        (
            rated(("a", "5"), ("b", "1"), ("a", "2")),
            [("duplicate-response", "completions[2]", "warning")],
        ),
        (rated(("a", "5"), ("b", "1"), (" ", "2")), [("bad-response", "completions[2]", "warning")]),
        (
            rated(("a", "5"), ("b", "1"), ("c", "6")),
            [
                ("missing-rating", "completions[2].helpfulness", "warning"),
                ("missing-rating", "completions[2].visual_faithfulness", "warning"),
            ],
        ),
        (
            {"prompt": "?", "completions": {"response": ["a", "b"], "annotations": [annotated("1", "1", "1")]}},
            [("misaligned-rating", "completions", "error")],
        ),
        (
            {"prompt": "?", "completions": [{"response": "a", "charm": 1}, {"response": "b", "charm": 2}]},
            [("missing-rating", "completions", "error")],
        ),
        (VLFEEDBACK | {"prompt": None}, [("missing-key", "prompt", "error")]),
    ],
)
def test_odd_ratings(tmp_path: Path, row: dict[str, Any], expected: list[tuple[str, str | None, str]]) -> None:
    found = findings(save(tmp_path / "rows.jsonl", [row]))
    assert [each for each in found if each[0] != "tied-pair" or expected[0][0] == "tied-pair"] == expected


def test_answers_of_one_prompt_are_joined(tmp_path: Path) -> None:
    """HelpSteer2 has a row for each answer; its conversations stand in one string."""
    talk = "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nA prime?"
    rows = [*HELPSTEER2, steer("11", 4, 4, 4, 4, 4, prompt=talk), steer("12", 0, 0, 4, 4, 4, prompt=talk)]
    read = read_groups(save(tmp_path / "rows.jsonl", [*rows, steer("alone", 1, 1, 1, 1, 1, prompt="other")]))
    assert [group.pairs[0].row for group in read.groups] == [1, 3]
    assert [(m.role, m.text) for m in read.groups[1].messages] == [
        ("user", "Hi"),
        ("assistant", "Yes?"),
        ("user", "A prime?"),
    ]
    assert [(finding.row, finding.kind) for finding in read.findings] == [(5, "too-few-responses")]
    assert groups_of(datasets.Dataset.from_list(rows), name="train") == groups_of(rows, name="train")


# --- pairs


@pytest.mark.parametrize(
    ("value", "scores"), [(-3, ["first", "second"]), (-1, ["first", "second"]), (1, ["second", "first"])]
)
def test_the_sign_of_a_preference(tmp_path: Path, value: int, scores: list[str]) -> None:
    [group] = read_groups(save(tmp_path / "rows.jsonl", [HELPSTEER3 | {"overall_preference": value}])).groups
    assert said(group) == list(zip(scores, [abs(value), 0.0], strict=True))
    assert [message.text for message in group.messages] == ["Hi", "Yes?", "?"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (HELPSTEER3 | {"overall_preference": 0}, ("no-pair", "overall_preference", "error")),
        (HELPSTEER3 | {"overall_preference": 4}, ("bad-preference", "overall_preference", "error")),
        (HELPSTEER3 | {"response1": ""}, ("empty-response", "response1", "error")),
        (LLAVA_RLHF | {"preference": 0}, ("bad-preference", "preference", "error")),
        (LLAVA_RLHF | {"output_2": {"from": "llm", "value": " "}}, ("empty-response", "output_2", "error")),
        (RLAIF_V | {"question": " "}, None),
        (RLAIF_V | {"chosen": " "}, ("empty-response", "chosen", "error")),
        (MMPR | {"image": []}, ("image-marks", "question", "error")),
        (RLHF_V | {"text": '{"question": "?", "rejected": '}, ("broken-json", "text", "error")),
        (
            RLHF_V | {"text": '{"question": "?", "rejected": "a", "rejected": "b"}'},
            ("repeated-key", "text.rejected", "error"),
        ),
        (RLHF_V | {"text": '{"question": "?", "rejected": "b"}'}, ("missing-key", "text.chosen", "error")),
        (HH | {"rejected": "\n\nHuman: Else?\n\nAssistant: 12"}, ("different-prompts", "rejected", "error")),
        (HH | {"rejected": START}, ("empty-response", "rejected", "error")),
    ],
)  # fmt: skip
def test_odd_pairs(tmp_path: Path, row: dict[str, Any], expected: tuple[str, str, str] | None) -> None:
    assert findings(save(tmp_path / "rows.jsonl", [row])) == ([expected] if expected else [])


def test_a_conversation_in_a_list_of_its_own(tmp_path: Path) -> None:
    row = LLAVA_RLHF | {"conversations": [LLAVA_RLHF["conversations"]], "preference": 1}
    [group] = read_groups(save(tmp_path / "rows.jsonl", [row])).groups
    assert [response.text for response in group.responses] == ["A dog.", "A cat."]
    assert [message.text for message in group.messages] == ["<image>\nWhat is this?"]


def test_images_of_vlfeedback_are_moved(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.jsonl", [VLFEEDBACK | {"img_path": "/elsewhere/images/cat.png"}])
    done = unidpo("relocate", path, "--images", tmp_path, "--to", tmp_path / "moved.jsonl")
    assert done.exit_code == 0, done.output
    assert read_groups(tmp_path / "moved.jsonl").groups[0].images == (tmp_path / "cat.png",)


def test_the_page_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example of the page is read, and every data command on it works, on rows of the hub's schemas."""
    monkeypatch.chdir(tmp_path)
    hub = {"MMInstruction/VLFeedback": "VLFeedback", "openbmb/RLAIF-V-Dataset": "RLAIF-V"}
    hub |= {"openbmb/UltraFeedback": "UltraFeedback", "nvidia/HelpSteer2": "HelpSteer2"}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, config: {"train": datasets.Dataset.from_list(ROWS[hub[name]])}
    )
    page = (Path(__file__).parent.parent / "docs" / "datasets.md").read_text("utf-8")
    Path("vlfeedback").mkdir()
    for image in ("cat.jpg", "cat.png", "vlfeedback/cat.png"):
        Image.new("RGB", (56, 56), "gray").save(image)
    layouts = set()
    for name, text in re.findall(r"`([\w-]+\.jsonl)`[^\n]*:\n\n```jsonl\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        Path(name).write_text(text, "utf-8")
        rows = list(read_rows(name))
        assert not any(row.findings for row in rows)
        layouts |= {row.layout for row in rows}
    assert layouts == set(PUBLISHED)
    commands = [shlex.split(line) for line in re.findall(r"^unidpo data (.*)$", page, re.MULTILINE)]
    assert len(commands) == 7
    for words in commands:
        done = unidpo(*words)
        assert done.exit_code == 0, (words, done.output)
    assert [response.score for response in read_groups("faithful.jsonl").groups[0].responses] == [5, 4.75, 1]
    axes = dict(re.findall(r"^\| (\w+) \| (`.*?`) \| `", page, re.MULTILINE))
    assert axes == {name: ", ".join(f"`{axis}`" for axis in known.names) for name, known in KNOWN.items()}
