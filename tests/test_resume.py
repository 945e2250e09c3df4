"""A run resumes with what it began with: other contents are refused and named, other places are not."""

import hashlib
import json
import os
import random
import shutil

import pandas
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from test_train import interrupted_at, metrics_of, rows_of, unidpo, write_recipe
from unidpo.errors import RunError
from unidpo.model.encode import CHATML
from unidpo.run_folder.inputs import Inputs
from worlds import GOLDEN, group

ROWS = 12


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A world of its own, paths relative to it, with a run that was interrupted after its second step of four."""
    world = tmp_path_factory.mktemp("stopped")
    (world / "data").mkdir()
    (world / "images").mkdir()
    shutil.copytree(GOLDEN / "model", world / "model")
    for row in rows_of(ROWS + 1):
        for image in row["images"]:
            shutil.copy(GOLDEN / "data" / image, world / image)
    write(world, rows_of(ROWS))
    (world / "chat.jinja").write_text(CHATML)
    write_recipe(
        world,
        output="run",
        model={"name": "model"},
        data={"path": "data/pairs.json", "images": ".", "template": "chat.jinja", "eval_fraction": 0.25},
        train={"global_batch_pairs": 2, "save_steps": 1, "max_steps": 3, "eval_strategy": "no"},
    )
    with pytest.MonkeyPatch.context() as patch, interrupted_at(3):
        patch.chdir(world)
        patch.setenv("UNIDPO_CACHE", str(world / "cache"))
        code, printed = unidpo("train", "recipe.yaml")
    assert code == 130, printed
    return world


@pytest.fixture
def world(stopped, tmp_path, monkeypatch):
    copy = shutil.copytree(stopped, tmp_path / "world")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("UNIDPO_CACHE", str(copy / "cache"))
    return copy


def write(world, rows, name="pairs.json", **layout):
    (world / "data" / name).write_text(json.dumps(rows, **layout))


def rewritten(change):
    """A change of the data file's rows, numbered from 0."""

    def carry_out(world):
        rows = json.loads((world / "data" / "pairs.json").read_text())
        write(world, change(rows) or rows)

    return carry_out


def with_keys(at, **values):
    return rewritten(lambda rows: rows[at].update(values))


def swapped(rows, one, other):
    rows[one], rows[other] = rows[other], rows[one]


def responses_swapped(rows):
    rows[5]["chosen"], rows[5]["rejected"] = rows[5]["rejected"], rows[5]["chosen"]


def scores_swapped(rows):
    for key in ("score_chosen", "score_rejected"):
        rows[4][key], rows[8][key] = rows[8][key], rows[4][key]


def repainted(world, row=5):
    path = world / rows_of(row)[-1]["images"][0]
    Image.new("RGB", (56, 56), "pink").save(path)


def other_weights(world, model="model"):
    path = world / model / "model.safetensors"
    weights = load_file(path)
    name = next(iter(sorted(weights)))
    weights[name] = weights[name] + torch.finfo(weights[name].dtype).eps
    save_file(weights, path, metadata={"format": "pt"})


def setting(file, **values):
    def carry_out(world):
        path = world / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return carry_out


def other_template(world):
    (world / "chat.jinja").write_text(CHATML.replace("helpful", "careful"))


def others_pictures(world):
    shutil.copytree(world / "images", world / "others" / "images")
    repainted(world / "others", 7)


def another_file(world):
    write(world, rows_of(ROWS + 1)[1:], "other.json")


FILE = "data/pairs.json: "
CHANGES = {
    "a score": (with_keys(2, score_chosen=4.9), (), FILE + "scores of row 3"),
    "scores between rows": (rewritten(scores_swapped), (), FILE + "scores of rows 5, 9 (2 rows)"),
    "all scores": (
        rewritten(lambda rows: [row | {"score_chosen": row["score_chosen"] + 1} for row in rows]),
        (),
        FILE + "scores of rows 1, 2, 3, 4, 5, 6, 7, 8, ... (12 rows)",
    ),
    "no score": (with_keys(2, score_rejected=4), (), FILE + "scores of row 3"),
    "two rows swapped": (
        rewritten(lambda rows: swapped(rows, 2, 8)),
        (),
        FILE + "order of the rows, or which are held out: rows 3, 9 (2 rows)",
    ),
    "all rows reversed": (
        rewritten(lambda rows: rows[::-1]),
        (),
        "order of the rows, or which are held out: rows 1, 2, 3, 4",
    ),
    "a prompt": (with_keys(3, instruction="<image>Which?"), (), FILE + "prompt of row 4"),
    "a system prompt": (with_keys(3, system="Be brief."), (), FILE + "prompt of row 4"),
    "a response": (with_keys(3, rejected="Nothing."), (), FILE + "responses of row 4"),
    "a space in a response": (
        rewritten(lambda rows: rows[3].update(chosen=rows[3]["chosen"] + " ")),
        (),
        FILE + "responses of row 4",
    ),
    "the two responses of a row": (rewritten(responses_swapped), (), FILE + "responses of row 6"),
    "fewer rows": (rewritten(lambda rows: rows[:8]), (), FILE + "rows 9, 10, 11, 12 (4 rows) gone"),
    "a row more": (rewritten(lambda rows: [*rows, rows_of(13)[12]]), (), FILE + "row 13 added"),
    "doubled rows": (
        rewritten(lambda rows: rows * 2),
        (),
        FILE + "rows 13, 14, 15, 16, 17, 18, 19, 20, ... (12 rows) added",
    ),
    "a heavier source": (
        None,
        ["data.path=[{path: data/pairs.json, weight: 2}]"],
        FILE + "rows 1, 2, 3, 4, 5, 6, 7, 8, ... (12 rows) added",
    ),
    "another file": (another_file, ["data.path=data/other.json"], "data/other.json: row 12 added"),
    "a repainted image": (repainted, (), FILE + "images of row 5"),
    "an image of another row": (
        rewritten(lambda rows: rows[3].update(images=rows[4]["images"])),
        (),
        FILE + "images of row 4",
    ),
    "another image folder": (others_pictures, ["data.images=others"], FILE + "images of row 7"),
    "base weights": (other_weights, (), "the base model's weights"),
    "the image processor": (
        setting("model/preprocessor_config.json", image_mean=[0.1, 0.2, 0.3]),
        (),
        "the processor or the chat template",
    ),
    "the chat template": (other_template, (), "the processor or the chat template"),
    "a key": (None, ["loss.beta=1"], "`loss.beta`: was 2.0, is 1.0"),
    "the kind of reference": (None, ["reference=live"], "`reference`: was 'stored', is 'live'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_contents_are_refused_by_name_and_nothing_is_written(world, change):
    carry_out, overrides, said = CHANGES[change]
    before = everything(world / "run")
    if carry_out is not None:
        carry_out(world)
    code, printed = unidpo("train", "recipe.yaml", *overrides, "--resume")
    assert code == 2, printed
    assert said in printed
    assert "run: this run began with" in printed
    assert everything(world / "run") == before


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def moved_run(world):
    (world / "run").rename(world / "elsewhere")


def moved_data(world):
    (world / "data").rename(world / "moved")
    (world / "images").rename(world / "moved" / "images")


def written_otherwise(world):
    rows = json.loads((world / "data" / "pairs.json").read_text())
    write(world, [dict(reversed(row.items())) for row in rows], indent=4)
    for image in (world / "images").iterdir():
        os.utime(image, (0, 0))


HARMLESS = {
    "as it was": (None, ()),
    "the run folder moved": (moved_run, ["output=elsewhere"]),
    "data and images moved": (moved_data, ["data.path=moved/pairs.json", "data.images=moved"]),
    "the model moved": (lambda world: (world / "model").rename(world / "base"), ["model.name=base"]),
    "the template moved": (
        lambda world: (world / "chat.jinja").rename(world / "my.jinja"),
        ["data.template=my.jinja"],
    ),
    "the file written otherwise": (written_otherwise, ()),
    "other logs and checkpoints": (
        None,
        ["train.logging_steps=2", "train.save_steps=2", "train.save_total_limit=1", "train.dataloader_num_workers=1"],
    ),
}


@pytest.fixture(scope="module")
def as_it_was():
    return {}


@pytest.mark.parametrize("change", HARMLESS)
def test_other_places_and_logs_are_no_other_run(world, change, as_it_was):
    carry_out, overrides = HARMLESS[change]
    if carry_out is not None:
        carry_out(world)
    code, printed = unidpo("train", "recipe.yaml", *overrides, "--resume")
    assert code == 0, printed
    run = world / ("elsewhere" if "output=elsewhere" in overrides else "run")
    weights = load_file(run / "model" / "model.safetensors")
    ledger = pandas.read_parquet(run / "pairs.parquet")
    for name, tensor in as_it_was.setdefault("weights", weights).items():
        assert torch.equal(weights[name], tensor), name
    pandas.testing.assert_frame_equal(ledger, as_it_was.setdefault("ledger", ledger))
    assert set(ledger["file"]) == {"data/pairs.json"}  # as the run began
    assert "| `data/pairs.json` | `" in (run / "model" / "README.md").read_text()
    assert "unknown" not in printed


def test_another_reference_model_is_refused_and_one_that_moved_is_not(world):
    shutil.copytree(world / "model", world / "teacher")
    shutil.rmtree(world / "run")
    with interrupted_at(3):
        assert unidpo("train", "recipe.yaml", "reference=teacher")[0] == 130
    (world / "teacher").rename(world / "moved")
    with interrupted_at(3):
        code, printed = unidpo("train", "recipe.yaml", "reference=moved", "--resume")
    assert code == 130, printed
    other_weights(world, "moved")
    code, printed = unidpo("train", "recipe.yaml", "reference=moved", "--resume")
    assert code == 2
    assert "the reference model's weights" in printed
    assert "the base model's weights" not in printed


def test_a_record_that_is_gone_is_said_and_one_that_is_damaged_is_named(world):
    (world / "run" / "inputs.parquet").write_bytes(b"PAR1")
    code, printed = unidpo("train", "recipe.yaml", "--resume")
    assert code == 2
    assert "run/inputs.parquet: is damaged" in printed
    (world / "run" / "inputs.parquet").unlink()
    with interrupted_at(3):
        code, printed = unidpo("train", "recipe.yaml", "--resume")
    assert code == 130
    assert "run/inputs.parquet: is gone; whether the data is what the run began with is unknown" in printed


def test_the_record_is_small_and_says_what_is_what(world):
    table = pq.read_table(world / "run" / "inputs.parquet")
    assert table["rows"].to_pylist() == [[row] for row in range(1, ROWS + 1)]
    assert sum(table["held_out"].to_pylist()) == 3
    assert table.schema.field("scores").metadata == {b"description": b"digest of scores"}
    recorded = json.loads((world / "run" / "inputs.json").read_text())
    sha256 = hashlib.sha256((world / "data" / "pairs.json").read_bytes()).hexdigest()
    assert recorded["data"] == [{"path": "data/pairs.json", "weight": 1.0, "sha256": sha256}]
    assert recorded["digests"].keys() == {"model", "processor"}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_moved_lost_or_doubled_is_found(tmp_path, seed):
    chance = random.Random(seed)

    def rows(kept):
        return [group(images=0, seed=one, row=row) for row, one in enumerate(kept, start=1)]

    before, now = list(range(8)), chance.choices(range(8), k=chance.randint(6, 10))
    for again in (rows(before), rows(before)[::-1]):  # the order in which groups come is no matter of the data
        Inputs(tmp_path, resume=again[0].pairs[0].row > 1).check_data(again, [], [])
    if now != before:
        with pytest.raises(RunError, match="row"):
            Inputs(tmp_path, resume=True).check_data(rows(now), [], [])


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def lost(name):
    return lambda run: (run / name).unlink()


def cut(name):
    return lambda run: os.truncate(run / name, (run / name).stat().st_size // 2)


def flipped(name):
    """One bit of a file's first page or object."""

    def carry_out(run):
        content = bytearray((run / name).read_bytes())
        content[20] ^= 1
        (run / name).write_bytes(content)

    return carry_out


def without_record(step):
    def carry_out(run):
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] != step))

    return carry_out


PART = "pairs.parquet/part-0000000{0}-0000000{0}.parquet"
DAMAGE = {
    "no optimizer": (lost("checkpoint-2/optimizer.pt"), "checkpoint-2: optimizer.pt is missing"),
    "no schedule": (lost("checkpoint-2/scheduler.pt"), "checkpoint-2: scheduler.pt is missing"),
    "no random state": (lost("checkpoint-2/rng_state.pth"), "checkpoint-2: rng_state.pth is missing"),
    "no weights": (lost("checkpoint-2/model.safetensors"), "checkpoint-2: model.safetensors is missing"),
    "weights cut": (cut("checkpoint-2/model.safetensors"), "checkpoint-2: model.safetensors has "),
    "optimizer damaged": (flipped("checkpoint-2/optimizer.pt"), "checkpoint-2: optimizer.pt is damaged"),
    "state cut": (cut("checkpoint-2/trainer_state.json"), "checkpoint-2: trainer_state.json has "),
    "state damaged": (flipped("checkpoint-2/trainer_state.json"), "checkpoint-2: trainer_state.json is damaged"),
    "no state": (lost("checkpoint-2/trainer_state.json"), "checkpoint-2: trainer_state.json is missing"),
    "no manifest": (lost("checkpoint-2/manifest.json"), "checkpoint-2: it has no usable manifest.json"),
    "manifest cut": (cut("checkpoint-2/manifest.json"), "checkpoint-2: it has no usable manifest.json"),
    "ledger lost": (lost(PART.format(2)), "pairs.parquet has 2 of 4 rows up to step 2"),
    "ledger damaged": (flipped(PART.format(2)), "part-00000002-00000002.parquet is damaged"),
    "metrics lost": (without_record(2), "metrics.jsonl has 1 of 2 records up to step 2"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_last_whole_one_taken(world, damage):
    carry_out, said = DAMAGE[damage]
    carry_out(world / "run")
    write(world, [])  # the choice is made before the data is read
    code, printed = unidpo("train", "recipe.yaml", "--resume")
    assert code == 2
    assert "Traceback" not in printed
    assert said in printed
    assert "; resuming from checkpoint-1\n" in printed


def test_a_run_that_goes_on_from_the_checkpoint_before_ends_as_ever(world, as_it_was):
    flipped(PART.format(2))(world / "run")
    code, printed = unidpo("train", "recipe.yaml", "--resume")
    assert code == 0, printed
    ledger = pandas.read_parquet(world / "run" / "pairs.parquet")
    pandas.testing.assert_frame_equal(ledger, as_it_was.setdefault("ledger", ledger))
    assert [record["step"] for record in metrics_of(world / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("carry_out", "said"),
    [
        (lost("metrics.jsonl"), ["has 0 of 2 records up to step 2", "has 0 of 1 records up to step 1"]),
        (lambda run: shutil.rmtree(run / "pairs.parquet"), ["has 0 of 4 rows up to step 2", "has 0 of 2 rows"]),
        (
            lambda run: [lost(f"checkpoint-{step}/optimizer.pt")(run) for step in (1, 2)],
            ["checkpoint-1: optimizer.pt is missing", "checkpoint-2: optimizer.pt is missing"],
        ),
    ],
    ids=["no metrics", "no ledger", "no optimizer in any"],
)
def test_where_no_checkpoint_is_whole_the_run_is_not_begun_anew(world, carry_out, said):
    carry_out(world / "run")
    before = everything(world / "run")
    code, printed = unidpo("train", "recipe.yaml", "--resume")
    assert code == 2
    assert "run: there is no checkpoint to resume from" in printed
    assert all(problem in printed for problem in said)
    assert everything(world / "run") == before


def test_weights_alone_are_not_gone_on_from(world):
    shutil.rmtree(world / "run")
    override = "train.save_only_model=true"
    with interrupted_at(3):
        assert unidpo("train", "recipe.yaml", override)[0] == 130
    code, printed = unidpo("train", "recipe.yaml", override, "--resume")
    assert code == 2
    assert "checkpoint-2: it holds weights alone (`train.save_only_model`)" in printed


# --- another machine --------------------------------------------------------------------------------------------------


def test_other_threads_processes_and_devices_are_recorded_and_said(world):
    environment = world / "run" / "environment.json"
    (start,) = json.loads(environment.read_text())["starts"]
    assert (start["threads"], start["processes"]) == (torch.get_num_threads(), 1)
    assert start["devices"] == [torch.backends.cpu.get_cpu_capability()]
    start |= {"threads": 7, "processes": 2, "devices": ["H100", "H100"]}
    environment.write_text(json.dumps({"starts": [start]}))
    with interrupted_at(3):
        code, printed = unidpo("train", "recipe.yaml", "--resume")
    assert code == 130
    assert f"resumed with threads {torch.get_num_threads()} (before: 7), processes 1 (before: 2), devices " in printed
    assert "(before: ['H100', 'H100']): the results will not be those of an uninterrupted run bit for bit" in printed
    assert len(json.loads(environment.read_text())["starts"]) == 2
