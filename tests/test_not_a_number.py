"""Runs on numbers that are none, or on rows that are all lost, stop: nothing is stored, and no loss is logged."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from test_train import metrics_of, rows_of, unidpo, write_recipe, write_rows
from trainers import some_groups, trainer_of
from unidpo.cache.features import FeaturePass, FeatureStore
from unidpo.cache.keys import content_keys
from unidpo.cache.reference import Logp, LogpStore, ReferencePass
from unidpo.cache.stored_pass import _Outcome
from unidpo.data.lost_rows import LostRows
from unidpo.data.pairs import Pair
from unidpo.errors import DataError, Finding, ModelError, TrainingError
from unidpo.losses import SimPO
from unidpo.model.attention import PACK_ATTENTION, set_text_attention
from unidpo.model.packs import pack
from unidpo.model.policy import Policy
from unidpo.training.reading import Step
from unidpo.training.record import RunRecord
from unidpo.training.running import StepReport
from worlds import GOLDEN, group, tiny_policy

SKIP = {"on_bad_row": "skip", "max_lost_fraction": 1.0}


@pytest.fixture(scope="module")
def broken_model(tmp_path_factory):
    """The golden model with a norm that is no number."""
    folder = tmp_path_factory.mktemp("models") / "broken"
    folder.mkdir()
    for file in (GOLDEN / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    norm = next(name for name in weights if name.endswith("norm.weight") and "layers" not in name)
    save_file(
        weights | {norm: torch.full_like(weights[norm], torch.nan)}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def parts(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


# --- through the command ---------------------------------------------------------------------------------------------


def test_a_reference_that_gives_nan_stops_the_run_and_nothing_is_stored(broken_model, tmp_path):
    data = write_rows(tmp_path, rows_of(4)) | SKIP
    code, printed = unidpo("train", write_recipe(tmp_path, data=data), f"reference={broken_model}")
    assert code == 2
    assert "the reference gives no log-probabilities" in printed
    assert "pairs.json, row 4: the log-probability of a response is nan" in printed
    assert "model.dtype=bfloat16" in printed
    assert "skipped" not in printed
    assert nothing_was_logged(tmp_path / "run")
    assert parts(tmp_path / "unidpo-cache") == []


@pytest.mark.parametrize("attention", ["auto", "sdpa", "padded"])
@pytest.mark.parametrize("settings", [[], ["reference=live"], ["loss={name: simpo}"]], ids=["stored", "live", "none"])
def test_a_policy_that_gives_nan_stops_before_its_first_step(broken_model, tmp_path, settings, attention):
    data = write_rows(tmp_path, rows_of(4)) | SKIP
    recipe = write_recipe(tmp_path, data=data, model={"name": str(broken_model), "attention": attention})
    code, printed = unidpo("train", recipe, *settings)
    if attention != "padded":
        assert code == 2
        assert "the model's log-probabilities are no finite numbers; look at its weights" in printed
    elif settings:
        assert code == 1
        assert "row 4: the loss of this pair is nan" in printed
        assert "look at its weights" in printed
    else:
        assert code == 2
        assert "row 4: the log-probability of a response is nan" in printed
    assert "skipped" not in printed
    assert nothing_was_logged(tmp_path / "run")
    assert parts(tmp_path / "unidpo-cache") == []


def nothing_was_logged(run):
    """Whether a run stopped before its first record; one that stops before its first step has no file of metrics."""
    return not (run / "metrics.jsonl").exists() or metrics_of(run) == []


def with_images_that_go(folder, count, going):
    """Rows whose first `going` images can be read by the check, and the files of those."""
    rows, paths = rows_of(count), []
    for row in rows[:going]:
        paths.append(folder / f"{len(paths)}.png")
        Image.open(GOLDEN / "data" / row["images"][0]).save(paths[-1])
        row["images"] = [str(paths[-1])]
    return write_rows(folder, rows), paths


@pytest.fixture
def after_the_first_step(monkeypatch):
    """Calls back after each step of a run."""

    def call(then):
        on_pairs = RunRecord.on_pairs

        def recorded(self, columns):
            on_pairs(self, columns)
            then()

        monkeypatch.setattr(RunRecord, "on_pairs", recorded)

    return call


@pytest.mark.parametrize("limit", [0.2, 0.3])
def test_a_share_of_lost_pairs_above_the_limit_stops_the_run(tmp_path, after_the_first_step, limit):
    data, paths = with_images_that_go(tmp_path, 8, 2)
    after_the_first_step(lambda: [path.unlink(missing_ok=True) for path in paths])
    data |= {"on_bad_row": "skip", "max_lost_fraction": limit}
    train = {"global_batch_pairs": 8, "num_train_epochs": 3}
    code, printed = unidpo("train", write_recipe(tmp_path, data=data, train=train))
    if limit < 0.25:
        assert code == 2
        assert "2 of 8 training pairs cannot be read any more" in printed
        assert "max_lost_fraction=0.2" in printed
        assert "row 1" in printed
        assert not (tmp_path / "run" / "model").exists()
    else:
        assert code == 0, printed
        assert [record["step"] for record in metrics_of(tmp_path / "run")] == [1, 2, 3]
        assert "2 rows could not be read any more and were skipped" in printed


def test_a_step_without_a_pair_stops_the_run_and_no_loss_of_it_is_logged(tmp_path, after_the_first_step):
    data, paths = with_images_that_go(tmp_path, 4, 4)
    after_the_first_step(lambda: [path.unlink(missing_ok=True) for path in paths[:2]])
    train = {"global_batch_pairs": 2, "num_train_epochs": 2, "logging_steps": 1}
    code, printed = unidpo("train", write_recipe(tmp_path, data=data | SKIP, train=train))
    assert code == 2
    assert "step 3: none of its pairs can be read" in printed
    assert "0.png" in printed
    assert all(record["loss"] > 0 for record in metrics_of(tmp_path / "run"))
    assert len(metrics_of(tmp_path / "run")) == 2


# --- the parts -------------------------------------------------------------------------------------------------------


def reference_pass(model, encoder, groups, folder, **options):
    reference = ReferencePass(Policy(model, model), encoder, torch.device("cpu"), collate=pack, **options)
    return reference.logps(groups, content_keys(groups).responses, folder)


@pytest.fixture(scope="module")
def packs():
    """The golden model with pack attention, and its encoder."""
    model, _, encoder = tiny_policy()
    set_text_attention(model, PACK_ATTENTION)
    return model, encoder


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), 1.0])
def test_a_number_that_is_no_log_probability_names_its_row_and_the_others_are_kept(
    packs, tmp_path, monkeypatch, number
):
    groups = some_groups(3)
    right = Policy.response_logps

    def one_is_wrong(self, batch):
        logps = right(self, batch)
        logps[3] = number
        return logps

    monkeypatch.setattr(Policy, "response_logps", one_is_wrong)
    with pytest.raises(ModelError, match="gives no log-prob") as raised:
        reference_pass(*packs, groups, tmp_path)
    (finding,) = raised.value.findings
    assert finding.row == 2
    assert str(number) in finding.message
    assert len(LogpStore(tmp_path)) == 5


def test_rounding_above_0_is_a_log_probability():
    assert Logp(3e-6, 3).is_valid
    assert not Logp(3e-6, 0).is_valid
    assert not Logp(1.0, 1000).is_valid


def test_what_another_process_computes_wrong_stops_this_one_too(packs, tmp_path, monkeypatch):
    groups = some_groups(2)
    keys = content_keys(groups).responses
    theirs = _Outcome(2, [], {keys[1][1]: Logp(-3.0, 4)}, problem=ModelError("pairs.json, row 2: no number"))
    monkeypatch.setattr("unidpo.cache.stored_pass.gather", lambda values: [*values, theirs])
    monkeypatch.setattr("unidpo.cache.stored_pass.world_size", lambda: 2)
    with pytest.raises(ModelError, match="row 2"):
        reference_pass(*packs, groups, tmp_path)
    assert len(LogpStore(tmp_path)) == 3


def test_features_that_are_no_numbers_are_not_kept(tmp_path, monkeypatch):
    model, _, encoder = tiny_policy()
    groups = some_groups(3)
    keys = content_keys(groups)
    right = Policy.image_features

    def one_is_wrong(self, vision):
        features = right(self, vision)
        if len(vision["image_grid_thw"]) == 3:  # and not in the trial on one prompt
            features.pooled[len(features.pooled) // 2, 0] = torch.inf
        return features

    monkeypatch.setattr(Policy, "image_features", one_is_wrong)
    features = FeaturePass(Policy(model, model), encoder, torch.device("cpu"))
    with pytest.raises(ModelError, match="features of images are no finite numbers") as raised:
        features.run(groups, keys, tmp_path)
    assert [finding.row for finding in raised.value.findings] == [2]
    assert {*FeatureStore(tmp_path).index} == {keys.prompts[0], keys.prompts[2]}


def test_held_out_pairs_whose_loss_is_no_number_stop_the_run(tmp_path, monkeypatch):
    held_out = [replace(group(seed=9), pairs=(Pair(0, 1, 77),))]
    trainer = trainer_of(tmp_path, eval_dataset=held_out, eval_strategy="steps", eval_steps=1, loss=SimPO())
    measure = trainer._evaluate_held_out

    def without_numbers():
        with torch.no_grad():
            trainer.policy.plain.lm_head.weight[0] = torch.nan
        return measure()

    monkeypatch.setattr(trainer, "_evaluate_held_out", without_numbers)
    with pytest.raises(TrainingError, match="row 77: the loss of this pair is nan"):
        trainer.train()
    assert not any("eval_loss" in record for record in trainer.state.log_history)


def lost(*rows):
    return [Finding("lost-row", "gone", "pairs.json", row) for row in rows]


def test_lost_pairs_count_once_and_among_those_they_belong_to():
    def groups(rows):
        return [replace(each, pairs=tuple(Pair(0, 1, row, "pairs.json") for row in rows)) for each in some_groups(1)]

    rows = LostRows({"training": groups(range(1, 11)), "held-out": groups([11, 12])}, stop=False, max_fraction=0.5)
    for _ in range(3):  # in every epoch, and by several processes
        rows.add(lost(1, 2, 3, 4, 5) + lost(1))
    rows.add(lost(11))
    with pytest.raises(DataError, match="2 of 2 held-out pairs") as raised:
        rows.add(lost(12))
    assert [finding.row for finding in raised.value.findings] == [1, 2, 3, 4, 5, 11, 12]
    with pytest.raises(DataError, match="6 of 10 training pairs"):
        LostRows({"training": groups(range(1, 11))}, stop=False, max_fraction=0.5).add(lost(*range(1, 7)))


def test_a_pair_of_a_row_that_is_not_lost_is_no_reason_to_stop():
    with pytest.raises(DataError, match="1 of 4 training pairs"):
        LostRows({"training": some_groups(4)}, stop=False, max_fraction=0).add([Finding("lost-row", "gone", None, 2)])
    LostRows({"training": some_groups(4)}, stop=False, max_fraction=0).add([])


@pytest.mark.parametrize("theirs", [0, 3])
def test_a_step_is_without_a_pair_only_where_no_process_has_one(tmp_path, monkeypatch, theirs):
    trainer = trainer_of(tmp_path, **SKIP)
    monkeypatch.setattr(trainer, "_add_pairs", lambda columns: None)
    trainer.create_optimizer()

    def gather(values):
        return [*values, StepReport(theirs, [], False)] if isinstance(values[0], StepReport) else values

    monkeypatch.setattr("unidpo.training.running.gather", gather)
    if theirs:
        assert trainer.training_step(trainer.model, Step([], lost(1))) == 0
    else:
        with pytest.raises(DataError, match=r"(?s)step 1: none of its pairs can be read.*row 1: gone"):
            trainer.training_step(trainer.model, Step([], lost(1)))
