"""Which benchmarks and models are meant by `MODEL`, `--benchmarks` and `--config`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unidpo.config.explaining import findings_of
from unidpo.config.named import PAPER
from unidpo.errors import did_you_mean, from_findings, shown
from unidpo.evaluate.benchmarks import Benchmark, EvaluationError
from unidpo.evaluate.own import load_benchmark
from unidpo.evaluate.vlmeval import VlmevalBenchmark, Worker, download_file, require_files, worker_python
from unidpo.evaluate.vlmeval_worker import CLASSES
from unidpo.files.regular import read_regular
from unidpo.progress import OnProgress
from unidpo.run_folder.folder import RunFolder


def select(
    words: Sequence[str],
    *,
    data: Path,
    worker: Worker,
    generation: Mapping[str, int] | None = None,
    download: bool = False,
    on_progress: OnProgress | None = None,
) -> list[Benchmark]:
    """Benchmarks by name or file; `paper` is the nine.

    Args:
        words: names, and paths of `.yaml` files.
        data: folder of VLMEvalKit's files.
        worker: the process that VLMEvalKit runs in.
        generation: settings that take the place of VLMEvalKit's.
        download: fetch files of VLMEvalKit's benchmarks that are missing, once everything else is known to be right.
        on_progress: called with how much of a download is done.

    Raises:
        UserError: a name is unknown or comes twice, a file is missing or cannot be used, VLMEvalKit is missing, or a
            download was interrupted.
    """
    words = [name for word in words for name in (PAPER if word == "paper" else [word])]
    own: dict[str, Benchmark] = {word: load_benchmark(Path(word)) for word in words if word.endswith((".yaml", ".yml"))}
    known = [word for word in words if word not in own]
    for word in known:
        if word not in PAPER:
            same = [f"; did you mean `{name}`?" for name in PAPER if name.lower() == word.lower()]
            problem = f"there is no benchmark {shown(word)}{''.join(same) or did_you_mean(word, ['paper', *PAPER])}"
            raise EvaluationError(f"{problem}; give paper, {', '.join(PAPER)}, or a .yaml file of your own")
    names = [own[word].name if word in own else word for word in words]
    if twice := [name for name in names if names.count(name) > 1]:
        raise EvaluationError(f"two benchmarks are called {twice[0]}; name each once")
    if not words:
        raise EvaluationError("no benchmark is named")
    if known:
        worker_python()
        for name in known if download else ():
            download_file(name, data, on_progress)
        require_files(known, data)
    return [
        own[word] if word in own else VlmevalBenchmark(word, data / f"{word}.tsv", worker, generation=generation)
        for word in words
    ]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Model(_Entry):
    kind: Literal["Qwen2VLChat"] = Field(alias="class")
    model_path: str = Field(min_length=1)
    max_new_tokens: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    @property
    def generation(self) -> dict[str, int]:
        """What takes the place of each benchmark's own settings."""
        return self.model_dump(include={"max_new_tokens", "min_pixels", "max_pixels"}, exclude_none=True)


class _DataSet(_Entry):
    kind: str | None = Field(None, alias="class")
    dataset: str | None = None


class KitConfig(_Entry):
    """A configuration of VLMEvalKit's: models and data sets by a name of the user's."""

    model: dict[str, _Model]
    data: dict[str, _DataSet]

    @property
    def models(self) -> list[str]:
        """Paths or hub ids of the models."""
        return [entry.model_path for entry in self.model.values()]

    @property
    def benchmarks(self) -> list[str]:
        """Names of the benchmarks."""
        return [entry.dataset or name for name, entry in self.data.items()]

    @property
    def generation(self) -> dict[str, int]:
        """Settings that take the place of each benchmark's own, the same for all models."""
        return next((entry.generation for entry in self.model.values()), {})

    @property
    def ignored(self) -> list[str]:
        """Keys that have no meaning here."""
        keys = list(self.model_extra or ())
        for section, entries in (("model", self.model), ("data", self.data)):
            keys += [f"{section}.{name}.{key}" for name, entry in entries.items() for key in entry.model_extra or ()]
        return keys


def read_config(path: Path) -> KitConfig:
    """A configuration file as VLMEvalKit's `run.py --config` takes it.

    Raises:
        EvaluationError: the file cannot be read, or asks for something that cannot be done here.
    """
    try:
        values = json.loads(read_regular(path).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: the configuration cannot be read: {error}") from error
    try:
        config = KitConfig.model_validate(values)
    except ValidationError as error:
        title = f'{path}: a configuration of VLMEvalKit is {{"model": {{...}}, "data": {{...}}}}, and in this one'
        raise from_findings(EvaluationError, title, findings_of(error, KitConfig, values)) from error
    if any(entry.generation != config.generation for entry in config.model.values()):
        raise EvaluationError(f"{path}: the models have different settings of generation; evaluate them one by one")
    for name, entry in zip(config.benchmarks, config.data.values(), strict=True):
        if name not in CLASSES:
            raise EvaluationError(f"{path}: there is no data set {shown(name)} here{did_you_mean(name, CLASSES)}")
        if entry.kind not in (None, CLASSES[name]):
            raise EvaluationError(f"{path}: {name} has the class {CLASSES[name]}, not {shown(entry.kind)}")
    return config


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to evaluate.

    Attributes:
        given: as the user named it.
        name: the folder or hub id that is loaded.
        label: short, unique among those evaluated together, fit for a folder's name.
    """

    given: str
    name: str
    label: str


def candidates(names: Sequence[str]) -> list[Candidate]:
    """Model folders behind names: run folders hold theirs in `model/`.

    Raises:
        EvaluationError: a run is not finished, or a model is named twice.
    """
    found: dict[str, Candidate] = {}
    for given in names:
        name = _model_of(given)
        if name in found:
            raise EvaluationError(f"{given}: this model is named twice")
        label = base = _label(name)
        number = 2
        while label in {each.label for each in found.values()}:
            label, number = f"{base}-{number}", number + 1
        found[name] = Candidate(given, name, label)
    return list(found.values())


def _model_of(given: str) -> str:
    folder = RunFolder(given)
    if folder.finished:
        return str(folder.model)
    if folder.path.is_dir() and folder.environment.is_file():
        checkpoint = folder.last_checkpoint
        remedy = f"finish it with `--resume`, or name {checkpoint}" if checkpoint else "finish it with `--resume`"
        raise EvaluationError(f"{given}: this run has no model yet; {remedy}")
    return given


def _label(name: str) -> str:
    parts = [part for part in Path(name).parts if part not in ("/", "..", ".")] or ["model"]
    if len(parts) > 1 and parts[-1] == "model":
        parts.pop()
    label = "-".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]
    return re.sub(r"[^\w.-]", "-", label).lstrip(".-") or "model"
