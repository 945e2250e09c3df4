"""Who answers: several processes, a server, an engine; and what survives when they are killed."""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from chat_stub import Stub, stubbed
from unidpo import cli
from unidpo.errors import ModelError
from unidpo.evaluate.predictions import read_answers
from unidpo.generate.hugging_face import load_model
from unidpo.generate.processes import Processes
from unidpo.generate.questions import Answer, Generation, GenerationFailed, LoadOptions, Question
from unidpo.generate.vllm import Engine, Server
from worlds import GOLDEN, picture

MODEL = GOLDEN / "model"


def questions(folder: Path, count: int = 8) -> list[Question]:
    rng = random.Random(2)
    found = []
    for i in range(count):
        path = folder / f"{i}.png"
        picture(rng, rng.randrange(30, 120)).save(path)
        found.append(Question(str(i), ((path,) if i % 3 else ()) + (" ".join(["what"] * (i + 1)),)))
    return found


# --- several processes


def test_two_processes_answer_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("forkserver")  # both for the price of one import
    context.set_forkserver_preload(["unidpo.generate.processes"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    asked, generation = questions(tmp_path), Generation(4)
    one = load_model(str(MODEL), LoadOptions(batch_size=2))
    alone = {index: answer for batch in one.answer(asked, generation) for index, answer in batch.items()}
    two = Processes(str(MODEL), LoadOptions(batch_size=2, processes=2))
    try:
        assert two.identity() == one.identity()
        together = {index: answer for batch in two.answer(asked, generation) for index, answer in batch.items()}
        assert together == alone
        assert len(two._pool._processes) == 2
        os.kill(next(iter(two._pool._processes)), signal.SIGKILL)
        with pytest.raises(GenerationFailed, match="run the command again"):
            list(two.answer(asked, generation))
    finally:
        two.close()


def test_a_model_that_is_not_there_is_said_by_the_processes_too(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nothing-here"):
        Processes(str(tmp_path / "nothing-here"), LoadOptions(processes=2))


# --- kill -9

SLOW_EXAM = """
import sys, time
from pathlib import Path
from unidpo.evaluate.own import load_benchmark
from unidpo.generate.questions import Answer
from unidpo.evaluate.running import evaluate

class Slow:
    def identity(self):
        return {"model": "slow"}
    def answer(self, questions, generation):
        for start in range(0, len(questions), 3):
            batch = questions[start:start + 3]
            with open(sys.argv[3], "a") as log:
                log.write("".join(f"{question.index}\\n" for question in batch))
            time.sleep(0.002)
            yield {question.index: Answer(question.text[::-1] * 50, 1) for question in batch}

benchmark = load_benchmark(Path(sys.argv[1]))
print("ready", flush=True)
evaluate(Slow(), [benchmark], Path(sys.argv[2]))
"""


def test_killed_at_any_moment_nothing_is_lost_or_asked_again(tmp_path: Path) -> None:
    rows = [{"question": f"question {i}", "answer": "x"} for i in range(240)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "exam.yaml").write_text("name: exam\nfile: rows.jsonl\ntype: exact\n")
    script = tmp_path / "slow.py"
    script.write_text(SLOW_EXAM)
    rng = random.Random(7)

    def start(out: str, log: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(script), str(tmp_path / "exam.yaml"), str(tmp_path / out), str(tmp_path / log)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def done() -> set[str]:
        path = tmp_path / "out" / "exam" / "predictions.jsonl"
        whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        return {json.loads(line)["index"] for line in whole.splitlines()}

    log = tmp_path / "asked"
    log.touch()
    killed = 0
    for _ in range(3):
        kept, asked_before = done(), len(log.read_text().splitlines())
        process = start("out", "asked")
        time.sleep(rng.uniform(0.01, 0.06))
        process.kill()
        process.communicate()
        killed += len(done()) < len(rows)
        assert not kept & set(log.read_text().splitlines()[asked_before:]), (
            "an answer that is there was generated again"
        )
    assert killed == 3
    kept, asked_before = done(), len(log.read_text().splitlines())
    assert start("out", "asked").communicate()[0] == ""
    assert start("whole", "asked-whole").communicate()[0] == ""
    assert not kept & set(log.read_text().splitlines()[asked_before:])
    both = [read_answers(tmp_path / out / "exam" / "predictions.jsonl") for out in ("out", "whole")]
    assert both[0] == both[1]
    lines = (tmp_path / "out" / "exam" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == len(rows), "each answer is there once"


# --- vLLM


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stubbed() as made:
        yield made


def server(stub: Stub, **options: Any) -> Server:
    return Server(str(MODEL), LoadOptions(backend="vllm", server=stub.address, **options))


def test_a_server_is_sent_images_limits_and_stops(stub: Stub, tmp_path: Path) -> None:
    Image.new("RGB", (30, 40), "red").save(tmp_path / "a.png")
    asked = [Question("1", (tmp_path / "a.png", "short")), Question("2", ("long",)), Question("3", (b"broken", "x"))]
    answerer = server(stub, batch_size=2)
    answers = [answer for batch in answerer.answer(asked, Generation(7, min_pixels=5000)) for answer in batch.items()]
    assert dict(answers) == {
        "1": Answer("short", 3),
        "2": Answer("long", 3, truncated=True),
        "3": Answer("", 0, problem="unreadable-image"),
    }
    request = next(each for each in stub.requests if len(each["messages"][0]["content"]) == 2)
    image = request["messages"][0]["content"][0]["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(image))).size == (30, 40)
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("served", 0, 7)
    assert request["stop_token_ids"] == [2048, 2050]
    assert request["mm_processor_kwargs"] == {"size": {"shortest_edge": 5000, "longest_edge": 12845056}}
    assert "chat_template" not in request
    assert answerer.identity()["backend"] == "vllm"


def test_a_plain_prompt_is_a_chat_template_of_the_request(stub: Stub) -> None:
    answerer = server(stub, prompt_style="plain")
    list(answerer.answer([Question("1", ("x",))], Generation(1)))
    [request] = stub.requests
    assert "<|vision_start|><|image_pad|><|vision_end|>" in request["chat_template"]
    assert request["add_generation_prompt"] is False
    stub.codes, stub.refusal = [400], "chat_template is not trusted"
    with pytest.raises(GenerationFailed, match="--trust-request-chat-template"):
        list(answerer.answer([Question("1", ("x",))], Generation(1)))


def test_a_server_that_is_not_there_or_serves_others_is_wrong_input(stub: Stub) -> None:
    stub.models = ["a", "b"]
    with pytest.raises(ModelError, match="the server has a, b"):
        server(stub)
    for address in ("localhost:8000", "http://127.0.0.1:9"):
        with pytest.raises(ModelError):
            Server(str(MODEL), LoadOptions(server=address))


def test_the_command_asks_a_server(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "one", "answer": "one"}\n{"question": "two", "answer": "2"}\n')
    (tmp_path / "mine.yaml").write_text("name: mine\nfile: rows.jsonl\ntype: exact\n")
    words = [str(MODEL), "--benchmarks", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, ["eval", *words, "--backend", "vllm", "--server", stub.address])
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"][0]["value"] == 50
    result = CliRunner().invoke(cli.app, ["eval", *words, "--server", stub.address])
    assert "--backend vllm" in str(result.exception)


def test_the_engine_gets_prompts_as_it_takes_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against a stand-in with the engine's names: what is sent, and how the answer is read."""
    sent: list[Any] = []

    class LLM:
        def __init__(self, **options: Any) -> None:
            sent.append(options)

        def generate(self, prompts: Any, settings: Any, use_tqdm: bool) -> list[Any]:
            sent.extend([prompts, settings])
            said = SimpleNamespace(text="said", token_ids=[1, 2], finish_reason="length")
            return [SimpleNamespace(outputs=[said]) for _ in prompts]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.__version__ = LLM, lambda **options: options, "0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    Image.new("RGB", (30, 40), "red").save(tmp_path / "a.png")
    asked = [Question("1", (tmp_path / "a.png", "x")), Question("2", (tmp_path / "missing.png", "y"))]
    engine = Engine(str(MODEL), LoadOptions(prompt_style="plain", processes=2))
    [answers] = engine.answer(asked, Generation(5))
    assert answers == {"1": Answer("said", 2, truncated=True), "2": Answer("", 0, problem="unreadable-image")}
    options, [prompt], settings = sent
    assert (options["model"], options["tensor_parallel_size"]) == (str(MODEL), 2)
    assert prompt["prompt"] == "<|vision_start|><|image_pad|><|vision_end|>x"
    assert prompt["multi_modal_data"]["image"][0].size == (30, 40)
    assert settings == {"temperature": 0.0, "max_tokens": 5, "stop_token_ids": [2048, 2050]}


def test_without_vllm_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match="--server http"):
        Engine(str(MODEL), LoadOptions())
