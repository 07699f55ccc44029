"""A product that is added to a sum has the rounding of both, and no more."""

import pytest
import torch

from fastbert.kernels.encoder_layer.products import add_product

pytestmark = pytest.mark.no_launch


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 17])
def test_a_product_is_summed_up_first(rows):
    """On the CPU, where addmm adds the terms of so few rows to the sum one by one."""
    total, a, b = torch.randn(rows, 64), torch.randn(rows, 256), torch.randn(256, 64)
    expected = total + torch.mm(a, b)
    add_product(total, a, b)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_product_of_16_bits_joins_a_sum_of_32(dtype):
    a, b = torch.randn(3, 16).to(dtype), torch.randn(16, 8).to(dtype)
    total = torch.ones(3, 8)
    add_product(total, a, b)
    torch.testing.assert_close(total, 1.0 + torch.mm(a, b).float())
