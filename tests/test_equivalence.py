"""Settings that must not change a trajectory, in classes: the largest and the mean difference of each to the first.

That one process and several make the same steps: `test_processes.py`.
"""

import pytest
from transformers import TrainerCallback

from trainers import lora, trainer_of
from unidpo.data.formats import load_pairs

CLASSES = {
    "full": {
        "packs": {},
        "padded": {"attention": "padded"},
        "checkpointing": {"activation_checkpointing": True},
        "checkpointing, padded": {"activation_checkpointing": True, "attention": "padded"},
        "packs of 100 tokens": {"max_tokens_per_pack": 100},
        "a frozen copy as reference": {"reference": "live"},
        "the model's folder as reference": {"reference": "folder"},
        "resumed": {"resume": True},
    },
    "adapter": {
        "adapter off as stored reference": {},
        "adapter off as live reference": {"reference": "live"},
        "a frozen copy as reference": {"reference": "folder"},
        "checkpointing": {"activation_checkpointing": True},
        "resumed": {"resume": True},
    },
}
LARGEST, MEAN = 5e-5, 1e-5


class StopAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def trajectory(golden, folder, *, adapter, resume=False, reference="stored", **options):
    """Loss and gradient norm of six steps."""

    def trainer(**more):
        return trainer_of(
            folder,
            load_pairs(golden / "data" / "golden48.json")[:24],
            batch=(4, 1),
            max_steps=6,
            learning_rate=1e-3,
            save_strategy="steps" if resume else "no",
            save_steps=3,
            shuffle=False,
            reference=str(golden / "model") if reference == "folder" else reference,
            peft_config=lora() if adapter else None,
            **options,
            **more,
        )

    if resume:
        trainer(callbacks=[StopAfter()]).train()
    made = trainer()
    made.train(resume_from_checkpoint=resume or None)
    return [(log["loss"], log["grad_norm"]) for log in made.state.log_history if "grad_norm" in log]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_has_one_trajectory(golden, tmp_path, kind):
    found = {
        name: trajectory(golden, tmp_path / str(number), adapter=kind == "adapter", **options)
        for number, (name, options) in enumerate(CLASSES[kind].items())
    }
    first = next(iter(found.values()))
    assert len(first) == 6
    for name, steps in found.items():
        apart = [
            (abs(loss - first_loss), abs(norm - first_norm) / first_norm)
            for (loss, norm), (first_loss, first_norm) in zip(steps, first, strict=True)
        ]
        for differences in zip(*apart, strict=True):
            assert max(differences) <= LARGEST, name
            assert sum(differences) / len(differences) <= MEAN, name
