"""The shipped recipes: they load, their first line runs them, their values are the authors'; so do the launch files."""

import re
import runpy
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import TrainingArguments

from unidpo import losses
from unidpo.config import is_sweep, load_recipe, load_sweep, recipe_from

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "recipes" / "launch"
FILES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.parent != LAUNCH]
SWEEPS = [path for path in FILES if is_sweep(path)]
RECIPES = [path for path in FILES if path not in SWEEPS]
CONFIGS = sorted(LAUNCH.glob("*.yaml"))


def name_of(path):
    return str(path.relative_to(ROOT))


def recipe_of(name):
    return load_recipe(ROOT / "recipes" / f"{name}.yaml")


def test_there_are_recipes():
    assert len(RECIPES) >= 18
    assert len(SWEEPS) == 1
    assert len(CONFIGS) == 6


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
class TestEachRecipe:
    def test_loads_and_survives_its_own_yaml(self, path, tmp_path):
        recipe = load_recipe(path)
        written = tmp_path / "resolved.yaml"
        written.write_text(recipe.to_yaml(), "utf-8")
        assert load_recipe(written).resolved() == recipe.resolved()

    def test_is_headed_by_the_command_that_runs_it(self, path):
        command = shlex.split(path.read_text("utf-8").splitlines()[0].removeprefix("# "))
        assert command[:3] == ["unidpo", "train", name_of(path)]
        load_recipe(path, command[3:])

    def test_values_differ_from_defaults_and_say_where_they_come_from(self, path):
        given_values = yaml.safe_load(path.read_text("utf-8"))
        bare = recipe_from(
            {
                "output": "o",
                "model": {"name": "m"},
                "data": {"path": "p"},
                "loss": {"name": given_values["loss"]["name"]},
            }
        ).resolved()
        for section in ("loss", "train", "data", "model"):
            for key, value in given_values[section].items():
                if key in ("name", "path"):
                    continue
                default = bare[section].get(key)  # None for what is left to transformers
                assert value != default, f"{section}.{key} repeats the default"
                (line,) = [line for line in path.read_text("utf-8").splitlines() if line.strip().startswith(f"{key}:")]
                assert "#" in line, f"{section}.{key} has no source"

    def test_files_it_names_are_shipped(self, path):
        recipe = load_recipe(path)
        if (recipe.data.template or "").endswith(".jinja"):
            assert (ROOT / recipe.data.template).is_file()
        if recipe.model.name.startswith("tests/"):
            assert (ROOT / recipe.model.name).is_dir()

    def test_has_a_row_in_the_documentation(self, path):
        assert f"`{path.relative_to(ROOT / 'recipes')}`" in (ROOT / "docs" / "recipes.md").read_text("utf-8")


def test_no_two_recipes_share_a_run_folder():
    assert len({load_recipe(path).output for path in RECIPES}) == len(RECIPES)


def test_the_multimodal_recipes_hold_the_authors_values():
    uni_dpo, dpo, simpo = (recipe_of(f"qwen2_vl_2b/{name}") for name in ("uni_dpo", "dpo", "simpo"))
    assert uni_dpo.loss.model_dump() == {
        "name": "uni_dpo", "beta": 2.0, "quality_eta": 0.7, "tau_ref": 2.0, "perf_gamma": 3.0, "nll_weight": 0.001,
        "tau_good": 2.5, "detach_performance_weight": False,
    }  # fmt: skip
    assert dpo.loss.model_dump() == {"name": "dpo", "beta": 0.1, "label_smoothing": 0.1, "length_normalized": True}
    assert simpo.loss.model_dump() == {"name": "simpo", "beta": 2.0, "gamma": 1.0}
    assert [r.train.learning_rate for r in (uni_dpo, dpo, simpo)] == [6e-6, 5e-7, 5e-7]
    for recipe in (uni_dpo, dpo, simpo):
        assert recipe.train.global_batch_pairs == 128
        assert recipe.train.lr_scheduler_type == "cosine"
        assert recipe.train.warmup_steps == 0
        assert recipe.data.max_length == 4096
        assert recipe.data.max_pixels == 768 * 768
        assert recipe.model.freeze == ("vision", "projector")
        assert recipe.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("name", "beta", "tau_ref", "learning_rate", "data"),
    [
        ("llama_3_8b_base_sft", 2.0, 0.8, 1e-6, "UltraFeedback-GPT-4o"),
        ("llama_3_8b_base_sft_v2_qwen", 2.0, 0.8, 1e-6, "UltraFeedback-Qwen2_5_72B"),
        ("llama_3_8b_instruct", 2.0, 1.0, 1e-6, "Llama-3-8B-Instruct-UltraFeedback-GPT-4o"),
        ("llama_3_8b_instruct_v2_armorm", 10.0, 1.0, 1e-6, "Llama-3-8B-Instruct-UltraFeedback-ArmoRM"),
        ("llama_3_8b_instruct_v2_gpt_4o", 10.0, 1.0, 1e-6, "Llama-3-8B-Instruct-UltraFeedback-ArmoRM-GPT-4o"),
        ("gemma_2_9b_it", 10.0, 0.8, 8e-7, "Gemma-2-9B-IT-UltraFeedback-GPT-4o"),
        *((f"qwen2_5_{size}b", 3.5, 0.8, 2e-6, "UltraFeedback-GPT-4o") for size in ("0_5", "1_5", "3", "7", "14")),
    ],
)
def test_the_text_recipes_hold_the_authors_values(name, beta, tau_ref, learning_rate, data):
    recipe = recipe_of(f"text/{name}")
    assert recipe.loss.model_dump() == {
        "name": "uni_dpo", "beta": beta, "quality_eta": 0.7, "tau_ref": tau_ref, "perf_gamma": 3.0, "nll_weight": 0.001,
        "tau_good": 3.2, "detach_performance_weight": False,
    }  # fmt: skip
    assert (recipe.train.learning_rate, recipe.train.warmup_steps) == (learning_rate, 0.1)
    assert (recipe.train.num_train_epochs, recipe.data.max_length) == (1, 2048)
    assert recipe.data.path == f"uni-dpo/Textual/{data}/train.jsonl"
    text = (ROOT / "recipes" / "text" / f"{name}.yaml").read_text("utf-8")
    passes = re.search(r"(\d+) (?:x|pairs? x) (\d+) (?:pairs|passes)", text)
    on_eight = 8 * int(passes[1]) * int(passes[2])
    assert recipe.train.global_batch_pairs == 128
    assert on_eight == 128 or f"make {on_eight} on 8 GPUs" in text


def test_the_math_recipe_holds_the_authors_values():
    recipe = recipe_of("math/qwen2_5_math_7b")
    loss = recipe.loss.model_dump()
    assert [loss[key] for key in ("beta", "quality_eta", "tau_ref", "perf_gamma", "nll_weight", "tau_good")] == [
        2.0, 0.7, 2.0, 3.0, 0.2, 8.0,
    ]  # fmt: skip
    assert (recipe.train.learning_rate, recipe.train.num_train_epochs, recipe.train.warmup_steps) == (1e-6, 2, 0)
    assert (recipe.train.global_batch_pairs, recipe.data.max_length) == (128, 4096)


def test_the_math_template_leaves_prompts_alone_and_closes_responses(text_model):
    from unidpo.data.pairs import Message, Pair, PromptGroup, Response
    from unidpo.model.encode import Encoder, plain_positions
    from unidpo.model.load import load_processor

    prompt = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    group = PromptGroup(
        (Message("user", (prompt,)),), (), (Response("2", 9.0), Response("3", 2.0)), (Pair(0, 1, row=1),)
    )
    tokenizer = load_processor(text_model)
    template = ROOT / recipe_of("math/qwen2_5_math_7b").data.template
    encoder = Encoder(tokenizer, plain_positions, template=str(template), max_length=512)
    encoded = encoder.encode(group)
    assert encoded.prompt_ids.tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    expected = [tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"] for text in "23"]
    assert [ids.tolist() for ids in encoded.response_ids] == expected


class TestMemory:
    def test_the_table_in_the_documentation_is_what_the_script_prints(self, capsys):
        runpy.run_path(str(ROOT / "benchmarks" / "recipe_memory.py"), run_name="__main__")
        printed = capsys.readouterr().out
        assert printed.count("\n") == 8
        assert printed in (ROOT / "docs" / "recipes.md").read_text("utf-8")


class TestSweep:
    @pytest.mark.parametrize("path", SWEEPS, ids=name_of)
    def test_is_headed_by_the_command_that_runs_it(self, path):
        command = shlex.split(path.read_text("utf-8").splitlines()[0].removeprefix("# "))
        assert command[:4] == ["unidpo", "train", "--sweep", name_of(path)]
        assert len(load_sweep(path, command[4:])) > 1

    def test_every_method_gets_as_many_runs_and_all_share_one_reference(self, monkeypatch):
        monkeypatch.chdir(ROOT)
        runs = load_sweep("recipes/qwen2_vl_2b/sweep.yaml")
        by_method = {}
        for run in runs:
            by_method.setdefault(run.name.partition("-")[0], []).append(run)
        assert set(by_method) == {"uni_dpo", "dpo", "dpo_summed", "simpo"}
        assert len({len(members) for members in by_method.values()}) == 1
        assert len({(str(r.recipe.model), str(r.recipe.data), r.recipe.reference) for r in runs}) == 1
        for method in ("uni_dpo", "dpo", "simpo"):  # the authors' own setting is one of them
            seed = recipe_of(f"qwen2_vl_2b/{method}")
            assert any(r.recipe.train == seed.train and r.recipe.loss == seed.loss for r in by_method[method])

    def test_the_slopes_in_the_documentation_are_those_of_the_losses(self):
        """docs/fair-comparison.md: |d loss / d (chosen - rejected log-probability per token)| before the first step."""
        rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) \|$", text_of_fair_comparison(), re.MULTILINE)
        assert {name for name, _ in rows} == {"uni_dpo", "dpo", "simpo"}
        for name, written in rows:
            loss = recipe_of(f"qwen2_vl_2b/{name}").loss
            chosen = torch.tensor([-1.0], requires_grad=True)
            other = torch.tensor([-1.0])
            scores = {"chosen_scores": torch.tensor([4.0]), "rejected_scores": torch.tensor([3.0])}
            pair = losses.PairLogps(chosen, other, ref_chosen_logps=other, ref_rejected_logps=other, **scores)
            loss(pair).loss.sum().backward()
            assert float(written) == pytest.approx(-chosen.grad.item(), abs=0.005), name


def text_of_fair_comparison():
    return (ROOT / "docs" / "fair-comparison.md").read_text("utf-8")


class TestLaunchFiles:
    @pytest.mark.parametrize("path", CONFIGS, ids=name_of)
    def test_accelerate_takes_them_as_its_first_line_says(self, path, monkeypatch):
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser

        monkeypatch.chdir(ROOT)
        command = shlex.split(path.read_text("utf-8").splitlines()[0].removeprefix("# "))
        assert command[:4] == ["accelerate", "launch", "--config_file", name_of(path)]
        assert command[-4:] == ["-m", "unidpo", "train", "RECIPE"]
        args, config, _ = _validate_launch_command(launch_command_parser().parse_args(command[2:]))
        assert (args.module, args.training_script, args.training_script_args) == (True, "unidpo", ["train", "RECIPE"])
        kinds = {"one_gpu": "NO", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
        assert config.distributed_type == kinds.get(path.stem, "MULTI_GPU")
        assert args.num_processes == {"one_gpu": 1, "two_nodes": 16}.get(path.stem, 8)
        assert args.mixed_precision == "no"  # the recipe's dtype decides

    def test_fsdp2_reaches_accelerate_as_version_2(self, monkeypatch):
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser
        from accelerate.utils import FullyShardedDataParallelPlugin
        from accelerate.utils.launch import prepare_multi_gpu_env

        command = ["--config_file", str(LAUNCH / "fsdp2.yaml"), "-m", "unidpo"]
        args, *_ = _validate_launch_command(launch_command_parser().parse_args(command))
        args.main_process_port = 0
        for key, value in prepare_multi_gpu_env(args).items():
            if key.startswith(("FSDP_", "ACCELERATE_")):
                monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert plugin.reshard_after_forward is True
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"
        assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
        assert not plugin.activation_checkpointing  # or a recipe with gradient_checkpointing would be refused

    @pytest.mark.parametrize("stage", [2, 3])
    @pytest.mark.filterwarnings("ignore")  # deepspeed's own
    def test_transformers_fills_in_what_the_json_leaves_open_and_deepspeed_takes_it(self, stage, tmp_path, monkeypatch):
        deepspeed = pytest.importorskip("deepspeed")
        from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, bf16=True, gradient_accumulation_steps=16, max_grad_norm=0.5
        )
        filled = HfTrainerDeepSpeedConfig(str(LAUNCH / f"zero{stage}.json"))
        filled.trainer_config_process(args)
        filled.trainer_config_finalize(args, SimpleNamespace(config=SimpleNamespace(hidden_size=64)), 100)
        config = filled.config
        assert "auto" not in str(config)
        assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (True, False)
        assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (16, 0.5)
        parsed = deepspeed.DeepSpeedConfig(config)
        assert parsed.zero_optimization_stage == stage
        assert parsed.zero_config.gather_16bit_weights_on_model_save == (stage == 3)

    def test_the_batch_script_is_bash(self):
        subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sbatch")], check=True)
        text = (LAUNCH / "slurm.sbatch").read_text()
        assert text.splitlines()[1] == "# sbatch recipes/launch/slurm.sbatch RECIPE [key=value ...]"
