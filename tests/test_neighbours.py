"""The tables of other tools' keys, TRL's and ms-swift's configurations, and the files that all of them come in."""

from dataclasses import fields
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from unidpo.config import load_recipe, recipe_from_trl_config
from unidpo.config.converting import convert
from unidpo.config.explaining import FOREIGN, dotted_keys
from unidpo.config.launch_files import read_launch
from unidpo.config.neighbours import LLAMA_FACTORY, MS_SWIFT, NEIGHBOURS, TRL
from unidpo.errors import RecipeError

ROOT = Path(__file__).parent.parent


def by_key(made):
    return {line.key: line for line in made.lines}


def held(made):
    """The recipe by dotted keys."""
    return {
        f"{section}.{key}" if key else section: value
        for section, inside in made.values.items()
        for key, value in (inside.items() if isinstance(inside, dict) else [("", inside)])
    }


class TestTables:
    @pytest.mark.parametrize(
        ("neighbour", "file"),
        [(LLAMA_FACTORY, "llamafactory.txt"), (MS_SWIFT, "swift.txt")],
        ids=["LLaMA-Factory", "ms-swift"],
    )
    def test_hold_every_argument(self, neighbour, file):
        """The files hold the names that LLaMA-Factory 0.9.5 and ms-swift 4.6 list in their documentation."""
        keys = (ROOT / "tests" / "neighbours" / file).read_text("utf-8").split()
        assert len(keys) > 200
        assert [key for key in keys if neighbour.row(key) is None] == []

    def test_hold_every_argument_of_trl(self):
        from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, ScriptArguments

        keys = {
            field.name
            for kind in (DPOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig)
            for field in fields(kind)
        }
        assert len(keys) > 150
        assert {key for key in keys if TRL.row(key) is None} == set()

    @pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=lambda neighbour: neighbour.name)
    def test_lead_to_keys_of_ours_or_say_why_not(self, neighbour):
        ours = {*dotted_keys(), "output", "reference", "lora"}
        for key, row in neighbour.rows.items():
            assert not row.ours or row.ours in ours, key
            assert row.ours or row.note or row.take, key
        assert neighbour.defaults.keys() <= neighbour.rows.keys()

    def test_are_what_errors_suggest(self, recipe_command):
        own = {key.rpartition(".")[2] for key in dotted_keys()} | {
            "output",
            "model",
            "data",
            "loss",
            "lora",
            "reference",
        }
        for neighbour in NEIGHBOURS.values():
            missed = [
                key for key, row in neighbour.rows.items()
                if row.ours and "*" not in key and key not in own and key not in FOREIGN
            ]  # fmt: skip
            assert missed == []
        code, _, said = recipe_command(
            "check", "recipes/tiny.yaml", "cutoff_len=1", "freeze_vit=true", "plot_loss=true"
        )
        assert code == 2
        assert "`cutoff_len`: is not a key; did you mean `data.max_length`?" in said
        assert "`freeze_vit`: is not a key; did you mean `model.freeze`?" in said
        assert "`plot_loss`: is not a key; that of LLaMA-Factory has no equal here: `unidpo report`" in said


class TestTrl:
    GIVEN: ClassVar = {
        "model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "dataset_name": "owner/name", "dataset_config": "en",
        "output_dir": "out", "beta": 0.2, "max_length": 2048, "attn_implementation": "sdpa",
        "precompute_ref_log_probs": True, "dataset_num_proc": 8,
    }  # fmt: skip

    def test_a_configuration_of_its_command(self, recipe_command, tmp_path):
        (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(self.GIVEN | {"num_processes": 4}), "utf-8")
        to = tmp_path / "recipe.yaml"
        words = ["gradient_accumulation_steps=8", "per_device_train_batch_size=2", "--to", to]
        code, out, said = recipe_command("from-trl", tmp_path / "dpo.yaml", *words)
        assert (code, out) == (0, "")
        recipe = load_recipe(to)
        assert recipe.loss.model_dump() == {
            "name": "dpo",
            "beta": 0.2,
            "label_smoothing": 0.0,
            "length_normalized": False,
        }
        assert (recipe.data.path, recipe.data.max_length) == ("owner/name:en@train", 2048)
        assert (recipe.model.freeze, recipe.model.attention, recipe.model.dtype) == ((), "sdpa", "bfloat16")
        assert (recipe.train.global_batch_pairs, recipe.train.learning_rate) == (64, 1e-6)
        assert (recipe.train.lr_scheduler_type, recipe.train.num_train_epochs) == ("linear", 3)
        assert recipe.lora is None
        assert all(key in said for key in self.GIVEN)
        assert said.endswith(f"then: unidpo train {to} --nproc 4\n")

    @pytest.mark.parametrize(
        ("added", "holds", "without"),
        [
            ({"loss_type": "ipo"}, {"loss.name": "ipo", "loss.tau": 0.2}, set()),
            ({"loss_type": ["sigmoid_norm"]}, {"loss.name": "dpo", "loss.length_normalized": True}, set()),
            (
                {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
                {"loss.name": "mpo", "loss.w_p": 0.8, "loss.w_q": 0.2, "loss.w_g": 1.0},
                set(),
            ),
            ({"loss_type": ["hinge"]}, {"loss.name": "???"}, {"loss_type"}),
            ({"loss_type": ["robust"], "label_smoothing": 0.1}, {"loss.name": "???"}, {"loss_type"}),
            ({"use_weighting": True, "sync_ref_model": True}, {}, {"use_weighting", "sync_ref_model"}),
            ({"f_divergence_type": "forward_kl"}, {}, {"f_divergence_type"}),
            ({"max_length": None}, {"data.max_length": 1_000_000}, set()),
            (
                {"use_peft": True},
                {"lora.r": 16, "lora.dropout": 0.05, "lora.target_modules": ["q_proj", "v_proj"]},
                set(),
            ),
            (
                {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear", "load_in_4bit": True},
                {"lora.r": 4, "lora.target_modules": "all-linear", "model.quantize": "nf4"},
                set(),
            ),
            ({"bf16": False, "fp16": True}, {"model.dtype": "float16"}, set()),
            ({"train_sampling_strategy": "sequential"}, {"data.shuffle": False}, set()),
            ({"eval_strategy": "steps"}, {}, {"eval_strategy"}),
            ({"eval_strategy": "steps", "test_split_size": 0.1}, {"train.eval_strategy": "steps"}, set()),
            ({"truncation_mode": "keep_end"}, {}, {"truncation_mode"}),
        ],
    )
    def test_every_key_is_accounted_for(self, added, holds, without):
        given = self.GIVEN | added
        made = convert(TRL, given)
        lines = by_key(made)
        assert {key for key, value in given.items() if value is not None} <= lines.keys()
        assert {key: held(made).get(key) for key in holds} == holds
        assert {line.key for line in made.lines if line.kind in ("no-equal", "open")} == without

    @pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # TRL's own default
    def test_its_objects_in_python(self, tmp_path):
        from peft import LoraConfig
        from trl import DPOConfig

        config = DPOConfig(
            str(tmp_path), beta=0.3, learning_rate=2e-6, bf16=False, use_cpu=True, report_to=[], loss_type=["ipo"]
        )
        peft_config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
        made = recipe_from_trl_config(config, model="models/x", data="pairs.json", peft_config=peft_config)
        recipe = made.recipe
        assert recipe.loss.model_dump() == {"name": "ipo", "tau": 0.3}
        assert (recipe.train.learning_rate, recipe.data.max_length, recipe.model.dtype) == (2e-6, 1024, "float32")
        assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.target_modules) == (4, 8, ("q_proj",))
        assert (recipe.model.name, recipe.data.path, recipe.output) == ("models/x", "pairs.json", tmp_path)
        assert len([line for line in made.lines if line.kind != "default"]) < 25  # not each of its 150 fields
        with pytest.raises(RecipeError, match="the nearest is `dpo`, a smooth hinge"):
            assert recipe_from_trl_config({"loss_type": "hinge", "output_dir": "o"}, model="m", data="p").recipe


class TestSwift:
    SCRIPT = """nproc_per_node=2
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \\
CUDA_VISIBLE_DEVICES=0,1 NPROC_PER_NODE=$nproc_per_node MAX_PIXELS=1003520 \\
swift rlhf --rlhf_type dpo --model Qwen/Qwen2.5-VL-7B-Instruct --dataset 'owner/name#20000' \\
    --load_from_cache_file true --split_dataset_ratio 0.01 --tuner_type lora --torch_dtype bfloat16 \\
    --num_train_epochs 1 --per_device_train_batch_size 1 --learning_rate 1e-4 --lora_rank 4 --lora_alpha 64 \\
    --target_modules q_proj v_proj --freeze_vit true --gradient_accumulation_steps 8 --max_length 4096 \\
    --output_dir output --warmup_ratio 0.05 --deepspeed zero2 {more}
"""

    def test_its_command_line(self, recipe_command, tmp_path):
        (tmp_path / "dpo.sh").write_text(self.SCRIPT.format(more="--rpo_alpha 0.1"), "utf-8")
        code, _, said = recipe_command("from-swift", tmp_path / "dpo.sh", "--to", tmp_path / "r.yaml")
        assert code == 0
        recipe = load_recipe(tmp_path / "r.yaml")
        assert recipe.loss.model_dump() == {"name": "mpo", "beta": 0.1, "w_p": 1.0, "w_q": 0.0, "w_g": 0.1}
        assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (4, 64, 0.05)
        assert recipe.lora.target_modules == ("q_proj", "v_proj")
        assert (recipe.train.global_batch_pairs, recipe.train.weight_decay, recipe.train.warmup_steps) == (
            16,
            0.1,
            0.05,
        )
        assert recipe.train.given()["adam_beta2"] == 0.95
        assert recipe.train.given()["deepspeed"] == "recipes/launch/zero2.json"
        assert (recipe.data.path, recipe.data.max_pixels, recipe.data.eval_fraction) == ("owner/name", 1003520, 0.01)
        assert "`#` draws some" in said
        assert said.endswith("--nproc 2\n")

    @pytest.mark.parametrize(
        ("added", "holds", "without"),
        [
            ({}, {"loss.name": "dpo", "loss.beta": 0.1, "lora.r": 8, "train.learning_rate": 1e-4}, set()),
            ({"tuner_type": "full"}, {"lora": None, "train.learning_rate": 1e-5}, set()),
            ({"tuner_type": "full"}, {"model.freeze": ["vision", "projector"]}, set()),
            ({"tuner_type": "full", "freeze_vit": False}, {"model.freeze": ["projector"]}, set()),
            ({"rlhf_type": "simpo", "cpo_alpha": 0.0}, {"loss.name": "simpo", "loss.beta": 2.0}, set()),
            ({"rlhf_type": "orpo"}, {"loss.name": "???"}, {"rlhf_type"}),
            ({"label_smoothing": 0.1}, {"loss.name": "dpo", "loss.label_smoothing": 0.1}, set()),
            ({"rpo_alpha": 1.0, "label_smoothing": 0.1}, {"loss.name": "mpo"}, {"label_smoothing"}),
            ({"quant_bits": 4, "padding_free": True, "attn_impl": "flash_attn"}, {"model.quantize": "nf4"}, set()),
            ({"tuner_type": "vera"}, {"lora": "???"}, {"tuner_type"}),
            ({"system": "x", "vit_lr": 1e-5}, {}, {"system", "vit_lr"}),
            ({"external_plugins": ["a.py"]}, {}, {"external_plugins"}),
            ({"dataset": ["a.jsonl", "b.jsonl"], "dataset_shuffle": False, "train_dataloader_shuffle": False},
             {"data.path": ["a.jsonl", "b.jsonl"], "data.shuffle": False}, set()),
            ({"ENV": {"MAX_PIXELS": 1003520}}, {}, {"ENV"}),
        ],
    )  # fmt: skip
    def test_every_key_is_accounted_for(self, added, holds, without):
        given = {"model": "a/b", "dataset": "pairs.jsonl", "output_dir": "o"} | added
        made = convert(MS_SWIFT, given)
        assert given.keys() <= by_key(made).keys()
        assert {key: held(made).get(key) for key in holds} == holds
        assert {line.key for line in made.lines if line.kind in ("no-equal", "open")} == without

    def test_variables_of_its_yaml(self, tmp_path):
        (tmp_path / "a.yaml").write_text("ENV: {MAX_PIXELS: 100352, NPROC_PER_NODE: 2}\nmodel: m\n", "utf-8")
        launch = read_launch(tmp_path / "a.yaml", MS_SWIFT)
        assert launch.values == {"MAX_PIXELS": 100352, "NPROC_PER_NODE": 2, "model": "m"}
        assert launch.processes == 2


class TestScripts:
    @pytest.mark.parametrize(
        ("line", "values", "processes"),
        [
            ("llamafactory-cli train {yaml} learning_rate=1e-5", {"stage": "dpo", "learning_rate": 1e-5}, None),
            (
                "torchrun --nproc_per_node=4 --nnodes 2 src/train.py --stage dpo --bf16",
                {"stage": "dpo", "bf16": True},
                8,
            ),
            ("accelerate launch --num_processes 2 train.py --stage dpo", {"stage": "dpo"}, 2),
            ("deepspeed --num_gpus 3 train.py --stage=dpo --bf16 false", {"stage": "dpo", "bf16": False}, 3),
            ("deepspeed --include a:0,1@b:0 train.py --stage dpo", {"stage": "dpo"}, 3),
            ("deepspeed --include localhost:$CARDS train.py --stage dpo", {"stage": "dpo"}, None),
            ("A=1 python train.py --cutoff-len 8 --stage dpo > log 2>&1 &", {"cutoff_len": 8, "stage": "dpo"}, None),
            ("python train.py --stage dpo --dataset a#b # the end", {"stage": "dpo", "dataset": "a#b"}, None),
            (
                "python train.py --stage dpo --output_dir $(date +%F)/x",
                {"stage": "dpo", "output_dir": "$(date +%F)/x"},
                None,
            ),
            ("X=1; python train.py --stage `echo dpo`", {"stage": "`echo dpo`"}, None),
        ],
    )
    def test_a_line(self, tmp_path, line, values, processes):
        (tmp_path / "c.yaml").write_text("stage: dpo\nlearning_rate: 1\n", "utf-8")
        script = tmp_path / "run.sh"
        script.write_text(f"set -e\nif true; then\n  {line.format(yaml='c.yaml')}\nfi\n", "utf-8")
        launch = read_launch(script, LLAMA_FACTORY)
        assert (launch.values, launch.processes) == (values, processes)

    def test_variables_are_filled_in_where_they_are_plain(self, tmp_path):
        script = tmp_path / "run.sh"
        call = "python train.py --stage dpo --seed ${A} --output_dir $B --dataset $C$D ${E:-3}"
        script.write_text(f"A=1\nB=$A/x\nexport C=$(pwd)\nA=2\n{call}\n", "utf-8")
        values = read_launch(script, LLAMA_FACTORY).values
        assert values == {"stage": "dpo", "seed": 2, "output_dir": "1/x", "dataset": ["$C$D", "${E:-3}"]}

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("gone.sh", None, "there is no such file"),
            ("gone.yaml", None, "there is no such configuration"),
            ("a.sh", "echo hi\n", "no line of it starts LLaMA-Factory"),
            ("a.yaml", "- 1\n", "a configuration is a mapping"),
            ("b.yaml", "a: [", "is not valid YAML"),
            ("b.sh", b"\xff\xfe", "cannot be read as text"),
        ],
    )
    def test_what_cannot_be_read_is_said(self, recipe_command, tmp_path, name, text, said):
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        code, out, err = recipe_command("from-llamafactory", tmp_path / name)
        assert (code, out) == (2, "")
        assert err.startswith(str(tmp_path / name))
        assert said in err
        assert err.count("\n") == 1

    def test_an_override_without_a_value_is_refused(self, recipe_command, tmp_path):
        (tmp_path / "a.yaml").write_text("stage: dpo\n", "utf-8")
        code, _, err = recipe_command("from-llamafactory", tmp_path / "a.yaml", "seed")
        assert (code, err) == (2, "seed: an override is written key=value, with a key of LLaMA-Factory\n")

    def test_nothing_needs_torch(self, tmp_path):
        import subprocess
        import sys

        (tmp_path / "a.yaml").write_text("stage: dpo\nmodel_name_or_path: m\n", "utf-8")
        code = (
            "import sys\nfrom unidpo import cli\n"
            f"sys.argv = ['unidpo', 'recipe', 'from-llamafactory', {str(tmp_path / 'a.yaml')!r}]\n"
            "try:\n    cli.main()\nexcept SystemExit as done:\n    assert not done.code\n"
            "assert not {'torch', 'transformers', 'trl'} & sys.modules.keys()\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
