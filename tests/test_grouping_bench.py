"""The measurement of `data.group_by_prompt`: both ways train on the same pairs, and the docs say what was found."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import pytest

from unidpo.run_folder.folder import RunFolder

PROMPTS = 12


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIDPO_CACHE", "")  # the script sets it
        yield patch


@pytest.fixture(scope="module")
def bench(patched) -> ModuleType:
    return importlib.import_module("benchmarks.grouping")


@pytest.fixture(scope="module")
def folder(bench, tmp_path_factory) -> Path:
    """A small seed's data and trained arms."""
    folder = tmp_path_factory.mktemp("grouping") / "seed-0"
    bench.make_data(folder, 0, prompts=PROMPTS)
    for arm, override in bench.ARMS.items():
        bench.train(folder, arm, 0, override)
    return folder


def visits(folder: Path, arm: str) -> list[tuple[Any, ...]]:
    columns = ["row", "chosen_score", "rejected_score", "ref_chosen_logps", "ref_rejected_logps"]
    return sorted(
        tuple(visit.values()) for visit in pq.read_table(folder / arm / "pairs.parquet", columns=columns).to_pylist()
    )


def test_both_ways_train_once_on_every_pair_in_equally_many_steps(bench, folder) -> None:
    apart, grouped = (visits(folder, arm) for arm in bench.ARMS)
    rows = (folder / "pairs.jsonl").read_text().splitlines()
    assert [visit[0] for visit in apart] == list(range(1, len(rows) + 1))
    assert [visit[:3] for visit in grouped] == [visit[:3] for visit in apart]
    for one, other in zip(apart, grouped, strict=True):
        assert one[3:] == pytest.approx(other[3:], rel=1e-4)
    steps = {arm: len(bench.norms(RunFolder(folder / arm))) for arm in bench.ARMS}
    assert steps == dict.fromkeys(bench.ARMS, -(-len(rows) // 32))


def test_only_grouping_keeps_a_prompt_in_one_step_or_two_that_follow(bench, folder) -> None:
    apart, grouped = (bench.prompts_of_steps(folder / "pairs.jsonl", RunFolder(folder / arm)) for arm in bench.ARMS)
    assert len(set.union(*apart)) == len(set.union(*grouped)) == PROMPTS
    assert sum(map(len, grouped)) <= PROMPTS + len(grouped) - 1 < sum(map(len, apart))


def test_what_is_finished_is_not_done_again(bench, tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(bench, "make_data", lambda folder, seed: (folder / "pairs.jsonl").touch())
    monkeypatch.setattr(bench, "measure_base", lambda folder, seed: {"accuracy": 0.5})
    monkeypatch.setattr(bench, "measure_arm", lambda folder, seed, arm: asked.append(arm) or {"accuracy": 0.75})
    (tmp_path / "seed-3").mkdir()
    (tmp_path / "seed-3" / "apart.json").write_text('{"accuracy": 0.25}')
    expected = [{"seed": 3, "base": {"accuracy": 0.5}, "apart": {"accuracy": 0.25}, "grouped": {"accuracy": 0.75}}]
    assert bench.measure(tmp_path, [3]) == expected == bench.measure(tmp_path, [3])
    assert asked == ["grouped"]


def test_the_summary_is_of_differences_within_a_seed(bench) -> None:
    def seed(apart: float, grouped: float) -> dict[str, Any]:
        arms = {"apart": (apart, 8.0), "grouped": (grouped, 12.0)}
        known = {"prompts_per_step": 8.0, "cpu_seconds": 2.0}
        return {"base": {"accuracy": 0.5, "gradient_norm": 2.0}} | {
            arm: {"accuracy": value, "mean_squared_gradient_norm": square} | known
            for arm, (value, square) in arms.items()
        }

    found = bench.summary([seed(0.8, 0.7), seed(0.6, 0.56), seed(0.7, 0.69)])
    assert found["difference"] == pytest.approx({"mean": -0.05, "standard_error": 0.0264575})  # of -0.1, -0.04, -0.01
    assert found["arms"]["apart"]["standard_deviation"] == pytest.approx(0.1)
    assert [arm["gradient_noise"] for arm in found["arms"].values()] == pytest.approx([1.0, 2.0])


def test_the_page_says_what_was_measured(bench) -> None:
    text = bench.DOCUMENT.read_text("utf-8")
    record = json.loads((bench.RESULTS / "grouping.json").read_text("utf-8"))[-1]
    assert bench.MEASURED.search(text)[0] == bench.report(record) + "\n"


def test_what_the_page_concludes_is_in_the_record(bench) -> None:
    record = json.loads((bench.RESULTS / "grouping.json").read_text("utf-8"))[-1]
    assert len(record["seeds"]) >= 5
    assert bench.summary(record["seeds"]).items() <= record.items()
    difference, arms = record["difference"], record["arms"]
    assert abs(difference["mean"]) < 2 * difference["standard_error"]
    assert difference["mean"] - 2 * difference["standard_error"] > -0.02
    assert min(arm["accuracy"] for arm in arms.values()) - record["base_accuracy"] > 0.2
    assert arms["grouped"]["cpu_seconds"] < arms["apart"]["cpu_seconds"] / 2
    prompts, noise = (arms["grouped"][key] / arms["apart"][key] for key in ("prompts_per_step", "gradient_noise"))
    assert 1.5 < noise < 0.6 / prompts
