"""Prompt groups, and how they are taken apart and joined."""

from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unidpo.data.pairs import IMAGE, Message, Pair, PromptGroup, Response, merge_by_prompt, ranked_pairs

PROMPT = (Message("user", ("Which?",)),)

scores = st.integers(0, 4).map(float)
responses = st.builds(Response, st.sampled_from("abcd"), scores)


@st.composite
def groups(draw: st.DrawFn) -> PromptGroup:
    # Within a group responses differ, as every reader sees to it.
    members = draw(st.lists(responses, min_size=2, max_size=4, unique=True))
    every = list(permutations(range(len(members)), 2))
    chosen = draw(st.lists(st.sampled_from(every), min_size=1, max_size=4))
    messages = (Message("user", (draw(st.sampled_from(["one", "two"])),)),)
    return PromptGroup(messages, (), tuple(members), tuple(Pair(i, j, draw(st.integers(1, 9))) for i, j in chosen))


def statements(some: list[PromptGroup]) -> Counter[object]:
    """What the groups say: which response is preferred to which, for which prompt, in which row."""
    return Counter(
        (group.messages, group.responses[pair.chosen], group.responses[pair.rejected], pair.row)
        for group in some
        for pair in group.pairs
    )


@given(st.lists(groups(), max_size=8))
def test_merging_keeps_what_is_said_and_each_prompt_once(some: list[PromptGroup]) -> None:
    merged = merge_by_prompt(some)
    assert statements(merged) == statements(some)
    keys = [group.prompt_key() for group in merged]
    assert keys == list(dict.fromkeys(group.prompt_key() for group in some))
    assert merge_by_prompt(merged) == merged


def test_merging_encodes_a_shared_response_once_but_keeps_both_scores_of_a_text() -> None:
    first = PromptGroup(PROMPT, (), (Response("a", 5.0), Response("b", 1.0)), (Pair(0, 1, 1),))
    second = PromptGroup(PROMPT, (), (Response("a", 5.0), Response("b", 2.0)), (Pair(0, 1, 2),))
    [merged] = merge_by_prompt([first, second])
    assert merged.responses == (Response("a", 5.0), Response("b", 1.0), Response("b", 2.0))
    assert merged.pairs == (Pair(0, 1, 1), Pair(0, 2, 2))


def test_the_same_question_about_another_image_is_another_prompt() -> None:
    messages = (Message("user", (IMAGE, "Which?")),)
    pair = (Response("a"), Response("b")), (Pair(0, 1, 1),)
    some = [PromptGroup(messages, (image,), *pair) for image in (Path("x.png"), Path("y.png"), Path("x.png"))]
    assert [group.images for group in merge_by_prompt(some)] == [(Path("x.png"),), (Path("y.png"),)]


@given(groups(), st.data())
def test_keeping_some_pairs_keeps_just_their_responses(group: PromptGroup, data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.sampled_from(group.pairs), min_size=1, unique=True))
    smaller = group.keep_pairs(kept)
    expected = Counter((group.responses[p.chosen], group.responses[p.rejected], p.row) for p in kept)
    assert (
        Counter((smaller.responses[p.chosen], smaller.responses[p.rejected], p.row) for p in smaller.pairs) == expected
    )
    assert {i for p in smaller.pairs for i in (p.chosen, p.rejected)} == set(range(len(smaller.responses)))


@given(st.lists(responses, max_size=6))
def test_ranked_pairs_are_exactly_the_strictly_larger_scores(some: list[Response]) -> None:
    pairs = ranked_pairs(some, row=7)
    said = [(pair.chosen, pair.rejected) for pair in pairs]
    assert said == sorted(said)
    assert {pair.row for pair in pairs} <= {7}
    # Of each two responses with different scores exactly one order is said, and ties say nothing.
    for i, j in permutations(range(len(some)), 2):
        assert ((i, j) in said) == (some[i].score > some[j].score)  # type: ignore[operator]


@pytest.mark.parametrize("score", [None, float("nan")])
def test_ranked_pairs_need_scores(score: float | None) -> None:
    with pytest.raises(ValueError, match="score"):
        ranked_pairs([Response("a", 1.0), Response("b", score)], row=1)


@pytest.mark.parametrize(
    ("messages", "images", "pairs", "problem"),
    [
        (PROMPT, (), (), "at least one pair"),
        (PROMPT, (), (Pair(0, 2, 1),), "does not name two"),
        (PROMPT, (), (Pair(-1, 0, 1),), "does not name two"),
        (PROMPT, (), (Pair(1, 1, 1),), "does not name two"),
        (PROMPT, (Path("a.png"),), (Pair(0, 1, 1),), "0 image marks but 1 images"),
        ((Message("user", (IMAGE, "x", IMAGE)),), (Path("a.png"),), (Pair(0, 1, 1),), "2 image marks but 1 images"),
    ],
)
def test_a_group_that_contradicts_itself_cannot_be_built(messages, images, pairs, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        PromptGroup(messages, images, (Response("a"), Response("b")), pairs)


def test_a_margin_needs_both_scores() -> None:
    group = PromptGroup(PROMPT, (), (Response("a", 5.0), Response("b", 1.5), Response("c")), (Pair(0, 1, 1),))
    assert group.score_margin(Pair(0, 1, 1)) == 3.5
    assert group.score_margin(Pair(1, 0, 1)) == -3.5
    assert group.score_margin(Pair(0, 2, 1)) is None
    assert group.score_margin(Pair(2, 0, 1)) is None


def test_a_message_reads_back_with_its_marks() -> None:
    assert Message("user", (IMAGE, "\nWhich of ", IMAGE, "?")).text == "<image>\nWhich of <image>?"
