"""Recipes: what they may hold, how overrides apply, and that everything wrong with one is said at once."""

import ast
import contextlib
import inspect
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from unidpo.config import Recipe, hf_arguments, load_recipe, recipe_from, schema
from unidpo.config.hf_arguments import OWNED_BY_RECIPE, TABLE
from unidpo.errors import RecipeError
from unidpo.losses import scored, unscored
from unidpo.run.training_arguments import training_arguments

ROOT = Path(__file__).parent.parent
MINIMAL = "output: runs/x\nmodel: {name: m}\ndata: {path: p.json}\n"


@pytest.fixture
def recipe_file(tmp_path):
    def write(text=MINIMAL, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return write


def problems(path, *overrides):
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    assert all(finding.message in str(error.value) for finding in error.value.findings[:20])
    return {finding.key: finding for finding in error.value.findings}


def test_every_key_explains_itself():
    sources = [inspect.getsource(module) for module in (schema, scored, unscored)]
    trees = [ast.parse(source) for source in sources]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    silent = [
        f"{body.name}.{statement.target.id}"
        for body in classes
        for statement, following in zip(body.body, [*body.body[1:], None], strict=True)
        if isinstance(statement, ast.AnnAssign)
        and "ClassVar" not in ast.unparse(statement.annotation)
        and statement.target.id not in ("name", "model", "data", "loss", "train")
        and not (isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant))
    ]
    assert silent == []


class TestHuggingFaceNames:
    def test_every_training_argument_is_a_key_or_explains_why_not(self):
        ours = {"compile", "global_batch_pairs", "max_tokens_per_pack"}
        assert set(schema.TrainSection.model_fields) - ours == TABLE["types"].keys() - OWNED_BY_RECIPE.keys()
        assert OWNED_BY_RECIPE.keys() <= TABLE["types"].keys()

    @pytest.mark.skipif(transformers.__version__ != TABLE["transformers"], reason="another version of transformers")
    def test_the_table_is_what_its_script_makes(self):
        script = runpy.run_path(str(ROOT / "scripts" / "make_training_arguments.py"))
        assert script["table"]() == TABLE
        assert script["TABLE"].samefile(Path(hf_arguments.__file__).with_name("hf_arguments.json"))

    def test_a_key_that_this_transformers_lacks_is_named(self, recipe_file, monkeypatch):
        class Older:
            def __init__(self, output_dir, bf16, fp16, disable_tqdm, logging_nan_inf_filter, report_to, **others):
                raise TypeError("got an unexpected keyword argument 'trackio_bucket_id'")

        monkeypatch.setattr("unidpo.run.training_arguments.TrainingArguments", Older)
        recipe = load_recipe(recipe_file(), ["train.trackio_bucket_id=b", "train.adam_beta2=0.9"])
        with pytest.raises(RecipeError, match=r"refuses train.trackio_bucket_id: got an unexpected"):
            training_arguments(recipe)

    def test_defaults_and_given_values_make_training_arguments(self, recipe_file, tmp_path):
        recipe = load_recipe(
            recipe_file(),
            ["train.eval_strategy=no", "train.adam_beta2=0.95", "train.optim=sgd", "train.lr_scheduler_kwargs={a: 1}"],
        )
        args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **recipe.train.training_arguments())
        assert (args.adam_beta2, args.optim, args.learning_rate, args.save_steps) == (0.95, "sgd", 1e-6, 100)
        assert args.eval_strategy == "no"
        assert args.lr_scheduler_kwargs == {"a": 1}

    def test_keys_left_alone_are_left_to_transformers(self, recipe_file):
        assert "adam_epsilon" not in load_recipe(recipe_file()).train.training_arguments()

    def test_words_are_checked(self, recipe_file):
        found = problems(
            recipe_file(), "train.lr_scheduler_type=cosin", "train.save_strategy=epochs", "train.optim=adamm"
        )
        assert "did you mean `cosine`?" in found["train.lr_scheduler_type"].message
        assert "did you mean `epoch`?" in found["train.save_strategy"].message
        assert "train.optim" in found

    @pytest.mark.parametrize("key", OWNED_BY_RECIPE)
    def test_keys_of_ours_are_refused_with_the_reason(self, recipe_file, key):
        assert OWNED_BY_RECIPE[key] in problems(recipe_file(), f"train.{key}=1")[f"train.{key}"].message


class TestOverrides:
    def test_last_wins(self, recipe_file):
        assert load_recipe(recipe_file(), ["train.seed=1", "train.seed=2"]).train.seed == 2

    def test_a_section_given_as_a_value_replaces_the_section(self, recipe_file):
        path = recipe_file(MINIMAL + "loss: {name: uni_dpo, tau_ref: 1.0}\n")
        assert load_recipe(path, ["loss={name: dpo, beta: 0.3}"]).loss.model_dump() == {
            "name": "dpo", "beta": 0.3, "label_smoothing": 0.0, "length_normalized": False,
        }  # fmt: skip

    def test_switching_the_loss_by_name_alone_says_how_to(self, recipe_file):
        path = recipe_file(MINIMAL + "loss: {name: uni_dpo, tau_ref: 1.0}\n")
        assert "loss={name: dpo}" in problems(path, "loss.name=dpo")["loss.tau_ref"].message

    def test_a_section_that_is_null_can_be_filled(self, recipe_file):
        assert load_recipe(recipe_file(MINIMAL + "lora: null\n"), ["lora.r=8"]).lora.r == 8

    def test_a_mistake_in_an_override_names_the_override(self, recipe_file):
        finding = problems(recipe_file(), "loss={name: uni_dpo}", "loss.beta=-1")["loss.beta"]
        assert finding.file == "override"
        assert "loss.beta=-1" in finding.message

    def test_a_later_good_override_mends_a_mistake_in_the_file(self, recipe_file):
        path = recipe_file(MINIMAL + "loss: {name: uni_dpo, beta: -1}\n")
        assert load_recipe(path, ["loss.beta=3"]).loss.beta == 3

    @pytest.mark.parametrize("override", ["beta", "=3", "a..b=1", ".a=1", "loss.beta.x=1", "model.name=[a", "x=${"])
    def test_what_is_no_override_is_refused_by_name(self, recipe_file, override):
        path = recipe_file(MINIMAL + "loss: {name: uni_dpo, beta: 1.0}\n")
        assert problems(path, override).keys() == {override}

    @given(st.text(max_size=30))
    def test_no_text_makes_anything_but_a_recipe_or_a_recipe_error(self, tmp_path_factory, text):
        path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
        path.write_text(MINIMAL, "utf-8")
        with contextlib.suppress(RecipeError):
            assert isinstance(load_recipe(path, [text]), Recipe)


class TestValues:
    @pytest.mark.parametrize(
        ("text", "value"), [("6e-6", 6e-6), ("6.0e-6", 6e-6), ("1E-5", 1e-5), ("1", 1.0), (".5", 0.5)]
    )
    def test_numbers_as_people_write_them(self, recipe_file, text, value):
        path = recipe_file(MINIMAL + f"train: {{learning_rate: {text}}}\n")
        assert load_recipe(path).train.learning_rate == value
        assert load_recipe(recipe_file(), [f"train.learning_rate={text}"]).train.learning_rate == value

    @pytest.mark.parametrize(
        "override",
        [
            "train.learning_rate=fast", "train.learning_rate='6e-6'", "train.seed=1.5", "train.max_steps=yes",
            "train.learning_rate=.nan", "train.warmup_steps=.inf", "data.shuffle=1", "data.max_length=0",
            "data.eval_fraction=1", "data.max_pixels=3", "model.dtype=float64", "model.attention=eager",
            "model.name=", "reference=", "output=", "lora.r=0", "lora.dropout=1", "eval=x", "train=3",
            "model.freeze=vision", "data.on_bad_row=drop", "train.global_batch_pairs=0",
        ],
    )  # fmt: skip
    def test_out_of_range_or_of_another_type(self, recipe_file, override):
        found = problems(recipe_file(), override)
        assert found.keys() == {override.partition("=")[0]}

    @pytest.mark.parametrize(
        ("loss", "key"),
        [
            ("{name: uni_dpo, beta: 0}", "beta"), ("{name: uni_dpo, perf_gamma: -1}", "perf_gamma"),
            ("{name: uni_dpo, nll_weight: -0.1}", "nll_weight"), ("{name: uni_dpo, quality_eta: -1}", "quality_eta"),
            ("{name: dpo, label_smoothing: 0.5}", "label_smoothing"), ("{name: simpo, gamma: -1}", "gamma"),
            ("{name: simpo, length_normalized: true}", "length_normalized"), ("{name: kto}", "name"), ("{}", "name"),
        ],
    )  # fmt: skip
    def test_hyper_parameters_have_ranges(self, recipe_file, loss, key):
        assert problems(recipe_file(MINIMAL + f"loss: {loss}\n")).keys() == {f"loss.{key}"}

    @pytest.mark.parametrize(
        ("text", "parts"), [("none", ()), ("[]", ()), ("[language]", ("language",)), ("[vision]", ("vision",))]
    )
    def test_freeze(self, recipe_file, text, parts):
        assert load_recipe(recipe_file(), [f"model.freeze={text}"]).model.freeze == parts

    def test_freezing_everything_needs_an_adapter(self, recipe_file):
        everything = "model.freeze=[vision,projector,language]"
        with pytest.raises(RecipeError, match="nothing would be trained"):
            load_recipe(recipe_file(), [everything])
        assert load_recipe(recipe_file(), [everything, "lora={r: 4}"]).lora.r == 4

    def test_one_way_to_say_the_batch(self, recipe_file):
        both = ["train.global_batch_pairs=8", "train.gradient_accumulation_steps=8"]
        with pytest.raises(RecipeError, match="not both"):
            load_recipe(recipe_file(), both)
        with pytest.raises(RecipeError, match="multiple"):
            load_recipe(recipe_file(), ["train.global_batch_pairs=8", "train.per_device_train_batch_size=3"])

    def test_environment(self, recipe_file, monkeypatch):
        path = recipe_file(MINIMAL.replace("p.json", "'${oc.env:DATA}/p.json'"))
        monkeypatch.setenv("DATA", "/data")
        assert load_recipe(path).data.path == "/data/p.json"
        monkeypatch.delenv("DATA")
        found = problems(path, "train.seed=x")
        assert "DATA" in found["data.path"].message
        assert found.keys() == {"data.path", "train.seed"}

    def test_immutable(self, recipe_file):
        recipe = load_recipe(recipe_file())
        with pytest.raises(ValueError, match="frozen"):
            recipe.train.seed = 3

    @given(
        learning_rate=st.floats(1e-12, 1.0), tau_good=st.floats(allow_nan=False, allow_infinity=False),
        name=st.text(st.characters(codec="utf-8", exclude_characters="$"), min_size=1),
    )  # fmt: skip
    def test_resolved_recipes_come_back_as_they_were(self, tmp_path_factory, learning_rate, tau_good, name):
        recipe = recipe_from(
            {
                "output": "runs/x",
                "model": {"name": name},
                "data": {"path": "p"},
                "loss": {"name": "uni_dpo", "tau_good": tau_good},
                "train": {"learning_rate": learning_rate},
                "lora": {"target_modules": ["q_proj", "1e3"]},
            }
        )
        assert recipe_from(recipe.resolved()) == recipe
        path = tmp_path_factory.getbasetemp() / "resolved.yaml"
        path.write_text(recipe.to_yaml(), "utf-8")
        again = load_recipe(path)
        assert math.isclose(again.train.learning_rate, learning_rate, rel_tol=0)
        assert again == recipe


class TestEverythingWrongAtOnce:
    def test_two_mistakes_are_both_shown_with_suggestions(self, recipe_file):
        path = recipe_file(
            MINIMAL.replace("{name: m}", "{name: m, dtpye: float32}")
            + "lss: {name: dpo}\ntrain: {learnig_rate: 1e-6}\n"
        )
        found = problems(path, "data.max_length=-1", "nothing")
        assert found.keys() == {"model.dtpye", "lss", "train.learnig_rate", "data.max_length", "nothing"}
        assert "did you mean `dtype`?" in found["model.dtpye"].message
        assert "did you mean `loss`?" in found["lss"].message
        assert "did you mean `learning_rate`?" in found["train.learnig_rate"].message
        assert found["model.dtpye"].file == str(path)

    def test_a_key_in_the_wrong_place_is_sent_to_the_right_one(self, recipe_file):
        found = problems(recipe_file(MINIMAL + "learning_rate: 1e-6\nbeta: 3\n"))
        assert "`train.learning_rate`" in found["learning_rate"].message
        assert "`loss.beta`" in found["beta"].message

    def test_what_must_be_there(self, recipe_file):
        assert problems(recipe_file("")).keys() == {"output", "model", "data"}
        assert problems(recipe_file(MINIMAL.replace("name: m", "name: '???'"))).keys() == {"model.name"}


class TestFiles:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("a: [b\nc: d", "line 2"), ("a: 1\na: 2\n", "duplicate"), ("- a\n", "mapping of sections"),
            ("a: !!python/object:os.system 3", "line 1"), ('a: "${b"', "not valid YAML"),
        ],
    )  # fmt: skip
    def test_broken_yaml_says_where(self, recipe_file, text, words):
        with pytest.raises(RecipeError, match=words) as error:
            load_recipe(recipe_file(text))
        assert "recipe.yaml" in str(error.value)

    def test_no_text(self, tmp_path):
        (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(RecipeError, match="UTF-8"):
            load_recipe(tmp_path / "r.yaml")

    def test_missing_file_suggests_a_neighbour(self, recipe_file, tmp_path):
        recipe_file(name="uni_dpo.yaml")
        with pytest.raises(RecipeError, match=r"did you mean `uni_dpo.yaml`"):
            load_recipe(tmp_path / "uni-dpo.yaml")
        with pytest.raises(RecipeError, match="folder"):
            load_recipe(tmp_path)


def test_imports_neither_torch_nor_transformers():
    code = "import sys, unidpo.config; print(sorted({'torch', 'transformers', 'datasets'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_override_of_the_loss_needs_no_loss_in_the_file(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output: out\nmodel: {name: m}\ndata: {path: p.json}\n")
    assert load_recipe(recipe, ["loss.beta=3"]).loss.beta == 3
    assert load_recipe(recipe, ["loss={name: dpo}"]).loss.name == "dpo"


def test_a_run_of_no_steps_is_refused(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output: out\nmodel: {name: m}\ndata: {path: p.json}\ntrain: {max_steps: 0}\n")
    with pytest.raises(RecipeError, match="max_steps"):
        load_recipe(recipe)
