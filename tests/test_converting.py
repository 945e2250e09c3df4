"""Other tools' configurations become recipes: every key is accounted for, and what is learned stays the same."""

import json

import pytest
import yaml

from test_golden import LOSSES, assert_follows
from unidpo.config import load_recipe, recipe_from
from unidpo.config.converting import TITLES, convert
from unidpo.config.launch_files import read_launch
from unidpo.config.neighbours import LLAMA_FACTORY
from unidpo.errors import RecipeError

# The authors' launch scripts, by their arguments: variables first, then one command over many lines.
SCRIPT = """#!/bin/bash
# {method}, on four GPUs
MODEL="models/Qwen2-VL-2B"   # where it was downloaded to
FOLDER="runs/seed"
SET="golden48"  # LEN: 48
CARDS="0,1,2,3"
EACH="1"
{variables}
ALL=128
IFS=',' read -ra LIST <<<"$CARDS"
STEPS=$((ALL / (${{#LIST[@]}} * EACH)))
echo "it's $(date)" >> log || {{
    exit 1
}}
FOLDER="$(realpath "$FOLDER")"
touch executed; $(touch executed); `touch executed`
SOME_CHECK=1 deepspeed --include localhost:"$CARDS" --master_port 61000 ./src/train.py \\
    --deepspeed examples/deepspeed/ds_z2_config.json --model_name_or_path "$MODEL" --stage dpo --flash_attn fa2 \\
    --do_train --finetuning_type full {arguments} \\
    --dataset "$SET" --template "qwen2_vl" --output_dir "$FOLDER" --overwrite_cache \\
    --per_device_train_batch_size "$EACH" --gradient_accumulation_steps "$STEPS" --preprocessing_num_workers 16 \\
    --lr_scheduler_type "cosine" --logging_steps 1 --save_steps 1000 --learning_rate "${{RATE}}" --num_train_epochs 1 \\
    --plot_loss --bf16 --warmup_ratio 0 --ddp_timeout 180000000 --cutoff_len 4096 --max_samples 10000000 \\
    --overwrite_output_dir \\
    2>&1 | tee -a "$FOLDER/log"
"""
METHODS = {
    "uni_dpo": (
        "RATE=6.0e-6\nBETA=2.0\nETA=0.7",
        '--pref_loss uni_dpo --pref_beta "$BETA" --dpo_average_log_prob --dpo_label_smoothing 0 '
        '--uni_dpo_qual_eta "$ETA" --uni_dpo_tau_ref 2.0 --uni_dpo_perf_gamma 3.0 --uni_dpo_nll_lambda 0.001 '
        "--uni_dpo_tau_good 2.5",
    ),
    "dpo": (
        "RATE=5.0e-7\nLS=0.1",
        '--pref_loss sigmoid --pref_beta 0.1 --dpo_average_log_prob --dpo_label_smoothing "$LS"',
    ),
    "simpo": ("RATE=5.0e-7", "--pref_loss simpo --pref_beta 2.0 --simpo_gamma 1.0 --dpo_label_smoothing 0"),
}


@pytest.fixture
def script(tmp_path):
    def write(name):
        variables, arguments = METHODS[name]
        path = tmp_path / f"{name}.sh"
        path.write_text(SCRIPT.format(method=name, variables=variables, arguments=arguments), "utf-8")
        return path

    return write


def by_key(made):
    return {line.key: line for line in made.lines}


def of_kind(made, kind):
    return {line.key for line in made.lines if line.kind == kind}


class TestTheAuthorsScripts:
    @pytest.mark.parametrize("name", METHODS)
    def test_become_the_recipes_of_their_settings(self, recipe_command, script, golden, tmp_path, name):
        to = tmp_path / "recipe.yaml"
        given = ["gradient_accumulation_steps=32", "output_dir=runs/x", f"dataset_dir={golden / 'data'}"]
        code, _, said = recipe_command("from-llamafactory", script(name), *given, "--to", to)
        assert code == 0
        assert said.splitlines()[-1] == f"then: unidpo train {to} --nproc 4"
        made, ours = load_recipe(to), load_recipe(f"recipes/qwen2_vl_2b/{name}.yaml")
        assert made.loss == ours.loss == LOSSES[name]
        made_train, ours_train = made.train.given(), ours.train.given()
        for key in ("learning_rate", "global_batch_pairs", "lr_scheduler_type", "warmup_steps", "num_train_epochs"):
            assert made_train[key] == ours_train[key], key
        for key in ("template", "max_length", "max_pixels", "shuffle", "eval_fraction"):
            assert getattr(made.data, key) == getattr(ours.data, key), key
        assert (made.model.freeze, made.model.dtype) == (ours.model.freeze, ours.model.dtype)
        assert (made.lora, made.reference) == (None, "stored")
        assert made.model.name == "models/Qwen2-VL-2B"
        assert made.data.path == str(golden / "data" / "golden48.json")
        assert "without an equal" not in said

    def test_are_read_and_not_run_and_what_they_compute_is_left_open(
        self, recipe_command, script, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        code, out, said = recipe_command("from-llamafactory", script("uni_dpo"), "--to", "recipe.yaml")
        assert (code, out) == (0, "")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "uni_dpo.sh"]
        assert "output_dir: $FOLDER → output: ???" in said
        assert "give gradient_accumulation_steps=VALUE behind it" in said
        assert "data/dataset_info.json is not here, or does not name golden48" in said
        with pytest.raises(RecipeError) as error:
            load_recipe("recipe.yaml")
        assert {finding.key for finding in error.value.findings} == {
            "output", "data.path", "train.gradient_accumulation_steps",
        }  # fmt: skip
        assert "is left open" in str(error.value)

    @pytest.mark.parametrize("name", METHODS)
    def test_follow_the_golden_run(self, script, golden, tmp_path, monkeypatch, name):
        """With the golden run's own model, data and step size, in LLaMA-Factory's keys, in place of the script's."""
        from unidpo.data.formats.declared import declared_data
        from unidpo.run.train import run

        monkeypatch.setenv("UNIDPO_CACHE", str(tmp_path / "cache"))
        text = script(name).read_text("utf-8").replace('CARDS="0,1,2,3"', 'CARDS="0"')
        text = text.replace("--deepspeed examples/deepspeed/ds_z2_config.json", "")
        changes = [
            f"model_name_or_path={golden / 'model'}", f"dataset_dir={golden / 'data'}",
            f"output_dir={tmp_path / 'run'}", "gradient_accumulation_steps=4", "learning_rate=1e-3",
            "disable_shuffling=true", "bf16=false", "use_cpu=true",
        ]  # fmt: skip
        path = tmp_path / "golden.sh"
        path.write_text(text, "utf-8")
        launch = read_launch(path, LLAMA_FACTORY, changes)
        assert launch.processes == 1
        made = convert(LLAMA_FACTORY, launch.values, processes=1, find_data=declared_data)
        folder = run(made.recipe)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        assert_follows(golden, name, [record for record in records if "grad_norm" in record])


BASE = {
    "model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct", "stage": "dpo", "do_train": True, "finetuning_type": "full",
    "dataset": "golden48", "template": "qwen2_vl", "cutoff_len": 2048, "output_dir": "saves/x", "bf16": True,
    "learning_rate": 5e-6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8,
}  # fmt: skip
LORA = BASE | {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
# What is added to one of the two; what the recipe then holds; the keys that have no equal.
CONFIGURATIONS = {
    "full": (BASE, {}, {"lora": None, "model.freeze": ["vision", "projector"], "train.learning_rate": 5e-6}, set()),
    "lora": (LORA, {}, {"lora.r": 8, "lora.alpha": 16, "lora.target_modules": None}, set()),
    "lora of some layers": (
        LORA,
        {"lora_target": "q_proj, v_proj", "lora_alpha": 64, "lora_dropout": 0.1, "use_rslora": True},
        {"lora.target_modules": ["q_proj", "v_proj"], "lora.alpha": 64, "lora.dropout": 0.1, "lora.rslora": True},
        set(),
    ),
    "dora, and more": (
        LORA,
        {
            "use_dora": True,
            "loraplus_lr_ratio": 16.0,
            "pissa_init": True,
            "pissa_iter": 4,
            "additional_target": "embed",
        },
        {"lora.dora": True},
        {"loraplus_lr_ratio", "pissa_init", "additional_target"},
    ),
    "qlora": (LORA, {"quantization_bit": 4, "quantization_method": "bnb"}, {"model.quantize": "nf4"}, set()),
    "gptq": (LORA, {"quantization_bit": 2}, {}, {"quantization_bit"}),
    "smoothing and averages where there are none": (
        BASE,
        {"pref_ftx": 1.0, "dpo_label_smoothing": 0.1, "dpo_average_log_prob": True},
        {"loss.name": "mpo", "loss.w_g": 1.0},
        {"dpo_label_smoothing", "dpo_average_log_prob"},
    ),
    "dpo with an SFT term": (
        BASE,
        {"pref_loss": "sigmoid", "pref_ftx": 0.5},
        {"loss.name": "mpo", "loss.w_p": 1.0, "loss.w_g": 0.5},
        set(),
    ),
    "dpo with BCO": (
        BASE,
        {"pref_bco_weight": 0.25},
        {"loss.name": "mpo", "loss.w_p": 0.8, "loss.w_q": 0.2, "loss.w_g": 0.0},
        set(),
    ),
    "smoothed dpo": (
        BASE,
        {"dpo_label_smoothing": 0.1, "pref_beta": 0.2},
        {"loss.label_smoothing": 0.1, "loss.beta": 0.2},
        set(),
    ),
    "ipo": (BASE, {"pref_loss": "ipo", "pref_beta": 0.3}, {"loss.name": "ipo", "loss.tau": 0.3}, set()),
    "simpo": (
        BASE,
        {"pref_loss": "simpo", "pref_beta": 2.5},
        {"loss.name": "simpo", "loss.beta": 2.5, "loss.gamma": 0.5},
        set(),
    ),
    "orpo": (BASE, {"pref_loss": "orpo"}, {"loss.name": "???"}, {"pref_loss"}),
    "hinge, ld-dpo": (BASE, {"pref_loss": "hinge", "ld_alpha": 0.5}, {"loss.name": "???"}, {"pref_loss", "ld_alpha"}),
    "kto": (BASE, {"stage": "kto", "kto_chosen_weight": 1.5}, {"loss.name": "???"}, {"stage", "kto_chosen_weight"}),
    "freeze": (
        BASE,
        {"finetuning_type": "freeze", "freeze_trainable_layers": 4},
        {"lora": "???"},
        {"finetuning_type"},
    ),
    "deepspeed 2, whole model": (
        BASE,
        {
            "deepspeed": "ds_z2.json",
            "freeze_vision_tower": False,
            "freeze_multi_modal_projector": False,
            "ddp_timeout": 18000,
            "resume_from_checkpoint": None,
            "report_to": "wandb",
            "run_name": "a",
        },
        {"train.deepspeed": "ds_z2.json", "model.freeze": [], "train.report_to": "wandb", "train.run_name": "a"},
        set(),
    ),
    "deepspeed 3, a given reference": (
        BASE,
        {"deepspeed": "ds_z3.json", "ref_model": "Qwen/R", "ref_model_quantization_bit": 4},
        {"train.deepspeed": "ds_z3.json", "reference": "Qwen/R"},
        {"ref_model_quantization_bit"},
    ),
    "several data sets, an eval split": (
        BASE,
        {
            "dataset": "golden48,other",
            "mix_strategy": "interleave_under",
            "interleave_probs": "0.7,0.3",
            "val_size": 0.1,
            "eval_strategy": "steps",
            "eval_steps": 100,
            "per_device_eval_batch_size": 1,
            "max_samples": 1000,
        },
        {"data.eval_fraction": 0.1, "train.eval_strategy": "steps", "train.eval_steps": 100},
        {"mix_strategy", "interleave_probs", "max_samples"},
    ),
    "an eval set": (
        BASE,
        {"eval_dataset": "other", "val_size": 100, "early_stopping_steps": 3},
        {},
        {"eval_dataset", "val_size", "early_stopping_steps"},
    ),
    "packing, flash attention, liger": (
        BASE,
        {
            "packing": True,
            "neat_packing": True,
            "flash_attn": "fa2",
            "enable_liger_kernel": True,
            "use_unsloth_gc": True,
            "disable_gradient_checkpointing": False,
            "upcast_layernorm": True,
            "image_max_pixels": 262144,
            "image_min_pixels": 1024,
            "video_maxlen": 64,
        },
        {"model.attention": "auto", "train.use_liger_kernel": True, "data.max_pixels": 262144},
        set(),
    ),
    "sdpa in half precision": (
        BASE,
        {"flash_attn": "sdpa", "bf16": False, "fp16": True},
        {"model.attention": "sdpa", "model.dtype": "float16"},
        set(),
    ),
    "galore in pure bf16": (
        BASE,
        {"use_galore": True, "galore_rank": 128, "galore_target": "all", "pure_bf16": True, "bf16": False},
        {"model.dtype": "bfloat16"},
        {"use_galore"},
    ),
    "badam, apollo, muon and what is off": (
        BASE,
        {
            "use_badam": True,
            "badam_mode": "layer",
            "use_apollo": False,
            "use_muon": True,
            "neftune_noise_alpha": 5,
            "optim": "adamw_torch",
            "weight_decay": 0.01,
            "max_grad_norm": 0.5,
            "warmup_ratio": 0.1,
            "use_adam_mini": False,
        },
        {"train.optim": "adamw_torch", "train.warmup_steps": 0.1, "train.weight_decay": 0.01},
        {"use_badam", "use_muon", "neftune_noise_alpha"},
    ),
}


class TestLlamaFactory:
    @pytest.mark.parametrize("name", CONFIGURATIONS)
    def test_every_key_is_accounted_for(self, golden, name):
        base, added, holds, without = CONFIGURATIONS[name]
        given = base | added
        files = {"golden48": str(golden / "data" / "golden48.json"), "other": "owner/name@train"}
        made = convert(LLAMA_FACTORY, given, find_data=lambda name, folder: files.get(name))
        assert [line.key for line in made.lines if line.kind != "default"] == [
            key for key in given if given[key] is not None or key not in LLAMA_FACTORY.defaults
        ]
        assert {line.kind for line in made.lines} <= TITLES.keys()
        flat = {
            f"{section}.{key}" if key else section: value
            for section, inside in made.values.items()
            for key, value in (inside.items() if isinstance(inside, dict) else [("", inside)])
        }
        assert {key: flat.get(key) for key in holds} == holds
        assert of_kind(made, "no-equal") | of_kind(made, "open") == without
        assert all(line.note for line in made.lines if line.kind not in ("taken", "default"))
        if not of_kind(made, "open"):
            assert recipe_from(yaml.safe_load(made.to_yaml())) == made.recipe
        else:
            with pytest.raises(RecipeError, match="to fill in"):
                assert made.recipe

    def test_there_are_twenty(self):
        assert len(CONFIGURATIONS) >= 20

    def test_defaults_that_change_what_is_learned_are_written_out(self):
        made = convert(LLAMA_FACTORY, {"stage": "dpo", "model_name_or_path": "m", "output_dir": "o"})
        written = {key for line in made.lines if line.kind == "default" for key in line.ours}
        assert written >= {
            "train.learning_rate", "train.num_train_epochs", "train.lr_scheduler_type", "data.max_length", "lora.r",
            "model.dtype", "train.per_device_train_batch_size",
        }  # fmt: skip
        assert made.values["train"]["learning_rate"] == 5e-5
        assert made.values["loss"] == {"name": "dpo", "beta": 0.1}
        assert not {line.key for line in made.lines} & {"pref_beta", "freeze_vision_tower"}  # as ours are

    def test_keys_it_does_not_have_and_values_we_refuse_are_named(self):
        made = convert(LLAMA_FACTORY, BASE | {"cutof_len": 3, "dpo_label_smoothing": 0.7, "learning_rate": -1})
        lines = by_key(made)
        assert str(lines["cutof_len"]) == "cutof_len: 3 (LLaMA-Factory has no such key; did you mean `cutoff_len`?)"
        assert "`loss.label_smoothing` must be" in lines["dpo_label_smoothing"].note
        assert "`train.learning_rate` must be" in lines["learning_rate"].note
        assert "label_smoothing" not in made.values["loss"]

    def test_no_secret_is_shown(self):
        made = convert(LLAMA_FACTORY, BASE | {"hf_hub_token": "abc123", "swanlab_api_key": "abc123"})
        assert "abc123" not in made.report() + made.to_yaml()
