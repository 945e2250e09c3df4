"""What is wrong with a recipe is said by `unidpo recipe check`: what, where, what to do; never in a traceback."""

import contextlib
import io
import json
import logging
import re
import shutil
import sys
from pathlib import Path

import pytest

from unidpo import cli
from unidpo.config import load_recipe
from unidpo.config.schema import TrainSection
from unidpo.errors import RecipeError
from unidpo.run_folder import folder as runs

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


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("x: " + "[" * 2000 + "]" * 2000, "is not valid YAML: maximum recursion depth"),
        ("x: " + "{a: " * 2000 + "1" + "}" * 2000, "is not valid YAML: maximum recursion depth"),
        ("x: &a [*a]", "recursive"),
        ("train: {seed: " + "9" * 6000 + "}", "Exceeds the limit"),
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
        ("a." * 3000 + "a=1", "an override is written section.key=value"),
        ("x=" + "[" * 2000 + "]" * 2000, "cannot be read: maximum recursion depth"),
        ("train.seed=" + "9" * 6000, "Exceeds the limit"),
        ("train.seed=!!timestamp x", "does not fit its tag"),
        ("data.path=\udc80", "cannot be read"),
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
            ("max_steps=-7", "greater than or equal to 1"), ("max_steps=0", "greater than or equal to 1"),
            ("seed=4294967296", "less than 4294967296"), ("seed=-1", "greater than or equal to 0"),
            ("data_seed=1e3", "a whole number"), ("adam_beta1=1", "less than 1"), ("adam_beta2=-0.1", "greater than"),
            ("adam_epsilon=-1", "greater than"), ("dataloader_num_workers=-1", "greater than or equal to 0"),
            ("dataloader_prefetch_factor=0", "greater than"), ("gradient_accumulation_steps=0", "greater than"),
            ("optim=adamw9", "one of 41 words, not 'adamw9'; the nearest are "),
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
        assert f"`train.{override.partition('=')[0]}" in said
        assert words in said

    def test_of_every_number_odd_values_are_refused_or_taken(self, tmp_path):
        from unidpo.run.training_arguments import training_arguments

        file = tmp_path / "r.yaml"
        file.write_text(MINIMAL.replace("runs/x", str(tmp_path)).replace("owner/m", "m, dtype: float32"))
        numbers = [
            name for name, field in TrainSection.model_fields.items() if re.search("int|float", str(field.annotation))
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


class TestNames:
    """What a recipe names is looked for: before torch is imported, and never on a hub where a folder is meant."""

    @pytest.fixture
    def world(self, tmp_path, golden):
        shutil.copytree(golden / "model", tmp_path / "models" / "tiny")
        (tmp_path / "runs" / "x" / "model").mkdir(parents=True)
        (tmp_path / "images").mkdir()
        (tmp_path / "broken.json").write_text("{")
        (tmp_path / "exam.yaml").write_text("{name: exam, file: exam.tsv, type: exact}")

    @pytest.mark.parametrize(
        ("override", "key", "words"),
        [
            ("model.name=./runs/x/modle", "model.name", "did you mean `model`?"),
            ("model.name=runs/y/model", "model.name", "nor 'runs/y'"),
            ("model.name=models/tny", "model.name", "did you mean `tiny`?"),
            ("model.name=models/qwen", "model.name", "in `models`, which is a folder here"),
            ("model.name=/data/model", "model.name", "no such folder: '/data/model'"),
            ("model.name=gpt2", "model.name", "a name of a hub has the form owner/name"),
            ("model.name=runs/x/model", "model.name", "holds no model"),
            ("model.name=p.json", "model.name", "holds no model"),
            ("reference=none", "reference", "no such folder: 'none'"), ("reference=", "reference", "empty"),
            ("reference=null", "reference", "must be text"), ("reference=~/gone", "reference", "no such folder"),
            ("data.path=q.json", "data.path", "did you mean `p.json`?"),
            ("data.path=./pairs", "data.path", "no such file: './pairs'"),
            ("data.path=[p.json, images/x.json]", "data.path[1].path", "no such file: 'images/x.json'"),
            ("data.images=image", "data.images", "did you mean `images`?"),
            ("data.template=chatlm.jinja", "data.template", "give a file, or one of chatml"),
            ("eval.benchmarks=[MME, exams.yaml]", "eval.benchmarks[1]", "did you mean `exam.yaml`?"),
            ("eval.benchmarks=[mme]", "eval.benchmarks[0]", "give a file, or one of paper, "),
            ("train.deepspeed=zero9.json", "train.deepspeed", "no such file: 'zero9.json'"),
            ("lora.rank=4", "lora.rank", "did you mean `r`?"),
            ("lora.lora_alpha=4", "lora.lora_alpha", "did you mean `alpha`?"),
            ("lr=1e-6", "lr", "did you mean `train.learning_rate`?"), ("output=", "output", "is empty"),
            ("model.torch_dtype=x", "model.torch_dtype", "did you mean `dtype`?"),
        ],
    )  # fmt: skip
    def test_one_that_is_wrong(self, check, world, override, key, words):
        code, said = check(MINIMAL, override)
        assert code == 2
        assert f"`{key}`: " in said
        assert words in said

    @pytest.mark.parametrize(
        "override",
        [
            "model.name=models/tiny", "model.name=Qwen/Qwen2-VL-2B-Instruct", "data.path=owner/set:config@train",
            "data.path=images", "reference=live", "lora.target_modules=[q_proj, visual.blocks.0.attn.qkv]",
            "lora.target_modules=.*q_proj", "lora.target_modules=all-linear", "eval.benchmarks=[paper]",
            "train.deepspeed={zero_optimization: {stage: 2}}", "data.template=chatml", "lora={}",
        ],
    )  # fmt: skip
    def test_those_that_are_right(self, check, world, override):
        assert check(MINIMAL, "model.name=models/tiny", override)[0] == 0

    def test_all_that_is_wrong_is_shown_at_once(self, check, world):
        text = (
            "output: o\nmodel: {nmae: x, dtype: float64}\ndata: {path: q.json}\ntrain: {seed: -1}\n"
            "loss: {name: uni_dpo, beta: -1, betta: 3}\neval: {benchmarks: [mme], stepps: 1}\n"
        )
        code, said = check(text, "lora.rank=3", "data.path=[{path: q.json, wieght: 1}]")
        assert code == 2
        found = {line.split("`")[1] for line in said.splitlines()[1:]}
        assert found == {
            "model.nmae", "model.name", "model.dtype", "loss.beta", "loss.betta", "eval.stepps", "train.seed",
            "lora.rank", "data.path[0].wieght",
        }  # fmt: skip

    def test_then_what_does_not_go_together_and_what_is_not_there(self, check, world):
        text = (
            "output: o\nmodel: {name: m/gone/x, freeze: [vision, projector, language]}\ndata: {path: q.json}\n"
            "eval: {benchmarks: [mme]}\nreference: none\n"
            "train: {global_batch_pairs: 3, per_device_train_batch_size: 2, gradient_accumulation_steps: 2}\n"
        )
        code, said = check(text, "data.images=gone")
        assert code == 2
        found = {line.split("`")[1] for line in said.splitlines()[1:]}
        assert found == {
            "model.name", "model.freeze", "data.path", "data.images", "eval.benchmarks[0]", "reference",
            "train.gradient_accumulation_steps",
        }  # fmt: skip

    @pytest.mark.parametrize("name", ["./runs/x/modle", "runs/y/model", "models/qwen", "gpt2"])
    def test_no_request_for_a_folder_that_was_mistyped(self, command, check, world, monkeypatch, name):
        def request(*_, **__):
            raise AssertionError("a hub was asked")

        monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", request)
        monkeypatch.setattr("transformers.AutoConfig.from_pretrained", request)
        code, said = command("data", "check", "p.json", "--model", name)
        assert code == 2
        assert "no such f" in said

    def test_names_written_out_are_those_of_their_modules(self):
        from unidpo.config import named
        from unidpo.model.encode import TEMPLATES

        assert set(named.TEMPLATES) == set(TEMPLATES)

    def test_foreign_names_lead_to_keys_of_ours(self):
        from unidpo.config.explaining import FOREIGN, dotted_keys

        assert set(FOREIGN.values()) <= {*dotted_keys(), "lora", "output", "reference"}
        ours = {key.rpartition(".")[2] for key in dotted_keys()} - {"batch_size"}  # of `eval`, not of `train`
        assert not FOREIGN.keys() & ours


def test_what_transformers_says_of_a_file_gives_no_orders_to_the_terminal():
    import transformers

    from unidpo.run.logs import log_to
    from unidpo.terminal import Terminal

    before = logging.getLogger("transformers").handlers
    try:
        log_to(Terminal(file=(said := io.StringIO())))
        transformers.logging.get_logger("transformers.models").error("unknown token \x1b]0;title")
        logging.getLogger("unidpo").warning("row \x1b[2J")
    finally:
        logging.getLogger("transformers").handlers = before
    assert said.getvalue().splitlines() == ["unknown token \\x1b]0;title", "row \\x1b[2J"]
