"""What is measured on the pairs of a step, where a loss or a reader depends on it."""

from dataclasses import fields

import pytest
import torch

from retyped import neg_log_sigmoid
from trainers import some_groups, trainer_of
from unidpo.losses import MPO, LossTerms, PairLogps
from unidpo.model.batches import Batch
from unidpo.model.encode import EncodedGroup
from unidpo.model.packs import index_pairs, pack
from unidpo.training.metrics import PairColumns
from worlds import group


def test_mpo_measures_rewards_from_the_mean_of_all_responses_so_far(tmp_path):
    seen = []
    trainer = trainer_of(
        tmp_path, some_groups(3), loss=MPO(), batch=(2, 1), max_steps=3, learning_rate=1e-3, on_pairs=seen.append
    )
    trainer.train()
    assert [len(step["row"]) for step in seen] == [2, 1, 2]
    rewards = [step["chosen_reward"] + step["rejected_reward"] for step in seen]
    shift = sum(map(sum, rewards[:2])) / (2 * 2 + 2 * 1)  # of two responses of each pair, the first step's zeros too
    assert abs(shift) > 1e-3
    for chosen, rejected, preference in zip(
        seen[2]["chosen_reward"], seen[2]["rejected_reward"], seen[2]["preference"], strict=True
    ):
        quality = neg_log_sigmoid(chosen - shift) + neg_log_sigmoid(shift - rejected)
        assert preference == pytest.approx(0.8 * neg_log_sigmoid(chosen - rejected) + 0.2 * quality, abs=1e-6)


def measured(device="cpu"):
    """A batch of one pair, and what a loss makes of it, the floats as they may come: of two widths."""
    one = group(images=0, responses=(3, 4), row=7)
    ids = torch.arange(3)
    encoded = EncodedGroup(ids, ids[None], ids * 0, (torch.arange(3), torch.arange(4)), (0, 0), {})
    batch = Batch(pack([encoded]), index_pairs([(one, one.pairs)]), None)
    numbers = iter(range(100))

    def number(dtype=torch.float32):
        return torch.tensor([next(numbers) + 0.1], dtype=dtype, device=device, requires_grad=True)

    pairs = PairLogps(number(), number(), number(torch.float64), number(torch.float64))
    return batch, pairs, LossTerms(*(number() for _ in fields(LossTerms)))


def test_the_numbers_of_a_step_are_waited_for_once(monkeypatch):
    columns = PairColumns()
    batch, pairs, terms = measured("meta")
    columns.add(batch, pairs, terms)  # none of these numbers can be had
    columns, waits, tolist = PairColumns(), [], torch.Tensor.tolist
    for _ in range(2):
        columns.add(*measured())
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append(tensor.shape) or tolist(tensor))
    taken = columns.take()
    assert waits == [(4 + len(fields(LossTerms)), 2)]
    monkeypatch.undo()
    batch, pairs, terms = measured()
    computed = {f.name: getattr(terms, f.name) for f in fields(terms)}
    computed |= {f"{name}_logps": getattr(pairs, f"{name}_logps") for name in ("chosen", "ref_chosen", "ref_rejected")}
    for name, numbers in computed.items():
        assert taken[name] == numbers.tolist() * 2  # not rounded
    assert taken["row"] == [7, 7]
    assert taken["rejected_tokens"] == [4, 4]
    assert taken["chosen_score"] == [5.0, 5.0]


def test_a_loss_without_a_reference_has_no_numbers_of_one():
    batch, pairs, terms = measured()
    columns = PairColumns()
    columns.add(batch, PairLogps(pairs.chosen_logps, pairs.rejected_logps), terms)
    taken = columns.take()
    assert taken["ref_chosen_logps"] == taken["ref_rejected_logps"] == [None]
    assert taken["chosen_logps"] == pairs.chosen_logps.tolist()
