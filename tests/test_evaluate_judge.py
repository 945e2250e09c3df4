"""A judge reads what no rule could match: who is asked, how often, what is kept, and what happens where it fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chat_stub import Stub, stubbed
from exams import Oracle, run_eval, write
from unidpo.errors import UserError
from unidpo.evaluate.judge import KEY, PROMPT_VERSION, meant, read_judge
from unidpo.evaluate.own import load_benchmark
from unidpo.evaluate.results import BenchmarkResult, Counts
from unidpo.evaluate.running import evaluate
from worlds import GOLDEN

OPTIONS = {"A": "red", "B": "blue"}
CHOICES = [{"question": f"Which, {i}?", **OPTIONS, "answer": "B"} for i in range(1, 6)]
SAID = {"1": "B", "2": "the one like the sky", "3": "the one like blood", "4": "I cannot see it", "5": ""}
"""A rule makes out the first; a judge can read the next three; nothing was said to the last."""
REPLIES = {"sky": "B", "blood": "`a.`", "cannot": "none"}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.delenv(KEY, raising=False)
    with stubbed() as made:
        made.answer = lambda text: next((reply for word, reply in REPLIES.items() if word in text), "what?")
        yield made


def run(stub: Stub, out: Path, path: Path, said: dict[str, str], model: str = "m") -> BenchmarkResult:
    judge = read_judge(f"{stub.address}+{model}")
    return evaluate(Oracle(said), [load_benchmark(path)], out, judge=judge).benchmarks[0]


def counts(result: BenchmarkResult) -> Counts:
    assert result.counts is not None
    return result.counts


def test_only_answers_that_no_rule_matches_are_judged(stub: Stub, tmp_path: Path) -> None:
    path = write(tmp_path, CHOICES, type="mcq")
    alone = evaluate(Oracle(SAID), [load_benchmark(path)], tmp_path / "alone").benchmarks[0]
    assert (alone.value, counts(alone).unmatched, alone.identity["judge"]) == (20, 4, "none")
    result = run(stub, tmp_path / "out", path, SAID)
    assert (result.value, counts(result).unmatched, counts(result).judged) == (40, 2, 3)
    assert result.identity["judge"] == {"model": "m", "prompt": PROMPT_VERSION}
    assert len(stub.requests) == 3
    for request in stub.requests:
        assert (request["model"], request["temperature"]) == ("m", 0)
    [asked] = [text for text in stub.texts() if "sky" in text]
    assert "B: blue" in asked
    assert "Which, 2?" in asked


def test_nobody_is_asked_twice_unless_the_answer_or_the_judge_is_another(stub: Stub, tmp_path: Path) -> None:
    path, out = write(tmp_path, CHOICES, type="mcq"), tmp_path / "out"
    before = run(stub, out, path, SAID)
    kept = out / "mine" / "judge.jsonl"
    kept.write_bytes(kept.read_bytes()[:-5])  # killed while it was written
    again = run(stub, out, path, SAID)
    assert len(stub.requests) == 4
    assert (again.value, counts(again).judged, counts(again).generated) == (before.value, 3, 0)
    stub.answer = lambda text: "A"
    other = run(stub, out, path, SAID, model="another")
    assert (other.value, len(stub.requests)) == (20, 7)
    assert run(stub, out, path, SAID).value == before.value
    assert len(stub.requests) == 7


def test_yes_and_no_are_judged_and_free_answers_are_not(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda text: "Yes." if "certainly" in text else "none"
    rows = [{"question": "Is it?", "answer": answer} for answer in ("yes", "no")]
    path = write(tmp_path / "a", rows, type="yesno")
    assert run(stub, tmp_path / "out", path, {"1": "certainly", "2": "perhaps"}).value == 50
    assert len(stub.requests) == 2
    path = write(tmp_path / "b", [{"question": "?", "answer": "x"}] * 2, type="vqa")
    assert counts(run(stub, tmp_path / "free", path, {"1": "", "2": "y"})).judged == 0
    assert len(stub.requests) == 2


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("B", "B"),
        ("**b**", "B"),
        ("It means blue, so\n\n(B).\n", "B"),
        ("none", "none"),
        ("C", "none"),
        ("A or B", "none"),
        ("", "none"),
    ],
)
def test_a_reply_is_a_choice_or_nothing(reply: str, said: str) -> None:
    assert meant(reply, OPTIONS) == said


def test_a_busy_judge_is_asked_again_and_a_refusal_is_not(stub: Stub, tmp_path: Path) -> None:
    path = write(tmp_path, CHOICES[:2], type="mcq")
    stub.codes = [429, 503]
    result = run(stub, tmp_path / "out", path, SAID)
    assert (result.value, counts(result).not_judged, len(stub.requests)) == (100, 0, 3)
    stub.codes = [400]
    result = run(stub, tmp_path / "other", path, SAID)
    assert (result.value, counts(result).not_judged, counts(result).unmatched, len(stub.requests)) == (50, 1, 1, 4)
    assert not (tmp_path / "other" / "mine" / "judge.jsonl").exists()


def test_a_judge_that_is_gone_is_left_alone_after_a_few_failures(stub: Stub, tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": f"{i}?", **OPTIONS, "answer": "B"} for i in range(200)], type="mcq")
    stub.codes = [500] * 10_000
    result = run(stub, tmp_path / "out", path, {str(i + 1): f"hm {i}" for i in range(200)})
    assert (counts(result).not_judged, counts(result).judged) == (200, 0)
    assert len(stub.requests) < 150, "four tries each would be 800"
    assert "could not be asked about 200 answers" in (tmp_path / "out" / "results.md").read_text()


def test_the_command_says_that_the_judge_failed_and_the_key_stays_secret(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "sk-very-secret"
    monkeypatch.setenv(KEY, f"{key}\n")
    rows = [{"question": "Which?", **OPTIONS, "answer": "B"}]
    path = write(tmp_path, rows, type="mcq", max_new_tokens=2)
    words = [GOLDEN / "model", "--benchmarks", path, "--out", tmp_path / "out", "--judge", f"{stub.address}+m"]
    stub.codes, stub.refusal = [401], f"wrong key: {key}"
    result = run_eval(*words)
    assert result.exit_code == 1, (result.output, result.exception)
    assert "wrong key: ***" in result.output
    assert stub.headers[-1]["Authorization"] == f"Bearer {key}"
    again = run_eval(*words)
    assert again.exit_code == 0, "the same command asks again"
    told = result.output + again.output + "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert key not in told


def test_what_is_meant_for_another_server_is_not_sent(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of the protocol reads these by itself."""
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "theirs")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Tenant: theirs\nAuthorization: theirs")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://theirs")
    judge = read_judge(f"{stub.address}+m")
    assert judge is not None
    judge.rule("hello")
    judge.server.models()
    assert len(stub.headers) == 2
    assert "theirs" not in str(stub.headers)


@pytest.mark.parametrize(
    "word",
    [
        "yes",
        "http://localhost",
        "localhost:1+m",
        "http://x:port+m",
        "http://user:pw@x+m",
        "user:pw@x:port+m",
        "http://x/v1?key=pw+m",
    ],
)
def test_a_judge_that_cannot_be_is_wrong_input(word: str) -> None:
    with pytest.raises(UserError, match="--judge") as raised:
        read_judge(word)
    assert "pw" not in str(raised.value)


def test_an_address_with_a_path_is_taken_as_it_is() -> None:
    judges = [read_judge(f"https://host{path}+org/model+2") for path in ("", "/", "/v1", "/api/v1beta/")]
    found: list[Any] = [judge and (judge.server.address, judge.model) for judge in judges]
    paths = ["/v1", "/v1", "/v1", "/api/v1beta"]
    assert found == [(f"https://host{path}", "org/model+2") for path in paths]
    assert read_judge("none") is None


def test_rulings_can_be_read_back(stub: Stub, tmp_path: Path) -> None:
    run(stub, tmp_path / "out", write(tmp_path, CHOICES, type="mcq"), SAID)
    lines = [json.loads(line) for line in (tmp_path / "out" / "mine" / "judge.jsonl").read_text().splitlines()]
    assert {(line["index"], line["said"], line["reply"]) for line in lines} == {
        ("2", "B", "B"),
        ("3", "A", "`a.`"),
        ("4", "none", "none"),
    }
