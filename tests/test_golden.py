"""The trajectories of the authors' implementation, over every way of laying out the same work."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from trainers import OnPairs
from unidpo.data.formats import load_pairs
from unidpo.losses import DPO, SimPO, UniDPO
from unidpo.training.trainer import PreferenceTrainer

LOSSES = {
    "uni_dpo": UniDPO(),
    "dpo": DPO(beta=0.1, label_smoothing=0.1, length_normalized=True),
    "simpo": SimPO(beta=2.0, gamma=1.0),
}
WAYS = {
    "packs": {},
    "packs of 120 tokens": {"max_tokens_per_pack": 120},
    "padded": {"attention": "padded"},
    "live reference": {"reference": "live"},
    "padded, live reference": {"attention": "padded", "reference": "live"},
}
# Our key → the authors', with the largest difference allowed.
LOGGED = {
    "logps/chosen": ("policy_logps/chosen", 2e-5),
    "logps/rejected": ("policy_logps/rejected", 2e-5),
    "logps/ref_chosen": ("ref_logps/chosen", 2e-5),
    "logps/ref_rejected": ("ref_logps/rejected", 2e-5),
    "rewards/chosen": ("rewards/chosen", 5e-5),
    "rewards/rejected": ("rewards/rejected", 5e-5),
    "rewards/margins": ("rewards/margins", 5e-5),
    "rewards/accuracies": ("rewards/accuracies", 1e-9),
    "weights/quality": ("w_qual", 1e-6),
    "weights/performance": ("w_perf", 1e-5),
    "learning_rate": ("learning_rate", 1e-9),
}


def train(golden, folder, name, *, batch=(1, 4), on_gradients=None, on_pairs=None, **options):
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch[0],
        gradient_accumulation_steps=batch[1],
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = PreferenceTrainer(
        golden / "model",
        loss=LOSSES[name],
        args=args,
        train_dataset=load_pairs(golden / "data" / "golden48.json"),
        shuffle=False,
        cache=folder / "cache",
        callbacks=[] if on_pairs is None else [OnPairs(on_pairs)],
        **options,
    )
    if on_gradients is not None:
        trainer.add_callback(on_gradients(trainer))
    trainer.train()
    return [record for record in trainer.state.log_history if "grad_norm" in record]


def assert_follows(golden, name, records):
    steps = json.loads((golden / "reference" / name / "steps.json").read_text())
    assert len(records) == len(steps) == 12
    for ours, reference in zip(records, steps, strict=True):
        where = f"{name}, step {reference['step']}"
        assert ours["loss"] == pytest.approx(reference["loss"], abs=2e-5), where
        assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4), where
        for key, (theirs, tolerance) in LOGGED.items():
            if theirs in reference:
                assert ours[key] == pytest.approx(reference[theirs], abs=tolerance), f"{where}: {key}"
        if name == "uni_dpo":
            gate_rate = reference["nll_coeffi"] / LOSSES[name].nll_weight
            assert ours["nll/gate_rate"] == pytest.approx(gate_rate, abs=1e-6), where


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_twelve_steps_of_the_reference(golden, tmp_path, name, way):
    assert_follows(golden, name, train(golden, tmp_path, name, **way))


@pytest.mark.parametrize("batch", [(2, 2), (4, 1)], ids=["2x2", "4x1"])
@pytest.mark.parametrize("attention", ["sdpa", "padded"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_batch_may_fall_into_passes_as_it_likes(golden, tmp_path, name, batch, attention):
    assert_follows(golden, name, train(golden, tmp_path, name, batch=batch, attention=attention))


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_the_first_step(golden, tmp_path, name):
    """After clipping to norm 1, as the authors recorded it; for Uni-DPO tensor by tensor, else norm by norm."""
    from transformers import TrainerCallback

    found = {}

    class Recorder(TrainerCallback):
        def __init__(self, trainer):
            self.model = trainer.model

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 0:
                found.update({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})

    train(golden, tmp_path, name, on_gradients=Recorder)
    recorded = json.loads((golden / "reference" / name / "gradient_norms_step1.json").read_text())
    assert found.keys() == recorded["norms"].keys()
    assert not found.keys() & set(recorded["frozen"])
    for parameter, norm in recorded["norms"].items():
        assert found[parameter].norm().item() == pytest.approx(norm, rel=1e-4), parameter
    if name == "uni_dpo":
        for parameter, gradient in load_file(golden / "reference" / name / "gradients_step1.safetensors").items():
            difference = torch.linalg.vector_norm(found[parameter] - gradient) / torch.linalg.vector_norm(gradient)
            assert difference < 1e-4, parameter


def test_token_ids_and_reference_logps_of_every_micro_batch(golden, tmp_path):
    pairs = []
    train(golden, tmp_path, "uni_dpo", on_pairs=pairs.append)
    lines = (golden / "reference" / "uni_dpo" / "micro_batches.jsonl").read_text().splitlines()
    ours = [dict(zip(step, values, strict=True)) for step in pairs for values in zip(*step.values(), strict=True)]
    for number, (line, row) in enumerate(zip(lines, ours, strict=True), start=1):
        micro = json.loads(line)
        assert row["row"] == number
        assert [row["chosen_tokens"], row["rejected_tokens"]] == micro["n_label"]
        assert row["ref_chosen_logps"] == pytest.approx(micro["ref"]["chosen_logps"][0], abs=1e-5)
        assert row["ref_rejected_logps"] == pytest.approx(micro["ref"]["rejected_logps"][0], abs=1e-5)
        assert row["chosen_logps"] == pytest.approx(micro["policy"]["chosen_logps"][0], abs=3e-5)
        assert row["loss"] == pytest.approx(micro["loss"], abs=5e-5)


def test_the_first_step_has_exactly_no_reward(golden, tmp_path):
    """Policy and reference are computed in different packs and differ by rounding; it must not open the gate."""
    first = train(golden, tmp_path, "uni_dpo", batch=(4, 1))[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert first["rewards/accuracies"] == 0.0
    assert first["nll/gate_rate"] == 0.0
    dpo = train(golden, tmp_path / "dpo", "dpo", batch=(4, 1))[0]
    assert dpo["loss"] == pytest.approx(0.6931471805599453, abs=1e-7)
