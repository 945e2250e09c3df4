"""Recipes: one YAML file per run, with `section.key=value` overrides, validated and resolved. Imports no torch."""

from unidpo.config.loading import load_recipe, recipe_from
from unidpo.config.schema import (
    DataSection,
    DPOSection,
    LoraSection,
    LossSection,
    ModelPart,
    ModelSection,
    Recipe,
    SimPOSection,
    TrainSection,
    UniDPOSection,
)

__all__ = [
    "DPOSection",
    "DataSection",
    "LoraSection",
    "LossSection",
    "ModelPart",
    "ModelSection",
    "Recipe",
    "SimPOSection",
    "TrainSection",
    "UniDPOSection",
    "load_recipe",
    "recipe_from",
]
