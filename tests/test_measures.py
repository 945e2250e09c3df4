"""What is measured on the pairs of a step, where a loss or a reader depends on it."""

import pytest

from retyped import neg_log_sigmoid
from trainers import some_groups, trainer_of
from unidpo.losses import MPO


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
