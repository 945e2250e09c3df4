"""What an evaluation keeps, refuses and compares, and the command itself."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image

from exams import Oracle, all_answers, exam, metric, run_eval, truth, write
from unidpo import cli
from unidpo.demo import CHECKPOINT
from unidpo.demo.answers import accuracies, greedy_answers, write_benchmark
from unidpo.demo.digits import load_world
from unidpo.demo.story import ASKED
from unidpo.errors import UserError
from unidpo.evaluate.benchmarks import EvaluationError, EvaluationFailed, Judged
from unidpo.evaluate.comparing import compare, paired_bootstrap
from unidpo.evaluate.own import BenchmarkFile, load_benchmark
from unidpo.evaluate.page import escaped
from unidpo.evaluate.predictions import Predictions, question_digest, read_answers
from unidpo.evaluate.running import evaluate
from unidpo.evaluate.scorers import ANSWER_TYPES, Truth, Verdict
from unidpo.evaluate.selection import candidates
from unidpo.generate.hugging_face import HuggingFace, load_model
from unidpo.generate.questions import Generation, LoadOptions, Question
from unidpo.model.load import load_policy, load_processor
from unidpo.run_folder.manifest import write_manifest
from worlds import GOLDEN

MODEL = GOLDEN / "model"


# --- what is kept


def test_a_run_goes_on_where_it_was_and_drops_a_cut_line(tmp_path: Path) -> None:
    benchmark = load_benchmark(exam(tmp_path))
    evaluate(Oracle(truth()), [benchmark], tmp_path / "whole")
    evaluate(Oracle(truth()), [benchmark], tmp_path / "out", limit=5)
    path = tmp_path / "out" / "mine" / "predictions.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    oracle = Oracle(truth())
    result = evaluate(oracle, [benchmark], tmp_path / "out")
    assert oracle.asked == ["5", "6", "7", "8"]
    assert result.benchmarks[0].value == 100
    assert read_answers(path) == read_answers(tmp_path / "whole" / "mine" / "predictions.jsonl")
    lines = [json.loads(line)["index"] for line in path.read_text().splitlines()]
    assert sorted(lines) == sorted(truth())


def test_a_damaged_line_is_an_error(tmp_path: Path) -> None:
    benchmark = load_benchmark(exam(tmp_path))
    evaluate(Oracle(truth()), [benchmark], tmp_path / "out")
    path = tmp_path / "out" / "mine" / "predictions.jsonl"
    path.write_text(path.read_text().replace("{", "", 1))
    with pytest.raises(EvaluationError, match="line 1 is damaged"):
        evaluate(Oracle(truth()), [benchmark], tmp_path / "out")


def test_another_model_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    benchmark = load_benchmark(exam(tmp_path))
    evaluate(Oracle(truth()), [benchmark], tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    other = Oracle(truth(), model="another")
    with pytest.raises(EvaluationError, match=r"`model`: was 'oracle', is 'another'"):
        evaluate(other, [benchmark], tmp_path / "out")
    assert other.asked == []
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_another_data_file_or_setting_is_refused(tmp_path: Path) -> None:
    evaluate(Oracle(truth()), [load_benchmark(exam(tmp_path))], tmp_path / "out")
    for changed in ({"instruction": "Say it."}, {"max_new_tokens": 9}):
        path = write(tmp_path, [{"question": f"{i}?", "answer": str(i)} for i in range(1, 9)], **changed)
        with pytest.raises(EvaluationError, match=next(iter(changed)).split("_")[0]):
            evaluate(Oracle(truth()), [load_benchmark(path)], tmp_path / "out")
    with pytest.raises(EvaluationError, match="`data`"):
        evaluate(Oracle(truth(9)), [load_benchmark(exam(tmp_path, 9))], tmp_path / "out")


def test_a_question_whose_image_changed_is_asked_again(tmp_path: Path) -> None:
    for i in (1, 2):
        Image.new("RGB", (40, 40), "red").save(tmp_path / f"{i}.png")
    rows = [{"question": "?", "answer": str(i), "image": f"{i}.png"} for i in (1, 2)]
    benchmark = load_benchmark(write(tmp_path, rows))
    evaluate(Oracle(truth()), [benchmark], tmp_path / "out")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "2.png")
    again = Oracle(truth())
    evaluate(again, [benchmark], tmp_path / "out")
    assert again.asked == ["2"]


def test_predictions_without_their_identity_are_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "predictions.jsonl").write_text("")
    with pytest.raises(EvaluationError, match=r"no identity\.json"):
        Predictions(folder, {})


def test_a_benchmark_that_fails_leaves_no_score_and_the_others_run(tmp_path: Path) -> None:
    class Broken(Oracle):
        def answer(self, questions: Any, generation: Any) -> Any:
            if len(questions) == 2:
                raise RuntimeError("no memory | <b>left</b>")
            return super().answer(questions, generation)

    one, two = load_benchmark(exam(tmp_path / "a", 3)), load_benchmark(exam(tmp_path / "b", 2))
    two.name = "other"
    evaluate(Oracle(truth()), [two], tmp_path / "out")
    (tmp_path / "out" / "other" / "predictions.jsonl").unlink()
    result = evaluate(Broken(truth()), [two, one], tmp_path / "out")
    assert [each.failure is None for each in result.benchmarks] == [False, True]
    assert not (tmp_path / "out" / "other" / "results.json").exists()
    page = (tmp_path / "out" / "results.md").read_text()
    assert "failed" in page
    assert "<b>" not in page
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["benchmarks"][0]["failure"] == "RuntimeError: no memory | <b>left</b>"


def test_a_scorer_that_does_not_start_costs_its_benchmark_only(tmp_path: Path) -> None:
    class Unable:
        name, generation = "unable", Generation()

        def identity(self) -> dict[str, Any]:
            raise EvaluationFailed("the scorer did not start")

    benchmarks: Any = [Unable(), load_benchmark(exam(tmp_path))]
    result = evaluate(Oracle(truth()), benchmarks, tmp_path / "out")
    assert [each.failure for each in result.benchmarks] == ["the scorer did not start", None]


def test_text_of_others_is_escaped() -> None:
    assert escaped("my_run _x_") == "my_run \\_x\\_"
    assert escaped("a|b<c>\n# d `e` [f](g) &amp; *h*") == ("a\\|b&lt;c&gt; \\# d \\`e\\` \\[f\\](g) &amp;amp; \\*h\\*")


# --- comparison


def judged(values: Sequence[float], **more: Any) -> list[Judged]:
    return [Judged(str(i), str(i), value, **more) for i, value in enumerate(values)]


def test_the_interval_is_that_of_paired_differences() -> None:
    """Against the normal approximation of the mean of paired differences."""
    rng = np.random.default_rng(0)
    before = rng.integers(0, 2, 800).astype(float)
    after = np.where(rng.random(800) < 0.9, before, 1 - before)
    after[:20] = 1
    low, high = paired_bootstrap(judged(before.tolist()), judged(after.tolist()), statistic="mean", best=100)
    differences = 100 * (after - before)
    half = 1.96 * differences.std() / np.sqrt(800)
    assert low == pytest.approx(differences.mean() - half, abs=0.4)
    assert high == pytest.approx(differences.mean() + half, abs=0.4)


def test_the_same_answers_differ_by_nothing() -> None:
    rows = judged([0, 1, 1, 0])
    assert paired_bootstrap(rows, rows, statistic="mean", best=100) == (0, 0)


def test_questions_of_one_unit_are_drawn_together() -> None:
    """MME: one category, in one picture both right, in the other one."""
    rows = [Judged(str(i), f"c/{i // 2}", value) for i, value in enumerate([1, 1, 1, 0])]
    assert metric(rows, statistic="mme", best=200) == pytest.approx(75 + 50)
    zero = [Judged(each.index, each.unit, 0) for each in rows]
    low, high = paired_bootstrap(zero, rows, statistic="mme", best=200)
    assert (low, high) == (50, 200), "either only the half picture, or only the whole one"


def test_f1_is_of_yes() -> None:
    said = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), ("no", "")]
    rows = [Judged(str(i), str(i), float(t == s), truth=t, said=s) for i, (t, s) in enumerate(said)]
    assert metric(rows, statistic="f1", best=100) == 200 * 1 / (2 + 2)


@pytest.mark.parametrize(
    "other",
    [(b"picture", "what?", "then"), (b"picture", "what?then"), ("what?", b"Picture", "then"), ("what?", "then")],
)
def test_a_digest_names_all_of_a_question(other: tuple[Any, ...]) -> None:
    assert question_digest(Question("1", ("what?", b"picture", "then"))) != question_digest(Question("1", other))


def test_no_category_goes_missing_in_the_drawing() -> None:
    """MME adds up its categories; of one picture each, every drawing has all of them."""
    rows = [Judged(str(i), f"{category}/1", 1) for i, category in enumerate("aabb")]
    zero = [Judged(each.index, each.unit, 0) for each in rows]
    assert paired_bootstrap(zero, rows, statistic="mme", best=400) == (400, 400)


def test_answers_that_changed_are_named_the_right_way_round(tmp_path: Path) -> None:
    benchmark = load_benchmark(exam(tmp_path, 4))
    said = {"before": {"3": "?", "4": "?"}, "after": {"2": "!", "4": "!"}}
    before, after = (
        evaluate(Oracle(truth(4) | wrong, name), [benchmark], tmp_path / name, label=name)
        for name, wrong in said.items()
    )
    (difference,) = compare([before, after], tmp_path)
    assert (difference.value, difference.gained, difference.lost) == (0, 1, 1)
    lines = [json.loads(line) for line in (tmp_path / "changed-after.jsonl").read_text().splitlines()]
    assert [(line["index"], line["change"], line["before"], line["after"]) for line in lines] == [
        ("2", "right to wrong", "2", "!"),
        ("3", "wrong to right", "?", "3"),
    ]


def test_different_questions_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="different questions"):
        paired_bootstrap(judged([1]), judged([1, 0]), statistic="mean", best=100)


# --- the command


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    world = load_world()
    questions = world.questions(60, split="held_out", rng=np.random.default_rng(3), kinds=ASKED)
    return write_benchmark(questions, tmp_path_factory.mktemp("digits")), questions


def test_the_digits_have_the_accuracy_the_demo_counts(tmp_path: Path, digits: Any) -> None:
    benchmark, questions = digits
    counted = accuracies(questions, greedy_answers(load_policy(CHECKPOINT), load_processor(CHECKPOINT), questions))
    result = run_eval(CHECKPOINT, "--benchmarks", benchmark, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    [record] = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]
    assert record["parts"] == pytest.approx({kind: 100 * each.accuracy for kind, each in counted.items()})
    assert 0 < record["value"] < 100


def test_two_models_are_compared(tmp_path: Path, digits: Any) -> None:
    benchmark, _ = digits
    out = tmp_path / "out"
    result = run_eval(CHECKPOINT, MODEL, tmp_path / "nowhere", "--benchmarks", benchmark, "--out", out, "--limit", 12)
    assert result.exit_code == 1, "one of three models is not there"
    [difference] = json.loads((out / "comparison.json").read_text())
    assert difference["questions"] == 12
    assert difference["value"] < 0
    assert difference["high"] < 0
    changed = [json.loads(line) for line in (out / "changed-golden.jsonl").read_text().splitlines()]
    assert len(changed) == difference["lost"] + difference["gained"]
    answers = read_answers(out / "checkpoint" / "digits" / "predictions.jsonl")
    assert all(line["before"] == answers[line["index"]].text for line in changed)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "MODEL"),
        (["m", "--batch-size", "0"], "--batch-size"),
        (["m", "--benchmarks", "pope"], "did you mean `POPE`?"),
        (["m", "--benchmarks", "x.yaml"], "x.yaml"),
        (["m", "--config", "x.json"], "x.json"),
    ],
)
def test_wrong_input_ends_with_2(words: list[str], said: str) -> None:
    result = run_eval(*words)
    code = result.exception.exit_code if isinstance(result.exception, UserError) else result.exit_code
    assert code == 2
    assert said in result.output + str(result.exception)


def test_models_are_found_in_run_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "a" / "checkpoint-5").mkdir()
    given = [
        str(tmp_path / "a"),
        str(tmp_path / "b" / "model"),
        str(tmp_path / "a" / "checkpoint-5"),
        "Qwen/Qwen2-VL-2B",
    ]
    found = candidates(given)
    assert [each.label for each in found] == ["a", "b", "a-checkpoint-5", "Qwen2-VL-2B"]
    assert [each.name for each in found] == [f"{tmp_path}/a/model", *given[1:]]
    with pytest.raises(EvaluationError, match="twice"):
        candidates([str(tmp_path / "a"), str(tmp_path / "a" / "model")])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_an_adapter_is_its_model_with_the_adapter_merged(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(load_policy(MODEL), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    answerer = load_model(str(tmp_path / "adapter"), LoadOptions())
    assert answerer.prompter.style == "chat"
    plain = load_model(str(MODEL), LoadOptions())
    assert answerer.identity()["processor"] == plain.identity()["processor"]
    assert answerer.identity()["model"] != plain.identity()["model"]


def test_a_run_without_a_model_says_what_to_name(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / "checkpoint-7").mkdir()
    write_manifest(tmp_path / "checkpoint-7", 7, run=tmp_path, resumable=True)
    with pytest.raises(EvaluationError, match="checkpoint-7"):
        candidates([str(tmp_path)])


def test_batches_are_several_times_faster_than_single_questions(digits: Any) -> None:
    """Processor seconds on the demo's model, in one run; the answers are the same."""
    benchmark = load_benchmark(digits[0])
    model, processor = load_policy(CHECKPOINT), load_processor(CHECKPOINT)
    seconds, said = {}, {}
    for size in (1, 16):
        answerer = HuggingFace(model, processor, batch_size=size)
        before = time.process_time()
        said[size] = all_answers(answerer, benchmark.questions(32), benchmark.generation)
        seconds[size] = time.process_time() - before
    assert said[1] == said[16]
    assert seconds[1] > 3 * seconds[16], seconds


def test_a_new_scorer_is_a_function_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered, a benchmark names it, `unidpo eval` scores with it, and it is among those that an error names."""

    def longest(text: str, truth: Truth) -> Verdict:
        return Verdict(min(1.0, len(text) / len(truth.answers[0])), text or None)

    rows = [{"question": "what?", "answer": "abcdefgh"}, {"question": "who?", "answer": "x"}]
    benchmark = write(tmp_path, rows, type="vqa", metric="longest", max_new_tokens=2)
    words = [MODEL, "--benchmarks", benchmark, "--out", tmp_path / "out"]
    unknown = run_eval(*words).exception
    assert isinstance(unknown, EvaluationError)
    assert "`metric` of the type vqa is accuracy or relaxed or" in str(unknown)
    assert not (tmp_path / "out").exists()

    monkeypatch.setitem(ANSWER_TYPES["vqa"].rules, "longest", longest)
    done = run_eval(*words)
    assert done.exit_code == 0, (done.output, done.exception)
    [record] = json.loads((tmp_path / "out" / "results.json").read_text())["benchmarks"]
    said = read_answers(tmp_path / "out" / "mine" / "predictions.jsonl")
    expected = [min(1.0, len(said[index].text) / length) for index, length in (("1", 8), ("2", 1))]
    assert record["metric"] == "longest"
    assert record["value"] == pytest.approx(100 * sum(expected) / 2)
    write(tmp_path, rows, type="vqa", metric="longer")
    assert "did you mean `longest`?" in str(run_eval(*words).exception)


def test_every_option_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text("utf-8")
    command = typer.main.get_command(cli.app).commands["eval"]  # type: ignore[attr-defined]
    for option in command.params:
        if option.opts[0].startswith("--") and option.opts != ["--help"]:
            assert f"`{option.opts[0]}`" in page, option.opts


def test_the_example_in_the_docs_is_a_benchmark(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text("utf-8")
    for name, text in re.findall(
        r"`([\w./-]+\.(?:ya?ml|jsonl))`:\n\n```\w+\n(.*?)^```$", page, re.MULTILINE | re.DOTALL
    ):
        (tmp_path / name).write_text(text, "utf-8")
    [path] = tmp_path.glob("*.yaml")
    benchmark = load_benchmark(path)
    assert len(benchmark.items) > 1
    keys = re.findall(r"^\| `(\w+)` \|", page.partition("### The YAML file")[2].partition("\n### ")[0], re.MULTILINE)
    assert set(keys) == set(BenchmarkFile.model_fields)


def test_every_scorer_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text("utf-8")
    table = page.partition("| type | metric | rule |")[2].partition("\n\n")[0]
    documented = [
        (kind, metric)
        for kind, metrics in re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE)
        for metric in re.findall(r"`(\w+)`", metrics)
    ]
    assert documented == [(name, metric) for name, kind in ANSWER_TYPES.items() for metric in kind.rules]
