"""The first layer of Qwen's vision towers as what it is: a matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class PatchProduct(torch.nn.Conv3d):
    """A convolution over patches that are each as large as its kernel, of which it sees nothing but the whole.

    Its weight stays as it is, and its name too. transformers' own (`fusion_config`) changes both, for every model of
    the class that is loaded in the process.
    """

    def forward(self, input: Float[Tensor, "patches channels frames height width"]) -> Tensor:  # noqa: A002
        if input.shape[2:] != self.kernel_size:
            return super().forward(input)
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


def multiply_patches(model: torch.nn.Module) -> None:
    """Let convolutions in three dimensions without padding multiply what is as large as their kernel."""
    for module in model.modules():
        if type(module) is not torch.nn.Conv3d:
            continue
        if (module.groups, module.dilation, any(module.padding)) == (1, (1, 1, 1), False):
            module.__class__ = PatchProduct
