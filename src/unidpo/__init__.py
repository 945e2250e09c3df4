"""Preference training for vision-language models on scored pairs.

The names below are imported when they are first used, so that `import unidpo` (and `unidpo --help`) needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unidpo.data.formats import load_pairs
    from unidpo.data.pairs import Message, Pair, PromptGroup, Response
    from unidpo.losses import DPO, IPO, MMDPO, MPO, ODPO, RPO, SimPO, UniDPO
    from unidpo.model.load import load_policy, load_processor
    from unidpo.training.trainer import PreferenceTrainer

_HOMES = {
    **dict.fromkeys(["DPO", "IPO", "MMDPO", "MPO", "ODPO", "RPO", "SimPO", "UniDPO"], "losses"),
    "Message": "data.pairs",
    "Pair": "data.pairs",
    "PromptGroup": "data.pairs",
    "Response": "data.pairs",
    "load_pairs": "data.formats",
    "load_policy": "model.load",
    "load_processor": "model.load",
    "PreferenceTrainer": "training.trainer",
}
__all__ = [
    "DPO",
    "IPO",
    "MMDPO",
    "MPO",
    "ODPO",
    "RPO",
    "Message",
    "Pair",
    "PreferenceTrainer",
    "PromptGroup",
    "Response",
    "SimPO",
    "UniDPO",
    "load_pairs",
    "load_policy",
    "load_processor",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
