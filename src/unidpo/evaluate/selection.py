"""Which benchmarks and models are meant by `--benchmarks` and `--config`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unidpo.errors import did_you_mean, shown
from unidpo.evaluate import fetching
from unidpo.evaluate.benchmarks import Benchmark, EvaluationError
from unidpo.evaluate.own import load_benchmark
from unidpo.evaluate.vlmeval import PAPER, VlmevalBenchmark, Worker, worker_python
from unidpo.evaluate.vlmeval_worker import CLASSES
from unidpo.files.regular import read_regular
from unidpo.generate.questions import Generation
from unidpo.progress import OnProgress

_GENERATION = tuple(field.name for field in dataclasses.fields(Generation))
_MODEL_CLASSES = ("Qwen2VLChat",)


@dataclass(frozen=True, slots=True)
class KitConfig:
    """What a configuration of VLMEvalKit's asks for.

    Attributes:
        models: paths or hub ids of the models.
        names: of the benchmarks.
        generation: settings that take the place of each benchmark's own.
        ignored: what has no meaning here, as sentences.
    """

    models: tuple[str, ...]
    names: tuple[str, ...]
    generation: dict[str, int]
    ignored: tuple[str, ...]


def select(
    words: Sequence[str],
    *,
    data: Path,
    worker: Worker,
    generation: dict[str, int] | None = None,
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
        on_progress: told how far a download is.

    Raises:
        EvaluationError: a name is unknown or comes twice, a file is missing, or VLMEvalKit is.
        DataError: the questions of a file cannot be used.
        FetchError: a download broke off.
    """
    words = [name for word in words for name in (PAPER if word == "paper" else [word])]
    known = [word for word in words if word in PAPER]
    for word in words:
        if word not in PAPER and not word.endswith((".yaml", ".yml")):
            same = [f"; did you mean `{name}`?" for name in PAPER if name.lower() == word.lower()]
            hint = same[0] if same else did_you_mean(word, ["paper", *PAPER])
            problem = f"there is no benchmark {shown(word)}{hint}"
            raise EvaluationError(f"{problem}; give paper, {', '.join(PAPER)}, or a .yaml file of your own")
    own = {word: load_benchmark(Path(word)) for word in words if word not in PAPER}
    names = [own[word].name if word in own else word for word in words]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EvaluationError(f"two benchmarks are called {twice}; name each once")
    if not words:
        raise EvaluationError("no benchmark is named")
    if known:
        worker_python()
        for name in known if download else ():
            fetching.download(name, data, on_progress)
        fetching.require(known, data)
    return [
        own[word] if word in own else VlmevalBenchmark(word, data / f"{word}.tsv", worker, generation=generation)
        for word in words
    ]


def read_config(path: Path) -> KitConfig:
    """A configuration file as VLMEvalKit's `run.py --config` takes it.

    Raises:
        EvaluationError: the file cannot be read, or asks for a model class or data set that is not known here.
    """
    try:
        config = json.loads(read_regular(path).decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path}: the configuration cannot be read: {error}") from error
    models, data = (_entries(path, config, key) for key in ("model", "data"))
    ignored = [f"`{key}` has no meaning here" for key in config if key not in ("model", "data")]
    found, settings = [], []
    for label, entry in models.items():
        found.append(_model(path, label, entry))
        settings.append({key: entry[key] for key in _GENERATION if isinstance(entry.get(key), int)})
        known = {"class", "model_path", *settings[-1]}
        ignored += [f"`model.{label}.{key}` has no meaning here" for key in entry if key not in known]
    if any(each != settings[0] for each in settings):
        raise EvaluationError(f"{path}: the models have different {', '.join(_GENERATION)}; evaluate them one by one")
    names = []
    for label, entry in data.items():
        names.append(_data_set(path, label, entry))
        ignored += [f"`data.{label}.{key}` has no meaning here" for key in entry if key not in ("class", "dataset")]
    return KitConfig(tuple(found), tuple(names), settings[0] if settings else {}, tuple(ignored))


def _entries(path: Path, config: Any, key: str) -> dict[str, dict[str, Any]]:
    part = config.get(key) if isinstance(config, dict) else None
    if not isinstance(part, dict) or not all(isinstance(entry, dict) for entry in part.values()):
        raise EvaluationError(f'{path}: a configuration of VLMEvalKit is {{"model": {{...}}, "data": {{...}}}}')
    return part


def _model(path: Path, label: str, entry: dict[str, Any]) -> str:
    if entry.get("class") not in _MODEL_CLASSES:
        problem = f"the class is {shown(entry.get('class'))}, and only {', '.join(_MODEL_CLASSES)} is known here"
        raise EvaluationError(f"{path}, `model.{label}`: {problem}; name the model on the command line instead")
    name = entry.get("model_path")
    if not isinstance(name, str) or not name:
        raise EvaluationError(f"{path}, `model.{label}`: `model_path` is missing")
    return name


def _data_set(path: Path, label: str, entry: dict[str, Any]) -> str:
    name = entry.get("dataset", label)
    if name not in PAPER:
        hint = did_you_mean(str(name), PAPER)
        raise EvaluationError(f"{path}, `data.{label}`: there is no data set {shown(name)} here{hint}")
    if entry.get("class", CLASSES[name]) != CLASSES[name]:
        raise EvaluationError(
            f"{path}, `data.{label}`: {name} has the class {CLASSES[name]}, not {shown(entry['class'])}"
        )
    return str(name)
