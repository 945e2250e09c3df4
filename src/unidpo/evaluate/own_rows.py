"""From the table of a benchmark of one's own to its questions, and everything that is wrong with its rows.

Answers keep their spelling: "007", "None" and "=1+1" are compared as they stand in the file.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import string
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, BeforeValidator, Field, ValidationError, ValidationInfo, field_validator

from unidpo.config.explaining import findings_of
from unidpo.data.formats.files import loads, rows_of
from unidpo.data.formats.row import DATA_URI
from unidpo.data.formats.texts import encodable, marked
from unidpo.data.pairs import IMAGE
from unidpo.errors import DataError, Finding, shown
from unidpo.evaluate.benchmarks import BenchmarkQuestion, EvaluationError
from unidpo.evaluate.scorers import Truth
from unidpo.files.regular import read_regular

_YES_NO = {"yes": "", "no": ""}
_IMAGES = ("images", "image", "image_path")
_BASE64_STARTS = ("iVBOR", "/9j/", "R0lGOD", "UklGR")
"""Of PNG, JPEG, GIF and WebP."""
_LONGEST_PATH = 1024


@dataclass(frozen=True, slots=True)
class Item:
    """A question, and what is needed to judge an answer."""

    question: BenchmarkQuestion
    truth: Truth
    category: str = ""


def read_items(path: Path, answer_type: str, instruction: str, images: Path) -> tuple[list[Item], list[Finding]]:
    """All questions of a file that can be used, and what is wrong with the others.

    Args:
        path: TSV, JSONL or Parquet.
        answer_type: the benchmark's type.
        instruction: follows each question.
        images: folder that image paths start from. No image is opened.

    Raises:
        DataError: the file cannot be read.
    """
    items: dict[str, Item] = {}
    findings: list[Finding] = []
    for number, row in _rows(path):
        item = _item(number, row, answer_type, instruction, images)
        if isinstance(item, list):
            findings += [replace(finding, row=number) for finding in item]
        elif (index := item.question.index) in items:
            findings.append(Finding("bad-row", f"{shown(index)} was that of an earlier row", row=number, key="index"))
        else:
            items[index] = item
    return list(items.values()), findings


def _text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"text is expected, not {shown(value)}; put it in quotes")
    if not encodable(str(value)):
        raise ValueError("half a character stands in it (\\ud800 to \\udfff); write it whole")
    return str(value)


def _listed(value: object) -> object:
    """A list, also one of strings that a cell of a table holds as JSON; of anything else a list of it alone."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            if found and all(isinstance(each, str) for each in found):
                return found
    return value if isinstance(value, list) else [value]


def _image(value: object) -> object:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, (str, bytes)) or not value:
        raise ValueError(f"an image is a path or base64, not {shown(value)}")
    return value


Text = Annotated[str, BeforeValidator(_text)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_listed)]
Images = Annotated[tuple[Annotated[str | bytes, BeforeValidator(_image)], ...], BeforeValidator(_listed)]


class QuestionRow(BaseModel):
    """A row without its empty cells; validated in the context of the benchmark's type."""

    options: dict[str, Text]
    index: Text
    question: Text
    answer: Texts
    hint: Text = ""
    category: Text = ""
    images: Images = Field((), validation_alias=AliasChoices(*_IMAGES))

    @field_validator("answer")
    @classmethod
    def _fits_the_type(cls, answers: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        answer_type, first, options = info.context, answers[0], info.data.get("options", {})
        if answer_type in ("mcq", "yesno") and len(answers) > 1:
            raise ValueError(f"the type {answer_type} has one answer")
        if answer_type == "mcq" and (first not in options or len(options) < 2):
            letters = ", ".join(options) or "(there are none)"
            raise ValueError(f"{shown(first)} is none of the letters {letters}; options are the columns A, B, ...")
        if answer_type == "yesno":
            answers = (first.lower(),)
            if answers[0] not in _YES_NO:
                raise ValueError(f"the answer is yes or no, not {shown(first)}")
        return answers


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows and their numbers from 1, those of JSONL as lines. No value is converted."""
    if path.suffix == ".parquet":
        yield from rows_of(path)
        return
    if path.suffix not in (".tsv", ".jsonl", ".ndjson"):
        raise EvaluationError(f"{path}: the questions of a benchmark are a .tsv, .jsonl or .parquet file")
    try:
        text = read_regular(path).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: the questions cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the file is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if path.suffix != ".tsv":
        yield from ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
        return
    csv.field_size_limit(sys.maxsize)  # a cell may hold an image
    try:
        yield from enumerate(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", restkey="", strict=True), 1)
    except csv.Error as error:
        raise DataError(f"{path}: not a table of tab-separated values ({error})") from error


def _item(number: int, row: Any, answer_type: str, instruction: str, folder: Path) -> Item | list[Finding]:
    """A row, or a line of JSON, as a question, or why it is none."""
    if isinstance(row, str):
        try:
            row = loads(row, parse_int=str, parse_float=str, parse_constant=str)
        except (ValueError, RecursionError) as error:
            return [Finding("bad-row", f"the line is not valid JSON ({error})")]
    if isinstance(row, Finding):
        return [row]
    if not isinstance(row, dict):
        return [Finding("bad-row", "a row is an object with `question` and `answer`")]
    if row.get("") is not None:
        return [Finding("bad-row", "the row has more cells than the table has columns")]
    cells = {key: value for key, value in row.items() if value not in (None, "", [])}
    given = [f"`{key}`" for key in _IMAGES if key in cells]
    if len(given) > 1:
        return [Finding("bad-row", f"{' and '.join(given)} are both given; keep one of them")]
    options = {letter: cells[letter] for letter in string.ascii_uppercase if answer_type == "mcq" and letter in cells}
    values = {"index": number, **cells, "options": options}
    try:
        read = QuestionRow.model_validate(values, context=answer_type)
    except ValidationError as error:
        found = findings_of(error, QuestionRow, values)
        return [replace(finding, key=(finding.key or "").removeprefix("options.")) for finding in found]
    lines = [read.hint, read.question, *(f"{letter}. {text}" for letter, text in read.options.items()), instruction]
    content = marked("\n".join(line for line in lines if line))
    images = [_located(each, folder) for each in read.images]
    if IMAGE not in content:
        content = (IMAGE,) * len(images) + content
    elif content.count(IMAGE) != len(images):
        problem = f"`{IMAGE.value}` stands {content.count(IMAGE)} times in it, and the row has {len(images)} images"
        return [Finding("bad-row", problem, key="question")]
    left = iter(images)
    parts = tuple(part if isinstance(part, str) else next(left) for part in content)
    choices = read.options or (_YES_NO if answer_type == "yesno" else {})
    return Item(BenchmarkQuestion(read.index, parts, choices), Truth(read.answer, read.options), read.category)


def _located(image: str | bytes, folder: Path) -> Path | bytes:
    """The bytes of an image in the row; of a path the file, which is not looked at."""
    if isinstance(image, bytes):
        return image
    uri = DATA_URI.match(image)
    if uri or len(image) > _LONGEST_PATH or image.startswith(_BASE64_STARTS):
        with suppress(ValueError):
            return base64.b64decode(image[uri.end() if uri else 0 :], validate=True)
    return folder / image
