"""Recipes: one YAML file per run, with `section.key=value` overrides, validated and resolved. Imports no torch."""

from unidpo.config.converting import Converted, recipe_from_trl_config
from unidpo.config.loading import load_recipe, recipe_from
from unidpo.config.schema import (
    DataSection,
    EvalSection,
    LoraSection,
    ModelSection,
    Recipe,
    TrainSection,
)
from unidpo.config.sweep import SweepRun, is_sweep, load_sweep

__all__ = [
    "Converted",
    "DataSection",
    "EvalSection",
    "LoraSection",
    "ModelSection",
    "Recipe",
    "SweepRun",
    "TrainSection",
    "is_sweep",
    "load_recipe",
    "load_sweep",
    "recipe_from",
    "recipe_from_trl_config",
]
