"""Which pairs make a step, which of them share a forward pass, and what a batch holds."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from unidpo.model.attention import PACK_ATTENTION, set_text_attention
from unidpo.model.batches import BatchMaker
from unidpo.model.logps import response_logps
from unidpo.model.pack_check import smallest
from unidpo.model.transfer import Parcel
from unidpo.training.reading import StepLoader, StepReader
from unidpo.training.steps import Dealer, StepSampler
from worlds import GOLDEN, group, tiny_policy

counts = st.lists(st.integers(1, 12), min_size=1, max_size=20)
sizes = st.tuples(st.integers(1, 16), st.integers(1, 6))


class Dealt:
    """The micro-batches of each step of an epoch, for one process."""

    def __init__(self, pair_counts, *, step=4, max_pairs=2, lengths=None, shuffle=True, seed=3, epoch=0, **dealing):
        self.steps = StepSampler(pair_counts, pairs_per_step=step, shuffle=shuffle, seed=seed)
        self.steps.set_epoch(epoch)
        self.dealer = Dealer(max_pairs, **dealing)
        self.tokens = lambda share: len(share[1]) if lengths is None else lengths[share[0]]

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        return (self.dealer.deal(step, self.tokens) for step in self.steps)


def pairs_of(micro_batches):
    """(group, pair) of every share of some micro-batches, in order."""
    return [(index, pair) for shares in micro_batches for index, pairs in shares for pair in pairs]


@given(counts, sizes, st.booleans(), st.integers(0, 5))
def test_an_epoch_visits_every_pair_once(pair_counts, size, shuffle, epoch):
    made = Dealt(pair_counts, step=size[0], max_pairs=size[1], shuffle=shuffle, epoch=epoch)
    visited = Counter(pair for step in made for pair in pairs_of(step))
    assert visited == Counter((i, pair) for i, count in enumerate(pair_counts) for pair in range(count))


@given(counts, sizes, st.booleans())
def test_a_step_has_exactly_its_pairs_and_says_how_many(pair_counts, size, shuffle):
    made = Dealt(pair_counts, step=size[0], max_pairs=size[1], shuffle=shuffle)
    steps = list(made)
    assert len(made) == len(steps)
    totals = [len(pairs_of(step)) for step in steps]
    assert totals[:-1] == [size[0]] * (len(steps) - 1)
    assert 0 < totals[-1] <= size[0]
    for step, total in zip(steps, totals, strict=True):
        assert len(set(pairs_of(step))) == total


@given(counts, sizes, st.booleans())
def test_only_a_single_group_may_be_more_than_a_micro_batch_holds(pair_counts, size, shuffle):
    for step in Dealt(pair_counts, step=size[0], max_pairs=size[1], shuffle=shuffle):
        for shares in step:
            assert len(shares) == 1 or len(pairs_of([shares])) <= size[1]


@given(counts, sizes, st.booleans())
def test_a_prompt_is_encoded_once_per_step(pair_counts, size, shuffle):
    for step in Dealt(pair_counts, step=size[0], max_pairs=size[1], shuffle=shuffle):
        groups = [index for shares in step for index, _ in shares]
        assert len(groups) == len(set(groups))


@given(counts, sizes)
def test_neighbours_share_a_micro_batch_while_they_fit(pair_counts, size):
    """No two micro-batches of a step that follow one another could have been one."""
    for step in Dealt(pair_counts, step=size[0], max_pairs=size[1]):
        for shares, following in itertools.pairwise(step):
            assert len(pairs_of([shares])) + len(following[0][1]) > size[1]


def test_without_shuffling_pairs_come_in_file_order():
    order = pairs_of(shares for step in Dealt([2, 1, 3], shuffle=False, epoch=1) for shares in step)
    assert order == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2)]


def test_the_order_is_made_of_seed_and_epoch_alone():
    def order(**options):
        return pairs_of(shares for step in Dealt([1] * 30, **options) for shares in step)

    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    torch.manual_seed(123)
    assert order(seed=1, epoch=2) == order(seed=1, epoch=2, step=7, max_pairs=3)
    assert len({tuple(order(seed=1, epoch=epoch)) for epoch in range(4)}) == 4
    assert len({tuple(order(seed=seed)) for seed in range(0, 40, 10)}) == 4


def test_drawing_the_order_leaves_the_global_generator():
    before = torch.get_rng_state()
    list(Dealt([1] * 8))
    assert torch.equal(torch.get_rng_state(), before)


# --- several processes -----------------------------------------------------------------------------------------------


@given(counts, sizes, st.booleans(), st.integers(1, 5))
def test_over_all_processes_every_pair_is_visited_once(pair_counts, size, shuffle, processes):
    dealt = [
        Dealt(pair_counts, step=size[0], max_pairs=size[1], shuffle=shuffle, rank=rank, world_size=processes)
        for rank in range(processes)
    ]
    visited = Counter(pair for made in dealt for step in made for pair in pairs_of(step))
    assert visited == Counter((i, pair) for i, count in enumerate(pair_counts) for pair in range(count))
    assert {len(made) for made in dealt} == {len(Dealt(pair_counts, step=size[0], max_pairs=size[1]))}


@given(counts, sizes, st.booleans(), st.integers(1, 5))
def test_every_process_makes_equally_many_micro_batches(pair_counts, size, shuffle, processes):
    """As few as hold the step's; who has fewer gets empty ones."""
    options = {"step": size[0], "max_pairs": size[1], "shuffle": shuffle}
    alone = Dealt(pair_counts, **options)
    dealt = [Dealt(pair_counts, **options, rank=rank, world_size=processes) for rank in range(processes)]
    for whole, *parts in zip(alone, *dealt, strict=True):
        assert {len(part) for part in parts} == {-(-len(whole) // processes)}
        assert sorted(shares for part in parts for shares in part if shares) == sorted(whole)


@given(st.lists(st.integers(1, 500), min_size=8, max_size=8))
def test_processes_have_about_equal_work(lengths):
    """Apart at most by the longest micro-batch, which nobody can share."""
    work = [
        sum(lengths[index] for shares in step for index, _ in shares)
        for rank in range(2)
        for step in Dealt([1] * 8, step=8, max_pairs=1, lengths=lengths, rank=rank, world_size=2)
    ]
    assert abs(work[0] - work[1]) <= max(lengths)


def test_the_longest_micro_batch_is_dealt_first():
    lengths = [1, 2, 3, 4]  # from the shortest on, one process would get 4 and the other 6
    options = {"step": 4, "max_pairs": 1, "lengths": lengths, "world_size": 2, "shuffle": False}
    dealt = [pairs_of(next(iter(Dealt([1] * 4, **options, rank=rank)))) for rank in range(2)]
    assert [sum(lengths[index] for index, _ in pairs) for pairs in dealt] == [5, 5]


# --- micro-batches filled by tokens -----------------------------------------------------------------------------------

token_counts = st.lists(st.integers(1, 300), min_size=1, max_size=30)


@given(token_counts, st.integers(50, 400), st.integers(1, 3))
def test_a_micro_batch_holds_at_most_its_tokens_or_one_group(lengths, limit, processes):
    made = [
        Dealt([1] * len(lengths), step=8, max_tokens=limit, lengths=lengths, rank=rank, world_size=processes)
        for rank in range(processes)
    ]
    micro_batches = [shares for each in made for step in each for shares in step]
    assert all(len(m) == 1 or sum(lengths[i] for i, _ in m) <= limit for m in micro_batches if m)
    assert sorted(pairs_of(micro_batches)) == [(i, 0) for i in range(len(lengths))]


@given(token_counts, st.integers(50, 400))
def test_the_pairs_of_a_step_do_not_depend_on_how_it_is_packed(lengths, limit):
    ones = [1] * len(lengths)
    by_tokens = Dealt(ones, step=5, max_tokens=limit, lengths=lengths)
    for ours, theirs in zip(by_tokens, Dealt(ones, step=5), strict=True):
        assert sorted(pairs_of(ours)) == sorted(pairs_of(theirs))


@given(token_counts, st.integers(50, 400))
def test_no_two_micro_batches_could_have_been_one(lengths, limit):
    for step in Dealt([1] * len(lengths), step=len(lengths), max_tokens=limit, lengths=lengths):
        sizes = [sum(lengths[index] for index, _ in shares) for shares in step]
        assert all(one + other > limit for one, other in itertools.combinations(sizes, 2))


# --- what a batch holds ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    return tiny_policy()[2]


def test_a_batch_holds_only_the_responses_its_pairs_name(encoder):
    groups = [group(images=0, responses=(2, 3, 4, 5), seed=1, row=1), group(images=0, seed=2, row=2)]
    stored = [torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-5.0, -6.0])]
    chosen = groups[0].pairs.index(next(p for p in groups[0].pairs if (p.chosen, p.rejected) == (1, 3)))
    batch, lost = BatchMaker(groups, encoder, ref_logps=stored).batch([(0, (chosen,)), (1, (0,))])
    assert lost == []
    lengths = [len(encoder.response_ids(groups[0].responses[i])) for i in (1, 3)]
    assert batch.responses.response_tokens.tolist()[:2] == lengths
    assert batch.ref_logps.tolist() == [-2.0, -4.0, -5.0, -6.0]
    assert batch.pairs.source_chosen == (1, 0)
    assert batch.pairs.rows == (1, 2)


def test_without_stored_numbers_a_batch_has_none(encoder):
    batch, _ = BatchMaker([group(images=0)], encoder).batch([(0, (0,))])
    assert batch.ref_logps is None


def reader(groups, encoder, dealt, **options):
    batches, device = BatchMaker(groups, encoder), torch.device("cpu")
    return StepReader(batches, dealt.dealer, dealt.tokens, **{"device": device} | options)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_a_step_at_a_time(encoder, workers):
    groups = [group(images=0, seed=i, row=i + 1) for i in range(5)]
    dealt = Dealt([1] * 5, step=3)
    loader = StepLoader(dealt.steps)
    loader.set_epoch(1)
    steps = reader(groups, encoder, dealt, workers=workers).read(loader)
    rows = [[row for batch in step.batches for row in batch.pairs.rows] for step in steps]
    assert [len(step) for step in rows] == [3, 2]
    assert len(loader) == 2
    expected = Dealt([1] * 5, step=3, epoch=1)
    assert rows == [[index + 1 for index, _ in pairs_of(step)] for step in expected]
    assert len(loader.dataset) == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_went_bad_is_left_out_and_named(encoder, tmp_path, workers):
    groups = [group(images=1, seed=i, row=i + 1) for i in range(3)]
    groups[1] = replace(groups[1], images=(tmp_path / "gone.png",))
    dealt = Dealt([1] * 3, step=3)
    (step,) = reader(groups, encoder, dealt, workers=workers).read(dealt.steps)
    assert step.pairs == 2
    assert [row for batch in step.batches for row in batch.pairs.rows] == [1, 3]
    assert [(finding.row, "gone.png" in finding.message) for finding in step.lost] == [(2, True)]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_micro_batches_one_by_one_each_in_one_buffer(encoder, monkeypatch, workers):
    groups = [group(images=1, seed=i, row=i + 1) for i in range(8)]
    dealt = Dealt([1] * 8, step=4, max_pairs=1)
    items = []
    opened = Parcel.open
    monkeypatch.setattr(Parcel, "open", lambda item: items.append(item.buffer.nbytes) or opened(item))
    # A device without memory: what goes to one is laid into a buffer.
    steps = [*reader(groups, encoder, dealt, workers=workers, device=torch.device("meta")).read(dealt.steps)]
    assert [len(step.batches) for step in steps] == [4, 4]
    assert len(items) == 8
    alone, _ = BatchMaker(groups, encoder).batch([(0, (0,))])
    assert max(items) < 1.2 * Parcel.of(alone).buffer.nbytes
    for batch in (batch for step in steps for batch in step.batches):
        tensors = [batch.responses.input_ids, batch.responses.vision["pixel_values"], batch.pairs.chosen_scores]
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_workers_read_one_step_ahead_and_no_further(encoder, monkeypatch):
    read_ahead = []

    class Recording(DataLoader):
        def __init__(self, *args, **options):
            read_ahead.append(options["prefetch_factor"] * options["num_workers"])
            super().__init__(*args, **options)

    monkeypatch.setattr("unidpo.training.reading.DataLoader", Recording)
    groups = [group(images=0, seed=i, row=i + 1) for i in range(40)]
    dealt = Dealt([1] * 40, step=8, max_pairs=1, shuffle=False)
    drawn = []
    steps = reader(groups, encoder, dealt, workers=2).read(drawn.append(step) or step for step in dealt.steps)
    for number, step in enumerate(steps, start=1):
        assert step.pairs == 8
        assert min(number + 1, 5) <= len(drawn) <= number + 2
    assert read_ahead == [8]


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_generator(encoder, workers):
    dealt = Dealt([1] * 2, step=1)
    before = torch.get_rng_state()
    list(reader([group(images=0)] * 2, encoder, dealt, workers=workers).read(dealt.steps))
    assert torch.equal(torch.get_rng_state(), before)


def test_stored_numbers_stay_with_their_responses_where_rows_are_left_out(encoder, tmp_path):
    groups = [group(images=i % 2, seed=i, row=i + 1) for i in range(4)]
    groups[1] = replace(groups[1], images=(tmp_path / "gone.png",))
    stored = [torch.tensor([-2.0 * i - 1, -2.0 * i - 2]) for i in range(4)]
    stored[2] = None  # there was nothing to compute it from
    batch, lost = BatchMaker(groups, encoder, ref_logps=stored).batch([(index, (0,)) for index in range(4)])
    assert batch.pairs.rows == (1, 4)
    assert batch.ref_logps.tolist() == [-1.0, -2.0, -7.0, -8.0]
    assert [finding.row for finding in lost] == [2, 3]


def test_a_model_is_tried_on_an_image_where_there_is_one_and_on_little_text(encoder):
    groups = [group(images=images, responses=(words, words), seed=seed) for seed, (images, words) in enumerate(SIZES)]
    tried = smallest(groups, encoder)
    assert tried.has_images
    assert torch.equal(tried.prompt_ids, encoder.encode(groups[2]).prompt_ids)
    assert not smallest(groups[:1], encoder).has_images


SIZES = [(0, 1), (1, 30), (1, 3), (2, 9)]  # images, words in a response


# --- a dummy group ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(encoder):
    """Batches of a group with an image, one without, and one whose image is gone; with a dummy group."""
    groups = [group(images=i % 2, seed=i, row=i + 1) for i in range(3)] + [group(images=1, seed=3, row=4)]
    groups[3] = replace(groups[3], images=(GOLDEN / "gone.png",))
    stored = [torch.tensor([-1.0 - i, -2.0 - i], dtype=torch.float64) for i in range(4)]
    dummy_group = encoder.encode(group(images=1, responses=(1, 1, 1), seed=9))
    return BatchMaker(groups, encoder, ref_logps=stored, dummy_group=dummy_group)


def test_a_dummy_group_joins_a_batch_without_an_image_and_no_pair_refers_to_it(mixed):
    batch, lost = mixed.batch([(0, (0,)), (2, (0,))])
    assert lost == []
    assert len(batch.responses.response_tokens) == 4 + 3
    assert len(batch.responses.vision["pixel_values"]) == len(mixed.dummy_group.vision["pixel_values"])
    assert batch.pairs.rows == (1, 3)
    assert {*batch.pairs.chosen.tolist(), *batch.pairs.rejected.tolist()} == {0, 1, 2, 3}
    assert batch.ref_logps.tolist() == [-1.0, -2.0, -3.0, -4.0, 0.0, 0.0, 0.0]


def test_a_dummy_group_stays_away_where_there_is_an_image(mixed):
    batch, _ = mixed.batch([(0, (0,)), (1, (0,))])
    assert len(batch.responses.response_tokens) == len(batch.ref_logps) == 4


@pytest.mark.parametrize("shares", [(), ((3, (0,)),)], ids=["no share", "shares whose rows are lost"])
def test_a_dummy_group_makes_up_for_nothing(mixed, shares):
    batch, lost = mixed.batch(shares)
    assert [finding.row for finding in lost] == [4] * len(shares)
    assert len(batch.responses.response_tokens) == len(batch.ref_logps) == 3
    assert len(batch.pairs.rows) == len(batch.pairs.chosen) == len(batch.pairs.files) == 0
    assert replace(mixed, dummy_group=None).batch(shares) == (None, lost)


def test_a_dummy_group_changes_neither_numbers_nor_gradients_of_the_others(mixed):
    model = tiny_policy(torch.float64)[0]
    set_text_attention(model, PACK_ATTENTION)

    def margins_and_gradients(batches):
        batch, _ = batches.batch([(0, (0,)), (2, (0,))])
        logps = response_logps(model, batch.responses)
        margins = logps[batch.pairs.chosen] - logps[batch.pairs.rejected]
        model.zero_grad()
        margins.square().sum().backward()
        return margins, [p.grad for p in model.model.language_model.parameters()]

    joined, gradients = margins_and_gradients(mixed)
    alone, expected = margins_and_gradients(replace(mixed, dummy_group=None))
    # transformers computes this model's norms in float32 whatever its dtype.
    torch.testing.assert_close(joined, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)
