"""The objective and its baselines: what is learned from a pair, one entry per pair.

A loss is a class of hyper-parameters. Called with `PairLogps` it returns `LossTerms`, every term kept for logging; the
training loss is the mean of `LossTerms.loss` over the pairs of the global batch. torch is imported with the first call
or with `PairLogps`, not with the losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from unidpo.losses.base import PreferenceLoss
from unidpo.losses.scored import MMDPO, ODPO, RPO, UniDPO
from unidpo.losses.unscored import DPO, IPO, MPO, SimPO

if TYPE_CHECKING:
    from unidpo.losses.terms import LossTerms, PairLogps

__all__ = [
    "DPO",
    "IPO",
    "LOSSES",
    "MMDPO",
    "MPO",
    "ODPO",
    "RPO",
    "LossTerms",
    "PairLogps",
    "PreferenceLoss",
    "SimPO",
    "UniDPO",
]

LOSSES: Mapping[str, type[PreferenceLoss]] = {
    loss.model_fields["name"].default: loss for loss in PreferenceLoss.__subclasses__()
}
"""Every loss of this package by the name a recipe gives it."""


def __getattr__(name: str) -> Any:
    if name not in ("LossTerms", "PairLogps"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unidpo.losses import terms

    return getattr(terms, name)
