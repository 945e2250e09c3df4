"""Own benchmarks from file to result: what is read, how it is asked, how it is scored, what is kept."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from exams import all_answers, encoded, metric, write, write_tsv
from unidpo.errors import DataError, ModelError
from unidpo.evaluate import scorers
from unidpo.evaluate.benchmarks import EvaluationError
from unidpo.evaluate.own import load_benchmark
from unidpo.evaluate.running import evaluate
from unidpo.evaluate.scorers import ANSWER_TYPES, Truth
from unidpo.generate.hugging_face import HuggingFace
from unidpo.generate.prompts import Prompt, Prompter, processor_fingerprint, stop_ids
from unidpo.generate.questions import Answer, Generation, Question
from unidpo.model.encode import CHATML
from unidpo.model.load import load_policy, load_processor
from worlds import GOLDEN, picture, tiny_policy

MODEL = GOLDEN / "model"
BASE_TEMPLATE = (
    "{% for content in messages %}{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
)
"""As that of the base Qwen2-VL: content items where others expect messages."""


# --- rules


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. a dog", "B"),
        ("**B**", "B"),
        ("The answer is B", "B"),
        ("I think the correct option is (B).", "B"),
        ("a dog", "B"),
        ("A dog", "B"),
        ("A", "A"),
        ("E", None),
        ("", None),
        ("The answer is A, no, the answer is B", None),
        ("a bird", None),
        ("The answer is a dog", None),
        ("Because of the colour", None),
    ],
)
def test_a_letter_is_made_out(text: str, said: str | None) -> None:
    verdict = scorers.multiple_choice(text, Truth(("B",), {"A": "a cat", "B": "a dog", "C": "c", "D": "d"}))
    assert (verdict.said, verdict.value) == (said, float(said == "B"))


@pytest.mark.parametrize(
    ("text", "said"),
    [("Yes", "yes"), ("no.", "no"), ("Yes, there is.", "yes"), ("yes and no", None), ("nothing", None), ("", None)],
)
def test_yes_and_no_are_words(text: str, said: str | None) -> None:
    assert scorers.yes_or_no(text, Truth(("yes",))).said == said


@pytest.mark.parametrize(
    ("rule", "text", "answers", "value"),
    [
        ("relaxed", "10.4", ["10"], 1),
        ("relaxed", "10.6", ["10"], 0),
        ("relaxed", "-9.6", ["-10"], 1),
        ("relaxed", "12 %", ["0.12"], 1),
        ("relaxed", "0", ["0"], 1),
        ("relaxed", "0.001", ["0"], 0),
        ("relaxed", "nan", ["nan"], 1),
        ("relaxed", "nan", ["5"], 0),
        ("relaxed", "inf", ["5"], 0),
        ("relaxed", "Red", ["red", "blue"], 1),
        ("relaxed", "red.", ["red"], 0),
        ("vqa_score", "stop", ["stop"] * 10, 1),
        ("vqa_score", "stop", ["stop"] * 3 + ["go"] * 7, (3 * 2 / 3 + 7) / 10),
        ("vqa_score", "stop", ["stop"] + ["go"] * 9, 9 / 3 / 10),
        ("vqa_score", "go", ["stop"], 0),
        ("anls", "hello", ["hallo", "x"], 0.8),
        ("anls", "hello", ["hexxx"], 0),
        ("contains", "It says  CENTRE\nhere", ["centre here"], 1),
        ("contains", "centre", ["centres"], 0),
        ("accuracy", "Two  Dogs.", ["two dogs"], 1),
        ("accuracy", "2", ["two"], 0),
    ],
)
def test_rules_for_free_answers(rule: str, text: str, answers: list[str], value: float) -> None:
    assert ANSWER_TYPES["vqa"].rules[rule](text, Truth(tuple(answers))).value == pytest.approx(value)


SPELLED = ["007", "None", "=1+1", "3.10", "NA", " true ", "1e5", "nan", "__import__('os').abort()"]


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet"])
def test_answers_keep_their_spelling(tmp_path: Path, kind: str) -> None:
    rows = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(SPELLED)]
    if kind == "tsv":
        path = write_tsv(tmp_path, rows)
    elif kind == "jsonl":
        path = write(tmp_path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
        path = write(tmp_path, rows, file="rows.parquet")
    benchmark = load_benchmark(path)
    assert [item.truth.answers for item in benchmark.items] == [(answer,) for answer in SPELLED]
    assert benchmark.score({str(i + 1): answer for i, answer in enumerate(SPELLED)}).value == 100
    spoiled = ["7", "nan", "2", "3.1", "", "True", "100000.0", "None", "0"]
    assert benchmark.score({str(i + 1): answer for i, answer in enumerate(spoiled)}).value == 0


def test_numbers_in_json_keep_their_spelling(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "?", "answer": "x"}])
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": 3.10}\n{"question": "b", "answer": 1e400}\n')
    assert [item.truth.answers for item in load_benchmark(path).items] == [("3.10",), ("1e400",)]


# --- benchmarks of one's own


def test_images_stand_where_the_marks_are(tmp_path: Path) -> None:
    red, blue = (encoded(Image.new("RGB", (40, 40), colour)) for colour in ("red", "blue"))
    picture(random.Random(0)).save(tmp_path / "a.png")
    text = base64.b64encode(red).decode()
    path = write(
        tmp_path,
        [
            {"question": "no mark", "answer": "x", "image": "a.png"},
            {"question": "first <image> then <image>", "answer": "x", "images": [text, "a.png"]},
            {"question": "no image", "answer": "x", "hint": "a hint"},
            {"question": "uri", "answer": "x", "image": f"data:image/png;base64,{base64.b64encode(blue).decode()}"},
        ],
        instruction="Be short.",
    )
    parts = [question.parts for question in load_benchmark(path).questions()]
    assert parts == [
        (tmp_path / "a.png", "no mark\nBe short."),
        ("first ", red, " then ", tmp_path / "a.png", "\nBe short."),
        ("a hint\nno image\nBe short.",),
        (blue, "uri\nBe short."),
    ]


def test_options_are_listed_and_scored(tmp_path: Path) -> None:
    rows = [
        {"question": "Which?", "A": "red", "B": "007", "C": "", "D": "None", "answer": "D", "category": "x"},
        {"question": "Which?", "A": "red", "B": "blue", "C": "", "D": "", "answer": "A", "category": "y"},
    ]
    benchmark = load_benchmark(write_tsv(tmp_path, rows, type="mcq"))
    assert benchmark.questions()[0].text == (
        "Which?\nA. red\nB. 007\nD. None\nAnswer with the letter of the right option."
    )
    score = benchmark.score({"1": "none", "2": "B"})
    assert (score.value, score.parts, score.unmatched) == (50, {"x": 100, "y": 0}, 0)


def test_yes_and_no_have_an_f1(tmp_path: Path) -> None:
    rows = [{"question": "?", "answer": answer} for answer in ("yes", "Yes", "no", "NO", "yes")]
    benchmark = load_benchmark(write(tmp_path, rows, type="yesno", metric="f1"))
    score = benchmark.score({"1": "yes", "2": "no", "3": "Yes.", "4": "no", "5": "perhaps"})
    # one right yes, two said, three true
    assert score.value == pytest.approx(100 * 2 * 1 / (2 + 3))
    assert score.parts["accuracy"] == pytest.approx(40)
    assert score.unmatched == 1
    assert metric(score.judged, statistic=score.statistic, best=100) == pytest.approx(score.value)


def test_several_answers_are_a_list_in_a_cell(tmp_path: Path) -> None:
    rows = [{"question": "?", "answer": '["two", "2"]'}, {"question": "?", "answer": "[1]"}]
    benchmark = load_benchmark(write_tsv(tmp_path, rows, type="vqa"))
    assert [item.truth.answers for item in benchmark.items] == [("two", "2"), ("[1]",)]
    assert benchmark.score({"1": "2", "2": "[1]"}).value == 100


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([{"question": "?", "answer": "x"}], {"type": "choice"}, ["`type`", "mcq"]),
        ([{"question": "?", "answer": "x"}], {"metrc": "f1"}, ["`metrc`", "did you mean `metric`"]),
        ([{"question": "?", "answer": "x"}], {"metric": "f1"}, ["accuracy", "'f1'"]),
        ([{"question": "?", "answer": "x"}], {"name": "../x"}, ["`name`"]),
        ([{"question": "?", "answer": "x"}], {"file": "other.jsonl"}, ["other.jsonl", "cannot be read"]),
        ([{"question": "?", "answer": "x"}], {"file": "other.csv"}, ["other.csv", ".tsv"]),
        ([{"question": "?"}], {}, ["row 1, `answer`", "required"]),
        ([{"question": "?", "answer": "x"}, {"question": "", "answer": "x"}], {}, ["row 2, `question`"]),
        ([{"question": "?", "answer": True}], {}, ["row 1, `answer`", "in quotes"]),
        ([{"question": "?", "answer": "maybe"}], {"type": "yesno"}, ["row 1", "yes or no"]),
        ([{"question": "?", "answer": "C", "A": "a", "B": "b"}], {"type": "mcq"}, ["row 1", "A, B"]),
        ([{"question": "<image>", "answer": "x"}], {}, ["row 1, `question`", "0 images"]),
        ([{"question": "\ud800", "answer": "x"}], {}, ["row 1, `question`", "half a character"]),
        ([{"question": "?", "answer": "x"}], {"min_pixels": 9, "max_pixels": 4}, ["`min_pixels`", "swap"]),
        ([{"question": "?", "answer": "x"}], {"name": "results.json"}, ["`name`"]),
        ([{"question": "?", "answer": "x", "index": 1}] * 2, {}, ["row 2, `index`"]),
        ([], {}, ["no question"]),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, rows: list[Any], settings: dict[str, Any], said: list[str]) -> None:
    path = write(tmp_path, rows, **settings)
    with pytest.raises((DataError, EvaluationError)) as raised:
        load_benchmark(path)
    assert all(each in str(raised.value) for each in said), str(raised.value)


def test_a_table_with_more_cells_than_columns_is_refused(tmp_path: Path) -> None:
    path = write_tsv(tmp_path, [{"question": "?", "answer": "x"}])
    (tmp_path / "rows.tsv").write_text("question\tanswer\na\tb\tc\n")
    with pytest.raises(DataError, match="more cells"):
        load_benchmark(path)


# --- prompts


def base_processor() -> Any:
    processor = load_processor(MODEL)
    processor.chat_template = BASE_TEMPLATE
    return processor


def test_the_style_follows_the_chat_template() -> None:
    question = Question("1", (Path("a.png"), "What <|im_end|> is this?"))
    chat = Prompter(load_processor(MODEL))
    assert chat.style == "chat"
    assert "user\n<|vision_start|><|image_pad|><|vision_end|>What" in chat.text(question)
    plain = Prompter(base_processor())
    assert plain.style == "plain"
    assert plain.text(question) == "<|vision_start|><|image_pad|><|vision_end|>What <|im_end|> is this?"
    assert Prompter(load_processor(MODEL), "plain").text(question) == plain.text(question)


def test_chat_is_chatml_where_the_models_template_drops_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question("1", (Path("a.png"), "What?"))
    assert Prompter(base_processor(), "chat").text(question) == Prompter(load_processor(MODEL)).text(question)
    unknown = base_processor()
    monkeypatch.setattr(type(unknown.tokenizer), "get_vocab", lambda _: {"a": 1})
    with pytest.raises(ModelError, match="leaves the question out"):
        Prompter(unknown, "chat")


def test_a_text_model_takes_no_images(text_model: Path) -> None:
    prompter = Prompter(load_processor(text_model))
    with pytest.raises(ModelError, match="takes none"):
        prompter.text(Question("1", (b"", "?")))


# --- generation


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    model, processor, _ = tiny_policy()
    return model, processor


def mixed_questions(count: int = 11) -> list[Question]:
    rng = random.Random(5)
    questions = []
    for i in range(count):
        sizes = [(rng.randrange(20, 200), rng.randrange(20, 200)) for _ in range(i % 3)]
        images = [encoded(picture(rng, 60).resize(size)) for size in sizes]
        words = " ".join(rng.choices(["red", "blue", "what", "number"], k=rng.randrange(1, 30)))
        questions.append(Question(str(i), (*images, words)))
    return questions


@pytest.mark.parametrize(("style", "limits"), [("chat", (None, None)), ("plain", (80 * 80, 100 * 100))])
def test_batched_answers_equal_single_ones(policy: Any, style: Any, limits: tuple[Any, Any]) -> None:
    questions, generation = mixed_questions(), Generation(6, *limits)
    single = all_answers(HuggingFace(*policy, prompt_style=style, batch_size=1), questions, generation)
    batched = all_answers(HuggingFace(*policy, prompt_style=style, batch_size=4), questions, generation)
    assert single == batched
    assert len({answer.text for answer in single.values()}) > 3, "a model that always says the same shows nothing"


def test_answers_are_those_of_the_model_itself(policy: Any) -> None:
    """Against a plain call of `generate` on one question, image and chat template written out."""
    model, processor = policy
    image = picture(random.Random(3), 84)
    inputs = processor(
        text=[
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            "<|image_pad|><|vision_end|>what?<|im_end|>\n<|im_start|>assistant\n"
        ],
        images=[image],
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=7)[0, inputs["input_ids"].shape[1] :]
    answers = all_answers(HuggingFace(model, processor), [Question("1", (encoded(image), "what?"))], Generation(7))
    assert answers["1"].text == processor.tokenizer.decode(tokens, skip_special_tokens=True)


def test_pixel_limits_reach_the_processor(policy: Any) -> None:
    answerer = HuggingFace(*policy)
    question = Question("1", (Image.new("RGB", (56, 56)),))
    prompt = Prompt(question, "<|vision_start|><|image_pad|><|vision_end|>", list(question.images))
    tokens = {
        limits: answerer._encode([prompt], Generation(1, *limits))["input_ids"].shape[1]
        for limits in [(None, None), (112 * 112, None), (None, 28 * 28)]
    }
    assert tokens == {(None, None): 4 + 2, (112 * 112, None): 16 + 2, (None, 28 * 28): 1 + 2}


def test_the_model_is_left_as_it_was(policy: Any) -> None:
    model, processor = policy
    model.train()
    before = model.generation_config
    model.generation_config.repetition_penalty, model.generation_config.do_sample = 5.0, True
    try:
        with_penalty = all_answers(HuggingFace(model, processor), mixed_questions(2), Generation(6))
        assert model.training
        assert model.generation_config is before
        assert before.repetition_penalty == 5.0
    finally:
        model.generation_config.repetition_penalty, model.generation_config.do_sample = None, False
        model.eval()
    assert with_penalty == all_answers(HuggingFace(model, processor), mixed_questions(2), Generation(6))


def test_an_answer_ends_at_a_stop_token_or_is_truncated(policy: Any) -> None:
    answerer = HuggingFace(*policy)
    known = answerer.prompter.tokenizer.get_vocab()
    end, red = known["<|im_end|>"], answerer.prompter.tokenizer("red")["input_ids"]
    assert {end, known["<|endoftext|>"]} <= set(answerer.stops)
    assert answerer._read([*red, end, known["<|endoftext|>"]], 4) == Answer("red", len(red))
    assert answerer._read(red * 2, 2 * len(red)) == Answer("redred", 2 * len(red), truncated=True)


def test_an_answer_ends_where_the_model_itself_ends_one(policy: Any) -> None:
    model, processor = policy
    usual = set(stop_ids(processor, model))
    before = model.generation_config
    try:
        for own in (7, [7, 9]):
            model.generation_config = GenerationConfig(eos_token_id=own)
            added = {7, 9 if isinstance(own, list) else 7}
            assert set(stop_ids(processor, model)) == {*stop_ids(processor), *added}
    finally:
        model.generation_config = before
    assert not usual & {7, 9}


def test_the_fingerprint_of_a_processor_names_what_answers_depend_on(policy: Any) -> None:
    """Predictions are gone on with only by what would have said the same."""

    def fingerprint(change: Any = lambda processor: None, style: Any = "chat", stops: Any = (1, 2)) -> str:
        processor = load_processor(GOLDEN / "model")
        change(processor)
        return processor_fingerprint(Prompter(processor, style), stops)

    prints = [
        fingerprint(),
        fingerprint(stops=(1, 3)),
        fingerprint(style="plain"),
        fingerprint(lambda processor: setattr(processor.image_processor, "image_mean", [0.1, 0.2, 0.3])),
        fingerprint(lambda processor: processor.tokenizer.add_tokens(["circle"])),
        fingerprint(lambda processor: setattr(processor, "chat_template", CHATML.replace("helpful", "grumpy"))),
    ]
    assert len(set(prints)) == len(prints)
    assert fingerprint(stops=(2, 1)) == fingerprint()


def test_a_word_behind_a_stop_token_is_no_part_of_the_answer(policy: Any) -> None:
    answerer = HuggingFace(*policy)
    end, red = answerer.prompter.tokenizer.get_vocab()["<|im_end|>"], answerer.prompter.tokenizer("red")["input_ids"]
    assert answerer._read([*red, end, *red], 9) == Answer("red", len(red))


def test_what_cannot_be_asked_is_counted(tmp_path: Path, policy: Any) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [
        {"question": "a", "answer": "x", "image": "broken.png"},
        {"question": "b", "answer": "x", "image": "missing.png"},
        {"question": " ", "answer": "x"},
        {"question": "c", "answer": "x"},
    ]
    benchmark = load_benchmark(write(tmp_path, rows, max_new_tokens=2))
    answerer = HuggingFace(*policy, prompt_style="plain", batch_size=3)
    result = evaluate(answerer, [benchmark], tmp_path / "out").benchmarks[0]
    counts = result.counts
    assert counts is not None
    assert (counts.questions, counts.generated, counts.unreadable_images, counts.empty_prompts) == (4, 1, 2, 1)
    # Once the image is there, its question is asked; the others are not asked again.
    Image.new("RGB", (40, 40)).save(tmp_path / "missing.png")
    counts = evaluate(answerer, [benchmark], tmp_path / "out").benchmarks[0].counts
    assert counts is not None
    assert (counts.questions, counts.generated, counts.unreadable_images) == (4, 1, 1)


def test_a_batch_that_does_not_fit_is_halved(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = HuggingFace(*policy, batch_size=8)
    questions, generation = mixed_questions(), Generation(3)
    expected = all_answers(answerer, questions, generation)
    generate, sizes = answerer._generate, []

    def small_memory(batch: Any, settings: Any) -> Any:
        sizes.append(len(batch.asked))
        if len(batch.asked) > 2:
            raise torch.OutOfMemoryError
        return generate(batch, settings)

    monkeypatch.setattr(answerer, "_generate", small_memory)
    assert all_answers(answerer, questions, generation) == expected
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1], "what did not fit is not tried again"


def test_a_text_model_answers_in_batches(text_model: Path) -> None:
    model, processor = load_policy(text_model), load_processor(text_model)
    questions = [Question(str(i), ("red " * (i + 1),)) for i in range(4)]
    single, batched = (
        all_answers(HuggingFace(model, processor, batch_size=n, prompt_style="plain"), questions, Generation(4))
        for n in (1, 3)
    )
    assert single == batched
