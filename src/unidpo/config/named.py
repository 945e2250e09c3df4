"""Whether the files and folders that a recipe names are there; reads no weights and asks no hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from unidpo.config.schema import Recipe
from unidpo.errors import did_you_mean, shown
from unidpo.files.places import missing_here

TEMPLATES = ("chatml",)
"""Names of chat templates that are no files."""
BENCHMARKS = (
    *("paper", "ChartQA_TEST", "MMBench_DEV_CN", "MMBench_DEV_EN", "MME"),
    *("OCRBench", "POPE", "ScienceQA_TEST", "SEEDBench_IMG", "TextVQA_VAL"),
)
"""Names of benchmarks that are no files."""


def missing_things(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys of a recipe that name something that is not there, each with what to say of it."""
    yield from _model("model.name", recipe.model.name)
    if recipe.reference not in ("stored", "live"):
        yield from _model("reference", recipe.reference)
    yield from _data(recipe)
    if recipe.data.template is not None:
        yield from _file("data.template", recipe.data.template, TEMPLATES)
    for index, name in enumerate(recipe.eval.benchmarks if recipe.eval is not None else ()):
        yield from _file(f"eval.benchmarks[{index}]", name, BENCHMARKS)
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
        if problem := missing_here(name, "file"):
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
