"""What a model said, on disk as soon as it is said; gone on with only by what would have said the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from unidpo.data.images import content_digest
from unidpo.errors import Finding, ImageError, from_findings, shown
from unidpo.evaluate.benchmarks import EvaluationError
from unidpo.files.writing import write_json
from unidpo.generate.questions import UNREADABLE_IMAGE, Answer, Question

IDENTITY, PREDICTIONS = "identity.json", "predictions.jsonl"


@dataclass(frozen=True, slots=True)
class KeptAnswer(Answer):
    """An answer on disk.

    Attributes:
        question: digest of the question's text and images, see `question_digest`.
    """

    question: str = ""


_COLUMNS = ("index", *(field.name for field in fields(KeptAnswer)))


class Predictions:
    """The answers of one model to one benchmark, in `predictions.jsonl`.

    Args:
        folder: of the benchmark; made here.
        identity: all that the answers depend on, as JSON holds it.

    Raises:
        EvaluationError: the folder holds answers that something else gave, or a damaged file.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.path = folder / PREDICTIONS
        self.refuse_others()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / IDENTITY).exists():
            write_json(folder / IDENTITY, self.identity)
        drop_cut_line(self.path)
        self.answers = read_answers(self.path)
        self._digests: dict[str, str] = {}

    def refuse_others(self) -> None:
        """Raise `EvaluationError` where the folder holds answers that something else gave."""
        try:
            before = json.loads((self.folder / IDENTITY).read_text("utf-8"))
        except FileNotFoundError:
            if self.path.exists():
                raise EvaluationError(
                    f"{self.folder}: there are predictions and no {IDENTITY}, which says what gave them; "
                    "give another --out, or delete the folder"
                ) from None
            return
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"{self.folder / IDENTITY}: cannot be read ({error}); give another --out, or delete the folder"
            ) from error
        changed = [
            Finding("changed", f"was {shown(before.get(key))}, is {shown(self.identity.get(key))}", key=key)
            for key in sorted(before.keys() | self.identity.keys())
            if before.get(key) != self.identity.get(key)
        ]
        if changed:
            title = f"{self.folder}: the predictions here were made with other things; give another --out"
            raise from_findings(EvaluationError, title, changed)

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Append answers to questions that `missing` gave; the operating system has them when this returns."""
        kept = {index: KeptAnswer(**asdict(each), question=self._digests[index]) for index, each in answers.items()}
        lines = [json.dumps({"index": index, **asdict(answer)}, ensure_ascii=True) for index, answer in kept.items()]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
        self.answers |= kept

    def missing(self, questions: Iterable[Question]) -> list[Question]:
        """Those still to be answered: new ones, ones whose text or image is another now, ones with an unread image."""
        todo = []
        for question in questions:
            digest = self._digests[question.index] = question_digest(question)
            known = self.answers.get(question.index)
            if known is None or known.question != digest or known.problem == UNREADABLE_IMAGE:
                todo.append(question)
        return todo


def question_digest(question: Question) -> str:
    """16 hex digits that name what is asked: texts and the content of images in their order."""
    digest = hashlib.blake2b(digest_size=8)
    for part in question.parts:
        if isinstance(part, str):
            content = b"text" + part.encode()
        else:
            try:
                content = b"image" + content_digest(part)
            except ImageError:
                content = b"unreadable"
        digest.update(len(content).to_bytes(8) + content)
    return digest.hexdigest()


def drop_cut_line(path: Path) -> None:
    """A process that is killed leaves half a line at the end."""
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def read_answers(path: Path) -> dict[str, KeptAnswer]:
    """Answers by index; of two to one question the later one. A last line without its end is not there."""
    return {str(record.pop("index")): KeptAnswer(**record) for record in read_records(path, _COLUMNS)}


def read_records(path: Path, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Those keys of every line of a file that grows line by line; none where there is no file.

    Raises:
        EvaluationError: a line is damaged.
    """
    *lines, _ = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            yield {key: record[key] for key in keys}
        except (ValueError, KeyError, TypeError) as error:
            problem = f"line {number} is damaged ({error}); delete this line to have its question asked again"
            raise EvaluationError(f"{path}: {problem}") from error
