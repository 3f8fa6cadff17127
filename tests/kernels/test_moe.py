"""Mixtures of experts against float64: every pair of token and expert once, whatever the routing looks like."""

import pytest
import torch

from mainsail_kernels import reference
from mainsail_kernels import reference_quantized as quantized
from mainsail_kernels.moe import group, grouped_mlp, route


@pytest.mark.parametrize(("tokens", "experts", "per_token"), [(1, 4, 2), (5, 3, 3), (40, 4, 2), (70, 2, 1)])
def test_grouped_mlp(tokens, experts, per_token, close, device, dtype):
    hidden, wide = 48, 40
    x = torch.randn(tokens, hidden).to(device, dtype)
    gate_up = (torch.randn(experts, 2 * wide, hidden) / 7).to(device, dtype)
    down = (torch.randn(experts, hidden, wide) / 7).to(device, dtype)
    weights, chosen = torch.rand(tokens, experts).topk(per_token, dim=1)
    weights, chosen = weights.to(device), chosen.to(device)
    truth = reference.grouped_mlp(x.double(), weights.double(), chosen, gate_up.double(), down.double())
    close(grouped_mlp(x, weights, chosen, gate_up, down), truth)


def test_all_tokens_may_choose_the_same_expert(close, device, dtype):
    x = torch.randn(33, 32).to(device, dtype)
    gate_up, down = (torch.randn(8, 32, 32) / 5).to(device, dtype), (torch.randn(8, 32, 16) / 5).to(device, dtype)
    chosen = torch.full((33, 1), 7, device=device)
    weights = torch.ones(33, 1, device=device)
    truth = reference.grouped_mlp(x.double(), weights.double(), chosen, gate_up.double(), down.double())
    close(grouped_mlp(x, weights, chosen, gate_up, down), truth)


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("tokens", [1, 40])
def test_grouped_mlp_of_fp8(tokens, blocks, close, device, dtype):
    """Only the weights are FP8: what goes in stays as it is."""
    experts, hidden, wide = 4, 144, 128
    x = torch.randn(tokens, hidden).to(device, dtype)
    gate_up = (torch.randn(experts, 2 * wide, hidden) * 8).to(torch.float8_e4m3fn).to(device)
    down = (torch.randn(experts, hidden, wide) * 8).to(torch.float8_e4m3fn).to(device)
    shapes = ((2, 2), (2, 1)) if blocks else ((2 * wide,), (hidden,))
    scales = [((0.5 + torch.rand(experts, *shape)) / 80).to(device) for shape in shapes]
    weights, chosen = torch.rand(tokens, experts).topk(2, dim=1)
    weights, chosen = weights.to(device), chosen.to(device)
    widen = quantized.widen_blocks if blocks else quantized.widen_rows
    whole = [
        torch.stack([widen(m, s, torch.float64) for m, s in zip(matrices, scale, strict=True)])
        for matrices, scale in zip((gate_up, down), scales, strict=True)
    ]
    truth = reference.grouped_mlp(x.double(), weights.double(), chosen, whole[0], whole[1])
    close(grouped_mlp(x, weights, chosen, gate_up, down, scales[0], scales[1]), truth)


@pytest.mark.parametrize("tokens", [1, 40])
def test_grouped_mlp_of_fp4_with_biases_and_the_clamped_activation(tokens, close, device, dtype):
    """gpt-oss: values far beyond the clamp, groups that no tile divides."""
    experts, hidden, wide = 4, 96, 160
    x = torch.randn(tokens, hidden).to(device, dtype)
    shapes = ((2 * wide, hidden), (hidden, wide))
    codes = [torch.randint(0, 256, (experts, out, num_in // 2), dtype=torch.uint8).to(device) for out, num_in in shapes]
    scales = [torch.randint(121, 127, (experts, out, i // 32), dtype=torch.uint8).to(device) for out, i in shapes]
    biases = [torch.randn(experts, out).to(device, dtype) for out, _ in shapes]
    weights, chosen = (part.to(device) for part in torch.rand(tokens, experts).topk(2, dim=1))
    whole = [quantized.widen_fp4(c, s, torch.float64) for c, s in zip(codes, scales, strict=True)]
    truth = reference.grouped_mlp(
        x.double(), weights.double(), chosen, whole[0], whole[1],
        gate_up_bias=biases[0].double(), down_bias=biases[1].double(), swiglu=(1.702, 7.0),
    )  # fmt: skip
    out = grouped_mlp(
        x, weights, chosen, codes[0], codes[1], scales[0], scales[1], biases[0], biases[1], swiglu=(1.702, 7.0)
    )
    close(out, truth)


def test_fp4_is_packed_and_widened_number_for_number():
    codes = torch.randint(0, 16, (3, 5, 96), dtype=torch.uint8)
    scale = torch.tensor([0, 1, 100, 127, 128, 254], dtype=torch.uint8)[torch.randint(0, 6, (3, 5, 3))]
    found = quantized.widen_fp4(quantized.pack_fp4(codes), scale, torch.float64)
    for at in ((0, 0, 0), (1, 2, 15), (2, 4, 16), (0, 3, 31), (1, 1, 64), (2, 0, 95)):
        value = quantized.FP4_VALUES[int(codes[at])] * 2.0 ** (int(scale[at[0], at[1], at[2] // 32]) - 127)
        assert float(found[at]) == value


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("experts", "per_token"), [(6, 2), (128, 8), (5, 5)])
def test_route(experts, per_token, normalized, device):
    scores = torch.randn(17, experts).to(device)
    weights, chosen = route(scores, per_token, normalized=normalized)
    truth, best = reference.route(scores.double(), per_token, normalized=normalized)
    assert (chosen == best).all()
    torch.testing.assert_close(weights.double(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tile", [4, 16])
@pytest.mark.parametrize("tokens", [1, 25, 350])
def test_every_pair_has_one_row_in_a_tile_of_its_expert(tile, tokens, device):
    chosen = torch.stack([torch.randperm(9)[:3] for _ in range(tokens)]).to(device)
    rows, tile_expert = group(chosen, 9, tile)
    real = rows < chosen.numel()
    assert sorted(rows[real].tolist()) == list(range(chosen.numel()))
    experts = tile_expert.repeat_interleave(tile)
    assert (experts[real] == chosen.reshape(-1)[rows[real].long()]).all()


def test_fp4_scales_that_do_not_fit_are_refused(device, dtype):
    x, ones = torch.ones(2, 64, device=device, dtype=dtype), torch.ones(2, 1, device=device)
    gate_up, down = (torch.zeros(1, 64, 32, dtype=torch.uint8, device=device) for _ in range(2))
    scale = torch.zeros(1, 64, 1, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="grouped_mlp"):
        grouped_mlp(x, ones, ones.long(), gate_up, down[..., :16].contiguous(), scale, scale)


def test_shapes_that_do_not_fit_are_refused(device, dtype):
    ones = torch.ones(2, 1, device=device)
    with pytest.raises(ValueError, match="grouped_mlp"):
        grouped_mlp(
            torch.ones(2, 3, device=device, dtype=dtype), ones, ones.long(),
            torch.ones(1, 4, 5, device=device, dtype=dtype), torch.ones(1, 3, 2, device=device, dtype=dtype),
        )  # fmt: skip
