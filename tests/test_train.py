"""`unidpo train` from outside: the authors' numbers, the run folder, resuming, and wrong inputs."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from unittest import mock

import pandas
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import unidpo as unidpo_package
from unidpo import cli
from unidpo.data.formats import load_pairs
from unidpo.errors import UserError
from unidpo.losses import SimPO
from unidpo.model.encode import Encoder, prompt_positions
from unidpo.model.load import load_processor
from unidpo.run_folder.records import LEDGER_COLUMNS
from unidpo.training.record import RunRecord
from worlds import GOLDEN

DATA = GOLDEN / "data"
LOSSES = {
    "uni_dpo": {"name": "uni_dpo"},
    "dpo": {"name": "dpo", "beta": 0.1, "label_smoothing": 0.1, "length_normalized": True},
    "simpo": {"name": "simpo", "beta": 2.0, "gamma": 1.0},
}
# peft asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def unidpo(*arguments):
    """A command in this process: exit code, and all it printed."""
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["unidpo", *map(str, arguments)]),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        pytest.raises(SystemExit) as done,
    ):
        cli.main()
    return done.value.code or 0, printed.getvalue()


def write_recipe(folder, **sections):
    """The golden recipe, with keys of its sections replaced; its run folder is `folder/run`."""
    recipe = {
        "output": str(folder / "run"),
        "model": {"name": str(GOLDEN / "model"), "dtype": "float32"},
        "data": {"path": str(DATA / "golden48.json"), "template": "chatml", "shuffle": False},
        "loss": LOSSES["uni_dpo"],
        "train": {"learning_rate": 1e-3, "global_batch_pairs": 4},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe[name], **section} if isinstance(recipe.get(name), dict) and name != "loss" else section
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def rows_of(count):
    return json.loads((DATA / "golden48.json").read_text())[:count]


def write_rows(folder, rows, name="pairs.json"):
    path = folder / name
    path.write_text(json.dumps(rows))
    return {"path": str(path), "images": str(DATA)}


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_follows(golden, name, run):
    reference = json.loads((golden / "reference" / name / "steps.json").read_text())
    for ours, theirs in zip(metrics_of(run), reference, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-9)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished golden run with its cache, made by the real command; and what that printed."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder, train={"save_steps": 5})
    environment = os.environ | {"UNIDPO_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "unidpo", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "gemm_4bit" not in done.stderr  # bitsandbytes, which is imported along with transformers' Trainer
    return folder, done


# --- a run ------------------------------------------------------------------------------------------------------------


def test_the_command_follows_the_reference_with_uni_dpo(golden, finished):
    assert_follows(golden, "uni_dpo", finished[0] / "run")


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_the_command_follows_the_reference(golden, tmp_path, name):
    code, printed = unidpo("train", write_recipe(tmp_path, loss=LOSSES[name]))
    assert code == 0, printed
    assert_follows(golden, name, tmp_path / "run")


def test_what_a_run_prints(finished):
    folder, done = finished
    assert done.stdout == ""
    for line in (
        "training on 48 pairs of 48 groups",
        "reference: 0 responses found",
        "96 to compute",
        "tokenizing, groups: 48/48",
        "reference, responses: 96/96",
        "training, pairs: 48/48",
        f"finished: {folder / 'run' / 'model'}",
    ):
        assert line in done.stderr
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_ends_with_what_can_be_done_next(finished):
    folder, done = finished
    run = folder / "run"
    title, report, evaluate, load, ledger = done.stderr.splitlines()[-5:]
    assert title == "next:"
    assert report.split("  ")[1] == str(run / "report.html")
    assert evaluate.split("  ")[1] == f"unidpo eval {run} --benchmarks paper"
    assert load.split("  ")[1] == f"unidpo.load_policy({str(run / 'model')!r})"
    assert eval(load.split("  ")[1], {"unidpo": unidpo_package}).dtype == torch.float32
    assert ledger.split("  ")[1] == str(run / "pairs.parquet")


def test_the_run_folder(finished):
    run = finished[0] / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.json", "environment.json", "inputs.json", "inputs.parquet", "report.html",
        "metrics.jsonl", "pairs.parquet", "model", "checkpoint-10", "checkpoint-12",
    }  # fmt: skip
    config = json.loads((run / "config.json").read_text())
    assert config["loss"]["quality_eta"] == 0.7  # defaults are filled in
    assert config["train"]["global_batch_pairs"] == 4
    environment = json.loads((run / "environment.json").read_text())
    assert environment["starts"][0]["packages"]["torch"] == torch.__version__
    records = metrics_of(run)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert {"loss", "grad_norm", "learning_rate", "rewards/accuracies", "weights/quality", "nll/gate_rate"} <= records[
        0
    ].keys()


def test_the_ledger_has_every_pair_once(finished):
    run = finished[0] / "run"
    ledger = pandas.read_parquet(run / "pairs.parquet")
    assert list(ledger.columns) == [column.name for column in LEDGER_COLUMNS]
    assert ledger["row"].tolist() == list(range(1, 49))
    assert ledger["step"].tolist() == [1 + i // 4 for i in range(48)]
    data = rows_of(48)
    assert ledger["chosen_score"].tolist() == [row["score_chosen"] for row in data]
    assert ledger["rejected_score"].tolist() == [row["score_rejected"] for row in data]
    for record, (_, step) in zip(metrics_of(run), ledger.groupby("step"), strict=True):
        assert record["loss"] == pytest.approx(step["loss"].mean(), abs=1e-6)


def test_the_model_loads_generates_and_has_learned(finished):
    folder = finished[0] / "run" / "model"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    encoder = Encoder(load_processor(folder), prompt_positions(model))
    encoded = encoder.encode(load_pairs(DATA / "golden48.json")[0])
    types = encoded.mm_token_type_ids[None]
    text = model.generate(
        input_ids=encoded.prompt_ids[None],
        attention_mask=torch.ones_like(types),
        mm_token_type_ids=types,
        max_new_tokens=2,
        min_new_tokens=2,
        **encoded.vision,
    )
    assert text.shape[1] == len(encoded.prompt_ids) + 2
    before, after = load_file(GOLDEN / "model" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys(), "the hub's names stay, so that other tools load it"
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if not name.startswith("visual.")}


def test_a_second_run_finds_the_reference(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIDPO_CACHE", str(finished[0] / "cache"))
    others = ("loss.beta=1.0", "loss.perf_gamma=1.5", "loss.quality_eta=0.3")
    code, printed = unidpo("train", write_recipe(tmp_path), *others, "train.max_steps=1")
    assert code == 0
    assert re.search(r"reference: 96 responses found in .*, 0 to compute", printed)


def test_the_model_of_a_run_is_the_model_of_the_next(finished, tmp_path):
    code, printed = unidpo(
        "train", write_recipe(tmp_path, model={"name": str(finished[0] / "run" / "model")}), "train.max_steps=1"
    )
    assert code == 0, printed
    first = metrics_of(tmp_path / "run")[0]
    assert first["loss"] < 0.5 * metrics_of(finished[0] / "run")[0]["loss"]


def test_each_key_of_a_recipe_reaches_the_trainer(tmp_path, monkeypatch):
    seen = {}

    def trainer(model, **options):
        seen.update(options, dtype=model.dtype)
        raise UserError("as far as this test goes")

    monkeypatch.setattr("unidpo.run.train.PreferenceTrainer", trainer)
    options = {
        "max_length": 999,
        "max_pixels": 9999,
        "template": "chatml",
        "shuffle": False,
        "cache_image_features": True,
        "on_bad_row": "skip",
        "max_lost_fraction": 0.5,
    }
    recipe = write_recipe(
        tmp_path,
        model={"dtype": "bfloat16", "freeze": ["vision", "projector", "language"], "attention": "padded"},
        data=options | {"eval_fraction": 0.25, "min_score_margin": 1.0},
        loss={"name": "simpo", "beta": 3.0},
        reference="live",
        lora={"r": 3},
        train={"global_batch_pairs": 6, "max_tokens_per_pack": 777, "learning_rate": 0.125, "data_seed": 5},
    )
    code, printed = unidpo("train", recipe)
    assert (code, "as far as this test goes" in printed) == (2, True), printed
    expected = options | {
        "reference": "live",
        "frozen": ("vision", "projector", "language"),
        "attention": "padded",
        "global_batch_pairs": 6,
        "max_tokens_per_pack": 777,
        "dtype": torch.bfloat16,
    }
    assert {name: seen[name] for name in expected} == expected
    assert seen["loss"] == SimPO(beta=3.0)
    assert seen["peft_config"].r == 3
    assert (seen["args"].learning_rate, seen["args"].data_seed, seen["args"].bf16) == (0.125, 5, True)
    groups = [*seen["train_dataset"], *seen["eval_dataset"]]
    assert min(one.score_margin(pair) for one in groups for pair in one.pairs) >= 1.0
    assert len(seen["eval_dataset"]) == round(0.25 * len(groups))
    assert len(groups) < 48


def test_overrides_and_what_is_left_out(tmp_path):
    rows = [row | {"score_chosen": 4.0, "score_rejected": 4.0 - 0.5 * i} for i, row in enumerate(rows_of(6))]
    recipe = write_recipe(tmp_path, data=write_rows(tmp_path, rows))
    code, printed = unidpo("train", recipe, "data.min_score_margin=1.0", "train.global_batch_pairs=2", "loss.beta=0.5")
    assert code == 0, printed
    assert "left out 2 of 6 pairs" in printed
    ledger = pandas.read_parquet(tmp_path / "run" / "pairs.parquet")
    assert ledger["row"].tolist() == [3, 4, 5, 6]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["loss"]["beta"] == 0.5


def test_bad_rows_are_left_out_where_the_recipe_says_so(tmp_path):
    rows = rows_of(5)
    rows[1]["score_chosen"] = "4"
    recipe = write_recipe(tmp_path, data=write_rows(tmp_path, rows) | {"on_bad_row": "skip"})
    code, printed = unidpo("train", recipe)
    assert code == 0, printed
    assert "row 2, `score_chosen`" in printed
    assert pandas.read_parquet(tmp_path / "run" / "pairs.parquet")["row"].tolist() == [1, 3, 4, 5]


def test_groups_of_one_prompt_through_the_command(tmp_path):
    rows = [rows_of(1)[0] | {"rejected": f"answer {i}", "score_rejected": 1.0 + i} for i in range(3)]
    recipe = write_recipe(tmp_path, data=write_rows(tmp_path, rows) | {"group_by_prompt": True})
    code, printed = unidpo("train", recipe)
    assert code == 0, printed
    assert "training on 3 pairs of 1 groups" in printed
    assert "4 to compute" in printed  # the chosen response is one, not three
    ledger = pandas.read_parquet(tmp_path / "run" / "pairs.parquet")
    assert ledger["row"].tolist() == [1, 2, 3]
    assert ledger["chosen_logps"].nunique() == 1


def test_an_adapter_through_the_command(tmp_path):
    recipe = write_recipe(tmp_path, data=write_rows(tmp_path, rows_of(4)), lora={"r": 4, "alpha": 8})
    code, printed = unidpo("train", recipe, "train.num_train_epochs=2")
    assert code == 0, printed
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model")
    assert any("lora_B" in name and p.abs().sum() > 0 for name, p in model.named_parameters())
    # As the model of another run it is one model, the adapter merged in.
    options = f"model.name={tmp_path / 'run' / 'model'}", f"output={tmp_path / 'next'}", "lora=null"
    code, printed = unidpo("train", recipe, *options)
    assert code == 0, printed
    last, first = (pandas.read_parquet(tmp_path / run / "pairs.parquet") for run in ("run", "next"))
    assert (first["chosen_logps"][:4] - last["ref_chosen_logps"][:4]).abs().min() > 1e-3


def test_a_text_model_through_the_command(tmp_path, text_model):
    rows = [
        {"prompt": f"What is {i}?", "chosen": "a number", "rejected": "red", "score_chosen": 4, "score_rejected": 2}
        for i in range(4)
    ]
    recipe = write_recipe(tmp_path, data=write_rows(tmp_path, rows), model={"name": str(text_model)})
    code, printed = unidpo("train", recipe, "model.attention=sdpa", "train.num_train_epochs=2")
    assert code == 0, printed
    first, second = metrics_of(tmp_path / "run")
    assert first["rewards/margins"] == 0 < second["rewards/margins"]


def test_held_out_pairs_through_the_command(tmp_path):
    recipe = write_recipe(tmp_path, data=write_rows(tmp_path, rows_of(8)) | {"eval_fraction": 0.25})
    code, printed = unidpo("train", recipe, "train.global_batch_pairs=2", "train.num_train_epochs=2")
    assert code == 0, printed
    records = metrics_of(tmp_path / "run")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "eval_loss" in record] == [3, 6]
    visited = pandas.read_parquet(tmp_path / "run" / "pairs.parquet")["row"].tolist()
    assert len(visited) == 12
    assert len(set(visited)) == 6


def test_losses_without_scores_train_on_data_without_scores(tmp_path):
    rows = [{k: v for k, v in row.items() if not k.startswith("score")} for row in rows_of(4)]
    code, printed = unidpo("train", write_recipe(tmp_path, data=write_rows(tmp_path, rows), loss={"name": "simpo"}))
    assert code == 0, printed
    ledger = pandas.read_parquet(tmp_path / "run" / "pairs.parquet")
    assert ledger["chosen_score"].isna().all()
    assert ledger["ref_chosen_logps"].isna().all()


@pytest.mark.parametrize("epochs", ["train.max_steps=2", "train.num_train_epochs=0.15"])
def test_progress_counts_the_pairs_that_are_visited(tmp_path, epochs):
    code, printed = unidpo("train", write_recipe(tmp_path, loss=LOSSES["simpo"]), epochs)
    assert code == 0, printed
    assert "training, pairs: 8/8 in" in printed


def test_keys_that_transformers_refuses_together(tmp_path):
    code, printed = unidpo("train", write_recipe(tmp_path), "train.dataloader_prefetch_factor=2")
    assert code == 2, printed
    assert "train.dataloader_prefetch_factor" in printed
    assert "dataloader_num_workers" in printed
    assert not (tmp_path / "run").exists()


# --- interrupted and resumed ------------------------------------------------------------------------------------------


def resumable(folder):
    """12 pairs, 2 shuffled epochs of 6 steps, checkpoints at 5 and 10."""
    folder.mkdir(exist_ok=True)
    train = {"global_batch_pairs": 2, "num_train_epochs": 2, "save_steps": 5, "learning_rate": 1e-4}
    return write_recipe(folder, data=write_rows(folder, rows_of(12)) | {"shuffle": True}, train=train)


@contextlib.contextmanager
def interrupted_at(step):
    """Ctrl-C in the middle of a step, after its backward pass."""
    on_pairs = RunRecord.on_pairs

    def interrupt(self, columns):
        on_pairs(self, columns)
        if columns["step"][0] == step:
            raise KeyboardInterrupt

    with mock.patch.object(RunRecord, "on_pairs", interrupt):
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIDPO_CACHE", str(folder / "cache"))
        code, printed = unidpo("train", resumable(folder))
    assert code == 0, printed
    return folder / "run"


def timeless(records):
    return [{k: v for k, v in record.items() if "runtime" not in k and "per_second" not in k} for record in records]


# Before the first checkpoint; in the second epoch, from a checkpoint in the first; from one within the second.
@pytest.mark.parametrize("step", [3, 8, 12])
def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path, uninterrupted, step):
    recipe, run = resumable(tmp_path), tmp_path / "run"
    with interrupted_at(step):
        code, printed = unidpo("train", recipe)
    assert code == 130
    assert f"unidpo train {recipe} --resume" in printed
    assert not (run / "model").exists()
    code, printed = unidpo("train", recipe, "--resume")
    assert code == 0, printed
    assert "24 responses found" in printed
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (run, uninterrupted))
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert timeless(metrics_of(run)) == timeless(metrics_of(uninterrupted))
    assert [record["step"] for record in metrics_of(run)] == list(range(1, 13))
    ledgers = [pandas.read_parquet(each / "pairs.parquet").drop(columns="file") for each in (run, uninterrupted)]
    pandas.testing.assert_frame_equal(*ledgers)
    assert sorted(ledgers[0]["row"]) == sorted([*range(1, 13)] * 2)
    assert len(json.loads((run / "environment.json").read_text())["starts"]) == 2


def test_an_epoch_has_its_own_order(uninterrupted):
    rows = pandas.read_parquet(uninterrupted / "pairs.parquet")["row"].tolist()
    assert rows[:12] != sorted(rows[:12])
    assert rows[:12] != rows[12:]


@pytest.mark.parametrize(
    "save", [{"save_strategy": "epoch"}, {"save_steps": 4, "logging_steps": 4}], ids=["epoch", "seldom"]
)
def test_the_ledger_never_lags_behind_a_checkpoint(tmp_path, save):
    recipe = write_recipe(
        tmp_path, data=write_rows(tmp_path, rows_of(8)), train={"global_batch_pairs": 2, "num_train_epochs": 2} | save
    )
    with interrupted_at(6):
        assert unidpo("train", recipe)[0] == 130
    code, printed = unidpo("train", recipe, "--resume")
    assert code == 0, printed
    ledger = pandas.read_parquet(tmp_path / "run" / "pairs.parquet")
    assert ledger["step"].tolist() == [1 + i // 2 for i in range(16)]
    assert ledger["row"].tolist() == [*range(1, 9)] * 2


def test_an_interrupted_reference_pass_goes_on(tmp_path, monkeypatch):
    from unidpo.cache import reference

    monkeypatch.setattr(reference.ReferencePass, "batch_tokens", 1)
    recipe = write_recipe(tmp_path, data=write_rows(tmp_path, rows_of(4)))
    add, calls = reference.LogpStore.add, []

    def interrupt(self, *args):
        add(self, *args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with mock.patch.object(reference.LogpStore, "add", interrupt):
        assert unidpo("train", recipe)[0] == 130
    code, printed = unidpo("train", recipe)  # nothing was trained, so there is nothing to resume
    assert code == 0, printed
    assert re.search(r"reference: 4 responses found in .*, 4 to compute", printed)


def test_a_run_may_not_go_on_with_another_recipe(tmp_path):
    recipe = resumable(tmp_path)
    with interrupted_at(6):
        assert unidpo("train", recipe)[0] == 130
    code, printed = unidpo("train", recipe, "loss.beta=1.0", "--resume")
    assert code == 2
    assert "`loss.beta`: was 2.0, is 1.0" in printed
    code, printed = unidpo("train", recipe)
    assert code == 2
    assert "--resume" in printed


# --- wrong inputs -----------------------------------------------------------------------------------------------------


def edit(row, **values):
    """A data set of four rows whose row (from 1) has other values; `None` takes a key out."""

    def make(folder):
        rows = rows_of(4)
        rows[row - 1] = {k: v for k, v in (rows[row - 1] | values).items() if v is not None}
        return {"data": write_rows(folder, rows)}

    return make


def text(content, name="pairs.json"):
    def make(folder):
        (folder / name).write_text(content)
        return {"data": {"path": str(folder / name)}}

    return make


def broken_image(folder):
    (folder / "broken.png").write_bytes((DATA / "images" / "golden48_000.png").read_bytes()[:300])
    return edit(2, images=[str(folder / "broken.png")])(folder)


def missing_file(folder):
    return {"data": {"path": str(folder / "pairs.json")}}


def no_model(folder):
    (folder / "empty").mkdir()
    return {"model": {"name": str(folder / "empty")}}


def broken_model(folder):
    shutil.copytree(GOLDEN / "model", folder / "halved")
    weights = folder / "halved" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    return {"model": {"name": str(folder / "halved")}}


def recipe_with(**sections):
    return lambda folder: sections


NAN_ROW = json.dumps([rows_of(1)[0] | {"score_chosen": float("nan")}])
JSONL = json.dumps(rows_of(1)[0] | {"images": [], "instruction": "What?"}) + '\n{"instruction": "What?", "chosen": \n'
# What is wrong → (how to make it, what the message must hold).
WRONG = {
    "missing file": (missing_file, ["pairs.json", "no such file"]),
    "broken JSON": (text('[{"instruction": "a",\n "chosen" "b"}]'), ["pairs.json", "line 2, column 11"]),
    "broken JSON line": (text(JSONL, "pairs.jsonl"), ["pairs.jsonl", "row 2", "not valid JSON"]),
    "missing score": (edit(3, score_rejected=None), ["pairs.json", "row 3", "`score_rejected`"]),
    "no scores": (
        edit(3, score_rejected=None, score_chosen=None),
        ["pairs.json", "row 3", "`score_chosen`", "or train with a loss that needs none: loss={name: dpo}"],
    ),
    "score that is no number": (edit(3, score_chosen="good"), ["pairs.json", "row 3", "`score_chosen`", "'good'"]),
    "NaN score": (text(NAN_ROW), ["pairs.json", "row 1", "`score_chosen`", "nan"]),
    "empty response": (edit(2, rejected="  "), ["pairs.json", "row 2", "`rejected`", "empty"]),
    "equal responses": (edit(4, chosen="same", rejected="same"), ["pairs.json", "row 4", "`rejected`", "same text"]),
    "missing image": (edit(1, images=["images/none.png"]), ["pairs.json", "row 1", "`images[0]`", "images/none.png"]),
    "broken image": (broken_image, ["pairs.json", "row 2", "`images[0]`", "broken.png"]),
    "marks and images": (
        edit(2, instruction="<image><image> What?"),
        ["pairs.json", "row 2", "`instruction`", "marks in the prompt: 2, images in the row: 1"],
    ),
    "unknown recipe key": (
        recipe_with(train={"learning_rat": 1e-3}),
        ["recipe.yaml", "`train.learning_rat`", "did you mean `learning_rate`"],
    ),
    "two errors in a recipe": (
        recipe_with(data={"max_length": 0}, loss={"name": "uni_dpo", "bta": 1.0}),
        ["recipe.yaml", "2 problems", "`data.max_length`", "`loss.bta`", "did you mean `beta`"],
    ),
    "a folder that is no model": (no_model, ["/empty", "no model"]),
    "a model with half its weights": (broken_model, ["/halved", "cannot load the model"]),
    "a template nobody knows": (recipe_with(data={"template": "chatm"}), ["did you mean `chatml`?", "chatml"]),
    "a length no prompt fits": (
        recipe_with(data={"max_length": 20}),
        ["data.max_length=20; raise it", "golden48.json, row 1"],
    ),
    "packs for a model that cannot": (None, ["model.attention=sdpa", "sliding_attention"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_input_is_said_and_costs_no_traceback(tmp_path, what, request):
    make, expected = WRONG[what]
    if make is None:
        rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2, "score_rejected": 1}]
        model = {"name": str(request.getfixturevalue("gemma2")), "attention": "sdpa"}
        sections = {"data": write_rows(tmp_path, rows), "model": model}
    else:
        sections = make(tmp_path)
    code, printed = unidpo("train", write_recipe(tmp_path, **sections))
    for part in expected:
        assert part in printed
    assert "Traceback" not in printed
    assert code == 2
    assert not (tmp_path / "run" / "model").exists()


def test_a_folder_that_holds_a_finished_run(finished):
    folder, _ = finished
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    for arguments in ((), ("--resume",)):
        code, printed = unidpo("train", folder / "recipe.yaml", *arguments)
        assert code == 2
        assert f"{folder / 'run'}: this folder holds a finished run" in printed
        assert "Traceback" not in printed
    assert (folder / "run" / "metrics.jsonl").read_bytes() == before


def test_a_wrong_input_can_be_mended_and_run_again(tmp_path):
    recipe = write_recipe(tmp_path, **edit(3, score_chosen="good")(tmp_path))
    assert unidpo("train", recipe)[0] == 2
    write_rows(tmp_path, rows_of(4))
    code, printed = unidpo("train", recipe)
    assert code == 0, printed


def test_the_real_command_exits_with_2(tmp_path):
    recipe = write_recipe(tmp_path, **edit(3, score_chosen="good")(tmp_path))
    done = subprocess.run(
        [sys.executable, "-m", "unidpo", "train", str(recipe)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "row 3, `score_chosen`" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("key", ["report_to=comet_ml", "optim=lomo"])
def test_a_package_that_is_missing_is_named(tmp_path, key):
    code, printed = unidpo("train", write_recipe(tmp_path, train={"max_steps": 1}), f"train.{key}")
    assert code == 2
    assert "Traceback" not in printed
    assert "not installed" in printed
    assert ("comet" if "comet" in key else "lomo_optim") in printed
