"""The documentation says what is so: its examples load, its tables are complete, its two READMEs agree."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import transformers
import typer.main
from PIL import Image
from typer.testing import CliRunner

import unidpo
from unidpo import cli
from unidpo.config import (
    DataSection,
    LoraSection,
    ModelSection,
    Recipe,
    TrainSection,
    is_sweep,
    load_recipe,
    load_sweep,
)
from unidpo.config.schema import SourceSection
from unidpo.data.check import check_data
from unidpo.data.formats import LAYOUTS, read_groups
from unidpo.losses import LOSSES
from unidpo.run_folder.folder import MAY_CHANGE_ON_RESUME
from unidpo.run_folder.records import LEDGER_COLUMNS
from unidpo.training.metrics import LOGGED

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "unidpo"
DOCS = sorted([ROOT / "README.md", ROOT / "README_zh.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"`([\w./-]+\.jsonl?)`:\n\n```jsonl?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KIND = re.compile(r"[a-z]+(-[a-z]+)+")
MODEL = ROOT / "tests" / "golden" / "model"


def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(name: str, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(text_of(name)) if language in languages]


def write_example(block: str, folder: Path) -> Path:
    """The example as a file, and the images it names."""
    for row in json.loads(block):
        for name in [*row.get("images", []), *([row["image"]] if "image" in row else [])]:
            Image.new("RGB", (56, 56), "gray").save(folder / name)
    path = folder / "pairs.json"
    path.write_text(block, "utf-8")
    return path


# --- pages that are followed from top to bottom


def examples_in(page: str) -> dict[str, str]:
    """The files a page shows, by name."""
    return dict(EXAMPLE.findall(text_of(page)))


def lay_out(page: str, folder: Path) -> None:
    """The files a page shows, and the images they name: where they say, and under `images`."""
    (folder / "images").mkdir()
    for name, text in examples_in(page).items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, "utf-8")
        for image in re.findall(r'"([\w./-]+\.(?:png|jpg))"', text):
            places = [folder / "images" / Path(image).name, *([] if image.startswith("/") else [file.parent / image])]
            for place in places:
                place.parent.mkdir(exist_ok=True)
                Image.new("RGB", (56, 56), "gray").save(place)


def follow(page: str) -> list[str]:
    """Run every `unidpo data` command and all Python of a page, in its order; gives the commands."""
    run = []
    for language, code in FENCE.findall(text_of(page)):
        if language == "python":
            exec(compile(code, page, "exec"), {})
        for line in code.splitlines() if language == "bash" else ():
            command = line.replace("Qwen/Qwen2-VL-2B-Instruct", str(MODEL))
            if command.startswith("unidpo data ") and not command.startswith("unidpo data fetch"):
                unidpo_data(*shlex.split(command.partition(" > ")[0])[2:])
                run.append(line)
    return run


def unidpo_data(*words: str) -> str:
    result = CliRunner().invoke(cli.app, ["data", *words])
    assert result.exit_code == 0, (words, result.output, result.exception)
    return result.output


def pairs_of(path: str | Path) -> list[str]:
    """What a data set says, in whatever layout and order: each pair with its prompt, images and scores."""
    return sorted(
        repr((group.messages, group.images, group.responses[pair.chosen], group.responses[pair.rejected]))
        for group in read_groups(path).groups
        for pair in group.pairs
    )


READABLE = sorted(set(examples_in("docs/data.md")) - {"dataset_info.json", "old.jsonl"})
"""Examples that are data which can be used as it stands. The images of `old.jsonl` lie elsewhere."""


def test_there_is_an_example_of_each_layout(tmp_path: Path) -> None:
    from unidpo.data.formats.reading import read_rows

    lay_out("docs/data.md", tmp_path)
    assert {row.layout for name in READABLE for row in read_rows(tmp_path / name)} == set(LAYOUTS)
    assert len(READABLE) >= 8


@pytest.mark.parametrize("name", READABLE)
def test_data_examples_pass_the_check(tmp_path: Path, name: str) -> None:
    lay_out("docs/data.md", tmp_path)
    assert read_groups(tmp_path / name).findings == []
    report = check_data(tmp_path / name)
    assert [finding for finding in report.findings if finding.kind != "missing-score"] == []
    assert report.usable_rows == report.rows


def test_the_readmes_example_passes_the_check(tmp_path: Path) -> None:
    report = check_data(write_example(blocks("README.md", "json")[0], tmp_path))
    assert report.findings == []
    assert report.usable_rows == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", READABLE)
def test_data_examples_go_to_every_layout_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, layout: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lay_out("docs/data.md", tmp_path)
    unidpo_data("convert", name, "--to", "there.parquet", "--layout", layout)
    unidpo_data("convert", "there.parquet", "--to", "back.json", "--layout", "ranked")
    assert pairs_of(name)
    assert pairs_of(name) == pairs_of("there.parquet") == pairs_of("back.json")


def test_the_data_page_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    turns = [{"role": "user", "content": "2 + 2?"}]
    row = {
        "chosen": [*turns, {"role": "assistant", "content": "4"}],
        "rejected": [*turns, {"role": "assistant", "content": "5"}],
        "score_chosen": 5.0,
        "score_rejected": 1.0,
    }
    hub = {"trl-lib/ultrafeedback_binarized": {"train": datasets.Dataset.from_list([row])}}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: hub[name])
    monkeypatch.chdir(tmp_path)
    lay_out("docs/data.md", tmp_path)
    commands = follow("docs/data.md")
    same = {
        "as-alpaca.json": "sharegpt.json",
        "ranked-again.jsonl": "chosen-pairs.jsonl",
        "plain.parquet": "plain.jsonl",
    }
    same |= dict.fromkeys(("as-sharegpt.json", "as-trl.jsonl", "as-ranked.jsonl"), "alpaca.json")
    same |= dict.fromkeys(("embedded.parquet", "embedded-again.json"), "embedded.jsonl")
    same |= dict.fromkeys(("as-layout.jsonl", "without-seller.jsonl"), "shop.json")
    for name, origin in same.items():
        assert pairs_of(name) == pairs_of(origin), name
    assert "seller" in Path("as-layout.jsonl").read_text("utf-8")
    assert "seller" not in Path("without-seller.jsonl").read_text("utf-8")
    assert "images/receipt.png" in Path("photos-elsewhere.jsonl").read_text("utf-8")
    for name in ("new.jsonl", "old.jsonl"):
        assert check_data(name).ok
        assert json.loads(Path(name).read_text("utf-8"))["images"] == ["images/cat.jpg"]
    assert pairs_of("from-hub.jsonl") == pairs_of("from-folder.parquet") == pairs_of("saved")
    written = {word for command in commands for word in shlex.split(command) if Path(word).suffix}
    assert all(Path(name).is_file() for name in written if "@" not in name)
    assert {words[2] for words in map(str.split, commands)} == {"check", "convert", "relocate"}


def test_the_check_page_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    write_example(blocks("README.md", "json")[0], tmp_path)
    assert len(follow("docs/check.md")) == 5
    assert pairs_of("usable.json") == pairs_of("pairs.json")


def test_the_mm_rlhf_page_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lay_out("docs/mm-rlhf.md", tmp_path)
    assert len(follow("docs/mm-rlhf.md")) == 4
    [group] = read_groups("scored.jsonl").groups
    assert [response.score for response in group.responses] == [5, 4, 1, 4.5]
    assert len(group.pairs) == 5
    assert (3, 1) not in {(pair.chosen, pair.rejected) for pair in group.pairs}
    [joined] = read_groups("joined.json").groups
    assert [response.score for response in joined.responses] == [5, 1]


def test_every_option_of_the_data_commands_is_documented() -> None:
    pages = {"check": "check.md", "convert": "data.md", "relocate": "data.md"}
    for name, command in typer.main.get_command(cli.app).commands["data"].commands.items():  # type: ignore[attr-defined]
        page = text_of(f"docs/{pages.get(name, 'mm-rlhf.md')}")
        for option in command.params:
            names = [*option.opts, *option.secondary_opts]
            if names[0].startswith("--") and names != ["--help"]:
                assert any(f"`{each}`" in page or f"{each} " in page for each in names), (name, names)


def test_the_speed_of_the_check_is_a_measured_one() -> None:
    said = text_of("docs/check.md").partition("## How fast")[2].partition("\n## ")[0]

    def is_said(run: dict[str, float]) -> bool:
        return f"{run['seconds']} s" in said and f"{run['peak_mib']} MiB" in said and f"{run['rows']:,} rows" in said

    last = json.loads(text_of("benchmarks/results/check.json"))[-1]
    assert all(is_said(run) for run in last["runs"].values())


def test_ranked_example_makes_the_pairs_it_says(tmp_path: Path) -> None:
    lay_out("docs/data.md", tmp_path)
    made = {}
    for name in ("ranked.jsonl", "chosen-pairs.jsonl"):
        first = read_groups(tmp_path / name).groups[0]
        scores = [response.score for response in first.responses]
        made[name] = [(scores[pair.chosen], scores[pair.rejected]) for pair in first.pairs]
    assert made == {"ranked.jsonl": [(4, 2.5), (4, 1), (2.5, 1)], "chosen-pairs.jsonl": [(4, 1), (2.5, 1)]}


# --- recipes and commands


@pytest.mark.parametrize("name", ["README.md", "README_zh.md", "docs/recipes.md"])
def test_recipes_in_the_docs_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(ROOT)  # where a sweep's recipes lie
    recipes = blocks(name, "yaml")
    assert recipes
    for number, block in enumerate(recipes):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block, "utf-8")
        load_either(path)


def load_either(path: Path, overrides: Sequence[str] = ()) -> None:
    (load_sweep if is_sweep(path) else load_recipe)(path, overrides)


def test_the_quick_start_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's data and recipe, word for word; only the model is one that lies here."""
    from unidpo.run.train import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNIDPO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    write_example(blocks("README.md", "json")[0], tmp_path / "images").rename(tmp_path / "pairs.json")
    Path("recipe.yaml").write_text(blocks("README.md", "yaml")[0], "utf-8")
    folder = run(load_recipe("recipe.yaml", [f"model.name={MODEL}", "data.template=chatml"]))
    for name in ("model/config.json", "metrics.jsonl", "config.json", "environment.json"):
        assert (folder / name).is_file(), name
    assert list(folder.glob("pairs.parquet/*.parquet"))


def test_what_the_readme_installs_runs_its_first_command() -> None:
    from unidpo.demo import require_digits

    (install,) = [block for block in blocks("README.md", "bash") if "pip install" in block]
    (extra,) = re.findall(r'-e "\.\[(\w+)\]"', install)
    packages = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"][extra]
    assert install.splitlines()[-1] == "unidpo demo"
    assert any(package.startswith("scikit-learn") for package in packages)
    require_digits()


def test_commands_in_the_docs_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `unidpo` command with its own options and, where it names a recipe of ours, overrides that are valid."""
    monkeypatch.chdir(ROOT)
    commands = [
        shlex.split(line, comments=True)
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
            load_either(ROOT / arguments["recipe"], arguments["overrides"] or ())


def test_both_readmes_have_the_same_headings_and_code() -> None:
    english, chinese = text_of("README.md"), text_of("README_zh.md")
    assert re.findall(r"^(#+) ", english, re.MULTILINE) == re.findall(r"^(#+) ", chinese, re.MULTILINE)
    assert FENCE.findall(english) == FENCE.findall(chinese)
    tables = [[line.count("|") for line in text.splitlines() if line.startswith("|")] for text in (english, chinese)]
    assert tables[0] == tables[1]
    names = [re.findall(r"`([^`\n]+)`", re.sub(FENCE, "", text)) for text in (english, chinese)]
    assert set(names[0]) == set(names[1])


def test_both_readmes_link_and_list_the_same() -> None:
    def shape(text: str) -> list[tuple[int, list[str]]]:
        """Of each section: how many points it lists, and where it links to, in whatever order."""
        sections = re.split(r"^#+ ", FENCE.sub("", text), flags=re.MULTILINE)
        return [(len(re.findall(r"^- ", s, re.MULTILINE)), sorted(re.findall(r"\]\((.+?)\)", s))) for s in sections]

    first, *rest = shape(text_of("README.md").replace("README_zh.md", "README.md"))
    assert [first, *rest] == shape(text_of("README_zh.md"))


def test_files_named_in_contributing_exist() -> None:
    text = text_of("CONTRIBUTING.md")
    named = [word for word in re.findall(r"`([\w./-]+)`", text) if re.search(r"/|\.(py|md|toml)$", word)]
    assert len(named) > 10
    assert [word for word in named if not (SOURCE / word).exists() and not (ROOT / word).exists()] == []
    assert len(text.splitlines()) < 100
    sources = "".join(
        (SOURCE / word).read_text("utf-8")
        for word in named
        if (SOURCE / word).suffix == ".py" and (SOURCE / word).is_file()
    )
    registries = re.findall(r"`([A-Z_]{4,})`", text)
    assert len(registries) >= 3
    assert [name for name in registries if f"\n{name}: " not in sources] == []


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


def test_the_floors_in_the_readmes_are_those_that_imports_are_held_to() -> None:
    contract = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"][0]
    floors = [floor.split(" | ") for floor in contract["layers"] if floor != "__main__"]
    assert len(floors) <= 12
    for page, title in (("README.md", "## The house"), ("README_zh.md", "## 结构")):
        table = text_of(page).partition(title)[2].partition("\n## ")[0]
        rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        assert [re.findall(r"`(\w+)`", row) for row in rows] == floors


def findings_made(*paths: Path) -> Iterator[tuple[str, str]]:
    """(kind, severity) of every finding that some modules can make."""
    severities = {"error": "error", "warn": "warning", "warning": "warning", "Finding": "error", "_note": "error"}
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text("utf-8")))):
        if isinstance(node, ast.Assign):
            target = node.targets[0]
            if getattr(target, "id", "") == "_ODD_TEXT" and isinstance(node.value, ast.Tuple):
                yield from ((row.elts[0].value, "warning") for row in node.value.elts)  # type: ignore[attr-defined]
            if any(getattr(name, "id", None) == "kind" for name in ast.walk(target)):
                yield from ((kind, "error") for kind in kinds_in(node.value))
            if isinstance(target, ast.Subscript):
                yield from ((kind, "warning") for kind in kinds_in(target.slice))
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Dict):
            yield from ((kind, "warning") for key in node.value.keys if key for kind in kinds_in(key))
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in severities and re.fullmatch(r"[a-z-]+", str(node.args[0].value)):
                given = [k.value.value for k in node.keywords if k.arg == "severity"]
                given += [a.value for a in node.args[3:] if getattr(a, "value", None) in ("error", "warning")]
                yield node.args[0].value, (given or [severities[called]])[0]


def kinds_in(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and KIND.fullmatch(inner.value):
            yield inner.value


@pytest.mark.parametrize(
    ("page", "modules"),
    [
        (
            "docs/check.md",
            ["data/formats/**/*.py", "data/check/**/*.py", "data/images.py", "data/lost_rows.py", "model/lengths.py"],
        ),
        ("docs/mm-rlhf.md", ["data/mm_rlhf/*.py"]),
    ],
)
def test_every_kind_of_finding_is_documented(page: str, modules: list[str]) -> None:
    documented = re.findall(r"^\| `([a-z-]+)` \| (error|warning) \|", text_of(page), re.MULTILINE)
    assert len(documented) == len(set(documented))
    assert set(documented) == set(findings_made(*(path for pattern in modules for path in SOURCE.glob(pattern))))


def test_every_recipe_key_is_documented() -> None:
    recipes, loss = text_of("docs/recipes.md"), text_of("docs/loss.md")
    keys = [key for s in (ModelSection, DataSection, SourceSection, LoraSection) for key in s.model_fields]
    keys += [key for key in (*Recipe.model_fields, *TrainSection.__annotations__) if key != "eval"]
    for key in keys:
        assert f"`{key}`" in recipes, key
    for key in {key for section in LOSSES.values() for key in section.model_fields} - {"name"}:
        assert f"`{key}`" in loss, key


def test_defaults_in_the_tables_are_the_defaults() -> None:
    """Rows of the form `| `key` | default | ...` in docs/recipes.md and docs/loss.md."""
    recipes, loss = text_of("docs/recipes.md"), text_of("docs/loss.md")
    sections = {"model": ModelSection, "data": DataSection, "lora": LoraSection, "train": TrainSection}
    tables = [(recipes.partition(f"## `{name}`\n")[2].partition("\n## ")[0], s) for name, s in sections.items()]
    tables.append((loss.partition("## Knobs of `uni_dpo`\n")[2].partition("\n##")[0], LOSSES["uni_dpo"]))
    tables.append((recipes.partition("## Several data sets\n")[2].partition("\n## ")[0], SourceSection))
    for table, section in tables:
        found = re.findall(r"^\| `(\w+)`(?: \(\S+\))? \| `?(.+?)`? \|", table, re.MULTILINE)
        assert len(found) >= 3
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
    from unidpo.run_folder.records import Ledger, Metrics

    monkeypatch.chdir(tmp_path)
    Path("runs/tiny").mkdir(parents=True)
    metrics = Metrics(Path("runs/tiny/metrics.jsonl"))
    metrics.add({"step": 1, "loss": 0.5, "rewards/accuracies": 0.5, "nll/gate_rate": 0.0})
    metrics.add({"step": 1, "eval_loss": 0.5, "eval_rewards/accuracies": 0.5})
    ledger = Ledger(Path("runs/tiny/pairs.parquet"))
    ledger.add({column.name: [1, 2] for column in LEDGER_COLUMNS} | {"file": ["a", "b"]})
    ledger.flush()
    for code in blocks("docs/run-folder.md", "python"):
        exec(compile(code, "docs/run-folder.md", "exec"), {})


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word; only the model is one that lies here, and the machine has no GPU."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    write_example(blocks("README.md", "json")[0], tmp_path / "images").rename(tmp_path / "pairs.json")
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    for code in blocks(page, "python"):
        exec(compile(code.replace("Qwen/Qwen2-VL-2B-Instruct", str(MODEL)), page, "exec"), {})
    metrics = Path("runs/py/metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [1, 2, 3]
    assert list(Path("runs/py").glob("pairs.parquet/*.parquet"))


def test_python_in_the_readme_names_what_there_is() -> None:
    (code,) = blocks("README.md", "python")
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = {"unidpo": unidpo, "transformers": transformers}[node.module or ""]
            assert all(hasattr(module, alias.name) for alias in node.names)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in unidpo.__all__:
            called = getattr(unidpo, node.func.id)  # type: ignore[attr-defined]
            # A loss is built at its first use; until then its signature does not name its fields.
            known = getattr(called, "model_fields", None) or inspect.signature(called).parameters
            assert {keyword.arg for keyword in node.keywords} <= known.keys()
