"""The digits world, its grader, its checkpoint, and how a model is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unidpo.demo import CHECKPOINT
from unidpo.demo.answers import accuracies, greedy_answers, sampled_answers, write_ranked_data
from unidpo.demo.digits import CELL, LETTERS, DigitQuestion, DigitsWorld, grade, is_correct, load_world, noisy_grade
from unidpo.errors import UserError
from unidpo.model.load import load_policy, load_processor

BLANK = Image.new("RGB", (CELL, CELL), "white")


@pytest.fixture(scope="module")
def world() -> DigitsWorld:
    return load_world()


@pytest.fixture(scope="module")
def base() -> Iterator[tuple[Any, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_policy(CHECKPOINT), load_processor(CHECKPOINT)
    torch.set_num_threads(threads)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def read(answer: str) -> DigitQuestion:
    return DigitQuestion("read", "Read the number.", answer, tuple(map(int, answer)), BLANK)


YES = DigitQuestion("yes_no", "Is there a 7?", "Yes", (7,), BLANK)
CHOICE = DigitQuestion("choice", "Which digit do you see? A) 3 B) 7 C) 1 D) 0", "B", (7,), BLANK, (3, 7, 1, 0))


# The world


def test_no_scan_is_on_both_sides_of_the_split(world: DigitsWorld) -> None:
    assert not set(world.train) & set(world.held_out)
    assert sorted([*world.train, *world.held_out]) == list(range(1797))
    assert np.bincount(world.labels[world.held_out], minlength=10).min() > 20


def test_no_held_out_picture_shows_a_training_scan(world: DigitsWorld) -> None:
    """The ink of each cell, wherever in the cell it lies, is found among the scans of its own split only."""
    for split, others in (("train", world.held_out), ("held_out", world.train)):
        own = {np.round(255 * (1 - world.ink[i])).astype(np.uint8).tobytes() for i in getattr(world, split)}
        other = {np.round(255 * (1 - world.ink[i])).astype(np.uint8).tobytes() for i in others}
        for question in world.questions(60, split=split, rng=rng()):  # type: ignore[arg-type]
            pixels = np.asarray(question.image.convert("L"))
            for cell in np.split(pixels, len(question.digits), axis=1):
                windows = {cell[i : i + 28, j : j + 28].tobytes() for i in range(5) for j in range(5)}
                assert windows & own
                assert not (windows & other) - own


def test_the_same_seed_asks_the_same_questions(world: DigitsWorld) -> None:
    first, again, other = (world.questions(30, split="train", rng=rng(seed)) for seed in (3, 3, 4))
    assert first == again
    assert [q.image.tobytes() for q in first] == [q.image.tobytes() for q in again]
    assert first != other


def test_every_answer_follows_from_the_digits(world: DigitsWorld) -> None:
    for question in world.questions(600, split="train", rng=rng()):
        assert question.image.size == (CELL * len(question.digits), CELL)
        if question.kind == "read":
            assert question.answer == "".join(map(str, question.digits))
        elif question.kind == "yes_no":
            asked = int(question.prompt.removeprefix("Is there a ").removesuffix("?"))
            assert question.answer == ("Yes" if asked in question.digits else "No")
        else:
            assert len(set(question.options)) == 4
            chosen = question.options[LETTERS.index(question.answer)]
            assert [option for option in question.options if option in question.digits] == [chosen]
            assert f"{question.answer}) {chosen}" in question.prompt


def test_answers_are_balanced(world: DigitsWorld) -> None:
    questions = world.questions(3000, split="train", rng=rng())
    yes = np.mean([q.answer == "Yes" for q in questions if q.kind == "yes_no"])
    letters = [np.mean([q.answer == letter for q in questions if q.kind == "choice"]) for letter in LETTERS]
    assert abs(yes - 0.5) < 0.06
    assert max(letters) < 0.31


# The grader


@pytest.mark.parametrize(
    ("question", "text", "expected"),
    [
        (read("472"), "472", 5),
        (read("472"), " 472\n", 5),
        (read("472"), "475", 4),  # two of three
        (read("472"), "47", 4),
        (read("472"), "274", 2),  # the middle one
        (read("47"), "4", 3),
        (read("47"), "74", 1),
        (read("47"), "471", 4),  # two of three written
        (read("47"), "It is 47.", 3),
        (read("47"), "4 7", 3),
        (read("47"), "", 1),
        (read("47"), "seven", 1),
        (YES, "Yes", 5),
        (YES, "No", 1),
        (YES, "yes.", 3),
        (YES, "Yes, there is.", 3),
        (YES, "", 1),
        (CHOICE, "B", 5),
        (CHOICE, "7", 3),
        (CHOICE, "B) 7", 3),
        (CHOICE, "A", 1),
        (CHOICE, "3", 1),
        (CHOICE, "  ", 1),
    ],
)
def test_grades(question: DigitQuestion, text: str, expected: int) -> None:
    assert grade(question, text) == expected
    assert is_correct(question, text) == (expected == 5)


def test_grading_noise_has_the_stated_rate() -> None:
    generator = rng()
    grades = [noisy_grade(read("47"), "47", generator, noise=0.2) for _ in range(4000)]
    assert set(grades) == {1, 2, 3, 4, 5}
    assert np.mean([g != 5 for g in grades]) == pytest.approx(0.2 * 4 / 5, abs=0.02)
    assert {noisy_grade(read("47"), "47", generator, noise=0.0) for _ in range(100)} == {5}


def test_missing_scikit_learn_says_what_to_install_before_torch_is_imported() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None; sys.argv = ['unidpo', 'demo']\n"
        "try:\n    from unidpo.cli import main; main()\n"
        "finally:\n    print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert ran.stderr == "the demo needs the handwritten digits of scikit-learn: pip install scikit-learn\n"
    assert ran.stdout == "[]\n"
    assert not Path("demo").exists()


# The data set


def test_ranked_data_merges_equal_answers_and_leaves_out_what_teaches_nothing(tmp_path: Path) -> None:
    questions = [read("47"), read("12"), read("9")]
    answers = [["47", "74", "47", "4"], ["12", "12", "12", "12"], ["8", "7", "", "8"]]
    data = write_ranked_data(questions, answers, tmp_path, noise=0.0, rng=rng())
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert rows == [
        {
            "prompt": "<image>Read the number.",
            "images": ["images/0001.png"],
            "responses": [{"text": "47", "score": 5}, {"text": "74", "score": 1}, {"text": "4", "score": 3}],
        }
    ]
    with Image.open(tmp_path / "images/0001.png") as image:
        assert image.size == (CELL, CELL)
    assert len(list((tmp_path / "images").iterdir())) == 1


def test_ranked_data_is_read_by_the_package(tmp_path: Path) -> None:
    from unidpo.data.formats import read_groups

    data = write_ranked_data([read("47")], [["47", "74", "4"]], tmp_path, noise=0.0, rng=rng())
    result = read_groups(data)
    assert not result.findings
    (group,) = result.groups
    assert len(group.pairs) == 3


def test_accuracy_and_its_standard_error() -> None:
    table = accuracies([read("47"), read("12"), read("9"), read("3"), YES], ["47", "12", "9", "8", "No"])
    assert {kind: (each.accuracy, each.questions) for kind, each in table.items()} == {
        "read": (0.75, 4),
        "yes_no": (0, 1),
    }
    assert table["read"].standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


# The checkpoint


def test_checkpoint_is_small_and_says_what_it_is() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 10_000_000
    card = (CHECKPOINT / "README.md").read_text()
    for fact in ("22 % reversed", "22 % without the last digit", "12 % with a wrong digit"):
        assert fact in card


def test_checkpoint_loads_as_any_model_does() -> None:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    text = "Zürich, 1,797 scans — 手写"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for token in ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|endoftext|>"):
        assert len(tokenizer(token)["input_ids"]) == 1


def test_a_cell_is_one_token_and_no_pixel_is_resampled(base: tuple[Any, Any], world: DigitsWorld) -> None:
    _, processor = base
    question = next(q for q in world.questions(50, split="held_out", rng=rng()) if len(q.digits) == 3)
    inputs = processor(text=["<|image_pad|>"], images=[question.image], return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 3
    values = processor.image_processor
    restored = inputs["pixel_values"] * values.image_std[0] + values.image_mean[0]
    # Every pixel once per colour and once per frame of the temporal patch.
    assert sorted(np.asarray(question.image).repeat(2).ravel()) == sorted(
        (restored * 255).round().int().ravel().tolist()
    )


def test_base_model_sees_well_and_answers_sloppily(base: tuple[Any, Any], world: DigitsWorld) -> None:
    """Greedy: nearly perfect where the annotator had no bad habit, mostly wrong by the habit where it had one."""
    questions = world.questions(300, split="held_out", rng=rng(5), kinds=("read", "read", "yes_no", "choice"))
    answers = greedy_answers(*base, questions)
    table = accuracies(questions, answers)
    assert table["yes_no"].accuracy > 0.95
    assert table["choice"].accuracy > 0.95
    assert 0.55 < table["read"].accuracy < 0.8
    asked = list(zip(questions, answers, strict=True))
    careful = [is_correct(q, a) for q, a in asked if q.prompt == "Read the number."]
    backwards = [a == q.answer[::-1] for q, a in asked if q.prompt == "What number is this?" and len(q.digits) > 1]
    shortened = [a == q.answer[:-1] for q, a in asked if q.prompt == "Which digits do you see?" and len(q.digits) > 1]
    assert np.mean(careful) > 0.9
    assert np.mean(backwards) > 0.35
    assert np.mean(shortened) > 0.6


# Asking


def test_batched_answers_equal_single_ones(base: tuple[Any, Any], world: DigitsWorld) -> None:
    questions = world.questions(12, split="held_out", rng=rng(1))
    together = greedy_answers(*base, questions, batch_size=12)
    assert together == greedy_answers(*base, questions, batch_size=1)
    assert together == greedy_answers(*base, questions, batch_size=5)
    assert len(set(together)) > 3


def test_samples_follow_from_the_seed_alone(base: tuple[Any, Any], world: DigitsWorld) -> None:
    questions = world.questions(8, split="train", rng=rng(1), kinds=("read",))
    torch.manual_seed(1)
    first = sampled_answers(*base, questions, count=4, seed=7)
    before = torch.get_rng_state()
    again = sampled_answers(*base, questions, count=4, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    assert first == again != sampled_answers(*base, questions, count=4, seed=8)
    assert [len(texts) for texts in first] == [4] * 8
    assert max(len(set(texts)) for texts in first) > 1


# The folder


def test_the_demo_replaces_its_own_folder_and_nothing_else(tmp_path: Path) -> None:
    from unidpo.demo.story import _make_folder

    out = tmp_path / "demo"
    _make_folder(out)
    (out / "run").mkdir()
    (out / "run" / "metrics.jsonl").touch()
    (out / "notes.txt").touch()
    _make_folder(out)
    assert {path.name for path in out.iterdir()} == {".unidpo-demo", "notes.txt"}

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").touch()
    with pytest.raises(UserError, match="something else"):
        _make_folder(other)
    assert (other / "chapter.tex").exists()


# The story


def test_a_short_demo_leaves_all_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from unidpo.demo import story

    monkeypatch.setattr(story, "TRAIN_PROMPTS", 80)
    monkeypatch.setattr(story, "HELD_OUT_QUESTIONS", 40)
    out = tmp_path / "demo"
    with (tmp_path / "told.txt").open("w") as told:
        story.run_demo(out, seed=3, console=Console(file=told, width=120))
    table = json.loads((out / "accuracy.json").read_text())
    assert {kind: entry["questions"] for kind, entry in table["trained"].items()} == {
        "read": 20,
        "yes_no": 10,
        "choice": 10,
    }
    with Image.open(out / "answers.png") as image:
        assert min(image.size) > 500
    records = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["rewards/margins"] > records[0]["rewards/margins"]
    # What is trained is the language model's behaviour, not its sight.
    base, trained = load_policy(CHECKPOINT).state_dict(), load_policy(out / "run" / "model").state_dict()
    assert {name for name in base if torch.equal(base[name], trained[name])} == {n for n in base if "visual" in n}
    text = (tmp_path / "told.txt").read_text()
    for said in ("read the number", str(out / "run"), f"unidpo train {out / 'recipe.yaml'}", "unidpo data check"):
        assert said in text
