"""What a model answered: on disk batch by batch, and resumed only by what would have answered the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from unidpo.data.images import content_digest
from unidpo.errors import Finding, ImageError, from_findings, shown
from unidpo.evaluate.benchmarks import EvaluationError, EvaluationFailed
from unidpo.files.writing import write_json
from unidpo.generate.questions import UNREADABLE_IMAGE, Answer, Answerer, Generation, Question
from unidpo.progress import OnProgress

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
        self._path = folder / PREDICTIONS
        if self._path.exists() or (folder / IDENTITY).exists():
            self._refuse_others()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / IDENTITY, self.identity)
        drop_cut_line(self._path)
        self.answers = read_answers(self._path)

    def _refuse_others(self) -> None:
        remedy = "give another --out, or delete the folder"
        try:
            before = json.loads((self.folder / IDENTITY).read_text("utf-8"))
        except FileNotFoundError:
            problem = f"there are predictions and no {IDENTITY}, which says what gave them"
            raise EvaluationError(f"{self.folder}: {problem}; {remedy}") from None
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{self.folder / IDENTITY}: cannot be read ({error}); {remedy}") from error
        changed = [
            Finding("changed", f"was {shown(before.get(key))}, is {shown(self.identity.get(key))}", key=key)
            for key in sorted(before.keys() | self.identity.keys())
            if before.get(key) != self.identity.get(key)
        ]
        if changed:
            title = f"{self.folder}: the predictions here were made with other things; give another --out"
            raise from_findings(EvaluationError, title, changed)

    def ask(
        self,
        questions: Sequence[Question],
        answerer: Answerer,
        generation: Generation,
        on_progress: OnProgress | None = None,
    ) -> int:
        """Have the questions answered that are not, and give how many answers that took.

        Asked are new questions, those whose text or image is another now, and those whose image could not be read.

        Raises:
            EvaluationFailed: questions were left without an answer.
        """
        digests = {question.index: question_digest(question) for question in questions}
        todo = [question for question in questions if not self._is_answered(question.index, digests[question.index])]
        left = {question.index for question in todo}
        tell = on_progress or (lambda stage, done, total: None)
        tell("answers", len(questions) - len(left), len(questions))
        generated = 0
        for batch in answerer.answer(todo, generation):
            kept = {index: KeptAnswer(**asdict(given), question=digests[index]) for index, given in batch.items()}
            append_lines(self._path, [{"index": index, **asdict(answer)} for index, answer in kept.items()])
            self.answers |= kept
            left -= kept.keys()
            generated += sum(given.problem is None for given in kept.values())
            tell("answers", len(questions) - len(left), len(questions))
        if left:
            raise EvaluationFailed(f"{len(left)} questions were left without an answer")
        return generated

    def _is_answered(self, index: str, digest: str) -> bool:
        known = self.answers.get(index)
        return known is not None and known.question == digest and known.problem != UNREADABLE_IMAGE


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


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file; the operating system has them when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


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
    return {str(record.pop("index")): KeptAnswer(**record) for record in read_lines(path, _COLUMNS)}


def read_lines(path: Path, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
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
