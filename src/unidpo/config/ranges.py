"""What values the arguments of transformers' trainer take, where their types do not say it.

Outside of these transformers, torch or numpy fail late, with an error that names no key, or do something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from unidpo.errors import shown

MANY = 10**9
"""More of anything that is counted is a slip of the keyboard."""


def _all_or_some(value: int) -> int:
    if value != -1 and not 0 < value <= MANY:
        raise ValueError(
            f"must be a number of steps from 1 to {MANY}, or left out to go by `num_train_epochs`, not {value}"
        )
    return value


def _pairs_of_settings(value: str) -> str:
    if not all(part.count("=") == 1 and part.strip(" =") == part.strip() for part in value.split(",")):
        raise ValueError(f"must be settings of the optimizer such as `a=1,b=2`, not {shown(value)}")
    return value


RANGES: Mapping[str, Any] = {
    "adam_beta1": Field(ge=0, lt=1),
    "adam_beta2": Field(ge=0, lt=1),
    "adam_epsilon": Field(ge=0, le=1),
    "data_seed": Field(ge=0, lt=2**32),
    "dataloader_num_workers": Field(ge=0, le=1024),
    "dataloader_prefetch_factor": Field(ge=1, le=1024),
    "ddp_bucket_cap_mb": Field(ge=1, le=1_000_000),
    "ddp_timeout": Field(ge=1, le=MANY),
    "eval_delay": Field(ge=0, le=MANY),
    "eval_steps": Field(gt=0, le=MANY),
    "gradient_accumulation_steps": Field(ge=1, le=MANY),
    "max_steps": AfterValidator(_all_or_some),
    "optim_args": AfterValidator(_pairs_of_settings),
}
"""By name; `TrainSection` holds those of the arguments that have a default of ours."""


def within_range(name: str, kind: Any) -> Any:
    """A plain type, narrowed to what the argument `name` takes."""
    return Annotated[kind, RANGES[name]] if name in RANGES and kind in (int, float, str) else kind
