"""What graphics cards can do at most, by the data sheets of their makers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from unidpo.errors import UserError, did_you_mean

UTILISATION = 0.4
"""Share of a card's peak that training is assumed to reach where no rate was measured."""


@dataclass(frozen=True, slots=True)
class GPU:
    """A graphics card.

    Attributes:
        tflops: dense bfloat16 matrix products with float32 sums at their peak, in 10¹² floating-point operations a
            second.
        memory: in GB (10⁹ bytes), as sold.
    """

    name: str
    tflops: float
    memory: int


GPUS = (
    GPU("L4", 121, 24),
    GPU("A10", 125, 24),
    GPU("RTX 3090", 71, 24),
    GPU("RTX 4090", 165, 24),
    GPU("RTX 5090", 209, 32),
    GPU("A100 40GB", 312, 40),
    GPU("A6000", 155, 48),
    GPU("L40S", 362, 48),
    GPU("A100", 312, 80),
    GPU("H100 PCIe", 756, 80),
    GPU("H100", 989, 80),
    GPU("H200", 989, 141),
    GPU("B200", 2250, 180),
    GPU("MI300X", 1307, 192),
)


def gpu_by_name(name: str) -> GPU:
    """The card of this name, however it is spelled. Raises `UserError` with those that are known."""
    known = {_plain(gpu.name): gpu for gpu in GPUS}
    wanted = _plain(name)
    if wanted not in known:
        listed = ", ".join(gpu.name for gpu in GPUS)
        raise UserError(
            f"--gpu {name}: no such card in the table ({listed}){did_you_mean(wanted, known)}; "
            "for any other give --tflops, what it reaches, or --rate"
        )
    return known[wanted]


def _plain(name: str) -> str:
    return re.sub("nvidia|geforce|amd|sxm|80gb|[^a-z0-9]", "", name.lower())
