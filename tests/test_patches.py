"""A convolution whose input is one kernel large, as a matrix product: the same numbers, by the same weights."""

import pytest
import torch

from unidpo.model.load import load_policy
from unidpo.model.patches import PatchProduct, multiply_patches
from worlds import GOLDEN


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_gives_the_convolutions_values_and_gradients(bias, monkeypatch):
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4), bias=bias, dtype=torch.float64)
    patches = torch.randn(5, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = [patches, *conv.parameters()]
    out = conv(patches)
    expected = [out, *torch.autograd.grad(out.square().sum(), weights)]
    multiply_patches(conv)
    monkeypatch.setattr(torch.nn.Conv3d, "forward", None)
    out = conv(patches)
    found = [out, *torch.autograd.grad(out.square().sum(), weights)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_what_is_larger_than_the_kernel_is_convolved():
    conv = torch.nn.Conv3d(1, 2, (1, 2, 2), stride=(1, 2, 2))
    image = torch.randn(1, 1, 1, 4, 4)
    expected = conv(image)
    multiply_patches(conv)
    assert torch.equal(conv(image), expected)


def test_a_policy_multiplies_and_its_weights_keep_their_names():
    model = load_policy(GOLDEN / "model")
    assert type(model.model.visual.patch_embed.proj) is PatchProduct
    assert "model.visual.patch_embed.proj.weight" in model.state_dict()
    assert model.model.visual.patch_embed.proj.weight.dim() == 5


@pytest.mark.parametrize("options", [{"padding": 1}, {"groups": 3}], ids=str)
def test_convolutions_of_another_kind_stay(options):
    conv = torch.nn.Conv3d(3, 6, 2, **options)
    multiply_patches(conv)
    assert type(conv) is torch.nn.Conv3d
