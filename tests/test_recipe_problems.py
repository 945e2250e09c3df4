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
            ("max_steps=-7", "greater than or equal to 1"), ("max_steps=0", "greater than or equal to 1"),
            ("seed=4294967296", "less than 4294967296"), ("seed=-1", "greater than or equal to 0"),
            ("data_seed=1e3", "a whole number"), ("adam_beta1=1", "less than 1"), ("adam_beta2=-0.1", "greater than"),
            ("adam_epsilon=-1", "greater than"), ("dataloader_num_workers=-1", "greater than or equal to 0"),
            ("dataloader_prefetch_factor=0", "greater than"), ("gradient_accumulation_steps=0", "greater than"),
            ("optim=adamw9", "the nearest are adamw_"),
            ("report_to=foo", "'none', 'all',"), ("report_to=[wandb, tensorbord]", "did you mean `tensorboard`?"),
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
            ("model.name=p.json", "model.name", "is a file"),
            ("reference=none", "reference", "`simpo` needs none"), ("reference=", "reference", "empty"),
            ("reference=null", "reference", "`simpo` needs none"), ("reference=~/gone", "reference", "no such folder"),
            ("data.path=q.json", "data.path", "did you mean `p.json`?"),
            ("data.path=./pairs", "data.path", "no such file: './pairs'"),
            ("data.path=[p.json, images/x.json]", "data.path[1].path", "no such file: 'images/x.json'"),
            ("data.images=image", "data.images", "did you mean `images`?"),
            ("data.template=chatlm.jinja", "data.template", "give chatml or a Jinja file"),
            ("eval.benchmarks=[MME, exams.yaml]", "eval.benchmarks[1]", "did you mean `exam.yaml`?"),
            ("eval.benchmarks=[exam.yaml]", "eval.benchmarks[0]", "'exam.tsv', which are not there"),
            ("eval.benchmarks=[mme]", "eval.benchmarks[0]", "there is no benchmark 'mme'"),
            ("train.deepspeed=zero9.json", "train.deepspeed", "no such file: 'zero9.json'"),
            ("train.fsdp_config=broken.json", "train.fsdp_config", "not valid JSON"),
            ("lora.target_modules=[q_porj]", "lora.target_modules[0]", "did you mean `q_proj`?"),
            ("lora.target_modules=q_proj,v_proj", "lora.target_modules", "as a list it is [q_proj, v_proj]"),
            ("lora.target_modules='(q_proj'", "lora.target_modules", "not a regular expression"),
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

    def test_layers_of_a_model_here_are_read_from_its_files(self, check, world):
        code, said = check(MINIMAL, "model.name=models/tiny", "lora.target_modules=[c_attn, q_proj, gate_pro]")
        assert code == 2
        assert "'models/tiny' has no layer 'c_attn'; it has " in said
        assert "`lora.target_modules[2]`: 'models/tiny' has no layer 'gate_pro'; did you mean `gate_proj`?" in said

    def test_all_that_is_wrong_is_shown_at_once(self, check, world):
        text = (
            "output: o\nmodel: {nmae: x, freeze: [vision, projector, language], dtype: float64}\ndata: {path: q.json}\n"
            "loss: {name: uni_dpo, beta: -1, betta: 3}\neval: {benchmarks: [mme], stepps: 1}\nreference: none\n"
            "train: {seed: -1, global_batch_pairs: 3, per_device_train_batch_size: 2, gradient_accumulation_steps: 2}\n"
        )
        code, said = check(text, "lora.rank=3", "lora=null", "data.images=gone")
        assert code == 2
        found = [line.split("`")[1] for line in said.splitlines()[1:]]
        assert sorted(found) == sorted(
            [
                "model.nmae", "model.name", "model.dtype", "model.freeze", "data.path", "loss.beta", "loss.betta",
                "eval.benchmarks[0]", "eval.stepps", "reference", "train.seed", "train.gradient_accumulation_steps",
                "train.global_batch_pairs", "data.images",
            ]
        )  # fmt: skip

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
        from unidpo.evaluate.vlmeval import PAPER
        from unidpo.model.encode import TEMPLATES

        assert set(named.BENCHMARKS) == {"paper", *PAPER}
        assert set(named.TEMPLATES) == set(TEMPLATES)

    def test_foreign_names_lead_to_keys_of_ours(self):
        from unidpo.config.explaining import FOREIGN, _dotted_keys

        assert set(FOREIGN.values()) <= {*_dotted_keys(), "output", "reference"}
        ours = {key.rpartition(".")[2] for key in _dotted_keys()} - {"batch_size"}  # of `eval`, not of `train`
        assert not FOREIGN.keys() & ours


def test_what_transformers_says_of_a_file_gives_no_orders_to_the_terminal():
    import transformers

    from unidpo.run.train import _log_to
    from unidpo.terminal import Terminal

    before = logging.getLogger("transformers").handlers
    try:
        _log_to(Terminal(file=(said := io.StringIO())))
        transformers.logging.get_logger("transformers.models").error("unknown token \x1b]0;title")
        logging.getLogger("unidpo").warning("row \x1b[2J")
    finally:
        logging.getLogger("transformers").handlers = before
    assert said.getvalue().splitlines() == ["unknown token \\x1b]0;title", "row \\x1b[2J"]
