"""The nine benchmarks of the paper: questions and scorers come from VLMEvalKit, which runs in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from unidpo.config.named import PAPER
from unidpo.data.download import FetchError, download_url, in_megabytes, size_of, unfinished_of
from unidpo.evaluate.benchmarks import BenchmarkQuestion, EvaluationError, EvaluationFailed, Judged, Score, md5_of
from unidpo.generate.questions import Generation, Part
from unidpo.progress import OnProgress

_LOG = logging.getLogger(__name__)
_WORKER = Path(__file__).with_name("vlmeval_worker.py")
_PYTHON = "UNIDPO_VLMEVAL_PYTHON"
OCRBENCH_MIN_PIXELS = 100 * 28 * 28
"""What VLMEvalKit enlarges OCRBench's images to; it sets no limits for the others."""


def data_folder(given: Path | None = None) -> Path:
    """Where benchmarks' files lie: as given, else `$LMUData`, else `~/LMUData`, as for VLMEvalKit itself."""
    return given or Path(os.environ.get("LMUData") or Path.home() / "LMUData")  # noqa: SIM112


def require_files(names: Sequence[str], folder: Path) -> None:
    """Raise `EvaluationError` that says what to download, from where, with which checksum, and where to."""
    places = {name: folder / f"{name}.tsv" for name in names}
    lines = [
        f"{name}: download {PAPER[name].url} (MD5 {PAPER[name].md5}) to {place}"
        for name, place in places.items()
        if not place.is_file()
    ]
    if lines:
        raise EvaluationError("\n".join([*lines, "add --download to have this done, or --data for another folder"]))


def download_file(name: str, folder: Path, on_progress: OnProgress | None = None) -> Path:
    """Bring a benchmark's file to its place, unless it is there, resuming what an earlier call left.

    Raises:
        FetchError: the server cannot be reached, breaks off, or sends something else than was published.
        DataError: the server has no such file, or the folder cannot be written.
    """
    place = folder / f"{name}.tsv"
    if place.is_file():
        return place
    published = PAPER[name]
    unfinished, size = unfinished_of(place, published.md5), size_of(published.url)
    download_url(published.url, unfinished, size, in_megabytes(f"download {name}", size, on_progress))
    if md5_of(unfinished) != published.md5:
        unfinished.unlink()
        raise FetchError(f"{published.url}: its MD5 is not the published {published.md5}; it was deleted")
    unfinished.replace(place)
    return place


def worker_python() -> str:
    """The Python that has VLMEvalKit: this one, or the one `$UNIDPO_VLMEVAL_PYTHON` names.

    Raises:
        EvaluationError: neither has it.
    """
    other = os.environ.get(_PYTHON)
    if other:
        if not Path(other).is_file():
            raise EvaluationError(f"{_PYTHON}={other}: there is no such program")
        return other
    if importlib.util.find_spec("vlmeval") is None:
        raise EvaluationError(
            'the benchmarks of the paper need VLMEvalKit: pip install "unidpo[eval]" (see docs/evaluation.md), '
            f"or set {_PYTHON} to the Python of an environment that has ms-vlmeval"
        )
    return sys.executable


class Worker:
    """The process that imports VLMEvalKit. A context manager; started at the first request."""

    def __init__(self) -> None:
        self.version = ""
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="unidpo-vlmeval-")
        self._log = Path(self._folder.name) / "log"

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._folder.cleanup()

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(OSError):
                self._process.communicate()
            self._process = None

    def ask(self, do: str, **request: Any) -> Any:
        """Send a request and wait for its answer; see `vlmeval_worker`.

        Raises:
            EvaluationFailed: the process ended, or VLMEvalKit could not do it.
        """
        self.start()
        answer = self._exchange({"do": do, **request})
        if "error" in answer:
            raise EvaluationFailed(f"{request['data']}: VLMEvalKit gives no {do}: {answer['error']}")
        return answer["ok"]

    def start(self) -> None:
        """Import VLMEvalKit, which takes some ten seconds, unless it is done. Raises `EvaluationError`."""
        if self._process is not None:
            return
        # Its judges read keys from the environment and write them to the log; no benchmark here needs one.
        environment = {name: value for name, value in os.environ.items() if "API_KEY" not in name}
        environment |= {"LMUData": self._folder.name, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [worker_python(), "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                cwd=self._folder.name,
                env=environment,
            )
        self.version = self._exchange(None)["ok"]

    def _exchange(self, request: Mapping[str, Any] | None) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        line = ""
        with contextlib.suppress(OSError):
            if request is not None:
                print(json.dumps(request), file=process.stdin, flush=True)
            line = process.stdout.readline()
        if not line:
            self._end()  # the next benchmark gets another one
            last = self._log.read_text("utf-8", errors="replace").strip().splitlines()[-1:]
            raise EvaluationFailed(f"the process of VLMEvalKit ended: {' '.join(last) or 'it left no message'}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class VlmevalBenchmark:
    """One of the nine, on a file that is there.

    Args:
        name: of the benchmark, as VLMEvalKit calls it.
        data: its TSV file.
        worker: asked for questions and scores.
        cache: receives the images, which the file holds as text; `None` for the user's cache.
        generation: settings that take the place of VLMEvalKit's own.
    """

    def __init__(
        self,
        name: str,
        data: Path,
        worker: Worker,
        *,
        cache: Path | None = None,
        generation: Mapping[str, int] | None = None,
    ) -> None:
        self.name = name
        # VLMEvalKit's wrapper heeds no other lower limit for OCRBench either.
        own = {"min_pixels": OCRBENCH_MIN_PIXELS} if name == "OCRBench" else {}
        self.generation = Generation(**{**(generation or {}), **own})
        self.data = data
        self.checksum = md5_of(data)
        self._worker = worker
        self._cache = cache
        self._questions: dict[int | None, list[BenchmarkQuestion]] = {}

    @property
    def is_published(self) -> bool:
        """Whether the file is the one VLMEvalKit publishes."""
        return self.checksum == PAPER[self.name].md5

    def identity(self) -> dict[str, Any]:
        self._worker.start()
        return {
            "benchmark": self.name,
            "scorer": f"ms-vlmeval {self._worker.version}",
            "data": self.checksum,
            "published_data": self.is_published,
            "wording": "Qwen2-VL",
        }

    def questions(self, limit: int | None = None) -> list[BenchmarkQuestion]:
        if limit not in self._questions:
            self._questions[limit] = list(self._read(limit))
        return self._questions[limit]

    def score(self, answers: Mapping[str, str]) -> Score:
        values = self._worker.ask("score", name=self.name, data=str(self.data.resolve()), answers=answers)
        return Score(**{**values, "judged": [Judged(**each) for each in values["judged"]]})

    def _read(self, limit: int | None) -> Iterator[BenchmarkQuestion]:
        from unidpo.cache.store import default_cache  # which imports torch

        images = (self._cache or default_cache()) / "benchmarks" / f"{self.name}-{self.checksum[:12]}"
        images.mkdir(parents=True, exist_ok=True)
        request = {"name": self.name, "data": str(self.data.resolve()), "images": str(images.resolve())}
        rows = self._worker.ask("questions", **request, limit=limit)
        if not self.is_published:
            problem = "this is not the file that VLMEvalKit publishes"
            _LOG.warning("%s: %s (MD5 %s)", self.data, problem, self.checksum)
        seen: set[str] = set()
        for row in rows:
            if row["index"] in seen:
                raise EvaluationFailed(f"{self.data}: two rows have the index {row['index']}; keep one of them")
            seen.add(row["index"])
            parts: tuple[Part, ...] = tuple(p["text"] if "text" in p else Path(p["image"]) for p in row["parts"])
            yield BenchmarkQuestion(row["index"], parts, row["choices"])
