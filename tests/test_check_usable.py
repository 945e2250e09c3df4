"""The usable rows of a data set, written to a file of their own."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unidpo.data.check import check_data, write_usable
from unidpo.errors import DataError


def row(n: int, **columns: Any) -> dict[str, Any]:
    return {
        "instruction": f"{n}?",
        "chosen": "yes",
        "rejected": "no",
        "score_chosen": 4,
        "score_rejected": 1,
        **columns,
    }


def save(folder: Path, rows: list[Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder / "pairs.json"


@pytest.fixture
def pictured(tmp_path: Path) -> Path:
    """A file with one good and one bad row, both with an image beside the file."""
    path = save(tmp_path / "data", [row(1, instruction="<image>?", images=["a.png"]), row(2, images=["a.png"])])
    Image.new("RGB", (40, 40)).save(tmp_path / "data" / "a.png")
    return path


def test_columns_nobody_reads_stay(tmp_path: Path) -> None:
    rows = [
        row(1, id="\ud800", note={"a": [1, None, 1e-7, 10**30]}, chosen="ja – \u2028 漢字"),
        row(2, chosen=""),
        row(3, extra=float("inf")),
    ]
    report = check_data(save(tmp_path, rows))
    for name in ("fixed.json", "fixed.jsonl"):
        assert write_usable(report, tmp_path / name) == 2
        text = (tmp_path / name).read_text(encoding="utf-8")
        read = json.loads(text) if name == "fixed.json" else [json.loads(line) for line in text.split("\n") if line]
        assert read == [rows[0], rows[2]]


@pytest.mark.parametrize("spelling", ["pairs.json", "../data/pairs.json", "link.json"])
def test_never_over_the_input(pictured: Path, spelling: str) -> None:
    (pictured.parent / "link.json").symlink_to(pictured)
    before = pictured.read_bytes()
    with pytest.raises(DataError, match="the checked file itself"):
        write_usable(check_data(pictured), pictured.parent / spelling)
    assert pictured.read_bytes() == before


def test_relative_image_paths_must_lead_to_the_same_files(pictured: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "fixed.json"
    target.write_text("kept")
    with pytest.raises(DataError, match=r"relative image paths would lead elsewhere; write it to the folder of"):
        write_usable(check_data(pictured), target)
    assert target.read_text() == "kept"
    assert list(target.parent.iterdir()) == [target]
    report = check_data(pictured, images=pictured.parent)
    assert write_usable(report, target) == 1
    assert check_data(target, images=pictured.parent).findings == []
    assert write_usable(check_data(pictured), pictured.with_name("fixed.json")) == 1


def test_a_relative_spelling_of_the_same_folder_will_do(pictured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pictured.parent.parent)
    assert write_usable(check_data("data/pairs.json"), pictured.with_name("fixed.json")) == 1


def test_a_file_that_changed_since_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, [row(1), row(2)])
    report = check_data(path)
    save(tmp_path, [row(1), row(3)])
    with pytest.raises(DataError, match="may have changed since the check"):
        write_usable(report, tmp_path / "fixed.json")
    assert not (tmp_path / "fixed.json").exists()


@pytest.mark.parametrize(
    ("rows", "name", "problem"),
    [
        ([row(1, chosen="")], "fixed.json", "nothing to write"),
        ([row(1)], "fixed.csv", r"name the file \.json or \.jsonl"),
        ([row(1)], "pairs.json/fixed.json", "cannot be written"),
    ],
)
def test_what_cannot_be_written_says_why(tmp_path: Path, rows: list[Any], name: str, problem: str) -> None:
    report = check_data(save(tmp_path, rows))
    with pytest.raises(DataError, match=problem):
        write_usable(report, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.json"]
