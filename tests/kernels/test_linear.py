"""Skinny linears against float64, with sizes that no tile divides."""

import pytest
import torch

from mainsail_kernels.linear import linear
from mainsail_kernels.tuned import LinearConfig, override


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17])
@pytest.mark.parametrize(("num_out", "num_in"), [(33, 80), (64, 128), (5, 200)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(rows, num_out, num_in, with_bias, close, device, dtype):
    x = torch.randn(rows, num_in).to(device, dtype)
    weight = torch.randn(num_out, num_in).to(device, dtype)
    bias = torch.randn(num_out).to(device, dtype) if with_bias else None
    with override(LinearConfig(16, 64, 4, 2)):
        out = linear(x, weight, bias)
    truth = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    close(out, truth)


def test_shapes_that_do_not_fit_are_refused(device, dtype):
    with pytest.raises(ValueError, match="linear: x"):
        linear(torch.ones(2, 3, device=device, dtype=dtype), torch.ones(4, 5, device=device, dtype=dtype))
