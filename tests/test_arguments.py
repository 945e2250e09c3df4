"""Training arguments that nothing reads are refused, each with the place where it goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from trainers import some_groups, trainer_of
from unidpo.config.hf_arguments import WITHOUT_EFFECT
from unidpo.config.loading import recipe_from
from unidpo.errors import UserError
from unidpo.losses import UniDPO
from unidpo.run.training_arguments import training_arguments
from unidpo.training.arguments import ELSEWHERE, default_workers, warn_without_workers
from unidpo.training.trainer import PreferenceTrainer
from worlds import GOLDEN

# TRL sets an argument of transformers by its former name.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

# A value for each key of transformers that nothing here reads, different from its default.
CHANGED: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "train_sampling_strategy": "group_by_length",
    "auto_find_batch_size": True,
    "dataloader_drop_last": True,
    "dataloader_persistent_workers": True,
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_in_order": False,
    "include_num_input_tokens_seen": "all",
    "torch_empty_cache_steps": 5,
    "length_column_name": "size",
    "label_names": ["labels"],
    "average_tokens_across_devices": False,
    "neftune_noise_alpha": 5.0,
    "prediction_loss_only": True,
    "batch_eval_metrics": True,
    "eval_accumulation_steps": 2,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "include_for_metrics": ["loss"],
}


def refused(tmp_path: Path, **settings: Any) -> list[str]:
    """The lines under the heading of the refusal, for settings of transformers."""
    with pytest.raises(UserError) as caught:
        trainer_of(tmp_path / "out", **settings)
    heading, *lines = str(caught.value).splitlines()
    assert heading == "TrainingArguments: settings without effect here"
    return lines


def dpo_config(folder: Path, **settings: Any) -> TrainingArguments:
    from trl import DPOConfig

    return DPOConfig(str(folder), **{"use_cpu": True, "report_to": "none", "bf16": False, "max_steps": 1} | settings)


def with_config(args: TrainingArguments) -> PreferenceTrainer:
    return PreferenceTrainer(GOLDEN / "model", loss=UniDPO(), args=args, train_dataset=some_groups(2))


def test_there_is_a_case_for_every_setting_of_transformers() -> None:
    assert CHANGED.keys() == WITHOUT_EFFECT.keys()


@pytest.mark.parametrize("key", CHANGED)
def test_a_setting_of_transformers_without_effect_is_refused(tmp_path: Path, key: str) -> None:
    assert refused(tmp_path, **{key: CHANGED[key]}) == [f"  `{key}={CHANGED[key]!r}`: {WITHOUT_EFFECT[key]}"]


def test_all_are_named_at_once(tmp_path: Path) -> None:
    assert len(refused(tmp_path, **CHANGED)) == len(CHANGED)


def test_a_setting_equal_to_its_default_is_taken(tmp_path: Path) -> None:
    defaults = {name: TrainingArguments.__dataclass_fields__[name].default for name in CHANGED}
    plain = {name: value for name, value in defaults.items() if name not in ("include_for_metrics",)}
    assert trainer_of(tmp_path / "out", **plain).args.label_smoothing_factor == 0


def test_settings_of_trl_say_where_they_go(tmp_path: Path) -> None:
    settings = {
        "beta": 2.0,
        "loss_type": "ipo",
        "label_smoothing": 0.1,
        "max_length": 4096,
        "padding_free": True,
        "precompute_ref_log_probs": True,
        "dataset_num_proc": 4,
    }
    with pytest.raises(UserError) as caught:
        with_config(dpo_config(tmp_path, **settings))
    lines = str(caught.value).splitlines()
    assert lines[0] == "DPOConfig: settings without effect here"
    assert sorted(finding.key.partition("=")[0] for finding in caught.value.findings if finding.key) == sorted(settings)
    assert "  `beta=2.0`: is of the loss: `PreferenceTrainer(loss=UniDPO(beta=...))`" in lines
    assert "  `max_length=4096`: is given to `PreferenceTrainer(max_length=...)`" in lines
    assert "  `dataset_num_proc=4`: has no effect here; leave it out" in lines


def test_trl_arguments_as_they_come_train_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = with_config(dpo_config(tmp_path, learning_rate=1e-4, save_strategy="no"))
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "unidpo.training.arguments"]
    assert warning.startswith("args: what DPOConfig has beside TrainingArguments (`")
    assert "has no effect here" in warning
    trainer.train()
    assert trainer.state.global_step == 1


def test_every_hint_names_a_setting_that_trl_has_or_had() -> None:
    from trl import DPOConfig

    former = {"simpo_gamma", "reference_free", "max_prompt_length", "max_completion_length"}
    assert ELSEWHERE.keys() - former <= DPOConfig.__dataclass_fields__.keys()


def test_a_default_that_a_class_computes_is_no_setting(tmp_path: Path) -> None:
    @dataclass
    class Arguments(TrainingArguments):
        folder: str = "auto"
        names: list[str] = field(default_factory=list)

        def __post_init__(self) -> None:
            super().__post_init__()
            self.folder = "there" if self.folder == "auto" else self.folder

    plain = {"use_cpu": True, "report_to": "none"}
    with_config(Arguments(str(tmp_path), **plain))
    with pytest.raises(UserError, match=r"`names=\['a'\]`: has no effect here; leave it out$"):
        with_config(Arguments(str(tmp_path), names=["a"], **plain))


# --- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(2, None, 2), (64, None, 8), (64, "4", 8), (16, "4", 4), (4, "8", 1)]
)
def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch, cores, processes, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    if processes is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert default_workers() == expected


@pytest.mark.parametrize(("device", "workers", "warns"), [("cuda", 0, True), ("cuda", 2, False), ("cpu", 0, False)])
def test_a_gpu_without_workers_is_said(tmp_path, monkeypatch, caplog, device, workers, warns):
    args = TrainingArguments(str(tmp_path), use_cpu=True, dataloader_num_workers=workers)
    monkeypatch.setattr(TrainingArguments, "device", torch.device(device))
    warn_without_workers(args)
    assert ("dataloader_num_workers=0" in caplog.text) is warns


@pytest.mark.parametrize(
    ("gpu", "train", "workers"), [(True, {}, 3), (True, {"dataloader_num_workers": 0}, 0), (False, {}, None)]
)
def test_a_recipe_has_workers_by_default_on_a_gpu_alone(tmp_path, monkeypatch, gpu, train, workers):
    given = {}

    def arguments(**values):
        given.update(values)
        return TrainingArguments(**values | {"use_cpu": True})

    monkeypatch.setattr("unidpo.run.training_arguments.accelerator", lambda: torch.device("cuda") if gpu else None)
    monkeypatch.setattr("unidpo.run.training_arguments.TrainingArguments", arguments)
    monkeypatch.setattr("unidpo.run.training_arguments.default_workers", lambda: 3)
    sections = {"model": {"name": "any"}, "data": {"path": "any"}, "loss": {"name": "dpo"}, "train": train}
    training_arguments(recipe_from({"output": str(tmp_path / "run"), **sections}))
    assert given["use_cpu"] is not gpu
    assert given.get("dataloader_num_workers") == workers
