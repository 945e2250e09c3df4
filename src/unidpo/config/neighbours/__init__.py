"""Other trainers' configurations, key by key: one table for each, the source of conversions and of hints in errors."""

from __future__ import annotations

from collections.abc import Mapping

from unidpo.config.neighbours.llamafactory import LLAMA_FACTORY
from unidpo.config.neighbours.swift import MS_SWIFT
from unidpo.config.neighbours.table import Neighbour
from unidpo.config.neighbours.trl import TRL

NEIGHBOURS: Mapping[str, Neighbour] = {"llamafactory": LLAMA_FACTORY, "trl": TRL, "swift": MS_SWIFT}
"""By the word of their command, `unidpo recipe from-<word>`."""

__all__ = ["LLAMA_FACTORY", "MS_SWIFT", "NEIGHBOURS", "TRL", "Neighbour"]
