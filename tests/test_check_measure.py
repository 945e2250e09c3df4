"""The data in numbers, and how they are drawn."""

import io
import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unidpo.data.check import check_data
from unidpo.data.check.measure import epoch_tokens, spread, token_estimator
from unidpo.data.pairs import IMAGE, GroupTokens, Message, Pair, PromptGroup, Response
from unidpo.terminal import Terminal


def group(prompt: str, texts: str, pairs: list[tuple[int, int]], row: int = 1) -> PromptGroup:
    responses = tuple(Response(text, 5.0 - n) for n, text in enumerate(texts.split()))
    return PromptGroup((Message("user", (prompt,)),), (), responses, tuple(Pair(*pair, row) for pair in pairs))


def letters(group: PromptGroup) -> GroupTokens:
    """A token per letter."""
    return GroupTokens(len(group.messages[0].text), tuple(len(response.text) for response in group.responses))


def test_an_epoch_is_counted_as_padded_pairs_and_as_packs() -> None:
    # Prompt of 10 with responses of 3, 5 and 2 in three pairs; again with those of 3 and 7, of which one is known;
    # a prompt of 4 with responses of 1 and 6.
    groups = [
        group("p" * 10, "aaa bbbbb cc", [(0, 1), (0, 2), (1, 2)]),
        group("p" * 10, "aaa ddddddd", [(0, 1)]),
        group("q" * 4, "a bbbbbb", [(0, 1)]),
    ]
    tokens = epoch_tokens(groups, [letters(each) for each in groups], estimated=False)
    rows = 2 * (10 + 5) + 2 * (10 + 3) + 2 * (10 + 5) + 2 * (10 + 7) + 2 * (4 + 6)
    assert tokens.padded_pairs == 2 * rows  # policy and reference
    assert tokens.pair_packs == (10 + 3 + 5) + (10 + 3 + 2) + (10 + 5 + 2) + (10 + 3 + 7) + (4 + 1 + 6)
    assert tokens.prompt_packs == (10 + 3 + 5 + 2 + 7) + (4 + 1 + 6)


def test_lengths_are_estimated_without_a_model() -> None:
    images = Path("a.png"), Path("large.png"), Path("unseen.png"), Image.new("RGB", (280, 28))
    content = ("12345678", IMAGE, IMAGE, "漢字" * 2, IMAGE, IMAGE)
    responses = Response("12345"), Response("é" * 4)
    prompt = PromptGroup((Message("user", content),), images, responses, (Pair(0, 1, 1),))
    estimate = token_estimator({images[0]: (560, 280), images[1]: (4000, 3000)})
    # 8 bytes and 12 bytes of text; 20 x 10 patches; 768 x 768 pixels make 752 twice; 10 patches.
    assert estimate(prompt) == GroupTokens(2 + 3 + 200 + 752 + 752 + 10, (2, 2))
    small = token_estimator({images[0]: (560, 280), images[1]: (4000, 3000)}, max_pixels=28 * 28 * 50)
    assert small(prompt) == GroupTokens(2 + 3 + 50 + 50 + 50 + 10, (2, 2))


def test_a_spread_counts_what_it_shows() -> None:
    whole = spread([1, 1, 2, 4])
    assert whole is not None
    assert (whole.minimum, whole.median, whole.maximum) == (1, 1.5, 4)
    tailed = spread([0.5 * n for n in range(100)] + [1e6])
    assert tailed is not None
    assert tailed.maximum == 1e6
    assert spread([]) is None


@given(st.lists(st.integers(-(10**6), 10**6) | st.floats(-2e38, 2e38), min_size=1))
def test_quantiles_are_in_order(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert found.minimum <= found.decile <= found.median <= found.ninth_decile <= found.maximum == max(values)


def printed(path: Path, encoding: str, **options: Any) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    check_data(path, **options).render(Terminal(file=file, width=120))
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def test_the_report_is_written_with_what_the_terminal_has(tmp_path: Path) -> None:
    scores = {"score_chosen": 4.5, "score_rejected": 2}
    rows = [{"instruction": f"{n}?", "chosen": "yes" * n, "rejected": "no", **scores} for n in range(1, 9)]
    rows += [{"instruction": "<image>?", "chosen": "yes", "rejected": "no", "images": ["größe.png"], **scores}]
    path = tmp_path / "paare-größe.json"
    path.write_text(json.dumps(rows))
    unicode, ascii_only = printed(path, "utf-8"), printed(path, "ascii")
    assert "größe.png" in unicode
    assert ascii_only.isascii()
    assert r"gr\xf6\xdfe.png" in ascii_only
    for text in (unicode, ascii_only):
        assert "~tokens per epoch" in text
        assert "times fewer" in text
        assert "4.5" in next(line for line in text.splitlines() if "tau_good" in line)


def test_tokens_are_counted_where_a_model_is_given(tmp_path: Path) -> None:
    pair = {"chosen": "yes", "rejected": "no"}
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"prompt": "Which?", **pair}, {"prompt": "Which one?", **pair}]))
    report = check_data(path, count_tokens=letters)
    assert report.epoch_tokens == epoch_tokens(
        report.groups, [letters(each) for each in report.groups], estimated=False
    )
    assert report.prompt_tokens is not None
    assert (report.prompt_tokens.minimum, report.prompt_tokens.maximum) == (6, 10)
    assert report.response_tokens is not None
    assert (report.response_tokens.minimum, report.response_tokens.maximum) == (2, 3)
    text = printed(path, "utf-8", count_tokens=letters)
    assert "tokens per epoch" in text
    assert "~" not in text
    assert report.to_json()["epoch_tokens"] == {
        "estimated": False,
        "padded_pairs": 2 * 2 * (6 + 3 + 10 + 3),
        "pair_packs": 6 + 3 + 2 + 10 + 3 + 2,
        "prompt_packs": 6 + 3 + 2 + 10 + 3 + 2,
    }
