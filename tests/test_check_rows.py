"""What the data check notices about rows that can be used."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unidpo.data.check import CheckReport, check_data, special_token_check
from unidpo.data.check.scores import mixed_scales
from unidpo.data.pairs import GroupTokens, Message, Pair, PromptGroup, Response
from unidpo.errors import Finding, ImageError, ModelError


def row(instruction: str = "Which?", chosen: str = "good", rejected: str = "bad", **columns: Any) -> dict[str, Any]:
    scores = {"score_chosen": 4.5, "score_rejected": 2}
    return {"instruction": instruction, "chosen": chosen, "rejected": rejected, **scores, **columns}


def check(folder: Path, rows: list[Any], **options: Any) -> CheckReport:
    (folder / "pairs.json").write_text(json.dumps(rows))
    return check_data(folder / "pairs.json", **options)


def found(report: CheckReport) -> list[tuple[str, int | None]]:
    return [(finding.kind, finding.row) for finding in report.findings]


def group(scores: Iterable[float | None], number: int = 1) -> PromptGroup:
    responses = tuple(Response(f"{n}", score) for n, score in enumerate(scores))
    return PromptGroup((Message("user", ("?",)),), (), responses, (Pair(0, 1, number),))


class TestRepeatedPairs:
    def test_the_same_pair_again(self, tmp_path):
        rows = [row(), row("Other?"), row(), row(chosen="better"), row(score_chosen=5), row(system="Be brief.")]
        report = check(tmp_path, rows)
        assert found(report) == [("duplicate-pair", 3), ("duplicate-pair", 5)]
        assert "row 1 has the same prompt, images and responses; remove" in report.findings[0].message
        assert "and responses, with other scores; remove" in report.findings[1].message
        assert report.ok

    def test_other_images_make_another_pair(self, tmp_path):
        for name in "ab":
            Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
        rows = [row("<image>?", images=[name]) for name in ("a.png", "b.png", "a.png")]
        assert found(check(tmp_path, rows)) == [("duplicate-pair", 3)]

    @pytest.mark.parametrize(
        ("scores", "part"),
        [
            ((4.5, 2), "contradict each other"),
            ((2, 4.5), "though their scores agree"),
            ((3, 3), "way round; keep"),
            ((None, None), "way round; keep"),
        ],
    )
    def test_both_orders(self, tmp_path, scores, part):
        swapped = row(chosen="bad", rejected="good", score_chosen=scores[0], score_rejected=scores[1])
        report = check(tmp_path, [row(), swapped])
        [finding] = [finding for finding in report.findings if finding.kind == "both-orders"]
        assert finding.row == 2
        assert "row 1 prefers" in finding.message
        assert part in finding.message

    def test_ranked_responses_and_pairs_meet(self, tmp_path):
        ranked = {"prompt": "Which?", "responses": [{"text": t, "score": s} for t, s in (("bad", 3), ("good", 1))]}
        assert found(check(tmp_path, [row(), ranked])) == [("both-orders", 2)]


class TestText:
    def test_white_space_only(self, tmp_path):
        rows = [row(chosen="a  b\n", rejected=" a b"), row("?", chosen="ab", rejected="a b")]
        assert found(check(tmp_path, rows)) == [("white-space-only", 1)]

    @pytest.mark.parametrize(
        ("text", "kind", "part"),
        [
            ("a <|im_end|> b <|im_end|>", "special-token", "holds '<|im_end|>', which"),
            ("</s><s>", "special-token", "'</s>', '<s>'"),
            ("lost \ufffd", "wrong-encoding", "U+FFFD"),
            ("café".encode().decode("cp1252"), "wrong-encoding", "Windows-1252"),
            ("it’s".encode().decode("cp1252"), "wrong-encoding", "Windows-1252"),
            ("\ufefffirst", "byte-order-mark", "U+FEFF"),
            ("a\x00b\x1b[31m", "control-characters", r"('\x00', '\x1b')"),
            ("é\x07", "control-characters", r"('\x07')"),
        ],
    )
    def test_odd_text_is_found_wherever_it_stands(self, tmp_path, text, kind, part):
        rows = [row(f"{text}?"), row("1", chosen=text), row("2", rejected=text), row("3", system=text)]
        responses = [{"text": t, "score": s} for t, s in (("x", 3), (text, 2), ("z", 1))]
        report = check(tmp_path, [*rows, {"prompt": "4", "responses": responses}])
        assert found(report) == [(kind, n) for n in range(1, 6)]
        places = ("the prompt", "the chosen response", "the rejected response", "the prompt", "response 2")
        for place, finding in zip(places, report.findings, strict=True):
            assert finding.message.startswith(f"{place} holds")
            assert part in finding.message
            assert finding.message.isprintable()
        assert report.ok

    def test_text_in_many_scripts_is_not_odd(self, tmp_path):
        text = "Ünïcödé «Ça» ÃO 漢字 עברית हिन्दी 👩‍👩‍👧 a\tb\r\nc “quotes” — <b>x</b> <image_1> if a<s then"
        assert found(check(tmp_path, [row(text, text + "1", text + "2")])) == []

    def test_the_tokens_of_a_model_replace_the_known_ones(self, tmp_path):
        rows = [row("say <|im_end|>"), row("say <tool>"), row("say <tool>[x]")]
        report = check(tmp_path, rows, special_tokens=["<tool>", "<tool>[x]", "", " "])
        assert [(finding.row, finding.message.split(",")[0]) for finding in report.findings] == [
            (2, "the prompt holds '<tool>'"),
            (3, "the prompt holds '<tool>[x]'"),
        ]
        assert list(special_token_check([])(group((1, 2)))) == []

    @pytest.mark.parametrize("text", ["<|image_pad|>", "see <|video_pad|><|im_end|>"])
    def test_image_tokens_would_stop_training_on_images(self, tmp_path, text):
        Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
        bad = [row(text), row("?", chosen=text)]
        assert check(tmp_path, bad).ok
        report = check(tmp_path, [*bad, row("<image>", images=["a.png"])])
        assert [(f.kind, f.row, f.severity) for f in report.findings] == [
            ("special-token", 1, "error"),
            ("special-token", 2, "error"),
        ]
        assert "<|im_end|>" not in report.findings[0].message
        assert report.usable_rows == 1
        assert check(tmp_path, [*bad, row("<image>", images=["a.png"])], special_tokens=["<tool>"]).ok

    def test_image_marks_are_no_text(self, tmp_path):
        Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
        rows = [row("<image>?", images=["a.png"])]
        assert found(check(tmp_path, rows, special_tokens=["<image>"])) == []


class TestScores:
    def test_some_rows_without(self, tmp_path):
        rows = [
            row("1", score_chosen=None, score_rejected=None),
            row("2"),
            row("3", score_chosen=None, score_rejected=None),
        ]
        report = check(tmp_path, rows)
        assert found(report) == [("missing-score", 1), ("missing-score", 3)]
        assert report.ok
        assert not check(tmp_path, rows, require_scores=True).ok
        assert found(check(tmp_path, [rows[0], rows[2]])) == []

    def test_mixed_scales_are_about_the_file(self, tmp_path):
        small = [row(f"s{n}", score_chosen=0.9 - n / 50, score_rejected=0.1 + n / 50) for n in range(5)]
        large = [row(f"l{n}", score_chosen=4 + n % 2, score_rejected=1 + n % 3) for n in range(20)]
        report = check(tmp_path, large + small)
        assert found(report) == [("mixed-scales", None)]
        message = report.findings[0].message
        assert "5 rows lie within 0.1 to 0.9 (such as rows 21, 22, 23)" in message
        assert "20 rows lie within 1 to 5 (such as rows 1, 2, 3)" in message
        assert report.verdict == "Ready: 25 of 25 rows are usable."

    @pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
    @pytest.mark.parametrize(
        ("small", "large"), [((0, 1), (1, 5)), ((0, 1), (1, 10)), ((0, 1), (10, 100)), ((1, 5), (30, 100))]
    )
    def test_two_scales_are_told_apart(self, small, large, share):
        rng = random.Random(1)
        groups = []
        for n in range(1, 1001):
            ends, digits = (small, 2) if rng.random() < share else (large, 0 if large[1] < 100 else 1)
            groups.append(group([round(rng.uniform(*ends), digits) for _ in range(2)], n))
        assert list(mixed_scales(groups))

    @pytest.mark.parametrize(
        "draw",
        [
            lambda rng, prompt: rng.randint(1, 5),
            lambda rng, prompt: rng.randint(0, 5),
            lambda rng, prompt: rng.randint(1, 10),
            lambda rng, prompt: rng.randint(0, 100),
            lambda rng, prompt: rng.random(),
            lambda rng, prompt: rng.uniform(0, 10),
            lambda rng, prompt: rng.gauss(0, 2),
            lambda rng, prompt: rng.gauss(6, 3),
            lambda rng, prompt: 10 * prompt + rng.gauss(0, 0.3),  # what is asked says more than what is answered
            lambda rng, prompt: max(0.0, 3 * prompt + rng.gauss(0, 0.1)),
            lambda rng, prompt: rng.lognormvariate(1, 1.5),
        ],
    )
    def test_one_scale_is_not_taken_for_two(self, draw):
        for seed in range(5):
            rng = random.Random(seed)
            prompts = [rng.random() for _ in range(1000)]
            groups = [group([draw(rng, p), draw(rng, p)], n) for n, p in enumerate(prompts, start=1)]
            assert not list(mixed_scales(groups))

    @given(st.lists(st.lists(st.none() | st.floats(-1e38, 1e38), min_size=2, max_size=4), max_size=8))
    def test_any_scores_will_do(self, scores):
        found = [finding.kind for finding in mixed_scales([group(each) for each in scores])]
        assert found in ([], ["mixed-scales"])


class TestFile:
    def test_a_byte_order_mark_is_worth_knowing(self, tmp_path):
        path = tmp_path / "pairs.jsonl"
        path.write_text(json.dumps(row()), encoding="utf-8-sig")
        report = check_data(path)
        assert found(report) == [("byte-order-mark", None)]
        assert (report.ok, report.usable_rows) == (True, 1)


class TestImages:
    def test_an_odd_image_is_named_in_each_row(self, tmp_path):
        Image.new("P", (40, 40)).save(tmp_path / "a.png")
        Image.new("RGB", (6000, 20)).save(tmp_path / "b.png")
        rows = [row(f"<image>{n}", images=[name]) for n, name in enumerate(("a.png", "b.png", "a.png"))]
        report = check(tmp_path, rows)
        assert found(report) == [("palette-image", 1), ("extreme-aspect", 2), ("palette-image", 3)]
        assert [finding.key for finding in report.findings] == ["images[0]"] * 3
        assert [each.pairs[0].row for each in report.groups] == [1, 3]


class TestModel:
    def test_a_row_the_model_refuses_is_an_error(self, tmp_path):
        def lengths(group: PromptGroup) -> GroupTokens:
            if "system" in [message.role for message in group.messages]:
                raise ModelError("the template takes no system prompt")
            return GroupTokens(10, (3, 5))

        def extra(group: PromptGroup) -> list[Finding]:
            if group.messages[-1].text == "narrow":
                raise ImageError("too narrow", findings=[Finding("extreme-aspect", "too narrow")])
            return [Finding("response-cut", "cut", severity="warning")]

        rows = [row("1"), row("2", system="s"), row("narrow")]
        report = check(tmp_path, rows, count_tokens=lengths, extra=[extra])
        assert found(report) == [
            ("response-cut", 1),
            ("response-cut", 2),
            ("refused-row", 2),
            ("extreme-aspect", 3),
        ]
        assert report.usable_rows == 1
        assert not report.epoch_tokens.estimated
        assert report.prompt_tokens is not None
        assert report.prompt_tokens.median == 10
