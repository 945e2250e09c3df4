"""Whether the files, folders and layers that a recipe names are there; reads no weights and asks no hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from unidpo.config.schema import Recipe
from unidpo.errors import did_you_mean, shown
from unidpo.files.places import missing_here
from unidpo.files.regular import open_regular, read_regular

TEMPLATES = ("chatml",)
"""Names of chat templates that are no files."""
BENCHMARKS = (
    *("paper", "ChartQA_TEST", "MMBench_DEV_CN", "MMBench_DEV_EN", "MME"),
    *("OCRBench", "POPE", "ScienceQA_TEST", "SEEDBench_IMG", "TextVQA_VAL"),
)
"""Names of benchmarks that are no files."""
LAYERS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj"),
    *("gate_up_proj", "fc1", "fc2", "qkv", "proj", "linear_1", "linear_2", "lm_head", "embed_tokens", "query", "key"),
    *("value", "dense", "query_key_value", "dense_h_to_4h", "dense_4h_to_h", "c_attn", "c_proj", "c_fc"),
    *("wq", "wk", "wv", "wo", "w1", "w2", "w3", "in_proj", "x_proj", "dt_proj"),
)
"""What families call their linear layers, where a model's own names cannot be read."""
_SPLIT = re.compile(r"[:@].*")
_MOST_HEADER = 100_000_000


def missing_things(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Keys of a recipe that name something that is not there, each with what to say of it."""
    yield from _model("model.name", recipe.model.name)
    if recipe.reference not in ("stored", "live"):
        yield from _model("reference", recipe.reference)
    yield from _data(recipe)
    template = recipe.data.template
    if template is not None and template not in TEMPLATES and not Path(template).is_file():
        hint = did_you_mean(template, TEMPLATES)
        yield "data.template", f"{_no_file(template)}{hint}; give {', '.join(TEMPLATES)} or a Jinja file"
    for index, name in enumerate(recipe.eval.benchmarks if recipe.eval is not None else ()):
        if problem := _benchmark(name):
            yield f"eval.benchmarks[{index}]", problem
    for key in ("deepspeed", "fsdp_config", "accelerator_config"):
        value = recipe.train.given().get(key)
        if isinstance(value, str) and not value.lstrip().startswith("{") and (problem := _json_file(value)):
            yield f"train.{key}", problem
    if recipe.lora is not None:
        yield from _target_modules(recipe.lora.target_modules, recipe.model.name)


def _model(key: str, name: str) -> Iterator[tuple[str, str]]:
    folder = Path(name).expanduser()
    if problem := missing_here(name):
        yield key, problem
    elif folder.is_file():
        yield key, f"{shown(name)} is a file; name the folder that `save_pretrained` wrote"
    elif folder.is_dir() and not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        yield key, f"{shown(name)} holds no model (no config.json); name a folder that `save_pretrained` wrote"


def _data(recipe: Recipe) -> Iterator[tuple[str, str]]:
    several = not isinstance(recipe.data.path, str)
    for index, source in enumerate(recipe.data.sources):
        key = f"data.path[{index}]" if several else "data.path"
        name = source.path if Path(source.path).exists() else _SPLIT.sub("", source.path)
        if problem := missing_here(name, "file"):
            yield f"{key}.path" if several else key, problem
        if source.images is not None and not source.images.is_dir():
            yield f"{key}.images", _no_folder(source.images)
    images = recipe.data.images
    if images is not None and not images.is_dir():
        yield "data.images", _no_folder(images)


def _no_file(name: str) -> str:
    return missing_here(name, "file", hub=False) or f"{shown(name)} is not a file"


def _no_folder(path: Path) -> str:
    return missing_here(path, hub=False) or f"{shown(path)} is not a folder"


def _benchmark(name: str) -> str | None:
    if not name.endswith((".yaml", ".yml")):
        hint = did_you_mean(name, BENCHMARKS)
        listed = f"{', '.join(BENCHMARKS)}, or a .yaml file"
        return None if name in BENCHMARKS else f"there is no benchmark {shown(name)}{hint}; give {listed}"
    path = Path(name)
    if not path.is_file():
        return _no_file(name)
    try:
        values = yaml.safe_load(read_regular(path).decode("utf-8-sig"))
        questions = path.parent / values["file"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError):
        return f"{name} cannot be read as a benchmark; `unidpo eval MODEL --benchmarks {name}` says why"
    return None if questions.is_file() else f"{name} names the questions {shown(str(questions))}, which are not there"


def _json_file(name: str) -> str | None:
    path = Path(name).expanduser()
    if not path.is_file():
        return f"{_no_file(name)}; `recipes/launch/` has some that work"
    try:
        value = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        return f"{name} is not valid JSON: {error}"
    return None if isinstance(value, dict) else f"{name} holds no JSON object"


def _target_modules(wanted: tuple[str, ...] | str | None, model: str) -> Iterator[tuple[str, str]]:
    key = "lora.target_modules"
    there = _layers_of(Path(model).expanduser())
    if isinstance(wanted, str):
        if wanted == "all-linear":
            return
        try:
            pattern = re.compile(wanted)
        except (re.error, RecursionError, OverflowError) as error:
            yield key, f"is not a regular expression: {error}; give a list of names"
            return
        if re.fullmatch(r"[\w., -]+", wanted) and not any(pattern.fullmatch(name) for name in there or LAYERS[-1:]):
            names = ", ".join(re.findall(r"[\w.]+", wanted))
            yield key, f"is a regular expression that matches no whole name of a layer; as a list it is [{names}]"
        return
    ends = {name.rpartition(".")[2] for name in there} | {"lm_head", "embed_tokens"} if there else set(LAYERS)
    # Weights of experts are joined while they are loaded, under names that the files do not have.
    unsure = any(".experts." in name for name in there)
    for index, name in enumerate(wanted or ()):
        last = name.rpartition(".")[2]
        near = did_you_mean(last, ends)
        if last not in ends and (near or (there and not unsure)):
            listed = ", ".join(sorted(ends & set(LAYERS))) if there else ""
            of_it = f"{shown(model)} has no layer {shown(name)}" if there else f"no model is known with {shown(name)}"
            yield f"{key}[{index}]", f"{of_it}{near}" + (f"; it has {listed}" if listed and not near else "")


def _layers_of(folder: Path) -> set[str]:
    """Full names of what has weights in a model folder, by the headers of its files; empty where they are not here."""
    try:
        adapter = folder / "adapter_config.json"
        if adapter.is_file() and not (folder / "config.json").is_file():
            return _layers_of(Path(json.loads(read_regular(adapter))["base_model_name_or_path"]))
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            tensors = json.loads(read_regular(index))["weight_map"]
        else:
            with open_regular(folder / "model.safetensors") as file:
                length = int.from_bytes(file.read(8), "little")
                tensors = json.loads(file.read(min(length, _MOST_HEADER)))
        return {name.rpartition(".")[0] for name in tensors}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()  # loading the model says what is wrong
