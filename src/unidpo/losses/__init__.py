"""The objective and its baselines: pure functions of tensors with one entry per pair.

A loss is a frozen dataclass of hyper-parameters. Called with `PairLogps` it returns `LossTerms`, every term kept for
logging; the training loss is the mean of `LossTerms.loss` over the pairs of the global batch. Everything is computed
in float32, or in float64 where the inputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from unidpo.losses.scored import MMDPO, ODPO, RPO, UniDPO
from unidpo.losses.terms import LossTerms, PairLogps, PreferenceLoss
from unidpo.losses.unscored import DPO, IPO, MPO, WPO, SimPO

__all__ = [
    "DPO",
    "IPO",
    "LOSSES",
    "MMDPO",
    "MPO",
    "ODPO",
    "RPO",
    "WPO",
    "LossTerms",
    "PairLogps",
    "PreferenceLoss",
    "SimPO",
    "UniDPO",
    "make_loss",
]

LOSSES: Mapping[str, Callable[..., PreferenceLoss]] = {
    UniDPO.name: UniDPO,
    MMDPO.name: MMDPO,
    ODPO.name: ODPO,
    RPO.name: RPO,
    DPO.name: DPO,
    SimPO.name: SimPO,
    IPO.name: IPO,
    MPO.name: MPO,
    WPO.name: WPO,
}
"""Losses by the name a recipe gives them."""


def make_loss(name: str, **hyper_parameters: Any) -> PreferenceLoss:
    """The loss a recipe's `loss` section describes. Raises `KeyError` for a name that is not in `LOSSES`."""
    return LOSSES[name](**hyper_parameters)
