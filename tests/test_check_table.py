"""One file of 2,000 rows with every kind of bad row among them: all are found, and nothing else is touched."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from unidpo.cli import app
from unidpo.data.check import CheckReport, check_data, write_usable
from unidpo.errors import DataError

ROWS = 2000
FIRST, APART = 17, 25  # the n-th bad row is row 17 + 25 n

USER = {"role": "user", "content": "Which?"}
ANSWER = {"role": "assistant", "content": "this"}
SCORES = {"score_chosen": 4, "score_rejected": 1}


def good(n: int) -> dict[str, Any]:
    """A good row in one of four layouts; no two are alike."""
    scores = {"score_chosen": 3 + n % 3, "score_rejected": 1 + n % 2}
    pair = {"chosen": f"yes {n}", "rejected": f"no {n}", **scores}
    match n % 4:
        case 0:
            return {"instruction": f"<image>Is it {n}?", **pair, "images": [f"{n % 10}.png"]}
        case 1:
            return {"prompt": [{"role": "user", "content": f"Is it {n}?"}], **pair}
        case 2:
            responses = [{"text": f"{word} {n}", "score": score} for score, word in enumerate("abc", start=1)]
            return {"prompt": f"Is it {n}?", "responses": responses}
        case _:
            return {"instruction": "Is it?", "input": str(n), "system": "Be brief.", "history": [["a", "b"]], **pair}


def alpaca(**columns: Any) -> dict[str, Any]:
    return {"instruction": "Which?", "chosen": "yes", "rejected": "no", **SCORES, **columns}


def seen(name: Any) -> dict[str, Any]:
    return alpaca(instruction="<image>Which?", images=[name])


def trl(**columns: Any) -> dict[str, Any]:
    return {"prompt": "Which?", "chosen": "yes", "rejected": "no", **SCORES, **columns}


def ranked(*responses: Any, **columns: Any) -> dict[str, Any]:
    return {"prompt": "Which?", "responses": list(responses), **columns}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in alpaca().items() if name != key}


def answer(text: Any, score: Any = 1) -> dict[str, Any]:
    return {"text": text, "score": score}


BAD: list[tuple[Any, str, str | None, str]] = [
    # row (bytes stand in the file as they are), kind, key, part of the reason
    (b'{"instruction": "cut off', "broken-json", None, "not valid JSON"),
    (b"just words", "broken-json", None, "not valid JSON"),
    (b'{"instruction": "Which?", "chosen": "caf\xe9"}', "wrong-encoding", None, "not UTF-8"),
    ([1, 2], "wrong-type", None, "a list"),
    ("text", "wrong-type", None, "a string"),
    (None, "wrong-type", None, "null"),
    (7, "wrong-type", None, "a number"),
    ({}, "unknown-layout", None, "no known layout"),
    ({"question": "Which?", "answer": "this"}, "unknown-layout", None, "'question'"),
    (alpaca(instruction=None), "missing-key", "instruction", "missing or null"),
    (without("chosen"), "missing-key", "chosen", "missing or null"),
    (without("rejected"), "missing-key", "rejected", "missing or null"),
    (alpaca(instruction=5), "wrong-type", "instruction", "a number"),
    (alpaca(chosen=5), "wrong-type", "chosen", "a number"),
    (alpaca(rejected={"text": "no"}), "wrong-type", "rejected", "an object"),
    (alpaca(instruction=" \n"), "empty-prompt", "instruction", "empty"),
    (alpaca(chosen=""), "empty-response", "chosen", "empty"),
    (alpaca(rejected="  \n\t"), "empty-response", "rejected", "empty"),
    (alpaca(rejected="yes"), "equal-responses", "rejected", "same text"),
    (alpaca(chosen="\ud83d"), "bad-text", "chosen", "surrogate"),
    (alpaca(instruction="\udc00?"), "bad-text", "instruction", "surrogate"),
    (alpaca(system=["x"]), "wrong-type", "system", "a list"),
    (alpaca(input=3.5), "wrong-type", "input", "a number"),
    (alpaca(history="before"), "wrong-type", "history", "a list of turns"),
    (alpaca(history=[["only one"]]), "wrong-type", "history[0]", "[user, assistant]"),
    (alpaca(history=[["a", "b"], ["c", None]]), "missing-key", "history[1][1]", "null"),
    # scores
    (without("score_chosen"), "missing-score", "score_chosen", "no score"),
    (without("score_rejected"), "missing-score", "score_rejected", "no score"),
    (alpaca(score_chosen="4"), "bad-score", "score_chosen", "without quotes"),
    (alpaca(score_rejected="N/A"), "bad-score", "score_rejected", "without quotes"),
    (alpaca(score_chosen=math.nan), "bad-score", "score_chosen", "nan"),
    (alpaca(score_chosen=math.inf), "bad-score", "score_chosen", "inf"),
    (alpaca(score_rejected=-math.inf), "bad-score", "score_rejected", "-inf"),
    (alpaca(score_chosen=10**400), "bad-score", "score_chosen", "no score"),
    (alpaca(score_chosen=1e300), "bad-score", "score_chosen", "1e+300"),
    (alpaca(score_chosen=True), "bad-score", "score_chosen", "a finite number"),
    (alpaca(score_chosen=[4]), "bad-score", "score_chosen", "a finite number"),
    (alpaca(score_rejected={"value": 1}), "bad-score", "score_rejected", "a finite number"),
    # images and their marks
    (alpaca(instruction="<image>Which?"), "image-marks", "instruction", "marks in the prompt: 1, images in the row: 0"),
    (alpaca(images=["1.png"]), "image-marks", "instruction", "marks in the prompt: 0, images in the row: 1"),
    (alpaca(instruction="<image><image>?", images=["1.png"]), "image-marks", "instruction", "make them equal"),
    (trl(prompt="<image>?", images=["1.png", "2.png"]), "image-marks", "prompt", "marks in the prompt: 1"),
    (seen(5), "wrong-type", "images[0]", "an image is a path"),
    (seen(None), "wrong-type", "images[0]", "an image is a path"),
    (seen(" "), "wrong-type", "images[0]", "an image is a path"),
    (seen({"bytes": "?!"}), "broken-image", "images[0]", "base64"),
    (seen({"bytes": "bm8gaW1hZ2U="}), "broken-image", "images[0]", "no image that can be read"),
    (seen("https://example.org/a.png"), "remote-image", "images[0]", "not fetched"),
    (alpaca(instruction="<image>?", images=["1.png"], image="1.png"), "wrong-type", "image", "keep one"),
    (seen("gone.png"), "missing-image", "images[0]", "gone.png"),
    (seen("1.png/below.png"), "missing-image", "images[0]", "there is no file"),
    (seen("folder.png"), "broken-image", "images[0]", "a folder"),
    (seen("empty.png"), "broken-image", "images[0]", "no image that can be read"),
    (seen("page.png"), "broken-image", "images[0]", "no image that can be read"),
    (seen("cut.png"), "broken-image", "images[0]", "cannot be decoded"),
    (seen("cut.jpg"), "broken-image", "images[0]", "cannot be decoded"),
    (seen("bomb.png"), "broken-image", "images[0]", "too large to be safe"),
    (seen("thread.png"), "extreme-aspect", "images[0]", "200 times"),
    (alpaca(instruction="<image><image>?", images=["1.png", "gone.png"]), "missing-image", "images[1]", "gone.png"),
    # messages
    (trl(prompt=[]), "empty-prompt", "prompt", "no message"),
    (trl(prompt=["Which?"]), "wrong-type", "prompt[0]", "`role` and `content`"),
    (trl(prompt=[{"role": "human", "content": "?"}]), "bad-role", "prompt[0].role", "'human'"),
    (trl(prompt=[USER, ANSWER]), "bad-role", "prompt", "ends with a message of the user"),
    (trl(prompt=[{"role": "user", "content": [{"type": "video"}]}]), "wrong-type", "prompt[0].content[0]", "a part is"),
    (trl(prompt=[{"role": "user"}]), "missing-key", "prompt[0].content", "null"),
    (trl(chosen=[ANSWER, ANSWER]), "wrong-type", "chosen", "one assistant message"),
    (trl(chosen=[USER], rejected=[ANSWER]), "wrong-type", "chosen", "one assistant message"),
    (trl(prompt=None), "missing-key", "prompt", "null"),
    # ranked responses
    (ranked(), "too-few-responses", "responses", "two or more"),
    (ranked(answer("a")), "too-few-responses", "responses", "two or more"),
    ({"prompt": "?", "responses": "a"}, "too-few-responses", "responses", "two or more"),
    (ranked(answer("a"), "b"), "wrong-type", "responses[1]", "a string"),
    (ranked(answer("a"), answer("b", None)), "missing-score", "responses[1].score", "missing"),
    (ranked(answer("a"), answer("b", "2")), "bad-score", "responses[1].score", "without quotes"),
    (ranked(answer("a"), answer("", 2)), "empty-response", "responses[1].text", "empty"),
    (ranked(answer("a"), answer(None, 2)), "missing-key", "responses[1].text", "null"),
    (ranked(answer("a", 3), answer("b", 3)), "no-pair", "responses", "all scores are equal"),
]


def save(image: Image.Image, path: Path, part: float = 1.0) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if path.suffix == ".jpg" else "PNG")
    data = buffer.getvalue()
    path.write_bytes(data[: int(part * len(data))])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    noise = Image.effect_noise((64, 64), 80).convert("RGB")
    for n in range(10):
        save(noise.rotate(9 * n), folder / f"{n}.png")
    save(noise, folder / "cut.png", part=0.5)
    save(noise, folder / "cut.jpg", part=0.5)
    save(Image.new("1", (10_000, 9_000)), folder / "bomb.png")  # 1.4 kB of file, 90 million pixels
    save(Image.new("RGB", (8000, 30)), folder / "thread.png")
    (folder / "empty.png").touch()
    (folder / "page.png").write_text("<html>404 Not Found</html>")
    (folder / "folder.png").mkdir()
    lines = [json.dumps(good(n)).encode() for n in range(1, ROWS + 1)]
    for n, (row, *_) in enumerate(BAD):
        lines[bad_row(n) - 1] = row if isinstance(row, bytes) else json.dumps(row).encode()
    (folder / "pairs.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "pairs.jsonl"


def bad_row(n: int) -> int:
    return FIRST + APART * n


@pytest.fixture(scope="module")
def report(data: Path) -> CheckReport:
    return check_data(data, require_scores=True)


def test_the_table_is_long_enough_and_fits() -> None:
    assert len(BAD) >= 60
    assert bad_row(len(BAD)) <= ROWS
    assert len({repr(row) for row, *_ in BAD}) == len(BAD)


@pytest.mark.parametrize("n", range(len(BAD)), ids=lambda n: f"{BAD[n][1]} {BAD[n][2]} {n}")
def test_each_bad_row_is_named_with_its_reason(report: CheckReport, data: Path, n: int) -> None:
    _, kind, key, reason = BAD[n]
    found = [finding for finding in report.errors if finding.row == bad_row(n)]
    assert [(finding.kind, finding.key) for finding in found] == [(kind, key)]
    assert reason in found[0].message
    assert found[0].file == data


def test_no_good_row_is_touched(report: CheckReport) -> None:
    bad = {bad_row(n) for n in range(len(BAD))}
    assert {finding.row for finding in report.findings} == bad
    assert not report.ok
    assert (report.rows, report.usable_rows) == (ROWS, ROWS - len(BAD))
    assert [group.pairs[0].row for group in report.groups] == [n for n in range(1, ROWS + 1) if n not in bad]


@pytest.mark.parametrize("name", ["fixed.jsonl", "fixed.json"])
def test_what_is_left_is_written_untouched_and_checks_clean(report: CheckReport, data: Path, name: str) -> None:
    before = data.read_bytes()
    target = data.with_name(name)
    assert write_usable(report, target) == ROWS - len(BAD)
    bad = {bad_row(n) for n in range(len(BAD))}
    text = target.read_text(encoding="utf-8")
    rows = json.loads(text) if name.endswith(".json") else list(map(json.loads, text.splitlines()))
    assert rows == [good(n) for n in range(1, ROWS + 1) if n not in bad]
    again = check_data(target, require_scores=True)
    assert (again.findings, again.usable_rows) == ([], ROWS - len(BAD))
    assert data.read_bytes() == before
    target.unlink()
    assert not [path for path in data.parent.iterdir() if path.name.startswith(".")]


def test_the_report_survives_its_own_data(report: CheckReport) -> None:
    text = json.dumps(report.to_json(), allow_nan=False)
    assert len(json.loads(text)["findings"]) == len(BAD)


def test_the_command_exits_with_2_and_what_it_fixes_trains(data: Path, golden: Path, tmp_path: Path) -> None:
    fixed = data.with_name("fixed-by-command.jsonl")
    checked = CliRunner().invoke(app, ["data", "check", str(data), "--fix", str(fixed)])
    assert checked.exit_code == 2
    assert f"{ROWS - len(BAD)} usable rows written" in checked.output

    recipe = tmp_path / "recipe.yaml"
    keys = {
        "output": str(tmp_path / "run"),
        "model": {"name": str(golden / "model"), "dtype": "float32"},
        "data": {"path": str(data)},
        "loss": {"name": "simpo"},  # no reference pass over two thousand rows
        "train": {"max_steps": 1, "save_strategy": "no"},
    }
    recipe.write_text(json.dumps(keys), encoding="utf-8")  # JSON is YAML
    refused = CliRunner().invoke(app, ["train", str(recipe)])
    assert isinstance(refused.exception, DataError)
    trained = CliRunner().invoke(app, ["train", str(recipe), f"data.path={fixed}"])
    fixed.unlink()
    assert trained.exit_code == 0, trained.output
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
