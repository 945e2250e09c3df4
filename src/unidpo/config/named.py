"""Whether the files and folders that a recipe names are there; reads no weights and asks no hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from unidpo.config.schema import Recipe
from unidpo.errors import did_you_mean, shown
from unidpo.files.places import DECLARATION, DECLARED_IN, missing_here

TEMPLATES = ("chatml",)
"""Names of chat templates that are no files."""
_OPENCOMPASS = "https://opencompass.openxlab.space/utils"


@dataclass(frozen=True, slots=True)
class Published:
    """A benchmark's file as VLMEvalKit publishes it.

    Attributes:
        url: where it is downloaded from.
        md5: of the file.
    """

    url: str
    md5: str


PAPER: Mapping[str, Published] = {
    name: Published(f"{_OPENCOMPASS}/{folder}/{name}.tsv", md5)
    for name, folder, md5 in (
        ("ChartQA_TEST", "VLMEval", "c902e0aa9be5582a7aad6dcf52734b42"),
        ("MMBench_DEV_CN", "benchmarks/MMBench", "08b8fc3324a5ed74155350f57be69fbd"),
        ("MMBench_DEV_EN", "benchmarks/MMBench", "b6caf1133a01c6bb705cf753bb527ed8"),
        ("MME", "VLMEval", "b36b43c3f09801f5d368627fb92187c3"),
        ("OCRBench", "VLMEval", "e953d98a987cc6e26ef717b61260b778"),
        ("POPE", "VLMEval", "c12f5acb142f2ef1f85a26ba2fbe41d5"),
        ("ScienceQA_TEST", "benchmarks/ScienceQA", "e42e9e00f9c59a80d8a5db35bc32b71f"),
        ("SEEDBench_IMG", "benchmarks/SEEDBench", "68017231464752261a2526d6ca3a10c0"),
        ("TextVQA_VAL", "VLMEval", "b233b31f551bbf4056f2f955da3a92cd"),
    )
}
"""The nine benchmarks of the paper, which are named without a file."""


def missing_things(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys of a recipe that name something that is not there, each with what to say of it."""
    yield from _model("model.name", recipe.model.name)
    if recipe.reference not in ("stored", "live"):
        yield from _model("reference", recipe.reference)
    yield from _data(recipe)
    if recipe.data.template is not None:
        yield from _file("data.template", recipe.data.template, TEMPLATES)
    for index, name in enumerate(recipe.eval.benchmarks if recipe.eval is not None else ()):
        yield from _file(f"eval.benchmarks[{index}]", name, ("paper", *PAPER))
    for key in ("deepspeed", "fsdp_config", "accelerator_config"):
        value = recipe.train.given().get(key)
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            yield from _file(f"train.{key}", value)


def _model(key: str, name: str) -> Iterator[tuple[str, str]]:
    folder = Path(name).expanduser()
    if problem := missing_here(name):
        yield key, problem
    elif folder.exists() and not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        yield key, f"{shown(name)} holds no model (no config.json); name a folder that `save_pretrained` wrote"


def _data(recipe: Recipe) -> Iterator[tuple[str, str]]:
    several = not isinstance(recipe.data.path, str)
    folders = {"data.images": recipe.data.images}
    for index, source in enumerate(recipe.data.sources):
        key = f"data.path[{index}]" if several else "data.path"
        name = source.path if Path(source.path).exists() else re.sub("[:@].*", "", source.path)
        is_declared = "/" not in name and any(Path(folder, DECLARATION).is_file() for folder in DECLARED_IN)
        if not is_declared and (problem := missing_here(name, "file")):
            yield f"{key}.path" if several else key, problem
        folders[f"{key}.images"] = source.images
    for key, folder in folders.items():
        if folder is not None and not folder.is_dir():
            yield key, missing_here(folder, hub=False) or f"{shown(folder)} is not a folder"


def _file(key: str, name: str, other_names: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """A name that is neither a file nor one of the names that stand for something else."""
    if name not in other_names and not Path(name).expanduser().is_file():
        problem = missing_here(name, "file", hub=False) or f"{shown(name)} is not a file"
        listed = f"; give a file, or one of {', '.join(other_names)}" if other_names else ""
        yield key, f"{problem}{did_you_mean(name, other_names)}{listed}"
