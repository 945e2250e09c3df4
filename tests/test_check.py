"""The data check: what it finds, counts and prints."""

import io
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from unidpo.data.check import CheckReport, check_data
from unidpo.data.images import inspect_image
from unidpo.errors import DataError, Finding

GOLDEN = Path(__file__).parent / "golden" / "data" / "golden48.json"


def row(instruction: str = "Which?", **columns: Any) -> dict[str, Any]:
    marks = "<image>" * len(columns.get("images", []))
    pair = {"chosen": "good", "rejected": "bad", "score_chosen": 4.5, "score_rejected": 2}
    return {"instruction": marks + instruction, **pair, **columns}


def save(folder: Path, rows: list[Any]) -> Path:
    path = folder / "pairs.json"
    path.write_text(json.dumps(rows))
    return path


def printed(report: CheckReport, width: int = 100) -> str:
    buffer = io.StringIO()
    report.render(Console(file=buffer, width=width))
    return buffer.getvalue()


def found(report: CheckReport) -> list[tuple[str, int | None, str | None]]:
    return [(finding.kind, finding.row, finding.key) for finding in report.findings]


def test_golden_data_is_usable_and_described() -> None:
    report = check_data(GOLDEN, require_scores=True)
    rows = json.loads(GOLDEN.read_text())
    assert (report.rows, report.usable_rows, report.pairs, report.scored_pairs, report.images) == (48,) * 5
    assert report.ok
    assert [finding.row for finding in report.warnings] == [4, 6, 19, 21, 26, 32, 38, 45]
    assert report.verdict == "Ready: 48 of 48 rows are usable, 8 of them with a warning."
    margins = sorted(row["score_chosen"] - row["score_rejected"] for row in rows)
    assert report.score_margin is not None
    assert (report.score_margin.minimum, report.score_margin.maximum) == (margins[0], margins[-1])
    assert report.score_margin.median == pytest.approx(statistics.median(margins))
    deciles = statistics.quantiles(margins, n=10, method="inclusive")
    assert report.score_margin.decile == pytest.approx(deciles[0])
    assert report.score_margin.ninth_decile == pytest.approx(deciles[-1])
    assert report.chosen_score_median == statistics.median(row["score_chosen"] for row in rows)


def test_bad_images_are_found_in_every_row_that_uses_them(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [["good.png"], ["gone.png"], ["good.png", "broken.png"], [], ["gone.png", "broken.png"]]
    rows = [row(images=names) for names in images]
    rows.append(row(chosen="", images=["gone.png"]))
    report = check_data(save(tmp_path, rows))
    assert found(report) == [
        ("missing-image", 2, "images[0]"),
        ("broken-image", 3, "images[1]"),
        ("missing-image", 5, "images[0]"),
        ("broken-image", 5, "images[1]"),
        ("empty-response", 6, "chosen"),
        ("missing-image", 6, "images[0]"),
    ]
    assert str(tmp_path / "gone.png") in report.findings[0].message
    assert {finding.file for finding in report.findings} == {tmp_path / "pairs.json"}
    assert (report.rows, report.usable_rows, report.pairs, report.images) == (6, 2, 2, 1)
    assert report.verdict.startswith("Not ready: 2 of 6 rows are usable.")
    unseen = check_data(save(tmp_path, rows), scan_images=False)
    assert found(unseen) == [("empty-response", 6, "chosen")]


def test_each_image_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    seen: list[Any] = []
    monkeypatch.setattr(
        "unidpo.data.check.inspect_image",
        lambda source, **limits: seen.append(source) or inspect_image(source, **limits),
    )
    progress: list[tuple[str, int, int]] = []
    rows = [row(images=["a.png", "b.png"]), row(images=["b.png"]), row(images=["a.png"])]
    check_data(save(tmp_path, rows), on_progress=lambda *step: progress.append(step))
    assert sorted(seen) == [tmp_path / "a.png", tmp_path / "b.png"]
    assert progress == [("images", 1, 2), ("images", 2, 2), ("rows", 3, 3)]


def test_images_are_looked_for_under_the_root(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "root" / "a.png")
    path = save(tmp_path, [row(images=["a.png"])])
    assert check_data(path, images=tmp_path / "root").errors == []
    assert found(check_data(path)) == [("missing-image", 1, "images[0]")]


def test_prompts_pairs_and_images_are_counted_apart(tmp_path: Path) -> None:
    responses = [{"text": text, "score": score} for text, score in (("a", 1), ("bb", 2), ("ccc", 4))]
    rows = [
        {"prompt": "What?", "responses": responses},
        row("What?", chosen="dddd", score_chosen=None, score_rejected=None),
        row("Which?", images=["a.png", "a.png"]),
    ]
    report = check_data(save(tmp_path, rows), scan_images=False)
    assert (report.rows, report.pairs, report.scored_pairs, report.prompts, report.images) == (3, 5, 4, 2, 1)
    assert report.pairs_per_prompt is not None
    assert (report.pairs_per_prompt.minimum, report.pairs_per_prompt.maximum) == (1, 4)
    assert report.images_per_prompt is not None
    assert (report.images_per_prompt.minimum, report.images_per_prompt.median, report.images_per_prompt.maximum) == (
        0,
        1,
        2,
    )
    assert report.response_characters is not None
    assert (report.response_characters.minimum, report.response_characters.maximum) == (1, 4)
    assert report.chosen_score_median == 4  # of 2, 4, 4 and 4.5


def test_scores_can_be_required(tmp_path: Path) -> None:
    path = save(tmp_path, [row(score_chosen=None, score_rejected=None)])
    unscored = check_data(path)
    assert (unscored.errors, unscored.score_margin, unscored.chosen_score_median) == ([], None, None)
    required = check_data(path, require_scores=True)
    assert found(required) == [("missing-score", 1, "score_chosen")]
    assert required.verdict.startswith("Not usable: 0 of 1 rows")


def test_further_checks_see_usable_rows_and_can_spoil_them(tmp_path: Path) -> None:
    rows = [row("long" * 50), row(chosen=""), row("short"), row("a" * 30)]
    seen = []

    def too_long(group: Any) -> list[Finding]:
        seen.append(group.pairs[0].row)
        length = len(group.messages[0].text)
        severity = "error" if length > 100 else "warning"
        return [Finding("prompt-too-long", f"{length} characters", severity=severity)] if length > 20 else []

    path = save(tmp_path, rows)
    report = check_data(path, extra=[too_long])
    assert seen == [1, 3, 4]
    assert found(report) == [
        ("prompt-too-long", 1, None),
        ("empty-response", 2, "chosen"),
        ("prompt-too-long", 4, None),
    ]
    assert report.findings[0].file == path
    assert not report.ok
    assert report.usable_rows == 2
    assert report.pairs == 2


def test_a_file_that_cannot_be_read_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        check_data(tmp_path / "gone.json")


def test_the_printed_report_groups_and_shortens(tmp_path: Path) -> None:
    rows = [row(chosen="") for _ in range(1234)] + [row(score_chosen=1)]
    text = printed(check_data(save(tmp_path, rows)))
    assert "error empty-response  1,234" in text
    assert "row 3, `chosen`: the response is empty" in text
    assert "row 4," not in text
    assert "... and 1,231 more" in text
    assert "warning reversed-scores  1" in text
    assert text.rstrip().splitlines()[-1].startswith("Not ready: 1 of 1,235 rows are usable.")


def test_what_the_data_says_is_printed_as_it_is(tmp_path: Path) -> None:
    rows = [row(images=["[red]a[/red].png"]), row(score_chosen="[/bold]\x1b[31m\ud800"), {"[bold]": 1}]
    folder = tmp_path / "[blink]"
    folder.mkdir()
    text = printed(check_data(save(folder, rows)), width=400)
    assert "[blink]/[red]a[/red].png'" in text
    assert r"'[/bold]\x1b[31m\ud800' is no score" in text
    assert "the keys ['[bold]'] are of no known layout" in text
    assert f"{folder}/pairs.json\n" in text
    assert "\x1b" not in text


def test_the_json_report_is_complete_and_strict(tmp_path: Path) -> None:
    rows = [row(chosen="") for _ in range(30)] + [row(score_chosen=float("nan")), row(score_chosen=3, score_rejected=3)]
    report = check_data(save(tmp_path, rows))
    read_back = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert (read_back["errors"], read_back["warnings"], read_back["rows"], read_back["usable_rows"]) == (31, 1, 32, 1)
    assert [finding["row"] for finding in read_back["findings"]] == list(range(1, 33))
    assert read_back["findings"][0] == {
        "kind": "empty-response",
        "message": report.findings[0].message,
        "file": str(tmp_path / "pairs.json"),
        "row": 1,
        "key": "chosen",
        "severity": "error",
    }
    assert read_back["score_margin"]["median"] == 0
    assert read_back["verdict"] == report.verdict


def test_checking_needs_no_torch() -> None:
    code = "import sys, unidpo.data.check; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
