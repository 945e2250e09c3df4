"""Which pairs make a step, which of them share a forward pass, and what a batch holds."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unidpo.model.attention import PACK_ATTENTION, set_text_attention
from unidpo.model.batches import Plan, PlannedBatches, StepLoader, StepSampler
from unidpo.model.logps import response_logps
from unidpo.model.pack_check import smallest
from worlds import GOLDEN, group, tiny_policy

counts = st.lists(st.integers(1, 12), min_size=1, max_size=20)
sizes = st.tuples(st.integers(1, 16), st.integers(1, 6))


def sampler(pair_counts, *, step=4, per_pack=2, shuffle=True, seed=3, epoch=0, rank=0, world_size=1, **more):
    lengths = more.pop("lengths", None)
    made = StepSampler(
        pair_counts,
        lambda index, places: len(places) if lengths is None else lengths[index],
        pairs_per_step=step,
        pairs_per_pack=per_pack,
        shuffle=shuffle,
        seed=seed,
        rank=rank,
        world_size=world_size,
        **more,
    )
    made.set_epoch(epoch)
    return made


def pairs_of(plans):
    """(group, pair) of every share of some plans, in order."""
    return [(index, pair) for plan in plans for index, pairs in plan.shares for pair in pairs]


@given(counts, sizes, st.booleans(), st.integers(0, 5))
def test_an_epoch_visits_every_pair_once(pair_counts, size, shuffle, epoch):
    made = sampler(pair_counts, step=size[0], per_pack=size[1], shuffle=shuffle, epoch=epoch)
    visited = Counter(pair for step in made for pair in pairs_of(step))
    assert visited == Counter((i, pair) for i, count in enumerate(pair_counts) for pair in range(count))


@given(counts, sizes, st.booleans())
def test_a_step_has_exactly_its_pairs_and_says_how_many(pair_counts, size, shuffle):
    made = sampler(pair_counts, step=size[0], per_pack=size[1], shuffle=shuffle)
    steps = list(made)
    assert len(made) == len(steps)
    totals = [len(pairs_of(step)) for step in steps]
    assert totals[:-1] == [size[0]] * (len(steps) - 1)
    assert 0 < totals[-1] <= size[0]
    for step, total in zip(steps, totals, strict=True):
        assert len(set(pairs_of(step))) == total


@given(counts, sizes, st.booleans())
def test_only_a_single_group_may_be_more_than_a_pass_holds(pair_counts, size, shuffle):
    for step in sampler(pair_counts, step=size[0], per_pack=size[1], shuffle=shuffle):
        for plan in step:
            assert len(plan.shares) == 1 or len(pairs_of([plan])) <= size[1]


@given(counts, sizes, st.booleans())
def test_a_prompt_is_encoded_once_per_step(pair_counts, size, shuffle):
    for step in sampler(pair_counts, step=size[0], per_pack=size[1], shuffle=shuffle):
        groups = [index for plan in step for index, _ in plan.shares]
        assert len(groups) == len(set(groups))


@given(counts, sizes)
def test_neighbours_share_a_pass_while_they_fit(pair_counts, size):
    """No two passes of a step that follow one another could have been one."""
    for step in sampler(pair_counts, step=size[0], per_pack=size[1]):
        for plan, following in itertools.pairwise(step):
            assert len(pairs_of([plan])) + len(following.shares[0][1]) > size[1]


def test_without_shuffling_pairs_come_in_file_order():
    order = pairs_of(plan for step in sampler([2, 1, 3], shuffle=False, epoch=1) for plan in step)
    assert order == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]


def test_the_order_is_made_of_seed_and_epoch_alone():
    def order(**options):
        return pairs_of(plan for step in sampler([1] * 30, **options) for plan in step)

    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    torch.manual_seed(123)
    assert order(seed=1, epoch=2) == order(seed=1, epoch=2, step=7, per_pack=3)
    assert len({tuple(order(seed=1, epoch=epoch)) for epoch in range(4)}) == 4
    assert len({tuple(order(seed=seed)) for seed in range(0, 40, 10)}) == 4


def test_drawing_the_order_leaves_the_global_generator():
    before = torch.get_rng_state()
    list(sampler([1] * 8))
    assert torch.equal(torch.get_rng_state(), before)


# --- several processes -----------------------------------------------------------------------------------------------


@given(counts, sizes, st.booleans(), st.integers(1, 5))
def test_over_all_processes_every_pair_is_visited_once(pair_counts, size, shuffle, processes):
    dealt = [
        sampler(pair_counts, step=size[0], per_pack=size[1], shuffle=shuffle, rank=rank, world_size=processes)
        for rank in range(processes)
    ]
    visited = Counter(pair for made in dealt for step in made for pair in pairs_of(step))
    assert visited == Counter((i, pair) for i, count in enumerate(pair_counts) for pair in range(count))
    assert {len(made) for made in dealt} == {len(sampler(pair_counts, step=size[0], per_pack=size[1]))}


@given(counts, sizes, st.booleans(), st.integers(1, 5))
def test_every_process_makes_equally_many_passes(pair_counts, size, shuffle, processes):
    """As few as hold the step's; who has fewer gets empty ones."""
    options = {"step": size[0], "per_pack": size[1], "shuffle": shuffle}
    alone = sampler(pair_counts, **options)
    dealt = [sampler(pair_counts, **options, rank=rank, world_size=processes) for rank in range(processes)]
    for whole, *parts in zip(alone, *dealt, strict=True):
        assert {len(part) for part in parts} == {-(-len(whole) // processes)}
        together = [plan for part in parts for plan in part if plan.shares]
        assert sorted(plan.shares for plan in together) == sorted(plan.shares for plan in whole)


@given(st.lists(st.integers(1, 500), min_size=8, max_size=8))
def test_processes_have_about_equal_work(lengths):
    """Apart at most by the longest pass, which nobody can share."""
    work = [
        sum(lengths[index] for plan in step for index, _ in plan.shares)
        for rank in range(2)
        for step in sampler([1] * 8, step=8, per_pack=1, lengths=lengths, rank=rank, world_size=2)
    ]
    assert abs(work[0] - work[1]) <= max(lengths)


def test_the_longest_pass_is_dealt_first():
    lengths = [1, 2, 3, 4]  # from the shortest on, one process would get 4 and the other 6
    options = {"step": 4, "per_pack": 1, "lengths": lengths, "world_size": 2, "shuffle": False}
    dealt = [pairs_of(next(iter(sampler([1] * 4, **options, rank=rank)))) for rank in range(2)]
    assert [sum(lengths[index] for index, _ in pairs) for pairs in dealt] == [5, 5]


# --- passes filled by tokens -----------------------------------------------------------------------------------------

token_counts = st.lists(st.integers(1, 300), min_size=1, max_size=30)


@given(token_counts, st.integers(50, 400), st.integers(1, 3))
def test_a_pass_holds_at_most_its_tokens_or_one_group(lengths, limit, processes):
    made = [
        sampler([1] * len(lengths), step=8, tokens_per_pack=limit, lengths=lengths, rank=rank, world_size=processes)
        for rank in range(processes)
    ]
    passes = [plan for each in made for step in each for plan in step]
    assert all(len(p.shares) == 1 or sum(lengths[i] for i, _ in p.shares) <= limit for p in passes if p.shares)
    assert sorted(pair for plan in passes for pair in pairs_of([plan])) == [(i, 0) for i in range(len(lengths))]


@given(token_counts, st.integers(50, 400))
def test_the_pairs_of_a_step_do_not_depend_on_how_it_is_packed(lengths, limit):
    ones = [1] * len(lengths)
    by_tokens = sampler(ones, step=5, tokens_per_pack=limit, lengths=lengths)
    for ours, theirs in zip(by_tokens, sampler(ones, step=5), strict=True):
        assert sorted(pairs_of(ours)) == sorted(pairs_of(theirs))


@given(token_counts, st.integers(50, 400))
def test_no_two_passes_could_have_been_one(lengths, limit):
    for step in sampler([1] * len(lengths), step=len(lengths), tokens_per_pack=limit, lengths=lengths):
        sizes = [sum(lengths[index] for index, _ in plan.shares) for plan in step]
        assert all(one + other > limit for one, other in itertools.combinations(sizes, 2))


# --- what a batch holds ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    return tiny_policy()[2]


def test_a_batch_holds_only_the_responses_its_pairs_name(encoder):
    groups = [group(images=0, responses=(2, 3, 4, 5), seed=1, row=1), group(images=0, seed=2, row=2)]
    stored = [torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-5.0, -6.0])]
    chosen = groups[0].pairs.index(next(p for p in groups[0].pairs if (p.chosen, p.rejected) == (1, 3)))
    batches = PlannedBatches(groups, encoder)
    batches.ref_logps = stored
    batch, lost = batches[Plan(((0, (chosen,)), (1, (0,))))]
    assert lost == []
    lengths = [len(encoder.response_ids(groups[0].responses[i])) for i in (1, 3)]
    assert batch.responses.response_tokens.tolist()[:2] == lengths
    assert batch.ref_logps.tolist() == [-2.0, -4.0, -5.0, -6.0]
    assert batch.pairs.source_chosen.tolist() == [1, 0]
    assert batch.pairs.rows.tolist() == [1, 2]


def test_without_stored_numbers_a_batch_has_none(encoder):
    batch, _ = PlannedBatches([group(images=0)], encoder)[Plan(((0, (0,)),))]
    assert batch.ref_logps is None


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_gives_a_step_at_a_time(encoder, workers):
    groups = [group(images=0, seed=i, row=i + 1) for i in range(5)]
    made = sampler([1] * 5, step=3, per_pack=2, shuffle=True)
    loader = StepLoader(PlannedBatches(groups, encoder), made, workers=workers)
    loader.set_epoch(1)
    rows = [[row for batch in step.batches for row in batch.pairs.rows.tolist()] for step in loader]
    assert [len(step) for step in rows] == [3, 2]
    assert len(loader) == 2
    expected = sampler([1] * 5, step=3, per_pack=2, shuffle=True, epoch=1)
    assert rows == [[index + 1 for index, _ in pairs_of(step)] for step in expected]
    assert len(loader.dataset) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_went_bad_is_left_out_and_named(encoder, tmp_path, workers):
    groups = [group(images=1, seed=i, row=i + 1) for i in range(3)]
    groups[1] = replace(groups[1], images=(tmp_path / "gone.png",))
    loader = StepLoader(PlannedBatches(groups, encoder), sampler([1] * 3, step=3), workers=workers)
    (step,) = loader
    assert step.pairs == 2
    assert [row for batch in step.batches for row in batch.pairs.rows.tolist()] == [1, 3]
    assert [(finding.row, "gone.png" in finding.message) for finding in step.lost] == [(2, True)]


def test_stored_numbers_stay_with_their_responses_where_rows_are_left_out(encoder, tmp_path):
    groups = [group(images=i % 2, seed=i, row=i + 1) for i in range(4)]
    groups[1] = replace(groups[1], images=(tmp_path / "gone.png",))
    batches = PlannedBatches(groups, encoder)
    batches.ref_logps = [torch.tensor([-2.0 * i - 1, -2.0 * i - 2]) for i in range(4)]
    batches.ref_logps[2] = None  # there was nothing to compute it from
    batch, lost = batches[Plan(tuple((index, (0,)) for index in range(4)))]
    assert batch.pairs.rows.tolist() == [1, 4]
    assert batch.ref_logps.tolist() == [-1.0, -2.0, -7.0, -8.0]
    assert [finding.row for finding in lost] == [2, 3]


def test_a_model_is_tried_on_an_image_where_there_is_one_and_on_little_text(encoder):
    groups = [group(images=images, responses=(words, words), seed=seed) for seed, (images, words) in enumerate(SIZES)]
    tried = smallest(groups, encoder)
    assert tried.has_images
    assert torch.equal(tried.prompt_ids, encoder.encode(groups[2]).prompt_ids)
    assert not smallest(groups[:1], encoder).has_images


SIZES = [(0, 1), (1, 30), (1, 3), (2, 9)]  # images, words in a response


# --- a stand-in ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(encoder):
    """Batches of a group with an image, one without, and one whose image is gone; with a stand-in."""
    groups = [group(images=i % 2, seed=i, row=i + 1) for i in range(3)] + [group(images=1, seed=3, row=4)]
    groups[3] = replace(groups[3], images=(GOLDEN / "gone.png",))
    batches = PlannedBatches(groups, encoder)
    batches.ref_logps = [torch.tensor([-1.0 - i, -2.0 - i], dtype=torch.float64) for i in range(4)]
    batches.stand_in = encoder.encode(group(images=1, responses=(1, 1, 1), seed=9))
    return batches


def test_a_stand_in_joins_a_batch_without_an_image_and_no_pair_refers_to_it(mixed):
    batch, lost = mixed[Plan(((0, (0,)), (2, (0,))))]
    assert lost == []
    assert len(batch.responses.response_tokens) == 4 + 3
    assert len(batch.responses.vision["pixel_values"]) == len(mixed.stand_in.vision["pixel_values"])
    assert batch.pairs.rows.tolist() == [1, 3]
    assert {*batch.pairs.chosen.tolist(), *batch.pairs.rejected.tolist()} == {0, 1, 2, 3}
    assert batch.ref_logps.tolist() == [-1.0, -2.0, -3.0, -4.0, 0.0, 0.0, 0.0]


def test_a_stand_in_stays_away_where_there_is_an_image(mixed):
    batch, _ = mixed[Plan(((0, (0,)), (1, (0,))))]
    assert len(batch.responses.response_tokens) == len(batch.ref_logps) == 4


@pytest.mark.parametrize("shares", [(), ((3, (0,)),)], ids=["an empty plan", "a plan whose rows are lost"])
def test_a_stand_in_makes_up_for_nothing(mixed, shares):
    batch, lost = mixed[Plan(shares)]
    assert [finding.row for finding in lost] == [4] * len(shares)
    assert len(batch.responses.response_tokens) == len(batch.ref_logps) == 3
    assert len(batch.pairs.rows) == len(batch.pairs.chosen) == len(batch.pairs.files) == 0
    mixed.stand_in = None
    assert mixed[Plan(shares)] == (None, lost)


def test_a_stand_in_changes_neither_numbers_nor_gradients_of_the_others(mixed):
    model = tiny_policy(torch.float64)[0]
    set_text_attention(model, PACK_ATTENTION)

    def margins_and_gradients():
        batch, _ = mixed[Plan(((0, (0,)), (2, (0,))))]
        logps = response_logps(model, batch.responses)
        margins = logps[batch.pairs.chosen] - logps[batch.pairs.rejected]
        model.zero_grad()
        margins.square().sum().backward()
        return margins, [p.grad for p in model.model.language_model.parameters()]

    joined, gradients = margins_and_gradients()
    mixed.stand_in = None
    alone, expected = margins_and_gradients()
    # transformers computes this model's norms in float32 whatever its dtype.
    torch.testing.assert_close(joined, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)
