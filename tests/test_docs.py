"""The documentation says what is so: its examples load, its tables are complete, its two READMEs agree."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
import typer.main
from PIL import Image

import unidpo
from unidpo import cli
from unidpo.check import check_data
from unidpo.config import DataSection, LoraSection, ModelSection, Recipe, TrainSection, load_recipe
from unidpo.config.schema import LOSS_SECTIONS
from unidpo.measures import LOGGED
from unidpo.runs import LEDGER_COLUMNS, MAY_CHANGE_ON_RESUME
from unidpo.sources import read_groups

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "unidpo"
DOCS = sorted([ROOT / "README.md", ROOT / "README_zh.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KIND = re.compile(r"[a-z]+(-[a-z]+)+")


def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(name: str, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(text_of(name)) if language in languages]


def rows_of(block: str) -> list[dict]:
    try:
        return json.loads(block)
    except json.JSONDecodeError:
        return [json.loads(line) for line in block.splitlines()]


def data_examples() -> list[str]:
    return [block for name in ("docs/data.md", "README.md") for block in blocks(name, "json", "jsonl")]


def write_example(block: str, folder: Path) -> Path:
    """The example as a file, and the images it names."""
    for row in rows_of(block):
        for name in [*row.get("images", []), *([row["image"]] if "image" in row else [])]:
            Image.new("RGB", (56, 56), "gray").save(folder / name)
    path = folder / "pairs.json"
    path.write_text(block, "utf-8")
    return path


def test_there_are_examples() -> None:
    assert len(data_examples()) >= 4


@pytest.mark.parametrize("block", data_examples(), ids=lambda block: re.sub(r"\W+", " ", block)[:30])
def test_data_examples_pass_the_check(tmp_path: Path, block: str) -> None:
    path = write_example(block, tmp_path)
    assert read_groups(path).findings == []
    report = check_data(path)
    assert report.findings == []
    assert report.usable_rows == len(rows_of(block))


def test_ranked_example_makes_the_pairs_it_says(tmp_path: Path) -> None:
    (block,) = blocks("docs/data.md", "jsonl")
    first = read_groups(write_example(block, tmp_path)).groups[0]
    scores = [response.score for response in first.responses]
    assert [(scores[pair.chosen], scores[pair.rejected]) for pair in first.pairs] == [(4, 2.5), (4, 1), (2.5, 1)]


@pytest.mark.parametrize("name", ["README.md", "README_zh.md", "docs/recipes.md"])
def test_recipes_in_the_docs_load(tmp_path: Path, name: str) -> None:
    recipes = blocks(name, "yaml")
    assert recipes
    for number, block in enumerate(recipes):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, "utf-8")
        load_recipe(path)


def test_the_quick_start_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's data and recipe, word for word; only the model is one that lies here."""
    from unidpo.train import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIDPO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    write_example(blocks("README.md", "json")[0], tmp_path / "images").rename(tmp_path / "pairs.json")
    Path("recipe.yaml").write_text(blocks("README.md", "yaml")[0], "utf-8")
    model = ROOT / "tests" / "golden" / "model"
    folder = run(load_recipe("recipe.yaml", [f"model.name={model}", "data.template=chatml"]))
    for name in ("model/config.json", "metrics.jsonl", "config.json", "environment.json"):
        assert (folder / name).is_file(), name
    assert list(folder.glob("pairs.parquet/*.parquet"))


def test_commands_in_the_docs_exist() -> None:
    """Each `unidpo` command with its own options and, where it names a recipe of ours, overrides that are valid."""
    commands = [
        shlex.split(line)
        for path in DOCS
        for language, code in FENCE.findall(path.read_text("utf-8"))
        if language == "bash"
        for line in code.splitlines()
        if line.startswith("unidpo ")
    ]
    assert len(commands) > 5
    for _, *words in commands:
        command = typer.main.get_command(cli.app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        words = words[: words.index(">")] if ">" in words else words
        arguments = command.make_context("unidpo", list(words)).params
        if "recipe" in arguments and (ROOT / arguments["recipe"]).is_file():
            load_recipe(ROOT / arguments["recipe"], arguments["overrides"] or ())


def test_both_readmes_have_the_same_headings_and_code() -> None:
    english, chinese = text_of("README.md"), text_of("README_zh.md")
    assert re.findall(r"^(#+) ", english, re.MULTILINE) == re.findall(r"^(#+) ", chinese, re.MULTILINE)
    assert FENCE.findall(english) == FENCE.findall(chinese)
    tables = [[line.count("|") for line in text.splitlines() if line.startswith("|")] for text in (english, chinese)]
    assert tables[0] == tables[1]
    names = [re.findall(r"`([^`\n]+)`", re.sub(FENCE, "", text)) for text in (english, chinese)]
    assert set(names[0]) == set(names[1])


def test_readmes_are_short() -> None:
    assert len(text_of("README.md").splitlines()) < 200
    assert len(text_of("README_zh.md").splitlines()) < 200
    for decision in ROOT.glob("docs/decisions/*.md"):
        assert len(decision.read_text("utf-8").splitlines()) <= 40, decision.name


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", FENCE.sub("", path.read_text("utf-8"))):
        if "://" in target:
            continue
        linked = path.parent / target if target else path
        assert linked.exists(), f"{path.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, anchor


def test_the_module_map_names_modules_that_exist() -> None:
    table = text_of("README.md").partition("## Modules")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert len(named) > 15
    there = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert named <= there


def findings_made() -> Iterator[tuple[str, str]]:
    """(kind, severity) of every finding that the data side of the package can make."""
    folders = [path for name in ("sources", "check*") for path in SOURCE.glob(f"{name}/**/*.py")]
    for path in [*folders, SOURCE / "images.py", SOURCE / "encode.py"]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "kind":
                value = getattr(node.value, "value", None)
                if isinstance(value, str) and KIND.fullmatch(value):
                    yield value, "error"
            if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
                continue
            kind, called = node.args[0].value, getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in ("error", "warn") and isinstance(kind, str) and KIND.fullmatch(kind):
                yield kind, "warning" if called == "warn" else "error"
            if called == "Finding":
                severity = next((k.value.value for k in node.keywords if k.arg == "severity"), "error")
                yield kind, severity


def test_every_kind_of_finding_is_documented() -> None:
    documented = re.findall(r"^\| `([a-z-]+)` \| (error|warning) \|", text_of("docs/data.md"), re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert set(documented) == set(findings_made())


def test_every_recipe_key_is_documented() -> None:
    recipes, loss = text_of("docs/recipes.md"), text_of("docs/loss.md")
    keys = [key for s in (ModelSection, DataSection, LoraSection) for key in s.model_fields]
    keys += [key for key in (*Recipe.model_fields, *TrainSection.__annotations__) if key != "eval"]
    for key in keys:
        assert f"`{key}`" in recipes, key
    for key in {key for section in LOSS_SECTIONS.values() for key in section.model_fields} - {"name"}:
        assert f"`{key}`" in loss, key


def test_defaults_in_the_tables_are_the_defaults() -> None:
    """Rows of the form `| `key` | default | ...` in docs/recipes.md and docs/loss.md."""
    recipes, loss = text_of("docs/recipes.md"), text_of("docs/loss.md")
    sections = {"model": ModelSection, "data": DataSection, "lora": LoraSection, "train": TrainSection}
    tables = [(recipes.partition(f"## `{name}`\n")[2].partition("\n## ")[0], s) for name, s in sections.items()]
    tables.append((loss.partition("## Knobs of `uni_dpo`\n")[2].partition("\n##")[0], LOSS_SECTIONS["uni_dpo"]))
    for table, section in tables:
        found = re.findall(r"^\| `(\w+)`(?: \(\S+\))? \| `?(.+?)`? \|", table, re.MULTILINE)
        assert len(found) >= 4
        for key, written in found:
            field = section.model_fields[key]
            if field.is_required():
                assert written == "required", key
                continue
            default = field.default
            if default is None or isinstance(default, bool):
                assert written == {None: "null", True: "true", False: "false"}[default], key
            elif isinstance(default, int | float):
                assert float(written) == default, key
            else:
                assert written == (default if isinstance(default, str) else f"[{', '.join(default)}]"), key


def test_every_column_and_logged_key_is_documented() -> None:
    text = text_of("docs/run-folder.md")
    for name in [column.name for column in LEDGER_COLUMNS] + [*LOGGED, "rewards/margins", "rewards/accuracies"]:
        assert f"`{name}`" in text, name
    for key in MAY_CHANGE_ON_RESUME - {"output", "train.dataloader_num_workers", "train.dataloader_prefetch_factor"}:
        assert f"`{key}`" in text, key


def test_reading_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of docs/run-folder.md on a folder written as a run writes it."""
    from unidpo.runs import Ledger, Metrics

    monkeypatch.chdir(tmp_path)
    Path("runs/tiny").mkdir(parents=True)
    Metrics(Path("runs/tiny/metrics.jsonl")).add(
        {"step": 1, "loss": 0.5, "rewards/accuracies": 0.5, "nll/gate_rate": 0.0}
    )
    ledger = Ledger(Path("runs/tiny/pairs.parquet"))
    ledger.add({column.name: [1, 2] for column in LEDGER_COLUMNS})
    ledger.flush()
    (code,) = blocks("docs/run-folder.md", "python")
    exec(compile(code, "docs/run-folder.md", "exec"), {})


def test_python_in_the_readme_names_what_there_is() -> None:
    (code,) = blocks("README.md", "python")
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = {"unidpo": unidpo, "transformers": transformers}[node.module or ""]
            assert all(hasattr(module, alias.name) for alias in node.names)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in unidpo.__all__:
            parameters = inspect.signature(getattr(unidpo, node.func.id)).parameters  # type: ignore[attr-defined]
            assert {keyword.arg for keyword in node.keywords} <= parameters.keys()
