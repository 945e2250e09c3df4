"""The nine benchmarks in VLMEvalKit's own formats, small, with every oddity that real files have."""

from __future__ import annotations

import base64
import csv
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

MME_PERCEPTION = (
    *("OCR", "artwork", "celebrity", "color", "count"),
    *("existence", "landmark", "position", "posters", "scene"),
)
MME_REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
OCR_CATEGORIES = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)


@dataclass(frozen=True)
class Table:
    """A benchmark: its rows as they stand in the file, and what a model that knows everything answers."""

    name: str
    rows: Sequence[Mapping[str, str]]
    truth: Mapping[str, str]

    def write(self, folder: Path) -> Path:
        path = folder / f"{self.name}.tsv"
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t", restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        return path


def picture(seed: int, *, mode: str = "RGB", kind: str = "JPEG", size: tuple[int, int] | None = None) -> str:
    """Base64 of a picture of no size in particular."""
    rng = random.Random(seed)
    image = Image.new("RGB", size or (rng.randrange(30, 130), rng.randrange(30, 130)), "white")
    image.paste(tuple(rng.randrange(256) for _ in range(3)), (5, 5, 25, 25))
    file = io.BytesIO()
    image.convert(mode).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def mmbench(name: str) -> Table:
    """Three questions, each as often as it has options, rolled; later rolls name the first one's image."""
    chinese = name.endswith("CN")
    questions = [
        (
            ("图中是什么?" if chinese else "What is shown?"),
            ["circle", "square", "dot", "line"],
            "",
            "coarse_perception",
        ),
        ("Which 1.5?", ["1.5", "2.5", "3.50"], "A hint.", "logic_reasoning"),
        ("Is\tit\nred?", ["yes", "no"], "", "logic_reasoning"),
    ]
    rows, truth = [], {}
    for number, (question, options, hint, category) in enumerate(questions, start=241):
        for roll in range(len(options)):
            rolled = options[roll:] + options[:roll]
            index = number + roll * 1_000_000
            letter = "ABCD"[rolled.index(options[0])]
            rows.append(
                {
                    "index": str(index),
                    "question": question,
                    "hint": hint,
                    **dict(zip("ABCD", rolled, strict=False)),
                    "answer": letter,
                    "category": category,
                    "l2-category": category,
                    "split": "dev",
                    "image": picture(number) if roll == 0 else str(number),
                }
            )
            truth[str(index)] = letter
    return Table(name, rows, truth)


def multiple_choice(name: str) -> Table:
    """One letter each; an option may be missing in the middle of nowhere, and some rows have no category."""
    options = [["red", "green", "blue"], ["3", "7"], ["a cat", "a dog", "a cow", "none of these"], ["up", "down"]]
    rows, truth = [], {}
    for number, given in enumerate(options, start=0 if name.startswith("SEED") else 5):
        letter = "ABCD"[number % len(given)]
        rows.append(
            {
                "index": str(number),
                "question": f"Question {number}?",
                **dict(zip("ABCD", given, strict=False)),
                "answer": letter,
                "category": "Instance Identity" if number % 2 else "Scene Understanding",
                "split": "test",
                "image": picture(number, mode="P", kind="PNG") if number % 2 else picture(number),
            }
        )
        ways = [letter, f"{letter}.", f"The answer is ({letter}).", given["ABCD".index(letter)]]
        truth[str(number)] = ways[number % 4]
    return Table(name, rows, truth)


def mme() -> Table:
    """Two questions on each picture, one to be answered yes and one no; the second names the first one's image."""
    rows, truth = [], {}
    for number, category in enumerate(MME_PERCEPTION + MME_REASONING):
        for k, answer in enumerate(("Yes", "No")):
            index = str(2 * number + k)
            rows.append(
                {
                    "index": index,
                    "question": f"Is this {answer} {category}? Please answer yes or no.",
                    "answer": answer,
                    "category": category,
                    "image_path": f"{category}/{number:04d}.jpg",
                    "image": picture(number) if k == 0 else str(2 * number),
                }
            )
            truth[index] = {"Yes": "Yes, it is.", "No": "no"}[answer]
    return Table("MME", rows, truth)


def pope() -> Table:
    """A question may belong to several categories, and counts in each."""
    categories = ["adversarial,popular,random", "adversarial", "random,popular"]
    rows, truth = [], {}
    for number in range(6):
        answer = "Yes" if number % 2 else "No"
        rows.append(
            {
                "index": str(number),
                "question": f"Is there a thing {number} in the image?",
                "answer": answer,
                "category": categories[number % 3],
                "image": picture(number),
            }
        )
        truth[str(number)] = answer
    return Table("POPE", rows, truth)


def chartqa() -> Table:
    """Answers that other programs spoil: "None" as nothing, "007" as 7, "3.10" as 3.1."""
    answers = ["None", "007", "3.10", "12%", "Yes", "NA", "0", "=1+1", "['2010', '2011']"]
    truth = {str(i): answer for i, answer in enumerate(answers)} | {"8": "2011"}
    rows = [
        {"index": str(i), "question": f"What is {i}?", "answer": a, "split": "test_human", "image": picture(i)}
        for i, a in enumerate(answers)
    ]
    return Table("ChartQA_TEST", rows, truth)


def textvqa() -> Table:
    """Ten people's answers as a list in a cell, quotes and all."""
    said = ["stop", "nokia", "None", "it's 5", "007"]
    truth = {str(34602 + i): answer for i, answer in enumerate(said)}
    rows = [
        {
            "index": i,
            "question": f"Text {i}?",
            "answer": repr([a] * 6 + ["x", "y", "z", 'q"']),
            "image": picture(int(i)),
        }
        for i, a in truth.items()
    ]
    return Table("TextVQA_VAL", rows, truth)


def ocrbench() -> Table:
    """A list of answers each, of which one must stand in the text."""
    answers = [["CENTRE"], ["07"], ["none", "None"], ["a\nb"], ["1234"], ["xq"], ["Bus 5"], ["p. 3"], ["$4.50"]]
    answers.append(["x ^ 2 + 1"])
    rows = [
        {"index": str(i), "question": f"Read {i}.", "answer": repr(a), "category": category, "image": picture(i)}
        for i, (a, category) in enumerate(zip(answers, OCR_CATEGORIES, strict=True))
    ]
    truth = {str(i): f"It says {a[-1].lower()} here" for i, a in enumerate(answers)}
    return Table("OCRBench", rows, truth)


def tables() -> dict[str, Table]:
    """All nine by name."""
    made = [
        chartqa(),
        mmbench("MMBench_DEV_CN"),
        mmbench("MMBench_DEV_EN"),
        mme(),
        ocrbench(),
        pope(),
        multiple_choice("ScienceQA_TEST"),
        multiple_choice("SEEDBench_IMG"),
        textvqa(),
    ]
    return {table.name: table for table in made}
