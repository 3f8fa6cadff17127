"""Skinny linears against float64, with sizes that no tile divides."""

import pytest
import torch

from mainsail_kernels import linear_hopper, reference
from mainsail_kernels.linear import gated_linear, linear
from mainsail_kernels.tuned import LinearConfig, override


@pytest.mark.parametrize("rows", [1, 2, 16, 33])
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("num_out", "num_in"), [(33, 80), (64, 128), (5, 200)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(rows, split, num_out, num_in, with_bias, close, device, dtype):
    x = torch.randn(rows, num_in).to(device, dtype)
    weight = torch.randn(num_out, num_in).to(device, dtype)
    bias = torch.randn(num_out).to(device, dtype) if with_bias else None
    with override(LinearConfig(16, 64, 4, 2, split=split)):
        out = linear(x, weight, bias)
        assert torch.equal(linear(x, weight, bias), out)
    truth = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    close(out, truth)


@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize(("size", "num_in"), [(33, 80), (64, 128), (5, 200)])
def test_gated_linear(rows, size, num_in, close, device, dtype):
    x = torch.randn(rows, num_in).to(device, dtype)
    weight = torch.randn(2 * size, num_in).to(device, dtype)
    with override(LinearConfig(16, 64, 4, 2)):
        out = gated_linear(x, weight)
    truth = reference.silu_mul(x.double() @ weight.double().T)
    close(reference.silu_mul(reference.linear(x, weight)) if out is None else out, truth)


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "num_in"), [(40, 64), (5000, 1032), (3000, 4504)])
def test_one_row_by_the_cards_own_tile(size, num_in, close, device, dtype):
    """With fewer programs than fetch ahead, and with more; rows shorter than what is fetched."""
    x, weight = torch.randn(1, num_in).to(device, dtype), torch.randn(2 * size, num_in).to(device, dtype)
    truth = x.double() @ weight.double().T
    close(linear(x, weight), truth)
    gated = gated_linear(x, weight)
    close(reference.silu_mul(reference.linear(x, weight)) if gated is None else gated, reference.silu_mul(truth))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "size", "num_in"), [(1, 128, 64), (200, 256, 256), (257, 300, 1032), (900, 5000, 512)]
)
def test_gated_linear_by_specialized_warps(rows, size, num_in, close, device, dtype):
    x = torch.randn(rows, num_in).to(device, dtype)
    weight = torch.randn(2 * size, num_in).to(device, dtype)
    if not linear_hopper.applies(x, weight):
        pytest.skip("for Hopper")
    truth = x.double() @ weight.double().T
    close(linear_hopper.gated_linear(x, weight), reference.silu_mul(truth))


def test_shapes_that_do_not_fit_are_refused(device, dtype):
    with pytest.raises(ValueError, match="linear: x"):
        gated_linear(torch.ones(2, 4, device=device, dtype=dtype), torch.ones(4, 5, device=device, dtype=dtype))
    with pytest.raises(ValueError, match="2 \\* d"):
        gated_linear(torch.ones(2, 5, device=device, dtype=dtype), torch.ones(3, 5, device=device, dtype=dtype))
    with pytest.raises(ValueError, match="linear: x"):
        linear(torch.ones(2, 3, device=device, dtype=dtype), torch.ones(4, 5, device=device, dtype=dtype))
