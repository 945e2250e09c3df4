"""What is wrong with a recipe is said by `unidpo recipe check`: what, where, what to do; never in a traceback."""

import json
import sys

import pytest

from unidpo import cli, runs
from unidpo.config import load_recipe

MINIMAL = "output: runs/x\nmodel: {name: owner/m}\ndata: {path: p.json}\n"


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """`unidpo recipe check` of a recipe's text with overrides; returns the exit code and all that was said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.json").write_text("[]")

    def run(text, *overrides, command="check"):
        (tmp_path / "recipe.yaml").write_text(text, "utf-8")
        monkeypatch.setattr(sys, "argv", ["unidpo", "recipe", command, "recipe.yaml", *overrides])
        with pytest.raises(SystemExit) as done:
            cli.main()
        said = "".join(capsys.readouterr())
        assert "Traceback" not in said
        assert said.isprintable() or all(line.isprintable() for line in said.splitlines())
        return done.value.code or 0, said

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
