"""`unidpo data ...` from outside: what the commands write, print and exit with."""

import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from unidpo import cli
from unidpo.cli.data import LAYOUT
from unidpo.data.download import FetchError
from unidpo.data.formats import LAYOUTS, read_groups
from unidpo.errors import DataError


def unidpo(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in ("data", *arguments)])


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two rows in the authors' layout (alpaca) whose images lay elsewhere when it was written."""
    (tmp_path / "here" / "train").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / "here" / "train" / name)
    rows = [
        {
            "instruction": "<image>What is this?",
            "chosen": "A square.",
            "rejected": "A circle.",
            "score_chosen": 4.5,
            "score_rejected": 2,
            "images": [f"/data/there/train/{name}"],
            "note": name,
        }
        for name in ("a.png", "b.png")
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    return path


def test_the_layouts_offered_are_those_there_are():
    assert set(LAYOUT.split("|")) == set(LAYOUTS)


def test_relocate_then_check(pairs, tmp_path):
    assert unidpo("check", pairs).exit_code == 2  # the images are not where it says
    moved = tmp_path / "moved.json"
    done = unidpo("relocate", pairs, "--images", tmp_path / "here", "--to", moved)
    assert done.exit_code == 0
    assert "found 2 of 2 image paths" in done.output
    assert [row["images"] for row in json.loads(moved.read_text())] == [["here/train/a.png"], ["here/train/b.png"]]
    assert unidpo("check", moved).exit_code == 0


def test_relocate_lists_what_it_did_not_find(pairs, tmp_path):
    (tmp_path / "here" / "train" / "b.png").unlink()
    done = unidpo("relocate", pairs, "--images", tmp_path / "here", "--in-place")
    assert "found 1 of 2 image paths" in done.output
    assert "row 2" in done.output
    assert "/data/there/train/b.png" in done.output
    assert json.loads(pairs.read_text())[1]["images"] == ["/data/there/train/b.png"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_convert_there_and_back(pairs, tmp_path, layout, suffix):
    there, back = tmp_path / f"there{suffix}", tmp_path / "back.json"
    first = unidpo("convert", pairs, "--to", there, "--layout", layout)
    assert first.exit_code == 0, first.output
    assert f"2 rows with 2 pairs in layout {layout}" in first.output
    second = unidpo("convert", there, "--from", layout, "--to", back, "--layout", "alpaca")
    assert second.exit_code == 0, second.output
    assert json.loads(back.read_text()) == json.loads(pairs.read_text())


def test_convert_names_what_it_leaves_out(pairs, tmp_path):
    rows = json.loads(pairs.read_text())
    rows[1]["chosen"] = ""
    pairs.write_text(json.dumps(rows))
    target = tmp_path / "new.jsonl"
    assert isinstance(unidpo("convert", pairs, "--to", target).exception, DataError)
    assert not target.exists()
    done = unidpo("convert", pairs, "--to", target, "--skip-bad-rows", "--drop-extra")
    assert done.exit_code == 0
    assert "left out" in done.output
    assert "row 2" in done.output
    assert "dropped column note" in done.output
    assert len(read_groups(target).groups) == 1


def test_check_against_a_model(golden, tmp_path):
    done = unidpo("check", golden / "data" / "golden48.json", "--model", golden / "model", "--max-length", 60, "--json")
    found = json.loads(done.stdout)
    kinds = {finding["kind"] for finding in found["findings"]}
    assert {"prompt-too-long", "response-cut", "tied-scores", "reversed-scores"} <= kinds
    assert found["epoch_tokens"]["estimated"] is False
    assert done.exit_code == 0  # all of them are warnings


def test_check_without_looking_at_images(pairs):
    assert unidpo("check", pairs, "--no-scan-images").exit_code == 0


def test_scores_of_mm_rlhf(tmp_path):
    row = {
        "id": "long_1",
        "question": "What is this?",
        "image": "long/1.png",
        "models_output": ["right", "half right", "wrong"],
        "helpfulness": [5, 3, 1],
        "faithfulness": [5, 4, 1],
        "ethical": [5, 5, 5],
        "final_ranking": [1, 2, 3],
    }
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    target = tmp_path / "scored.jsonl"
    done = unidpo("from-mm-rlhf", tmp_path, "--to", target, "--score", "helpfulness=1")
    assert done.exit_code == 0, done.output
    (group,) = read_groups(target).groups
    assert [response.score for response in group.responses] == [5, 3, 1]
    assert len(group.pairs) == 3
    again = unidpo("from-mm-rlhf", tmp_path, "--to", target)
    assert isinstance(again.exception, DataError)  # never over what is there, unless told to
    assert unidpo("from-mm-rlhf", tmp_path, "--to", target, "--force").exit_code == 0


def test_a_hub_that_cannot_be_reached_is_no_wrong_input(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    done = unidpo("fetch", "uni-dpo", "--to", tmp_path / "data", "--endpoint", "http://127.0.0.1:9")
    assert isinstance(done.exception, FetchError)
    assert done.exception.exit_code == 1
    assert "cannot be reached" in str(done.exception)


class TestScalesOfScores:
    """The values that are proposed are put to the check again, which then is silent."""

    @staticmethod
    def checked(folder: Path, scores: list[tuple[float, float]]) -> str:
        rows = [
            {"prompt": f"{i}?", "chosen": "yes", "rejected": "no", "score_chosen": high, "score_rejected": low}
            for i, (high, low) in enumerate(scores)
        ]
        (folder / "scored.json").write_text(json.dumps(rows), "utf-8")
        done = unidpo("check", folder / "scored.json")
        assert done.exit_code == 0
        return " ".join(done.stdout.split())

    def test_between_0_and_1_no_score_reaches_tau_good(self, tmp_path):
        said = self.checked(tmp_path, [(0.9, 0.1), (0.7, 0.2), (0.8, 0.3)])
        assert "tau_good 2.5 (the default of uni_dpo), the largest is 0.9" in said
        assert "`loss.tau_good=0.8`" in said
        assert "saturated-weights" not in said

    def test_between_0_and_100_the_weights_saturate(self, tmp_path):
        scores = [(90.0, 10.0), (70.0, 30.0), (80.0, 50.0), (65.0, 64.0)]
        said = self.checked(tmp_path, scores)
        assert "quality_eta 0.7 (the default of uni_dpo) 3 of 4 pairs" in said
        assert "unreached-tau-good" not in said
        [eta] = re.findall(r"loss.quality_eta=([\d.]+)", said)
        assert 1 / (1 + math.exp(-float(eta) * 35)) == pytest.approx(0.8, abs=0.01)  # 35 is the median margin

    @pytest.mark.parametrize(
        "scores", [[(4.5, 2.0), (2.0, 1.0)], [(90.0, 10.0), (66.0, 65.0), (52.0, 51.0)], [(3.0, 3.0)]]
    )
    def test_on_a_scale_that_fits_nothing_is_said(self, tmp_path, scores):
        said = self.checked(tmp_path, scores)
        assert "tau_good " not in said.replace("try as tau_good", "")
        assert "saturated-weights" not in said

    def test_training_takes_the_values_of_the_recipe(self, tmp_path, capsys):
        from unidpo.config import recipe_from
        from unidpo.progress import Stages
        from unidpo.run.data import training_data
        from unidpo.terminal import Terminal

        self.checked(tmp_path, [(90.0, 10.0), (70.0, 30.0)])
        values = {"output": "o", "model": {"name": "m"}, "data": {"path": str(tmp_path / "scored.json")}}
        for more, expected in (
            ({"tau_good": 95.0, "quality_eta": 0.02}, {"unreached-tau-good"}),
            ({"tau_good": 95.0, "nll_weight": 0.0}, {"saturated-weights"}),
            ({"tau_good": 80.0, "quality_eta": 0.02}, set()),
        ):
            recipe = recipe_from({**values, "loss": {"name": "uni_dpo", **more}})
            training_data(recipe, Stages(Terminal()))
            said = capsys.readouterr().out
            assert {kind for kind in ("unreached-tau-good", "saturated-weights") if kind in said} == expected
            assert "(of the recipe)" in said or not expected

    def test_the_defaults_are_those_of_recipes(self):
        from unidpo.data.check.scores import DEFAULTS
        from unidpo.losses import UniDPO

        loss = UniDPO()
        assert (DEFAULTS.quality_eta, DEFAULTS.tau_good) == (loss.quality_eta, loss.tau_good)


def test_convert_says_which_images_it_did_not_find(pairs, tmp_path):
    done = unidpo("convert", pairs, "--to", tmp_path / "new.jsonl")
    assert done.exit_code == 0
    assert "2 of 2 images were not found, such as /data/there/train/a.png (row 1)" in done.stderr
    assert "give --images FOLDER" in done.stderr
    assert "unidpo data relocate" in done.stderr
    assert unidpo("relocate", pairs, "--images", tmp_path / "here", "--to", tmp_path / "found.json").exit_code == 0
    assert "not found" not in unidpo("convert", tmp_path / "found.json", "--to", tmp_path / "new.jsonl").stderr
