"""Scored preference data from MM-RLHF's human ratings."""

import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from unidpo.data.formats import read_groups
from unidpo.data.mm_rlhf import RatingsReport, Scoring, from_mm_rlhf, parse_weights, scored_groups
from unidpo.data.mm_rlhf.ratings import subset_of
from unidpo.data.pairs import IMAGE, PromptGroup
from unidpo.errors import DataError


def row(name: str = "long/1", ratings: Any = ((5, 5), (3, 3), (1, 1)), ranking: Any = None, **changes: Any) -> Any:
    """A row as published: responses a, b, c, ..., with (helpfulness, faithfulness) each."""
    count = len(ratings)
    helpful, faithful = [r[0] for r in ratings], [r[1] for r in ratings]
    values = {
        "id": f"{name.replace('/', '_')}",
        "question": f"What of {name}?",
        "answer": "x",
        "image": f"{name}.jpg",
        "models_output": [f"{name} {letter}" for letter in "abcdefgh"[:count]],
        "helpfulness": helpful,
        "faithfulness": faithful,
        "ethical": [1] * count,
        "final_ranking": list(range(1, count + 1)) if ranking is None else ranking,
        "score_reasons": [""] * count,
        "ranking_reason": "",
    }
    values |= changes
    return {key: value for key, value in values.items() if value != "absent"}


def written(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in rows]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def told(group: PromptGroup) -> list[tuple[str, str, float]]:
    """The pairs of a group by the letters of their responses, and their margins."""
    texts = [response.text[-1] for response in group.responses]
    return [(texts[p.chosen], texts[p.rejected], group.score_margin(p) or 0.0) for p in group.pairs]


def only(folder: Path, *rows: Any, **options: Any) -> tuple[list[tuple[str, str, float]], RatingsReport]:
    scored = scored_groups(written(folder, *rows), Scoring(**options))
    return [pair for group in scored.groups for pair in told(group)], scored.report


def test_a_score_is_the_mean_of_helpfulness_and_faithfulness(tmp_path: Path) -> None:
    """(5+4)/2 = 4.5, (2+4)/2 = 3, (3+2)/2 = 2.5"""
    [group] = scored_groups(written(tmp_path, row(ratings=[(5, 4), (2, 4), (3, 2)]))).groups
    assert [r.score for r in group.responses] == [4.5, 3.0, 2.5]
    assert told(group) == [("a", "b", 1.5), ("a", "c", 2.0), ("b", "c", 0.5)]
    assert group.messages[0].content == (IMAGE, "What of long/1?")
    assert group.images == (tmp_path / "long/1.jpg",)
    assert {p.row for p in group.pairs} == {1}


def test_weights_choose_and_mix_the_ratings(tmp_path: Path) -> None:
    """helpfulness 3, ethical 1: (3·5+1)/4 = 4, (3·2+5)/4 = 2.75"""
    folder = written(tmp_path, row(ratings=[(5, None), (2, None)], ethical=[1, 5]))
    [group] = scored_groups(folder, Scoring(weights=parse_weights("helpfulness=3, ethical"))).groups
    assert [r.score for r in group.responses] == [4.0, 2.75]
    with pytest.raises(DataError, match="no pair is left"):
        scored_groups(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least one of helpfulness"),
        ("helpfullness=1", "did you mean `helpfulness`"),
        ("helpfulness=x", "'x' is no number"),
        ("helpfulness=", "'' is no number"),
        ("helpfulness=0", "above 0"),
        ("helpfulness=-1", "above 0"),
        ("helpfulness=nan", "above 0"),
        ("ethical=inf", "above 0"),
        ("ethical,ethical=2", "twice"),
    ],
)
def test_weights_that_weigh_nothing_are_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Scoring(weights=parse_weights(text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsets": ("lnog",)}, "did you mean `long`"),
        ({"subsets": ("video",)}, "video cannot be used"),
        ({"subsets": ()}, "at least one"),
        ({"min_margin": -1}, "between 0 and 4"),
        ({"min_margin": float("nan")}, "between 0 and 4"),
        ({"conflicts": "ignore"}, "there are drop, keep"),
        ({"best_rank": "first"}, "there are lowest, highest"),
        ({"weights": {}}, "at least one"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Scoring(**options)


def test_pairs_against_the_ranking_are_dropped_or_kept_and_counted(tmp_path: Path) -> None:
    """Scores a 5, b 3, c 1; the ranking puts b before a: (a, b) is in conflict, (a, c) and (b, c) agree."""
    pairs, report = only(tmp_path / "drop", row(ranking=[2, 1, 3]))
    assert pairs == [("a", "c", 4.0), ("b", "c", 2.0)]
    assert (report.agreements, report.conflicts, report.pairs, report.responses) == (2, 1, 2, 3)
    pairs, report = only(tmp_path / "keep", row(ranking=[2, 1, 3]), conflicts="keep")
    assert pairs == [("a", "b", 2.0), ("a", "c", 4.0), ("b", "c", 2.0)]
    assert report.conflicts == 1


def test_equal_scores_make_no_pair_and_equal_places_no_conflict(tmp_path: Path) -> None:
    pairs, report = only(tmp_path, row(ratings=[(4, 2), (3, 3), (2, 2)], ranking=[1, 2, 2]))
    assert pairs == [("a", "c", 1.0), ("b", "c", 1.0)]
    assert (report.ties, report.agreements, report.conflicts) == (1, 1, 0)


def test_a_minimum_margin_leaves_out_close_pairs_only(tmp_path: Path) -> None:
    """Scores 5, 4.5, 4: of the margins 0.5, 1, 0.5 one is at least 1; b then is in no pair and goes."""
    pairs, report = only(tmp_path, row(ratings=[(5, 5), (5, 4), (4, 4)]), min_margin=1.0)
    assert pairs == [("a", "c", 1.0)]
    assert (report.below_margin, report.responses) == (2, 2)


def test_a_ranking_that_is_read_backwards_is_noticed(tmp_path: Path) -> None:
    """Seven rows of three pairs, all against the ranking; with six there are 18 pairs, too few to say."""
    rows = [row(f"long/{i}", ranking=[3, 2, 1]) for i in range(7)]
    with pytest.raises(DataError, match=r"disagree about 21 of 21 pairs.*--best-rank highest"):
        only(tmp_path / "seven", *rows)
    with pytest.raises(DataError, match="no pair is left of 6 rows"):
        only(tmp_path / "six", *rows[:6])
    pairs, report = only(tmp_path / "turned", *rows, best_rank="highest")
    assert (len(pairs), report.agreements, report.conflicts) == (21, 21, 0)
    pairs, report = only(tmp_path / "keep", *rows, conflicts="keep")
    assert (len(pairs), report.conflicts) == (21, 21)


ODD_ROWS: list[tuple[Any, list[str], int]] = [
    # the row, what is found, how many pairs it makes
    (row("long/0"), [], 3),
    (row("short/1", [(5, 5), (4, 4), (3, 3), (2, 2), (1, 1)]), [], 10),
    (row("mcq/2", [(4, 4), (4, 4), (2, 2), (2, 2)], [1, 1, 3, 3]), [], 4),
    (row("long/3", [(3, 3), (4, 2), (2, 4)]), ["no-pair"], 0),
    (row("long/4", [(5, 5), (None, 3), (1, 1)]), ["missing-rating"], 1),
    (row("long/5", [(5, 5), ("bad", 3), (1, 1)]), ["missing-rating"], 1),
    (row("long/6", [(5, 5), ("3", " 3.0 "), (1, 1)]), [], 3),
    (row("long/7", [(5, 5), (0, 3), (1, 6)]), ["missing-rating"] * 2 + ["too-few-responses"], 0),
    (row("long/8", [(5, 5), (float("nan"), 3), (True, 1)]), ["missing-rating"] * 2 + ["too-few-responses"], 0),
    (row("long/9", helpfulness=None), ["missing-rating"], 0),
    (row("long/10", faithfulness=[]), ["missing-rating"], 0),
    (row("long/11", helpfulness="absent"), ["missing-rating"], 0),
    (row("long/12", helpfulness=[5, 4]), ["misaligned-rating"], 0),
    (row("long/13", helpfulness="5, 4, 3"), ["wrong-type"], 0),
    (row("long/14", ethical=None), [], 3),
    (row("long/15", final_ranking=None), ["missing-ranking"], 3),
    (row("long/16", final_ranking=[3, 1]), ["missing-ranking"], 3),
    (row("long/17", final_ranking=[3, None, 1]), ["missing-ranking"], 2),
    (row("long/18", models_output=[]), ["bad-outputs"], 0),
    (row("long/19", models_output="one text"), ["bad-outputs"], 0),
    (row("long/20", models_output=["a", " ", None]), ["bad-response"] * 2 + ["too-few-responses"], 0),
    (row("long/21", models_output=["a", "a", "c"]), ["duplicate-response"], 1),
    (row("long/22", question=None), ["missing-question"], 0),
    (row("long/23", question=" <image> "), ["missing-question"], 0),
    (row("long/24", question="<image>\nWhat?"), [], 3),
    (row("long/25", question="<image><image>What?"), ["image-marks"], 0),
    (row("long/26", image=["long/26a.jpg", "long/26b.jpg"]), [], 3),
    (row("long/27", image=7), ["wrong-type"], 0),
    (row("long/28", image="absent"), ["missing-image"], 0),
    (row("long/29", question="\ud800?"), ["missing-question"], 0),
    (row("other/30", id="x", image="other/30.jpg"), ["unknown-subset"], 0),
    (row("long/0"), ["duplicate-row"], 0),
    (row("long/0", question="Another?"), [], 3),
    ("{broken", ["broken-json"], 0),
    ("[1, 2]", ["wrong-type"], 0),
    (row("safety/35"), [], 0),
    (row("video/36", image="absent", video="video/36.mp4"), [], 0),
    (row("x/37", id="mcq_37", image="folder/37.jpg"), [], 3),
    (row("x/38", image="/data/MM-RLHF/short/38.jpg"), [], 3),
]


def test_every_oddity_is_counted_with_its_row_and_the_rest_comes_out(tmp_path: Path) -> None:
    lines = [line if isinstance(line, str) else json.dumps(line) for line, _, _ in ODD_ROWS]
    scored = scored_groups(written(tmp_path, *lines))
    report = scored.report
    found: dict[int, list[str]] = {}
    for finding in report.findings:
        assert finding.file == tmp_path / "data.jsonl"
        found.setdefault(finding.row or 0, []).append(finding.kind)
    pairs = Counter(pair.row for group in scored.groups for pair in group.pairs)
    for number, (_, kinds, count) in enumerate(ODD_ROWS, start=1):
        assert (number, found.get(number, []), pairs[number]) == (number, kinds, count)
    assert report.rows == len(ODD_ROWS)
    assert report.pairs == sum(count for *_, count in ODD_ROWS)
    assert report.prompts == sum(1 for *_, count in ODD_ROWS if count)
    assert dict(report.subsets) == {"long": 30, "short": 2, "mcq": 2, "safety": 1, "video": 1, "unknown": 3}
    # A row is left out for an error, once or not at all.
    left_out = {finding.row for finding in report.findings if finding.severity == "error"}
    assert left_out | set(pairs) | {36, 37} == set(range(1, len(ODD_ROWS) + 1))
    assert not left_out & set(pairs)


def test_the_report_prints_counts_and_an_example_of_each(tmp_path: Path) -> None:
    report = scored_groups(written(tmp_path, *(json.dumps(line) for line, _, _ in ODD_ROWS[:20]))).report
    console = Console(file=io.StringIO(), width=200)
    report.render(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "left out: misaligned-rating" in text
    assert "row 13: 2 ratings of 3 responses" in text
    assert "in part: missing-ranking" in text


def test_safety_comes_on_demand_and_video_rows_in_it_are_named(tmp_path: Path) -> None:
    rows = [row("safety/1"), row("x/2", id="safety_2", image="absent", video="safety/2.mp4"), row("long/3")]
    pairs, report = only(tmp_path, *rows, subsets=("safety",))
    assert len(pairs) == 3
    assert report.subsets == {"safety": 1, "video": 1, "long": 1}


@pytest.mark.parametrize(
    ("values", "subset"),
    [
        ({"image": "long/a/short/1.jpg"}, "long"),
        ({"image": "./mcq/1.jpg"}, "mcq"),
        ({"image": "C:\\data\\short\\1.jpg"}, "short"),
        ({"image": "images/1.jpg", "id": "short-12"}, "short"),
        ({"image": "longer/1.jpg", "id": "longest_1"}, None),
        ({"image": "", "id": 12}, None),
        ({"video": "long/1.mp4"}, "video"),
        ({}, None),
    ],
)
def test_the_subset_is_the_images_folder_else_the_ids_beginning(values: Any, subset: str | None) -> None:
    assert subset_of(values) == subset


@pytest.mark.parametrize("name", ["out.jsonl", "out.json", "out.parquet"])
def test_what_is_written_reads_back_as_what_was_scored(tmp_path: Path, name: str) -> None:
    """Also where pairs were left out of a prompt that the scores alone would make, and away from the images."""
    rows = [row("long/1", ranking=[2, 1, 3]), row("short/2"), row("mcq/3", [(3, 3), (3, 3)]), row("mcq/4")]
    folder = written(tmp_path / "in", *rows)
    told_rows = [told(group) for group in scored_groups(folder).groups]
    for to in (tmp_path / "in" / name, tmp_path / "elsewhere" / name):
        report = from_mm_rlhf(folder, to)
        again = read_groups(to, require_scores=True)
        assert again.findings == []
        assert [told(group) for group in again.groups] == told_rows
        assert [g.images[0].resolve() for g in again.groups] == [  # type: ignore[union-attr]
            (folder / n).resolve() for n in ("long/1.jpg", "short/2.jpg", "mcq/4.jpg")
        ]
        assert report.prompts == 3


def test_nothing_is_written_over_a_file_unless_asked(tmp_path: Path) -> None:
    folder = written(tmp_path, row())
    to = tmp_path / "out.jsonl"
    to.write_text("mine")
    with pytest.raises(DataError, match="--force"):
        from_mm_rlhf(folder, to)
    assert to.read_text() == "mine"
    from_mm_rlhf(folder, to, force=True)
    assert json.loads(to.read_text())["responses"][0] == {"text": "long/1 a", "score": 5.0}
    with pytest.raises(DataError, match="this is what is read"):
        from_mm_rlhf(folder, tmp_path / "data.jsonl", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "out.jsonl"]


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl: there is no such file; `unidpo data fetch mm-rlhf"):
        scored_groups(tmp_path)
    (tmp_path / "data.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        scored_groups(tmp_path / "data.jsonl")
    written(tmp_path, row("safety/1"))
    with pytest.raises(DataError, match="none is in the chosen subsets"):
        scored_groups(tmp_path)
    written(tmp_path, row())
    with pytest.raises(DataError, match=r"dpo_pairs\.jsonl: there is no such file"):
        scored_groups(tmp_path, Scoring(join_pairs=True))


def pair(name: str, chosen: str, rejected: str, **changes: Any) -> Any:
    values = {
        "prompt": f"What of {name}?",
        "image": f"{name}.jpg",
        "chosen": f"{name} {chosen}",
        "rejected": f"{name} {rejected}",
    }
    return {key: value for key, value in {**values, **changes}.items() if value != "absent"}


def test_published_pairs_get_their_scores_from_the_ratings(tmp_path: Path) -> None:
    rows = [
        row("long/1"),
        row("short/2", [(3, 3), (4, 2), (1, 1)]),
        row("mcq/3", [(5, 5), (None, 1), (1, 1)]),
        row("long/4", question="What of long/1?"),
    ]
    given: list[tuple[Any, str | None]] = [
        (pair("long/1", "a", "b"), None),
        (pair("long/1", "a", "c", prompt="<image>\nWhat  of long/1? "), None),
        (pair("long/1", "c", "b"), "conflict"),
        (pair("long/1", "a", "b"), "duplicate-pair"),
        (pair("short/2", "b", "a"), None),  # equal scores
        (pair("mcq/3", "a", "c", id="mcq_3", prompt="worded differently"), None),
        (pair("mcq/3", "a", "b"), "no-such-response"),
        (pair("mcq/3", "a", "a"), "equal-responses"),
        (pair("long/9", "a", "b"), "no-such-prompt"),
        (pair("long/4", "b", "c", prompt="What of long/1?"), None),  # the same question about another image
        (pair("long/4", "b", "c", prompt=7), "wrong-type"),
        (pair("long/4", "b", "c", image=["x"]), "wrong-type"),
        ("{", "broken-json"),
        (pair("video/1", "a", "b", image="absent", video="video/1.mp4"), "other"),
    ]
    folder = written(tmp_path, *rows)
    written(tmp_path, *(line for line, _ in given), name="dpo_pairs.jsonl")
    report = from_mm_rlhf(folder, tmp_path / "out.json", Scoring(join_pairs=True))
    found = {f.row: f.kind for f in report.findings if f.file == tmp_path / "dpo_pairs.jsonl"}
    assert found == {i: kind for i, (_, kind) in enumerate(given, 1) if kind not in (None, "conflict", "other")}
    assert (report.pair_rows, report.pairs, report.conflicts, report.agreements, report.ties) == (13, 5, 1, 4, 1)
    scores = [
        (r["chosen"], r["rejected"], r["score_chosen"], r["score_rejected"], r["images"])
        for r in json.loads((tmp_path / "out.json").read_text())
    ]
    assert scores == [
        ("long/1 a", "long/1 b", 5.0, 3.0, ["long/1.jpg"]),
        ("long/1 a", "long/1 c", 5.0, 1.0, ["long/1.jpg"]),
        ("short/2 b", "short/2 a", 3.0, 3.0, ["short/2.jpg"]),
        ("mcq/3 a", "mcq/3 c", 5.0, 1.0, ["mcq/3.jpg"]),
        ("long/4 b", "long/4 c", 3.0, 1.0, ["long/4.jpg"]),
    ]
    report = from_mm_rlhf(folder, tmp_path / "far.json", Scoring(join_pairs=True, min_margin=2.5))
    assert (report.pairs, report.below_margin) == (2, 3)
    report = from_mm_rlhf(folder, tmp_path / "all.json", Scoring(join_pairs=True, conflicts="keep"))
    assert (report.pairs, report.conflicts) == (6, 1)


def test_many_prompts_with_one_question_take_seconds(tmp_path: Path) -> None:
    """Quadratic work would take minutes here."""
    chance = random.Random(0)
    rows = [
        row(
            f"long/{i}",
            [(chance.randint(1, 5), chance.randint(1, 5)) for _ in range(4)],
            [1, 1, 1, 1],
            question="What?",
        )
        for i in range(8_000)
    ]
    pairs = [pair(f"long/{i}", "a", "b", prompt="What?") for i in range(8_000)]
    written(tmp_path, *(json.dumps(r) for r in rows))
    written(tmp_path, *(json.dumps(p) for p in pairs), name="dpo_pairs.jsonl")
    report = scored_groups(tmp_path, Scoring(join_pairs=True, conflicts="keep")).report
    assert report.pairs == 8_000
