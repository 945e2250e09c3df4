"""What is wrong with a recipe is said by `unidpo recipe check`: what, where, what to do; never in a traceback."""

import contextlib
import json
import shutil
import sys
import typing
from pathlib import Path

import pytest

from unidpo import cli, runs
from unidpo.config import load_recipe
from unidpo.config.schema import TrainSection
from unidpo.errors import RecipeError

MINIMAL = "output: runs/x\nmodel: {name: owner/m}\ndata: {path: p.json}\n"


ROOT = Path(__file__).parent.parent


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process; returns the exit code and all that was said."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["unidpo", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        said = "".join(capsys.readouterr())
        assert "Traceback" not in said
        assert all(line.isprintable() for line in said.splitlines())
        return done.value.code or 0, said

    return run


@pytest.fixture
def check(tmp_path, monkeypatch, command):
    """`unidpo recipe check` of a recipe's text with overrides; returns the exit code and all that was said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.json").write_text("[]")

    def run(text, *overrides):
        (tmp_path / "recipe.yaml").write_text(text, "utf-8")
        return command("recipe", "check", "recipe.yaml", *overrides)

    return run


def aliases(levels, width=10):
    lines = ["a0: &a0 [" + "x," * width + "]"]
    return "\n".join([*lines, *(f"a{i}: &a{i} [" + f"*a{i - 1}," * width + "]" for i in range(1, levels))]) + "\n"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("x: " + "[" * 2000 + "]" * 2000, "line 4: lists or mappings in one another"),
        ("x: " + "{a: " * 2000 + "1" + "}" * 2000, "line 4: lists or mappings in one another"),
        ("\n" * 1_000_001, "longer than 1,000,000 characters"),
        ("".join(f"k{i}: 1\n" for i in range(20_000)), "more than 10,000 values"),
        (aliases(9), "more than 10,000 values, aliases written out"),
        ("x: &a [*a]", "recursive"),
        ("train: {seed: " + "9" * 6000 + "}", "line 4: a number of 6,000 digits"),
        ("train: {learning_rate: " + "9" * 350 + "}", "`train.learning_rate`: must be"),
        ("train: {learning_rate: 1e999}", "`train.learning_rate`: must be a finite number"),
        ("x: !!int foo", "does not fit its tag"),
        ("x: !!timestamp foo", "does not fit its tag"),
        ("x: {a: '${y}'}\ny: {b: '${x}'}", "leads back to itself"),
        ("x: ${y}\ny: ${x}", "Recursive interpolation"),
        ('"\\e[2J": 4', "`\\x1b[2J`: is not a key"),
    ],
)
def test_texts_that_are_no_recipe(check, more, words):
    code, said = check(f"{MINIMAL}{more}\n")
    assert code == 2
    assert words in said


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("a." * 3000 + "a=1", "a key has at most 32 parts"),
        ("x=" + "[" * 2000 + "]" * 2000, "lists or mappings in one another"),
        ("train.seed=" + "9" * 6000, "a number of 6,000 digits"),
        ("train.seed=!!timestamp x", "does not fit its tag"),
        ("data.path=\udc80", "not UTF-8 text"),
        ("\x1b]0;red=1", "\\x1b]0;red"),
    ],
)
def test_overrides_that_are_none(check, override, words):
    code, said = check(MINIMAL, override)
    assert code == 2
    assert words in said


class TestSecrets:
    TOKEN = "hf_" + "aB3" * 11

    @pytest.mark.parametrize(
        "override",
        [
            "train.run_name=${oc.env:MY_SECRET}", "output=runs/${oc.env:MY_SECRET}", "model.name=${oc.env:HF_TOKEN}",
            "train.run_name=${oc.env:PLAIN}", "output=${oc.env:${data.template}}", "train.project=${oc.env:PLAIN,x}",
            f"train.run_name={TOKEN}", f"data.path=https://me:{TOKEN}@host/p.json", "loss.name=${oc.env:PLAIN}",
            "data.path=[{path: '${oc.env:API_KEY}'}]",
        ],
    )  # fmt: skip
    def test_are_refused_and_not_repeated(self, check, monkeypatch, override):
        for name in ("MY_SECRET", "HF_TOKEN", "PLAIN", "API_KEY"):
            monkeypatch.setenv(name, "s3cr3t-value")
        code, said = check(MINIMAL, override)
        assert code == 2
        assert f"`{override.partition('=')[0]}" in said
        assert "s3cr3t-value" not in said
        assert self.TOKEN not in said

    def test_the_environment_says_where_things_are(self, check, monkeypatch):
        monkeypatch.setenv("DATA", ".")
        assert check(MINIMAL, "data.path=${oc.env:DATA}/p.json", "output=${oc.env:DATA}/out")[0] == 0

    def test_the_command_line_is_recorded_without_them(self, monkeypatch, tmp_path):
        words = ["unidpo", "train", "r.yaml", f"a={self.TOKEN}", "train.hub_token=abc", "output=o", "https://u:p@h/x"]
        monkeypatch.setattr(sys, "argv", words)
        folder = runs.RunFolder(tmp_path / "run")
        folder.create({"output": "o"})
        recorded = json.loads(folder.environment.read_text())["starts"][0]["command"]
        assert recorded == ["unidpo", "train", "r.yaml", "a=***", "train.hub_token=***", "output=o", "https://***@h/x"]


def test_the_environment_in_a_path_is_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL.replace("p.json", "'${oc.env:DATA}/p.json'"))
    assert load_recipe(path).data.path == "/data/p.json"


class TestTrainSection:
    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("max_steps=-7", "a number of steps from 1"), ("max_steps=0", "a number of steps from 1"),
            ("seed=4294967296", "less than 4294967296"), ("seed=-1", "greater than or equal to 0"),
            ("data_seed=1e3", "a whole number"), ("adam_beta1=1", "less than 1"), ("adam_beta2=-0.1", "greater than"),
            ("adam_epsilon=-1", "greater than"), ("dataloader_num_workers=-1", "greater than or equal to 0"),
            ("dataloader_prefetch_factor=0", "greater than"), ("gradient_accumulation_steps=0", "greater than"),
            ("optim=adamw9", "the nearest are adamw_"), ("optim_args=foo", "such as `a=1,b=2`"),
            ("report_to=foo", "one of none, all,"), ("report_to=[wandb, tensorbord]", "did you mean `tensorboard`?"),
            ("log_level=warn", "did you mean"), ("eval_steps=-1", "greater than 0"),
            ("push_to_hub=true", "--push-to-hub"),
            ("activation_checkpointing_kwargs={reentrant: true}", "use_reentrant"),
            ("gradient_checkpointing_kwargs=x", "must be a mapping"), ("parallelism_config=3", "not supported"),
        ],
    )  # fmt: skip
    def test_values_are_held_to_what_torch_and_transformers_take(self, check, override, words):
        code, said = check(MINIMAL, f"train.{override}")
        assert code == 2
        assert f"`train.{override.partition('=')[0]}`: " in said
        assert words in said

    def test_of_every_number_odd_values_are_refused_or_taken(self, tmp_path):
        from unidpo.training_arguments import training_arguments

        file = tmp_path / "r.yaml"
        file.write_text(MINIMAL.replace("runs/x", str(tmp_path)).replace("owner/m", "m, dtype: float32"))
        numbers = [
            name
            for name, field in TrainSection.model_fields.items()
            if {int, float} & {field.annotation, *typing.get_args(field.annotation)}
        ]
        assert len(numbers) >= 20
        taken = set()
        for name in numbers:
            for value in ("-1", "0", "1", ".nan", ".inf", "1e999", "x", "1" + "0" * 30):
                with contextlib.suppress(RecipeError):
                    training_arguments(load_recipe(file, [f"train.{name}={value}"]))
                    taken.add((name, value))
        assert {value for _, value in taken} <= {"-1", "0", "1", "1" + "0" * 30}
        assert ("max_steps", "-1") in taken
        assert ("learning_rate", "0") in taken

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["lr_scheduler_kwargs={a: 1}"], "train.lr_scheduler_kwargs"),
            (["lr_scheduler_type=cosine_with_min_lr"], "min_lr"),
            (["optim=sgd", "optim_args=momentum=x"], "train.optim, train.optim_args"),
            (["deepspeed={a: 1}"], "train.deepspeed"),
            (["ddp_backend=foo"], "train.ddp_backend"),
            (["torch_compile=true", "torch_compile_backend=x"], "train.torch_compile_backend"),
            (["fsdp=true"], "add `--nproc N`"),
            (["accelerator_config={a: 1}"], "train.accelerator_config"),
            (["debug=x"], "train.debug"),
        ],
    )
    def test_what_only_transformers_knows_is_said_before_the_data_is_read(
        self, command, monkeypatch, tmp_path, overrides, words
    ):
        monkeypatch.chdir(ROOT)
        keys = [f"train.{override}" for override in overrides]
        code, said = command("train", "recipes/tiny.yaml", f"output={tmp_path / 'run'}", *keys)
        assert code == 2
        assert words in said
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", None, b"{"), ("config.json", None, b"[" * 100_000), ("config.json", "vision_config", 3),
        ("preprocessor_config.json", None, b"\xff\xfe"), ("preprocessor_config.json", "patch_size", "x"),
        ("preprocessor_config.json", "min_pixels", 1e308), ("preprocessor_config.json", "size", []),
        ("tokenizer.json", None, b"{}"), ("tokenizer_config.json", "model_max_length", "x"),
        ("tokenizer_config.json", "chat_template", "{{ 1/0 }}"), ("tokenizer_config.json", "chat_template", "{{ a( }}"),
        ("tokenizer_config.json", "chat_template", "{{ raise_exception('\x1b[31mred') }}"),
    ],
)  # fmt: skip
def test_a_broken_file_of_a_model_folder(command, tmp_path, golden, file, key, value):
    model = tmp_path / "model"
    shutil.copytree(golden / "model", model)
    (model / "chat_template.json").unlink()
    if key is None:
        (model / file).write_bytes(value)
    else:
        (model / file).write_text(json.dumps({**json.loads((model / file).read_text()), key: value}))
    code, said = command("data", "check", golden / "data" / "golden48.json", "--model", model)
    assert code == 2
    assert "cannot" in said
