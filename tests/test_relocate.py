"""Image paths find their files under another folder; nothing else of a data file changes."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unidpo.data.formats import read_groups, relocate
from unidpo.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tree in which `a.png` lies three times."""
    for name in ("a.png", "set/a.png", "other/set/a.png", "set/deep/b c.png", "漢.png", "back\\slash.png"):
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "new" / name).touch()
    (tmp_path / "outside.png").touch()
    return tmp_path / "new"


def row(*images: Any) -> dict[str, Any]:
    return {"instruction": "<image>" * len(images), "chosen": "a", "rejected": "b", "images": list(images)}


def save(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


def moved(tmp_path: Path, root: Path, *images: Any, **options: Any) -> list[Any]:
    source = save(tmp_path / "pairs.json", [row(*images, "a.png")])  # one that is always found
    relocate(source, root, tmp_path / "moved.json", **options)
    [result] = json.loads((tmp_path / "moved.json").read_text())
    return result["images"][:-1]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/home/someone/images/set/a.png", "new/set/a.png"),
        ("/x/other/set/a.png", "new/other/set/a.png"),
        ("another/set/a.png", "new/set/a.png"),
        ("a.png", "new/a.png"),
        ("./set//deep/b c.png", "new/set/deep/b c.png"),
        ("C:\\data\\set\\deep\\b c.png", "new/set/deep/b c.png"),
        ("\\\\server\\share/set\\a.png", "new/set/a.png"),
        ("old/back\\slash.png", "new/back\\slash.png"),
        ("/漢.png", "new/漢.png"),
        ("../../set/../a.png", "new/a.png"),
    ],
)
def test_the_longest_ending_that_exists_is_taken(tmp_path: Path, root: Path, old: str, new: str) -> None:
    assert moved(tmp_path, root, old) == [new]


@pytest.mark.parametrize(
    "old", ["set/c.png", "../outside.png", "new/../../outside.png", "set", "/", "..", "A.PNG", "\0"]
)
def test_what_is_not_under_the_root_stays_and_is_listed(tmp_path: Path, root: Path, old: str) -> None:
    source = save(tmp_path / "pairs.json", [row("a.png"), row("a.png", old)])
    report = relocate(source, root, tmp_path / "moved.json")
    assert (report.rows, report.found) == (2, 2)
    [finding] = report.not_found
    assert (finding.kind, finding.file, finding.row, finding.key) == ("missing-image", source, 2, "images[1]")
    assert json.loads((tmp_path / "moved.json").read_text())[1]["images"][1] == old


@given(st.lists(st.sampled_from(["..", ".", "", "a.png", "set", "new", "outside.png", "link", "\\"]), max_size=6))
def test_no_path_leads_outside_of_the_root(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    top = tmp_path_factory.getbasetemp() / "safety"
    (top / "new" / "set").mkdir(parents=True, exist_ok=True)
    for name in ("outside.png", "new/a.png", "new/set/a.png"):
        (top / name).touch()
    source = save(top / "pairs.json", [row("a.png", "/".join(parts), "\\".join(parts))])
    report = relocate(source, top / "new", top / "moved.json")
    [result] = json.loads((top / "moved.json").read_text())
    bad = {finding.key for finding in report.not_found}
    for i, path in enumerate(result["images"]):
        if f"images[{i}]" not in bad:
            assert ".." not in Path(path).parts
            assert (top / path).is_file()
            assert (top / path).is_relative_to(top / "new")


@pytest.mark.parametrize(
    ("strip", "old", "new"),
    [
        ("/old", "/old/set/a.png", "new/set/a.png"),
        ("/old/", "/old/set/a.png", "new/set/a.png"),
        ("/old/other", "/old/other/set/a.png", "new/set/a.png"),
        ("C:\\old", "C:\\old\\set\\a.png", "new/set/a.png"),
        ("", "set/a.png", "new/set/a.png"),
        ("/old", "/older/a.png", None),
        ("/old", "/x/set/a.png", None),
        ("/old", "/old/x/a.png", None),
        ("/old", "/old/../outside.png", None),
    ],
)
def test_a_prefix_can_be_forced(tmp_path: Path, root: Path, strip: str, old: str, new: str | None) -> None:
    known = f"{strip.rstrip('/')}/a.png" if strip else "a.png"
    source = save(tmp_path / "pairs.json", [row(known, old)])
    report = relocate(source, root, tmp_path / "moved.json", strip=strip)
    assert json.loads((tmp_path / "moved.json").read_text())[0]["images"] == ["new/a.png", new or old]
    assert len(report.not_found) == (new is None)


def test_paths_are_absolute_where_the_file_lies_elsewhere(tmp_path: Path, root: Path) -> None:
    source = save(tmp_path / "pairs.json", [row("x/set/a.png")])
    relocate(source, root, tmp_path / "else" / "where.json")
    group = read_groups(tmp_path / "else" / "where.json").groups[0]
    assert group.images == (root / "set/a.png",)


def test_linked_folders_are_searched_and_circles_left(tmp_path: Path, root: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "z.png").touch()
    (root / "linked").symlink_to(tmp_path / "store")
    (root / "circle").symlink_to(root)
    (tmp_path / "store" / "back").symlink_to(root)
    assert moved(tmp_path, root, "/x/linked/z.png") == ["new/linked/z.png"]


PARTS = [{"type": "text", "text": "set/a.png"}, {"type": "image", "image": "/old/set/a.png", "more": 1}]


def test_everything_else_stays_as_it_is(tmp_path: Path, root: Path) -> None:
    odd = {
        "zeta": 1,
        "alpha": [None, {"images": ["set/a.png"]}],
        "é": 1e300,
        "big": 12345678901234567890,
        "nan": "\ud800",
    }
    rows = [
        odd | row("/old/set/a.png", {"path": "/old/a.png", "bytes": None}, {"bytes": "AAAA", "path": "a.png"}),
        {"images": "/old/a.png"} | odd,
        {"prompt": [{"role": "user", "content": PARTS}], "image": "https://x.org/a.png", "chosen": "/old/a.png"},
        {"images": ["data:image/png;base64,AAAA"], "prompt": "set/a.png", "rejected": [{"content": "a.png"}]},
        7,
        None,
    ]
    source = save(tmp_path / "pairs.json", rows)
    report = relocate(source, root, tmp_path / "moved.json")
    text = (tmp_path / "moved.json").read_text()
    expected = json.dumps(rows).replace('"/old/set/a.png"', '"new/set/a.png"').replace('"/old/a.png"', '"new/a.png"')
    expected = expected.replace('"chosen": "new/a.png"', '"chosen": "/old/a.png"')
    assert text == expected + "\n"
    assert (report.rows, report.found, report.embedded, report.not_found) == (6, 4, 2, [])


def test_lines_stay_lines(tmp_path: Path, root: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row(name)) + "\n" for name in ("old/a.png", "old/x.png")))
    relocate(source, root, tmp_path / "moved.jsonl")
    assert (tmp_path / "moved.jsonl").read_text() == source.read_text().replace("old/a.png", "new/a.png")


def test_names_of_a_declaration_are_followed(tmp_path: Path, root: Path) -> None:
    source = save(tmp_path / "pairs.json", [{"pictures": ["old/a.png"], "images": ["old/a.png"]}])
    columns = {"prompt": "x", "images": "pictures"}
    save(tmp_path / "dataset_info.json", {"mine": {"file_name": "pairs.json", "columns": columns}})
    relocate(source, root, tmp_path / "moved.json")
    assert json.loads((tmp_path / "moved.json").read_text()) == [{"pictures": ["new/a.png"], "images": ["old/a.png"]}]


def test_a_table_keeps_schema_metadata_and_other_columns(tmp_path: Path, root: Path) -> None:
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = [[{"bytes": None, "path": "/old/a.png"}], [], None, [{"bytes": b"x", "path": "/old/a.png"}]]
    columns = {
        "prompt": pa.array(["a", "b", None, "d"]).dictionary_encode(),
        "images": pa.array(images, pa.list_(image)),
        "when": pa.array([1, 2, None, 2**62], pa.timestamp("ns")),
    }
    table = pa.table(columns).replace_schema_metadata({"huggingface": "{}"})
    pq.write_table(table, tmp_path / "pairs.parquet")
    source = pq.read_table(tmp_path / "pairs.parquet")
    report = relocate(tmp_path / "pairs.parquet", root, tmp_path / "moved.parquet")
    result = pq.read_table(tmp_path / "moved.parquet")
    assert (report.rows, report.found, report.embedded) == (4, 1, 1)
    assert result.schema.equals(source.schema, check_metadata=True)
    assert result.drop(["images"]).equals(source.drop(["images"]))
    images[0][0]["path"] = "new/a.png"  # type: ignore[index]
    assert result["images"].to_pylist() == images


def test_in_place_replaces_the_file(tmp_path: Path, root: Path) -> None:
    source = save(tmp_path / "pairs.json", [row("old/a.png")])
    report = relocate(source, root, in_place=True)
    assert report.to == source
    assert json.loads(source.read_text())[0]["images"] == ["new/a.png"]
    relocate(source, root, in_place=True)
    assert json.loads(source.read_text())[0]["images"] == ["new/a.png"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("pairs.json", [row("a.png")], {}, "give either a new file"),
        ("pairs.json", [row("a.png")], {"to": "moved.json", "in_place": True}, "give either a new file"),
        ("pairs.json", [row("a.png")], {"to": "pairs.json"}, "the file itself"),
        ("pairs.json", [row("a.png")], {"to": "link.json"}, "the file itself"),
        ("pairs.json", [row("a.png")], {"to": "moved.parquet"}, "of the same kind"),
        ("pairs.json", [row("x.png"), row("y.png")], {"to": "moved.json"}, "none of 2 image paths"),
        ("pairs.json", [row("a.png")], {"to": "moved.json", "images_root": "gone"}, "no such image folder"),
        ("gone.json", None, {"to": "moved.json"}, "no such file"),
        ("pairs.json", {"rows": []}, {"to": "moved.json"}, "one JSON object"),
        ("pairs.jsonl", "{", {"to": "moved.jsonl"}, "row 1: the line is not valid JSON"),
        ("pairs.parquet", "PAR1", {"to": "moved.parquet"}, "not a whole Parquet file"),
    ],
)
def test_refusals_leave_everything_as_it_was(
    tmp_path: Path, root: Path, name: str, content: Any, options: dict[str, Any], message: str
) -> None:
    source = tmp_path / name
    if content is not None:
        source.write_text(content if isinstance(content, str) else json.dumps(content))
        (tmp_path / "link.json").symlink_to(source)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    options = {key: tmp_path / value if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(DataError, match=message):
        relocate(source, **{"images_root": root, **options})
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
