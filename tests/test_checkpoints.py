"""Checkpoints: they appear whole or not at all, and what goes on from one ends as if nothing had happened."""

import functools
import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from trainers import lora, some_groups, trainer_of
from unidpo.data.pairs import Pair
from unidpo.errors import Interrupted, ModelError, RunError, TrainingError
from unidpo.losses import DPO, MPO
from unidpo.model.attention import PACK_ATTENTION
from unidpo.model.load import load_policy
from unidpo.run_folder.folder import UNFINISHED_CHECKPOINT, RunFolder
from worlds import GOLDEN

# peft asks transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
EACH_STEP = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def make(out):
    return functools.partial(trainer_of, out)


def names(folder):
    return {path.name for path in folder.iterdir()}


# --- writing ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_appears_when_it_is_whole(make, out, monkeypatch):
    while_writing, write = [], transformers.Trainer._save_checkpoint

    def watched(self, model, trial):
        write(self, model, trial)
        while_writing.append(names(out))

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", watched)
    make(**EACH_STEP).train()
    assert while_writing == [{UNFINISHED_CHECKPOINT}, {UNFINISHED_CHECKPOINT, "checkpoint-1"}]
    assert names(out) == {"checkpoint-1", "checkpoint-2"}
    assert names(out / "checkpoint-1") == names(out / "checkpoint-2") >= {
        "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
        "manifest.json",
    }  # fmt: skip


def test_what_a_killed_run_left_half_written_is_no_part_of_the_next_checkpoint(make, out):
    junk = out / UNFINISHED_CHECKPOINT / "checkpoint-1"
    junk.mkdir(parents=True)
    (junk / "half a file").touch()
    (out / UNFINISHED_CHECKPOINT / "checkpoint-9").mkdir()
    make(**EACH_STEP).train()
    assert names(out) == {"checkpoint-1", "checkpoint-2"}
    assert "half a file" not in names(out / "checkpoint-1")


def test_an_older_checkpoint_stays_until_the_new_one_is_whole(make, out, monkeypatch):
    while_writing, write = [], transformers.Trainer._save_checkpoint

    def watched(self, model, trial):
        write(self, model, trial)
        while_writing.append(names(out) - {UNFINISHED_CHECKPOINT})

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", watched)
    make(**EACH_STEP, max_steps=3, save_total_limit=1).train()
    assert while_writing == [set(), {"checkpoint-1"}, {"checkpoint-2"}]
    assert names(out) == {"checkpoint-3"}


FULL_DISK = {
    "OSError": OSError(28, "No space left on device"),
    "torch": RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", FULL_DISK.values(), ids=FULL_DISK)
def test_a_checkpoint_that_cannot_be_written_stops_the_run_and_names_the_last_good_one(make, out, monkeypatch, error):
    trainer = make(**EACH_STEP, save_total_limit=1)
    write = trainer._save_optimizer_and_scheduler

    def full_disk(folder):
        if trainer.state.global_step == 2:
            raise error
        write(folder)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full_disk)
    with pytest.raises(TrainingError) as stopped:
        trainer.train()
    said = str(stopped.value)
    assert "checkpoint of step 2" in said
    assert str(error).split(": ")[-1] in said
    assert f"last good one is {out / 'checkpoint-1'}" in said
    assert "--resume" in said
    assert names(out) == {"checkpoint-1"}
    assert trainer.args.output_dir == str(out)


def test_a_first_checkpoint_that_cannot_be_written(make, out, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    trainer = make(**EACH_STEP)
    monkeypatch.setattr(trainer, "save_model", full_disk)
    with pytest.raises(TrainingError, match=r"step 1 .*No space left on device.*there is none yet"):
        trainer.train()
    assert RunFolder(out).last_checkpoint is None
    assert not (out / UNFINISHED_CHECKPOINT).exists()


# --- the best one -----------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_named_by_its_place_and_loaded_at_the_end(make, out):
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "save_total_limit": 1}
    held_out = [replace(one, pairs=(Pair(1, 0, one.pairs[0].row),)) for one in some_groups()]  # the other way round
    after = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            after.append(trainer.model.lm_head.weight.clone())

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved = json.loads((out / f"checkpoint-{state.global_step}" / "trainer_state.json").read_text())
            assert saved["best_model_checkpoint"] == str(out / "checkpoint-1")
            assert names(out) == {"checkpoint-1", f"checkpoint-{state.global_step}"}

    trainer = make(
        loss=DPO(),
        eval_dataset=held_out,
        load_best_model_at_end=True,
        callbacks=[Keep(), Look()],
        **EACH_STEP | options,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(out / "checkpoint-1")
    assert torch.equal(trainer.model.lm_head.weight, after[0])
    assert not torch.equal(after[0], after[1])


# --- going on ---------------------------------------------------------------------------------------------------------


def assert_ended_alike(ours, theirs):
    weights = ours.model.state_dict(), theirs.model.state_dict()
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    last = [[record for record in t.state.log_history if "loss" in record][-1] for t in (ours, theirs)]
    assert last[0] == last[1]


@pytest.mark.parametrize("how", ["stored", "live", "adapter", "bfloat16", "reward shift"])
def test_a_resumed_training_ends_as_the_uninterrupted_one(make, out, tmp_path, how):
    """The reference, where it has to be found again, is the model as it was before the first step."""
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32

    def trainer(cache):
        model = load_policy(GOLDEN / "model", dtype=dtype)
        options = {"peft_config": lora()} if how == "adapter" else {}
        options |= {"reference": "live"} if how == "live" else {"cache": tmp_path / cache}
        options |= {"loss": MPO()} if how == "reward shift" else {}
        return make(model=model, bf16=how == "bfloat16", max_steps=3, **EACH_STEP, **options)

    whole = trainer("cache")
    whole.train()
    resumed = trainer("another cache")
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert_ended_alike(resumed, whole)


class StopInStep(TrainerCallback):
    """Asks a trainer to stop while it is in a step."""

    def __init__(self, step):
        self.step = step
        self.trainer = None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.trainer.request_stop()


@pytest.mark.parametrize("step", [1, 2, 3])  # of two in an epoch
def test_a_training_asked_to_stop_leaves_a_checkpoint_and_ends_as_the_uninterrupted_one(make, out, step):
    options = {"groups": some_groups(6), "num_train_epochs": 2, "max_steps": -1}
    whole = make(**options)
    whole.train()
    assert whole.state.global_step == 4
    stop = StopInStep(step)
    stopped = stop.trainer = make(callbacks=[stop], **options)
    with pytest.raises(Interrupted, match=f"step {step}\\b") as interrupted:
        stopped.train()
    assert interrupted.value.exit_code == 143
    assert names(out) == {f"checkpoint-{step}"}
    assert stopped.policy.attention != PACK_ATTENTION
    resumed = make(**options)
    resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
    assert_ended_alike(resumed, whole)


def test_where_there_is_no_checkpoint_nothing_is_resumed(make):
    with pytest.raises(RunError, match="no whole checkpoint to resume from"):
        make().train(resume_from_checkpoint=True)


def test_a_reference_pass_asked_to_stop_keeps_what_it_has(make, out, monkeypatch, caplog):
    monkeypatch.setattr("unidpo.cache.reference.ReferencePass.batch_tokens", 1)
    caplog.set_level("INFO", "unidpo")
    trainer = make(
        on_progress=lambda stage, *done: trainer.request_stop() if done == (4, 8) and "ref" in stage else None
    )
    with pytest.raises(Interrupted, match=r"before the first step \(reference, responses: \d/8\)"):
        trainer.train()
    assert not [record for record in trainer.state.log_history if "loss" in record]
    make().train()
    assert "reference: 6 responses found" in caplog.text
    assert "2 to compute" in caplog.text


def test_a_checkpoint_does_not_ask_for_pack_attention(make, out):
    make(max_steps=1, **EACH_STEP).train()
    saved = (out / "checkpoint-1" / "config.json").read_text()
    assert PACK_ATTENTION not in saved


def test_a_checkpoint_that_lacks_weights_is_not_resumed(make, out):
    make(**EACH_STEP).train()
    weights = out / "checkpoint-1" / "model.safetensors"
    state = load_file(weights)
    del state["visual.merger.mlp.0.bias"]
    save_file(state, weights, metadata={"format": "pt"})
    (weights.parent / "manifest.json").unlink()  # as of another program
    with pytest.raises(ModelError, match=r"checkpoint-1.*merger"):
        make().train(resume_from_checkpoint=str(weights.parent))


def test_a_checkpoint_that_lost_something_is_refused_and_true_takes_the_last_whole_one(make, out):
    make(**EACH_STEP).train()
    (out / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(RunError, match=r"checkpoint-2: optimizer\.pt is missing"):
        make().train(resume_from_checkpoint=str(out / "checkpoint-2"))
    steps = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    make(callbacks=[Look()]).train(resume_from_checkpoint=True)
    assert steps == [1]


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_state_that_cannot_be_read_is_named_where_no_manifest_tells(make, out, name):
    make(**EACH_STEP).train()
    (out / "checkpoint-1" / "manifest.json").unlink()
    (out / "checkpoint-1" / name).write_bytes(b"PK" * 500)
    with pytest.raises(RunError, match=r"checkpoint-1: its optimizer, schedule or random state cannot be read"):
        make().train(resume_from_checkpoint=str(out / "checkpoint-1"))
