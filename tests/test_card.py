"""The model card that a run leaves in `model/`, and `--push-to-hub`, against a hub of this process."""

import json
import re
import types
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

from test_train import metrics_of, rows_of, unidpo, write_recipe, write_rows
from unidpo.run.card import HELD_OUT_ROWS, write_card
from unidpo.run_folder.folder import RunFolder
from unidpo.run_folder.manifest import write_manifest
from unidpo.run_folder.records import LEDGER_COLUMNS, Ledger, Metrics

TABLE = {"step": 1, "epoch": 0.0, "file": "a.json", "row": 1, "chosen": 0, "rejected": 1, "nll_gate": 0.0}


def run_folder(path, *, pairs=({},), records=(), model="org/base", data="a.json", loss="uni_dpo", **config):
    """A run folder without a training: pairs as overrides of a ledger row, records of metrics as they are."""
    folder = RunFolder(path)
    sections = {"model": {"name": model}, "data": {"path": data, "eval_fraction": 0.0}, "loss": {"name": loss}}
    folder.create({**sections, "train": {}, **config})
    metrics, ledger = Metrics(folder.metrics), Ledger(folder.ledger)
    for record in records:
        metrics.add(record)
    for pair in pairs:
        ledger.add({column.name: [(TABLE | pair).get(column.name, 1.0)] for column in LEDGER_COLUMNS})
    ledger.flush()
    sources = [{"path": data, "weight": 1.0}] if isinstance(data, str) else data
    (path / "inputs.json").write_text(json.dumps({"data": [source | {"sha256": None} for source in sources]}))
    model_folder = path / "model"
    model_folder.mkdir()
    return folder, model_folder


def card_of(path, **content):
    folder, model = run_folder(path, **content)
    write_card(folder, model)
    return (model / "README.md").read_text()


def line_of(card, start):
    (line,) = (line for line in card.splitlines() if line.startswith(start))
    return line


# --- the card ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_card(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = write_recipe(tmp_path, data=write_rows(tmp_path, rows_of(8)) | {"eval_fraction": 0.25}, lora={"r": 2})
    code, printed = unidpo("train", recipe, "train.global_batch_pairs=2")
    assert code == 0, printed
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert ModelCard(card).data.tags == ["unidpo", "preference-optimization", "uni_dpo"]
    assert ModelCard(card).data.library_name == "peft"
    assert "6 rows and 6 pairs were met in 6 visits over 3 optimizer steps" in card
    last = [record for record in metrics_of(tmp_path / "run") if "loss" in record][-1]
    assert line_of(card, "| `rewards/margins` |") == f"| `rewards/margins` | {last['rewards/margins']:.4g} |"
    held_out = [record for record in metrics_of(tmp_path / "run") if "eval_loss" in record]
    assert f"| 3 | {held_out[-1]['eval_loss']:.4g} |" in card
    assert "unidpo train ~/recipe.yaml train.global_batch_pairs=2" in card
    assert "global_batch_pairs: 2" in card
    assert str(tmp_path) not in card, "nobody's home directory belongs on a hub"


def test_the_counts_are_those_of_the_ledger(tmp_path):
    pairs = [{"row": i + 1, "step": i // 2 + 1} for i in range(6)]
    card = card_of(tmp_path / "run", pairs=[*pairs, {**pairs[0], "step": 4}])
    assert "6 rows and 6 pairs were met in 7 visits over 4 optimizer steps" in card


def test_of_many_evaluations_the_last_are_shown(tmp_path):
    records = [
        {"step": step, "eval_loss": 0.5, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.1}
        for step in range(1, 101)
    ]
    card = card_of(tmp_path / "run", records=records)
    steps = [int(step) for step in re.findall(r"^\| (\d+) \| 0\.5", card, re.MULTILINE)]
    assert steps == list(range(101 - HELD_OUT_ROWS, 101))


def test_the_best_model_is_said_to_be_the_best(tmp_path):
    folder, model = run_folder(
        tmp_path / "run", train={"load_best_model_at_end": True, "metric_for_best_model": "rewards/accuracies"}
    )
    checkpoint = folder.path / "checkpoint-8"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"best_global_step": 4}))
    write_manifest(checkpoint, 8, run=folder.path, resumable=False)
    write_card(folder, model)
    assert "of step 4, the best by `rewards/accuracies`" in (model / "README.md").read_text()


def test_names_of_the_hub_are_metadata_and_paths_are_not(tmp_path):
    local = tmp_path / "pairs.json"
    local.write_text("[]")
    sources = [{"path": str(local), "weight": 1.0}, {"path": "trl-lib/feedback:all@train", "weight": 0.5}]
    card = ModelCard(card_of(tmp_path / "run", data=sources)).data
    assert card.base_model == "org/base"
    assert card.datasets == ["trl-lib/feedback"]
    base = tmp_path / "org" / "base"
    base.mkdir(parents=True)
    card = ModelCard(card_of(tmp_path / "other", model=str(base), data=str(local))).data
    assert card.base_model is None


def test_data_cannot_write_the_page(tmp_path):
    evil = "a|b`c``](x)\n# <script>alert(1)</script>"
    card = card_of(tmp_path / "run", data=evil, model=evil, note=f"{evil}\n```\n# out of the fence\n````\n")
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", card)  # fenced blocks
    outside = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", outside)  # code spans
    assert "<script>" not in outside
    assert "](x)" not in outside
    assert [line for line in outside.splitlines() if line.startswith("# ")] == [line_of(card, "# ")]
    assert "out of the fence" not in outside
    assert r"a\|b" in line_of(card, "| `")


def test_what_is_no_number_is_said_to_be_none(tmp_path):
    card = card_of(tmp_path / "run", records=[{"step": 1, "loss": float("nan")}])
    assert line_of(card, "| `loss`") == "| `loss` | not a number |"


def test_a_card_that_cannot_be_written_does_not_cost_the_model(tmp_path, monkeypatch):
    def broken(folder, model):
        raise KeyError("loss")

    monkeypatch.setattr("unidpo.run.train.write_card", broken)
    code, printed = unidpo("train", write_recipe(tmp_path, data=write_rows(tmp_path, rows_of(2))))
    assert code == 0, printed
    assert "the model card could not be written" in printed
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """What `HfApi` does here: notes what is asked of it, and fails where a test says so."""

    def __init__(self):
        self.asked, self.fails = [], {}

    def _do(self, what, *seen):
        self.asked.append((what, *seen))
        if what in self.fails:
            raise self.fails[what]

    def create_repo(self, repo_id, *, private, exist_ok):
        self._do("create", repo_id, private, exist_ok)
        return types.SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def auth_check(self, repo_id, *, write):
        self._do("check", repo_id, write)

    def upload_folder(self, *, folder_path, repo_id, commit_message):
        self._do("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir()))
        return types.SimpleNamespace(repo_url=f"https://hub/{repo_id}")


@pytest.fixture
def hub(monkeypatch):
    """A hub, and a training that finishes at once."""

    def run(recipe, **options):
        run_folder(recipe.output)[1].joinpath("config.json").write_text("{}")

    hub = Hub()
    monkeypatch.setattr("unidpo.run.hub.HfApi", lambda: hub)
    monkeypatch.setattr("unidpo.run.train.run", run)
    return hub


def push(tmp_path):
    return unidpo("train", write_recipe(tmp_path), "--push-to-hub", "me/it")


def test_the_finished_model_is_pushed(hub, tmp_path):
    code, printed = push(tmp_path)
    assert code == 0, printed
    assert [what for what, *_ in hub.asked] == ["create", "check", "upload"]
    assert hub.asked[0] == ("create", "me/it", True, True)
    assert hub.asked[2] == ("upload", "me/it", ["config.json"])
    assert "pushed: https://hub/me/it" in printed


@pytest.mark.parametrize(
    ("what", "error", "expected"),
    [
        ("create", LocalTokenNotFoundError("no token"), "hf auth login"),
        ("check", PermissionError("403 Forbidden: read only"), "read only"),
        ("create", ConnectionError("no route to the hub"), "no route to the hub"),
    ],
)
def test_a_hub_that_refuses_is_known_before_the_training(hub, tmp_path, what, error, expected):
    hub.fails[what] = error
    code, printed = push(tmp_path)
    assert code == 2
    assert "--push-to-hub me/it" in printed
    assert expected in printed
    assert not (tmp_path / "run").exists()


def test_an_upload_that_fails_leaves_the_finished_run_and_the_command_to_try_again(hub, tmp_path):
    hub.fails["upload"] = ConnectionError("cable cut")
    code, printed = push(tmp_path)
    assert code == 1
    assert "cable cut" in printed
    assert f"hf upload me/it {tmp_path / 'run' / 'model'}" in printed
    assert RunFolder(tmp_path / "run").finished


def test_an_upload_that_is_interrupted_is_no_interrupted_training(hub, tmp_path):
    hub.fails["upload"] = KeyboardInterrupt()
    code, printed = push(tmp_path)
    assert code == 130
    assert "hf upload me/it" in printed
    assert "--resume" not in printed
