"""The nine benchmarks through VLMEvalKit's own scorers (`make test-eval`), and what can be said of them without it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from typer.testing import CliRunner

from chat_stub import stubbed
from exams import Oracle, metric
from unidpo import cli
from unidpo.config.named import PAPER, Published
from unidpo.data.download import FetchError
from unidpo.evaluate import vlmeval
from unidpo.evaluate.benchmarks import EvaluationError, EvaluationFailed
from unidpo.evaluate.judge import read_judge
from unidpo.evaluate.predictions import read_answers
from unidpo.evaluate.running import evaluate
from unidpo.evaluate.selection import read_config, select
from unidpo.evaluate.vlmeval import VlmevalBenchmark, Worker, data_folder, worker_python
from unidpo.evaluate.vlmeval_worker import CLASSES
from vlmeval_world import Table, tables
from worlds import GOLDEN

MODEL = GOLDEN / "model"
NINE = tables()


def has_vlmeval() -> bool:
    try:
        return bool(worker_python())
    except EvaluationError:
        return False


real = [pytest.mark.vlmeval, pytest.mark.skipif(not has_vlmeval(), reason="VLMEvalKit is not installed")]


def marked(function: Any) -> Any:
    for mark in real:
        function = mark(function)
    return function


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("LMUData")
    for table in NINE.values():
        table.write(folder)
    return folder


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as started:
        yield started


@pytest.fixture(scope="module")
def nine(data: Path, worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, VlmevalBenchmark]:
    cache = tmp_path_factory.mktemp("cache")
    found = {name: VlmevalBenchmark(name, data / f"{name}.tsv", worker, cache=cache) for name in PAPER}
    for benchmark in found.values():
        benchmark.questions()
    return found


def wrong(table: Table, index: str) -> str:
    """An answer that the scorer understands and that is not right."""
    truth = table.truth[index]
    if CLASSES[table.name] == "ImageYORNDataset":
        return "no" if truth.lower().startswith("yes") else "yes"
    if CLASSES[table.name] == "ImageMCQDataset":
        [row] = [row for row in table.rows if row["index"] == index]
        return "B" if row["answer"] == "A" else "A"
    return "something else"


def answers(table: Table, right: set[str]) -> dict[str, str]:
    return {index: text if index in right else wrong(table, index) for index, text in table.truth.items()}


# --- with VLMEvalKit


@marked
@pytest.mark.parametrize("name", PAPER)
def test_who_knows_everything_gets_full_marks(nine: Mapping[str, VlmevalBenchmark], name: str) -> None:
    benchmark, table = nine[name], NINE[name]
    assert {question.index for question in benchmark.questions()} == set(table.truth)
    score = benchmark.score(table.truth)
    best = {"MME": 2800, "OCRBench": 10}.get(name, 100)
    assert (score.value, score.best, score.unmatched) == (best, best, 0)
    if name == "MME":
        assert (score.parts["perception"], score.parts["reasoning"]) == (2000, 800)
    assert all(each.value == 1 for each in score.judged)


@marked
@pytest.mark.parametrize("name", PAPER)
def test_who_is_always_wrong_gets_nothing(nine: Mapping[str, VlmevalBenchmark], name: str) -> None:
    score = nine[name].score(answers(NINE[name], set()))
    assert (score.value, score.unmatched) == (0, 0)


@marked
@pytest.mark.parametrize(
    ("name", "right", "value"),
    [
        ("ChartQA_TEST", {"0", "1"}, 100 * 2 / 9),
        # Circular: a question counts if all its rolls are right; the third has two of them.
        ("MMBench_DEV_EN", {"243", "1000243", "241", "242"}, 100 / 3),
        ("MMBench_DEV_CN", {"241", "1000241", "2000241"}, 0),
        ("SEEDBench_IMG", {"1", "2"}, 50),
        ("ScienceQA_TEST", {"7"}, 25),
        # One picture with both right (100 + 100), one with one of two (50 + 0); the others nothing.
        ("MME", {"0", "1", "2"}, 250),
        ("OCRBench", {"3", "9"}, 2),
        ("TextVQA_VAL", {"34602", "34606"}, 40),
    ],
)
def test_who_is_right_on_some_gets_exactly_that(
    nine: Mapping[str, VlmevalBenchmark], name: str, right: set[str], value: float
) -> None:
    score = nine[name].score(answers(NINE[name], right))
    assert score.value == pytest.approx(value)
    assert metric(score.judged, statistic=score.statistic, best=score.best) == pytest.approx(value)


@marked
def test_pope_counts_a_question_in_each_of_its_categories(nine: Mapping[str, VlmevalBenchmark]) -> None:
    """Yes to 1 (one category), 3 (three) and 5 (two): said yes to 3 and, wrongly, 0 (three)."""
    score = nine["POPE"].score(answers(NINE["POPE"], {"2", "3", "4"}))
    assert score.value == pytest.approx(100 * 2 * 3 / ((3 + 3) + (1 + 3 + 2)))
    assert metric(score.judged, statistic="f1", best=100) == pytest.approx(score.value)


@marked
def test_partial_credit_is_kept(nine: Mapping[str, VlmevalBenchmark]) -> None:
    """One of ten people said "x": nine of the ten times he is there, a third of a point."""
    given = {**NINE["TextVQA_VAL"].truth, "34602": "X."}
    score = nine["TextVQA_VAL"].score(given)
    assert score.judged[0].value == pytest.approx(0.3)
    assert score.value == pytest.approx(100 * 4.3 / 5)


@marked
def test_what_cannot_be_made_out_is_counted(nine: Mapping[str, VlmevalBenchmark]) -> None:
    unclear = {name: dict.fromkeys(NINE[name].truth, "?" * 50) for name in ("MME", "SEEDBench_IMG", "MMBench_DEV_EN")}
    assert {name: nine[name].score(given).unmatched for name, given in unclear.items()} == {
        name: len(given) for name, given in unclear.items()
    }


@marked
@pytest.mark.parametrize(("name", "share"), [("SEEDBench_IMG", 0.5), ("MMBench_DEV_EN", 2 / 3), ("MME", 0.5)])
def test_a_judges_choice_is_scored_in_the_place_of_an_answer(
    nine: Mapping[str, VlmevalBenchmark], tmp_path: Path, name: str, share: float
) -> None:
    """The one who knows everything speaks in riddles about some questions; the judge solves them."""
    table, benchmark = NINE[name], nine[name]
    asked = {question.index: question for question in benchmark.questions()}
    riddles = {index: f"riddle {index}." for index in list(table.truth)[: round(share * len(table.truth))]}
    with stubbed() as stub:
        solved = {riddles[index]: row["answer"] for row in table.rows if (index := row["index"]) in riddles}
        stub.answer = lambda text: next(answer for riddle, answer in solved.items() if f"\n{riddle}\n" in text)
        oracle = Oracle({**table.truth, **riddles})
        plain = evaluate(oracle, [benchmark], tmp_path).benchmarks[0]
        found = evaluate(oracle, [benchmark], tmp_path, judge=read_judge(f"{stub.address}+m")).benchmarks[0]
        assert found.counts is not None
        assert plain.value < found.value == found.best
        assert (found.counts.judged, found.counts.unmatched, found.counts.generated) == (len(riddles), 0, 0)
        assert len(stub.requests) == len(riddles)
    words = [row for row in table.rows if row["index"] in riddles]
    for row in words if name != "MME" else ():
        assert asked[row["index"]].choices == {letter: row[letter] for letter in "ABCD" if row.get(letter)}


@marked
def test_a_scorer_that_dies_is_started_again(data: Path, tmp_path: Path) -> None:
    with Worker() as worker:
        first = VlmevalBenchmark("POPE", data / "POPE.tsv", worker, cache=tmp_path)
        first.questions()
        assert worker._process is not None
        worker._process.kill()
        with pytest.raises(EvaluationFailed, match="ended"):
            first.score(NINE["POPE"].truth)
        second = VlmevalBenchmark("MME", data / "MME.tsv", worker, cache=tmp_path)
        second.questions()
        assert second.score(NINE["MME"].truth).value == 2800


@marked
def test_a_file_without_a_column_is_named(tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "POPE.tsv").write_text("index\tquestion\n1\t?\n")
    with pytest.raises(EvaluationFailed, match=r"POPE\.tsv.* no column answer, image"):
        VlmevalBenchmark("POPE", tmp_path / "POPE.tsv", worker, cache=tmp_path).questions()


@marked
def test_two_rows_with_one_index_are_refused(tmp_path: Path, worker: Worker) -> None:
    table = NINE["POPE"]
    file = Table("POPE", [*table.rows, table.rows[0]], {}).write(tmp_path)
    with pytest.raises(EvaluationFailed, match="two rows have the index 0"):
        VlmevalBenchmark("POPE", file, worker, cache=tmp_path).questions()


@pytest.fixture(scope="module")
def own_way(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What VLMEvalKit makes of some answers that survive an Excel file, through its own files."""
    folder = tmp_path_factory.mktemp("own-way")
    (folder / "answers.json").write_text(json.dumps(some_right()))
    script = Path(__file__).with_name("plain_vlmeval.py")
    command = [worker_python(), "-P", str(script), str(data), str(folder / "answers.json"), str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    return folder


def some_right() -> dict[str, dict[str, str]]:
    """Answers of which the last few are wrong. Those of ChartQA do not survive an Excel file."""
    return {name: answers(table, set(list(table.truth)[:-2])) for name, table in NINE.items() if name != "ChartQA_TEST"}


@marked
def test_scores_are_those_of_vlmevalkits_own_way(nine: Mapping[str, VlmevalBenchmark], own_way: Path) -> None:
    for name, given in some_right().items():
        head, first, *_ = json.loads((own_way / f"{name}.json").read_text())
        row = dict(zip(head, first, strict=True))
        score = nine[name].score(given)
        if name == "MME":
            expected = row["perception"] + row["reasoning"]
        elif name == "OCRBench":
            expected = row["Final Score"]
        else:
            expected = row["Overall"] * (100 if CLASSES[name] == "ImageMCQDataset" else 1)
        if name == "TextVQA_VAL":  # of five; an Excel file holds the answer "None" as no answer
            expected += 20
        assert score.value == pytest.approx(expected), name
        assert 0 < score.value < score.best, name


@marked
def test_urls_and_checksums_are_vlmevalkits(own_way: Path) -> None:
    found = json.loads((own_way / "published.json").read_text())
    assert found == {name: [published.url, published.md5] for name, published in PAPER.items()}


@marked
def test_questions_that_belong_together_stay_together(nine: Mapping[str, VlmevalBenchmark]) -> None:
    assert [q.index for q in nine["MME"].questions(3)] == ["0", "1", "2", "3"]
    assert [q.index for q in nine["MMBench_DEV_EN"].questions(1)] == ["241", "1000241", "2000241", "3000241"]
    table = NINE["MMBench_DEV_EN"]
    asked = {question.index for question in nine["MMBench_DEV_EN"].questions(5)}
    assert nine["MMBench_DEV_EN"].score({index: table.truth[index] for index in asked}).value == 100


@marked
def test_only_what_is_asked_is_unpacked(data: Path, worker: Worker, tmp_path: Path) -> None:
    benchmark = VlmevalBenchmark("MME", data / "MME.tsv", worker, cache=tmp_path)
    assert len(benchmark.questions(3)) == 4
    there = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in sorted(there)] == ["0000.jpg", "0001.jpg"]
    assert len(benchmark.questions()) == 28


@marked
@pytest.mark.parametrize("name", ["ChartQA_TEST", "TextVQA_VAL", "OCRBench"])
def test_answers_are_not_evaluated(tmp_path: Path, worker: Worker, name: str) -> None:
    """An answer that is an expression is text, in the scorers that call `eval` too."""
    trap, table = tmp_path / "trap", NINE[name]
    rows = [{**row, "answer": f"[open({str(trap)!r}, 'w').close()]"} for row in table.rows]
    benchmark = VlmevalBenchmark(name, Table(name, rows, {}).write(tmp_path), worker, cache=tmp_path / "cache")
    benchmark.questions()
    given = dict.fromkeys(table.truth, "x")
    if name == "OCRBench":  # where answers are always a list
        with pytest.raises(EvaluationFailed, match="malformed node"):
            benchmark.score(given)
    else:
        assert benchmark.score(given).value == 0
    assert not trap.exists()


@marked
def test_a_damaged_image_costs_one_question(tmp_path: Path, worker: Worker) -> None:
    table = NINE["SEEDBench_IMG"]
    rows = [{**row, "image": "A" * 200} if row["index"] == "1" else row for row in table.rows]
    file = Table(table.name, rows, table.truth).write(tmp_path)
    benchmark = VlmevalBenchmark(table.name, file, worker, cache=tmp_path / "cache")
    there = {question.index: Path(str(question.images[0])).is_file() for question in benchmark.questions()}
    assert there == {"0": True, "1": False, "2": True, "3": True}
    assert benchmark.score(table.truth).value == 100


@marked
def test_the_scorer_opens_no_connection() -> None:
    file = Path(vlmeval.__file__).with_name("vlmeval_worker.py")
    script = f"""
import importlib.util, sys, urllib.request
spec = importlib.util.spec_from_file_location("worker", {str(file)!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
sys.addaudithook(worker.refuse_connections)
urllib.request.urlopen("http://127.0.0.1:9")
"""
    done = subprocess.run([worker_python(), "-c", script], capture_output=True, text=True, check=False)
    assert "opens no connections" in done.stderr


@marked
def test_the_nine_run_with_a_random_model(data: Path, tmp_path: Path) -> None:
    """From the command to the tables, offline; a second call generates nothing."""
    out = tmp_path / "out"
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "model": {
                    "m": {"class": "Qwen2VLChat", "model_path": str(MODEL), "max_new_tokens": 3, "temperature": 0.01}
                },
                "data": {name: {"class": cls, "dataset": name} for name, cls in CLASSES.items()},
            }
        )
    )
    words = ["eval", "--config", str(config), "--data", str(data), "--out", str(out)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    assert "`model.m.temperature` has no meaning here" in result.output
    record = json.loads((out / "results.json").read_text())["benchmarks"]
    assert [each["name"] for each in record] == list(PAPER)
    for each in record:
        counts = each["counts"]
        assert counts["questions"] == counts["generated"] == len(NINE[each["name"]].truth)
        assert counts["unreadable_images"] == counts["empty_prompts"] == 0
        assert each["identity"]["scorer"] == "ms-vlmeval 0.0.20"
        assert each["identity"]["published_data"] is False
        assert each["identity"]["generation"]["min_pixels"] == (78400 if each["name"] == "OCRBench" else None)
        assert each["identity"]["generation"]["max_new_tokens"] == 3
        assert len(read_answers(out / each["name"] / "predictions.jsonl")) == counts["questions"]
        assert (out / each["name"] / "scorer.csv").is_file()
    again = CliRunner().invoke(cli.app, words)
    assert again.exit_code == 0
    for before, after in zip(record, json.loads((out / "results.json").read_text())["benchmarks"], strict=True):
        assert after["counts"]["generated"] == 0
        assert {**after, "counts": None} == {**before, "counts": None}


# --- without


def test_a_missing_file_says_what_to_download(tmp_path: Path) -> None:
    (tmp_path / "POPE.tsv").touch()
    with pytest.raises(EvaluationError) as raised:
        vlmeval.require_files(["MME", "POPE"], tmp_path)
    [line, hint] = str(raised.value).splitlines()
    assert line == (
        "MME: download https://opencompass.openxlab.space/utils/VLMEval/MME.tsv "
        f"(MD5 b36b43c3f09801f5d368627fb92187c3) to {tmp_path / 'MME.tsv'}"
    )
    assert "--download" in hint


def test_nothing_is_asked_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(url: str) -> int:
        raise AssertionError(url)

    monkeypatch.setattr(vlmeval, "size_of", no_network)
    (tmp_path / "MME.tsv").write_text("mine")
    vlmeval.require_files(["MME"], tmp_path)
    assert vlmeval.download_file("MME", tmp_path).read_text() == "mine"


def test_downloads_go_on_and_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Any) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    content = bytes(range(256)) * 40
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    monkeypatch.setitem(PAPER, "MME", Published(f"{server.address}/MME.tsv", md5))  # type: ignore[arg-type]
    server.files["/MME.tsv"] = content
    (tmp_path / f".MME.tsv.{md5[:16]}.unfinished").write_bytes(content[:1000])
    assert vlmeval.download_file("MME", tmp_path).read_bytes() == content
    assert server.asked[-1] == ("GET", "bytes=1000-")
    (tmp_path / "MME.tsv").unlink()
    server.files["/MME.tsv"] = content[::-1]
    with pytest.raises(FetchError, match="its MD5 is not the published"):
        vlmeval.download_file("MME", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def server() -> Iterator[Any]:
    """Files on a local address, in ranges."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from types import SimpleNamespace

    state = SimpleNamespace(files={}, asked=[], address="")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.reply(b"")

        def do_GET(self) -> None:
            self.reply(state.files[self.path])

        def reply(self, content: bytes) -> None:
            wanted = self.headers.get("Range")
            state.asked.append((self.command, wanted))
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            whole = len(state.files[self.path])
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(whole - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
            self.end_headers()
            self.wfile.write(content[start:])

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{listening.server_address[1]}"
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield state
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_the_authors_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    entry = {"class": "Qwen2VLChat", "model_path": "runs/mine/model"}
    names = {name: {"class": cls, "dataset": name} for name, cls in CLASSES.items()}
    path.write_text(json.dumps({"model": {"Qwen2-VL-2B": entry}, "data": names}))
    kit = read_config(path)
    assert (kit.models, kit.benchmarks, kit.generation, kit.ignored) == (["runs/mine/model"], list(PAPER), {}, [])


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        ({"class": "LLaVA", "model_path": "x"}, {"dataset": "MME"}, "Qwen2VLChat"),
        ({"class": "Qwen2VLChat"}, {"dataset": "MME"}, "model_path"),
        ({"class": "Qwen2VLChat", "model_path": "x"}, {"dataset": "MMEE"}, "did you mean `MME`"),
        ({"class": "Qwen2VLChat", "model_path": "x"}, {"dataset": "MME", "class": "OCRBench"}, "ImageYORNDataset"),
        ("x", {"dataset": "MME"}, "a configuration of VLMEvalKit is"),
    ],
)
def test_a_configuration_that_means_nothing_here_is_refused(tmp_path: Path, model: Any, data: Any, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model": {"m": model}, "data": {"d": data}}))
    with pytest.raises(EvaluationError, match=said):
        read_config(path)


def test_a_benchmark_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "?", "answer": "x"}\n')
    (tmp_path / "a.yaml").write_text("name: a\nfile: rows.jsonl\ntype: exact\n")
    with Worker() as worker, pytest.raises(EvaluationError, match="two benchmarks are called a"):
        select([str(tmp_path / "a.yaml"), str(tmp_path / "a.yaml")], data=tmp_path, worker=worker)


def test_the_data_lies_where_vlmevalkit_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMUData", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.delenv("LMUData")
    assert data_folder() == Path.home() / "LMUData"


def test_a_worker_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no torch here >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("UNIDPO_VLMEVAL_PYTHON", str(program))
    with Worker() as worker, pytest.raises(EvaluationFailed, match="ended: no torch here"):
        worker.start()
    monkeypatch.setenv("UNIDPO_VLMEVAL_PYTHON", str(tmp_path / "nothing"))
    with Worker() as worker, pytest.raises(EvaluationError, match="no such program"):
        worker.start()
