"""The page of a run: whole, safe whatever the data holds, and right about what the run taught."""

import base64
import hashlib
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reports import ROW, Page, drawn, make_run, trained
from test_train import unidpo, write_recipe
from unidpo.errors import RunError
from unidpo.evaluate.benchmarks import Judged, Score
from unidpo.evaluate.comparing import Difference
from unidpo.evaluate.results import BenchmarkResult, ModelResult, write_benchmark_result, write_model_result
from unidpo.files.locks import locked
from unidpo.report import MOST_RUNS, texts
from unidpo.report.charts import smoothed
from unidpo.report.page import embedded
from unidpo.report.pairs import OUTCOMES, pairs_of
from unidpo.report.reading import read_run
from unidpo.run_folder.inputs import data_file

FLOOR = Path(texts.__file__).parent
WORDS = json.loads((FLOOR / "words.json").read_text("utf-8"))
HOSTILE = "</script><img src=x onerror=alert(1)><!-- <script> ]]> \u2028 \u202egnp.exe"


# --- one file ---------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_runs_its_own_script_alone(tmp_path):
    page = drawn(make_run(tmp_path / "run", **trained()))
    for name, attributes in page.tags:
        for key in ("src", "href", "action", "srcset", "data"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/")), (name, attributes)
        assert not [key for key in attributes if key.startswith("on") or key == "style"], (name, attributes)
    (script,), (style,) = page.scripts, page.styles
    policy = page.policy()
    for kind, text in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", script + style), "nothing is fetched"
    assert len(page.html) < 3_000_000


def test_every_word_is_there_in_both_languages_and_is_used():
    used = "".join((FLOOR / name).read_text("utf-8") for name in ("report.html.j2", "report.js", "pairs.js"))
    used += "".join(path.read_text("utf-8") for path in FLOOR.glob("*.py"))
    for key, word in WORDS.items():
        assert set(word) == {"en", "zh"}, key
        braces = [set(re.findall(r"\{(\w+)\}", word[language])) for language in ("en", "zh")]
        assert braces[0] == braces[1], key
        stem = re.match(r"(chart|stage|outcome|col|order|fact|tile|state|said|alert|note|nav)-", key)
        assert f'"{key}"' in used or stem, f"{key} is said nowhere"
    names = re.findall(r'\bt\("([\w-]+)"[,)]|\bsay\("([\w-]+)"|label\("([\w-]+)"', used)
    assert {next(filter(None, found)) for found in names} <= WORDS.keys()


# --- hostile texts ----------------------------------------------------------------------------------------------------


def hostile_run(tmp_path):
    rows = [{"prompt": HOSTILE, "chosen": "a" * 100_000, "rejected": HOSTILE, "score_chosen": 5, "score_rejected": 2}]
    file = tmp_path / "a&<b>.json"
    file.write_text(json.dumps(rows))
    data = [{"path": str(file), "weight": 1.0, "sha256": data_file(str(file), 1.0).sha256}]
    visits = trained(steps=12, per_step=1, file=str(file), row=1)
    return make_run(tmp_path / "<img src=x onerror=alert(1)>", data=data, note=HOSTILE, **visits)


def test_hostile_texts_stay_text(tmp_path):
    run = hostile_run(tmp_path)
    page = drawn(run, to=tmp_path / "page.html")
    assert [name for name, attributes in page.tags if name == "img" or "onerror" in attributes] == []
    assert [name for name, _ in page.tags].count("script") == 2
    assert "</script><img src=x onerror=alert(1)>" in page.data["texts"][0]
    assert "\\u202egnp.exe" in page.data["texts"][0], "a mark that turns the direction of writing is shown"
    assert "\u202e" not in page.html
    assert "<img src=x onerror=alert(1)>" in page.text, "the folder's name, as it is"


def test_a_text_too_long_for_the_page_is_cut_and_that_is_said(tmp_path):
    page = drawn(hostile_run(tmp_path), to=tmp_path / "page.html")
    assert max(map(len, page.data["texts"])) == texts.LONGEST_TEXT
    assert list(page.data["lengths"].values()) == [100_000]
    assert "Texts longer than 4,000 characters are cut (1 of them)" in page.text


def test_texts_are_cut_to_what_fits_together(monkeypatch):
    monkeypatch.setattr(texts, "MOST_TEXT", 100)
    known = texts.Texts()
    for length in (10, 80, 90):
        known.text(chr(96 + length // 10) * length)
    cut, lengths = known.cut()
    assert [len(text) for text in cut] == [10, 45, 45]
    assert lengths == {1: 80, 2: 90}


def test_json_in_a_page_ends_nothing():
    value = {"a": "</script>&\u2028\u2029<!--"}
    assert not set("<>&\u2028\u2029") & set(embedded(value))
    assert json.loads(embedded(value)) == value


# --- what state a run is in -------------------------------------------------------------------------------------------


def test_a_finished_run(tmp_path):
    page = drawn(make_run(tmp_path / "run", **trained()))
    assert "Finished" in page.text
    assert "已完成" in page.text
    assert "The run is finished after optimizer step 40" in page.text
    assert "base, trained on 320 pairs of" in page.text
    assert "with Uni-DPO (beta 2)" in page.text, "what departs from the defaults, and beta"


def test_a_killed_run_says_where_it_stopped(tmp_path):
    run = make_run(tmp_path / "run", finished=False, **trained(steps=12))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "los')
    checkpoint = run / "checkpoint-10"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"max_steps": 40}')
    assert "The run broke off after step 12 of 40" in drawn(run).text


def test_a_run_at_work_is_not_broken_off(tmp_path):
    run = make_run(tmp_path / "run", finished=False, **trained(steps=12))
    with locked(run):
        page = drawn(run)
    assert "still going; step 12 is the last one written" in page.text


def test_a_damaged_part_of_the_ledger_is_left_out_and_named(tmp_path):
    run = make_run(tmp_path / "run", finished=False, **trained(steps=12))
    (run / "pairs.parquet" / "part-00000013-00000014.parquet").write_bytes(b"PAR1")
    (run / "environment.json").write_text("{")
    page = drawn(run)
    assert "part-00000013-00000014.parquet is missing or damaged" in page.text
    assert "environment.json is missing or damaged" in page.text
    assert len(page.data["runs"][0]["outcome"]) == 96


def test_a_run_of_one_step(tmp_path):
    page = drawn(make_run(tmp_path / "run", **trained(steps=1)))
    assert "too short to judge" in page.text
    assert page.alerts == []
    assert len(page.data["runs"][0]["outcome"]) == 8


def test_a_run_that_was_killed_before_its_first_step(tmp_path):
    page = drawn(make_run(tmp_path / "run", finished=False))
    assert "broke off after step 0" in page.text
    assert "The ledger holds no pairs yet" in page.text


def test_several_runs_are_named_by_the_settings_in_which_they_differ(tmp_path):
    runs = [
        make_run(tmp_path / f"r{beta}", loss=ROW_LOSS | {"beta": float(beta)}, output=f"r{beta}", **trained())
        for beta in range(1, MOST_RUNS + 1)
    ]
    page = drawn(*runs, to=tmp_path / "all.html")
    assert page.data["names"] == [f"beta {beta}" for beta in range(1, MOST_RUNS + 1)]
    assert len({line["run"] for line in page.data["charts"]["margin"]["series"]}) == MOST_RUNS
    with pytest.raises(RunError, match="1 to 8"):
        drawn(*runs, runs[0], to=tmp_path / "all.html")


ROW_LOSS = {"name": "uni_dpo", "nll_weight": 0.001, "tau_good": 2.5}


def test_runs_of_several_losses_are_named_by_them(tmp_path):
    runs = [
        make_run(tmp_path / "a", **trained()),
        make_run(tmp_path / "b", loss={"name": "dpo", "beta": 0.1}, **trained()),
    ]
    assert drawn(*runs).data["names"] == ["loss uni_dpo, beta 2", "loss dpo, beta 0.1"]


def test_of_many_differences_a_run_is_named_by_what_it_has_apart(tmp_path):
    changes = [{}, {}, {"a": 1}, {"b": 2, "c": 3}, {"d": 4, "e": 5}]
    usual = dict.fromkeys("abcde", 0)
    runs = [make_run(tmp_path / f"r{i}", finer=usual | c, **trained(steps=2)) for i, c in enumerate(changes)]
    assert drawn(*runs).data["names"] == ["r0", "r1", "a 1", "b 2, c 3", "d 4, e 5"]


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_what_the_policy_did_with_a_pair(tmp_path):
    """Reference and policy each rank a pair right (+1) or wrong (-1)."""
    cases = {"learnt": (-1, 1), "known": (1, 1), "not_learnt": (-1, -1), "unlearnt": (1, -1)}
    rows = [
        {
            "ref_chosen_logps": -2.0 + before / 2,
            "ref_rejected_logps": -2.0,
            "chosen_logps": -1.0 + now,
            "rejected_logps": -1.0,
        }
        for before, now in cases.values()
    ]
    pairs = pairs_of(read_run(make_run(tmp_path / "run", rows=rows)))
    assert [OUTCOMES[outcome] for outcome in pairs.outcome] == list(cases)
    # beta 2 times ((chosen - rejected) - (the reference's))
    np.testing.assert_allclose(pairs.columns["margin"], [2 * (now - before / 2) for before, now in cases.values()])
    np.testing.assert_allclose(pairs.columns["weight"], 0.45)


def test_a_pair_met_twice_counts_once_as_it_was_last(tmp_path):
    rows = [{"row": 1, "step": 1}, {"row": 2, "step": 2}, {"row": 1, "step": 3, "chosen_logps": -3.0}]
    pairs = pairs_of(read_run(make_run(tmp_path / "run", rows=rows)))
    assert pairs.columns["visits"].tolist() == [2, 1]
    assert pairs.columns["after"].tolist() == [-1, 1]


def test_without_a_reference_the_first_visit_is_what_was_before(tmp_path):
    missing = {"ref_chosen_logps": None, "ref_rejected_logps": None}
    rows = [{"row": 1, "step": step, "chosen_logps": logps} | missing for step, logps in ((1, -3.0), (2, -1.0))]
    run = make_run(tmp_path / "run", rows=rows, loss={"name": "simpo", "beta": 2.0})
    assert [OUTCOMES[outcome] for outcome in pairs_of(read_run(run)).outcome] == ["learnt"]
    page = drawn(run)
    assert "chosen_moved" not in page.data["runs"][0]["columns"], "nothing is said of what is unknown"
    assert "what was before is not known" not in page.text
    once = drawn(make_run(tmp_path / "once", rows=rows[1:], loss={"name": "simpo", "beta": 2.0}))
    assert "what was before is not known" in once.text
    assert "pairs turned right" not in once.text


def test_more_pairs_than_a_page_holds_are_spread_over_the_data(tmp_path):
    run = read_run(make_run(tmp_path / "run", **trained(steps=10)))
    pairs = pairs_of(run, most=9)
    assert pairs.total == 80
    assert pairs.columns["row"].tolist() == [1, 10, 20, 30, 40, 50, 60, 70, 80]


def ranked_run(tmp_path, *, row=ROW, **written):
    file = tmp_path / "ranked.jsonl"
    responses = [{"text": text, "score": score} for text, score in (("good", 5), ("middling", 3), ("bad", 1))]
    file.write_text(json.dumps({"prompt": "Which?", "responses": responses}) + "\n")
    data = [{"path": str(file), "weight": 1.0, "sha256": data_file(str(file), 1.0).sha256}]
    visits = [{"file": str(file), "row": 1} | written]
    return make_run(tmp_path / "run", rows=visits, data=data), file


@pytest.mark.parametrize("index", [(1, 2), (0, 1)], ids=["as in the file", "as in a group that lost answers"])
def test_texts_of_a_pair_are_those_of_its_row_and_scores(tmp_path, index):
    scores = {"chosen": index[0], "rejected": index[1], "chosen_score": 3.0, "rejected_score": 1.0}
    run, _ = ranked_run(tmp_path, **scores)
    data = drawn(run).data
    (pairs,) = data["runs"]
    said = [data["texts"][pairs[what][0]] for what in ("prompt", "chosen", "rejected")]
    assert said == ["Which?", "middling", "bad"]


def test_data_that_is_gone_or_another_is_said_and_shows_no_text(tmp_path):
    run, file = ranked_run(tmp_path, chosen_score=5.0, rejected_score=3.0)
    assert drawn(run).data["runs"][0]["chosen"] != [-1]
    file.write_text(file.read_text() + file.read_text())
    page = drawn(run)
    assert page.data["runs"][0]["chosen"] == [-1]
    assert "has changed since the run began" in page.text
    file.unlink()
    assert "does not lie where it was" in drawn(run).text


# --- alerts -----------------------------------------------------------------------------------------------------------


def falls(done, pair):
    return -1.0 - 0.4 * done


DESERVED = {
    "alert-displacement": {"chosen_logps": falls, "rejected_logps": lambda done, pair: -1.5 - 0.8 * done},
    "alert-unmoved": {"chosen_logps": -1.0, "rejected_logps": lambda done, pair: -1.5 - 0.004 * done},
    "alert-length": {"rejected_logps": lambda done, pair: -1.5 - done * (0.3 + 0.1 * ((7 * pair) % 5))},
    "alert-gate-never": {"chosen_score": 2.0, "rejected_score": 1.0},
    "alert-gate-always": {"nll_gate": 1.0},
    "alert-saturated": {"performance_weight": lambda done, pair: 0.01 if done > 0.5 else 0.5},
}


@pytest.mark.parametrize("name", DESERVED)
def test_an_alert_fires_on_a_run_that_deserves_it(tmp_path, name):
    assert drawn(make_run(tmp_path / "run", **trained(**DESERVED[name]))).alerts == [name]


def test_no_alert_fires_on_a_good_run(tmp_path):
    page = drawn(make_run(tmp_path / "run", **trained()))
    assert page.alerts == []
    assert "Nothing in this run asks for a second look" in page.text


@pytest.mark.parametrize(("last", "alerts"), [(0.6, ["alert-overfitting"]), (0.89, [])])
def test_held_out_accuracy_that_falls_while_that_of_the_training_rises(tmp_path, last, alerts):
    run = trained()
    held_out = [(10, 0.8), (20, 0.9), (40, last)]
    run["records"] += [{"step": step, "eval_loss": 0.5, "eval_rewards/accuracies": value} for step, value in held_out]
    path = make_run(tmp_path / "run", **run)
    pq.write_table(pa.table({"held_out": [True] * 200}), path / "inputs.parquet")
    page = drawn(path)
    assert page.alerts == alerts
    assert "last of 3 evaluations; best 90.0% at step 20" in page.text


def test_a_threshold_a_reason_and_a_remedy_stand_with_each_alert(tmp_path):
    text = drawn(make_run(tmp_path / "run", **trained(**DESERVED["alert-displacement"]))).text
    assert "nats per token from the reference" in text
    assert "the alert begins below −0.1" in text
    assert "Likelihood displacement" in text
    assert "Lower train.learning_rate" in text


# --- curves -----------------------------------------------------------------------------------------------------------


def test_smoothing_neither_lags_nor_shifts():
    line = np.arange(50.0)
    np.testing.assert_allclose(smoothed(line), line)
    noise = np.random.default_rng(0).normal(size=400)
    assert np.std(smoothed(noise)) < 0.4 * np.std(noise)


def test_held_out_values_stand_beside_those_of_the_training(tmp_path):
    run = trained()
    run["records"] += [{"step": s, "eval_loss": 0.5, "eval_rewards/margins": s / 50} for s in (20, 40)]
    series = drawn(make_run(tmp_path / "run", **run)).data["charts"]["margin"]["series"]
    assert [(line["held"], len(line["x"])) for line in series] == [(False, 40), (True, 2)]


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluated(folder, shares, questions=100):
    """Results of models that answer so large a share right, the first of them the one compared to."""
    for label, share in shares.items():
        judged = [Judged(str(i), str(i), float(i < share * questions)) for i in range(questions)]
        result = BenchmarkResult("mine", "accuracy", 100 * share, 100.0)
        path = folder / label
        (path / "mine").mkdir(parents=True)
        write_benchmark_result(path / "mine", result, Score("accuracy", 100 * share, 100.0, judged))
        write_model_result(ModelResult(label, label, path, [result]))
    before, after = shares
    difference = Difference("mine", before, after, 20.0, 12.0, 28.0, questions, 25, 5)
    (folder / "comparison.json").write_text(json.dumps([asdict(difference)]))
    lines = [("1", "wrong to right"), ("2", "right to wrong")]
    (folder / f"changed-{after}.jsonl").write_text(
        "".join(
            json.dumps({"benchmark": "mine", "index": i, "change": change, "before": "<b>x", "after": "y"}) + "\n"
            for i, change in lines
        )
    )
    return folder


def test_benchmarks_stand_with_their_intervals_base_first(tmp_path):
    folder = evaluated(tmp_path / "evals", {"zbase": 0.5, "trained": 0.7})
    page = drawn(make_run(tmp_path / "run", **trained()), evaluations=[folder])
    found = re.findall(r"(zbase|trained) (\d+\.\d) (\d+\.\d) … (\d+\.\d)", page.text)
    assert [(name, float(value)) for name, value, _, _ in found] == [("zbase", 50.0), ("trained", 70.0)]
    for _, value, low, high in found:  # a binomial's standard error is about 5 points, its 95 % about 20 wide
        assert float(low) < float(value) < float(high)
        assert 16 < float(high) - float(low) < 23
    assert "+20.0 +12.0 … +28.0 clear" in page.text.replace("明确", "").replace("  ", " ")
    assert page.text.index("right to wrong 由对变错 <b>x y") < page.text.index("wrong to right 由错变对 <b>x y")


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(RunError, match="there are no results"):
        drawn(make_run(tmp_path / "run", **trained()), evaluations=[tmp_path])


# --- the commands -----------------------------------------------------------------------------------------------------


def test_a_run_and_a_resumed_run_leave_their_page(tmp_path):
    recipe = write_recipe(tmp_path, train={"save_steps": 4, "max_steps": 8})
    code, printed = unidpo("train", recipe)
    assert code == 0, printed
    run = tmp_path / "run"
    assert re.search(rf"{run / 'report.html'} +the report", printed)
    (start,) = json.loads((run / "environment.json").read_text())["starts"]
    assert start["seconds"].keys() >= {"training, pairs", "reference, responses"}
    assert start["peak_memory"]["host"] > 1e8
    page = Page((run / "report.html").read_text("utf-8"))
    assert "The run is finished after optimizer step 8" in page.text
    assert "Where the time went" in page.text
    (pairs,) = page.data["runs"]
    assert len(pairs["outcome"]) == 32
    assert all(place >= 0 for what in ("prompt", "chosen", "rejected") for place in pairs[what])
    assert any(address.startswith("data:image/webp;base64,") for _, address in page.data["pictures"])
    # As if it had been killed after the checkpoint.
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoint-8")
    code, printed = unidpo("report", run, "--to", tmp_path / "broken.html")
    assert code == 0, printed
    assert "broke off after step 8 of 8" in Page((tmp_path / "broken.html").read_text("utf-8")).text
    code, printed = unidpo("train", recipe, "--resume")
    assert code == 0, printed
    assert "It was started 2 times and resumed" in Page((run / "report.html").read_text("utf-8")).text


def test_a_page_that_cannot_be_drawn_does_not_cost_the_run(tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("loss")

    monkeypatch.setattr("unidpo.run.train.write_report", broken)
    code, printed = unidpo("train", write_recipe(tmp_path, train={"max_steps": 1}))
    assert code == 0, printed
    assert "the report could not be drawn; `unidpo report" in printed
    assert (tmp_path / "run" / "model").is_dir()


def test_the_command_draws_several_runs_and_names_what_is_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / name, **trained()) for name in ("a", "b")]
    code, printed = unidpo("report", *runs)
    assert code == 0, printed
    assert printed.splitlines()[-1] == "report.html"
    assert Page(Path("report.html").read_text("utf-8")).data["names"] == ["a", "b"]
    code, printed = unidpo("report", tmp_path)
    assert code == 2
    assert "there is no run in this folder" in printed
    code, printed = unidpo("report", runs[0], "--to", tmp_path / "no" / "where.html")
    assert code == 2
    assert "give another --to" in printed
