"""What the tests of losses share: the logistic function in plain floats, and pairs made of columns of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from unidpo.losses import LossTerms, PairLogps, PreferenceLoss

COUNTS = ("chosen_tokens", "rejected_tokens")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def neg_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))


def pair_logps(
    *, dtype: torch.dtype = torch.float64, reward_shift: float | None = None, **columns: Sequence[float]
) -> PairLogps:
    """Pairs of columns of numbers by the name of the field; gradients as in training."""
    tensors = {
        name: torch.tensor(column, dtype=torch.long if name in COUNTS else dtype) for name, column in columns.items()
    }
    for name in ("chosen_logps", "rejected_logps"):
        tensors[name].requires_grad_()
    shift = None if reward_shift is None else torch.tensor(reward_shift, dtype=dtype)
    return PairLogps(**tensors, reward_shift=shift)


def one_pair(loss: PreferenceLoss, **values: float) -> tuple[LossTerms, float, float]:
    """A loss of a single pair, with its derivatives by `chosen_logps` and `rejected_logps`."""
    shift = values.pop("reward_shift", None)
    pairs = pair_logps(reward_shift=shift, **{name: [value] for name, value in values.items()})
    terms = loss(pairs)
    terms.loss.sum().backward()
    assert pairs.chosen_logps.grad is not None
    assert pairs.rejected_logps.grad is not None
    return terms, pairs.chosen_logps.grad.item(), pairs.rejected_logps.grad.item()
