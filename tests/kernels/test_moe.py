"""Mixtures of experts against float64: every pair of token and expert once, whatever the routing looks like."""

from dataclasses import replace

import pytest
import torch

from mainsail_kernels import reference
from mainsail_kernels import reference_quantized as quantized
from mainsail_kernels.experts import Mixture
from mainsail_kernels.moe import group, grouped_mlp, route, routed_mlp
from mainsail_kernels.tuned import pair_tiles, sorted_tile

KINDS = ("plain", "channels", "blocks", "fp4")


def mixture(kind, experts, hidden, wide, device, dtype, *, per_token=2, normalized=True):
    """Random matrices of a kind, FP4 as gpt-oss has it: with biases, and values far beyond the activation's clamp."""
    shapes = ((2 * wide, hidden), (hidden, wide))
    scales, biases, swiglu = [None, None], [None, None], None
    if kind == "plain":
        matrices = [torch.randn(experts, *shape) / 7 for shape in shapes]
    elif kind == "fp4":
        matrices = [torch.randint(-(2**31), 2**31, (experts, out, num_in // 8)).int() for out, num_in in shapes]
        exponents = [torch.randint(121, 127, (experts, out, num_in // 32), dtype=torch.uint8) for out, num_in in shapes]
        scales = [quantized.pack_fp4_scales(each).to(device) for each in exponents]
        biases = [torch.randn(experts, out).to(device, dtype) for out, _ in shapes]
        swiglu = (1.702, 7.0)
    else:
        matrices = [(torch.randn(experts, *shape) * 8).to(torch.float8_e4m3fn) for shape in shapes]
        sizes = [(out,) if kind == "channels" else (-(-out // 128), -(-num_in // 128)) for out, num_in in shapes]
        scales = [((0.5 + torch.rand(experts, *size)) / 80).to(device) for size in sizes]
    matrices = [m.to(device, dtype) if kind == "plain" else m.to(device) for m in matrices]
    return Mixture(*matrices, *scales, *biases, per_token=per_token, normalized=normalized, swiglu=swiglu)


def truth_of(x, weights, chosen, m):
    """In float64, with the numbers that the matrices stand for."""
    widen = {1: quantized.widen_rows, 2: quantized.widen_blocks}
    whole = []
    for matrix, scale in ((m.gate_up, m.gate_up_scale), (m.down, m.down_scale)):
        if matrix.dtype == torch.int32:
            whole.append(quantized.widen_fp4(matrix, scale, torch.float64))
        elif scale is None:
            whole.append(matrix.double())
        else:
            pairs = zip(matrix, scale, strict=True)
            whole.append(torch.stack([widen[scale.dim() - 1](one, its, torch.float64) for one, its in pairs]))
    biases = [None if bias is None else bias.double() for bias in (m.gate_up_bias, m.down_bias)]
    return reference.grouped_mlp(
        x.double(), weights.double(), chosen, *whole, gate_up_bias=biases[0], down_bias=biases[1], swiglu=m.swiglu
    )


@pytest.mark.parametrize(("tokens", "experts", "per_token"), [(1, 4, 2), (5, 3, 3), (40, 4, 2), (70, 2, 1)])
def test_grouped_mlp(tokens, experts, per_token, close, device, dtype):
    x = torch.randn(tokens, 48).to(device, dtype)
    m = mixture("plain", experts, 48, 40, device, dtype, per_token=per_token)
    weights, chosen = (part.to(device) for part in torch.rand(tokens, experts).topk(per_token, dim=1))
    close(grouped_mlp(x, weights, chosen, m), truth_of(x, weights, chosen, m))


def test_all_tokens_may_choose_the_same_expert(close, device, dtype):
    x = torch.randn(33, 32).to(device, dtype)
    m = mixture("plain", 8, 32, 16, device, dtype, per_token=1)
    chosen, weights = torch.full((33, 1), 7, device=device), torch.ones(33, 1, device=device)
    close(grouped_mlp(x, weights, chosen, m), truth_of(x, weights, chosen, m))
    scores = torch.zeros(33, 8).to(device, dtype)
    scores[:, 7] = 9.0
    close(routed_mlp(x, scores, m), truth_of(x, weights, chosen, m))


@pytest.mark.parametrize(("tokens", "kind"), [*((40, kind) for kind in KINDS), (1, "fp4"), (70, "fp4")])
def test_grouped_mlp_of_quantized_experts(tokens, kind, close, device, dtype):
    """Only the weights are quantized: what goes in stays as it is. Tiles are not whole."""
    hidden, wide = (96, 160) if kind == "fp4" else (144, 128)
    x = torch.randn(tokens, hidden).to(device, dtype)
    experts = 2 if tokens == 70 else 4  # so many rows an expert that FP4 is widened into a buffer
    m = mixture(kind, experts, hidden, wide, device, dtype)
    weights, chosen = (part.to(device) for part in torch.rand(tokens, experts).topk(2, dim=1))
    close(grouped_mlp(x, weights, chosen, m), truth_of(x, weights, chosen, m))


@pytest.mark.parametrize(
    ("tokens", "normalized", "kind"),
    [(1, True, kind) for kind in KINDS]
    + [(7, False, kind) for kind in KINDS]
    + [(2, True, "plain"), (25, True, "fp4")],
)
def test_routed_mlp(tokens, normalized, kind, close, device, dtype):
    """From scores to sums, twice: what one call leaves behind must not disturb the next."""
    hidden, wide = (96, 160) if kind == "fp4" else (144, 128)
    x = torch.randn(tokens, hidden).to(device, dtype)
    m = mixture(kind, 5, hidden, wide, device, dtype, normalized=normalized)
    for _ in range(2):
        scores = torch.randn(tokens, 5).to(device, dtype)
        weights, chosen = reference.route(scores.double(), 2, normalized=normalized)
        close(routed_mlp(x, scores, m), truth_of(x, weights, chosen, m))


def test_ties_go_to_the_lower_expert(close, device, dtype):
    x, scores = torch.randn(1, 32).to(device, dtype), torch.zeros(1, 6).to(device, dtype)
    m = mixture("plain", 6, 32, 16, device, dtype)
    weights, chosen = torch.full((1, 2), 0.5, device=device), torch.tensor([[0, 1]], device=device)
    close(routed_mlp(x, scores, m), truth_of(x, weights, chosen, m))


def test_fp4_is_packed_and_widened_number_for_number():
    codes = torch.randint(0, 16, (3, 5, 96), dtype=torch.uint8)
    scale = torch.tensor([0, 1, 100, 127, 128, 192], dtype=torch.uint8)[torch.randint(0, 6, (3, 5, 3))]
    found = quantized.widen_fp4(quantized.pack_fp4(codes), quantized.pack_fp4_scales(scale), torch.float64)
    values = torch.tensor(quantized.FP4_VALUES, dtype=torch.float64)[codes.int()]
    assert torch.equal(found, values * 2.0 ** (scale.double() - 127).repeat_interleave(32, dim=2))


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


def test_shapes_that_do_not_fit_are_refused(device, dtype):
    ones = torch.ones(2, 1, device=device)
    m = mixture("plain", 1, 4, 2, device, dtype, per_token=1)
    with pytest.raises(ValueError, match="mixture of experts: x"):
        grouped_mlp(torch.ones(2, 3, device=device, dtype=dtype), ones, ones.long(), m)
    with pytest.raises(ValueError, match="scores"):
        routed_mlp(torch.ones(2, 4, device=device, dtype=dtype), torch.ones(2, 3, device=device, dtype=dtype), m)
    fp4 = mixture("fp4", 1, 64, 32, device, dtype, per_token=1)
    wrong = replace(fp4, down_scale=fp4.gate_up_scale)
    with pytest.raises(ValueError, match="mixture of experts: x"):
        grouped_mlp(torch.ones(2, 64, device=device, dtype=dtype), ones, ones.long(), wrong)


@pytest.mark.parametrize("tokens", [1, 2, 300])
def test_no_tile_steps_over_a_block_of_scales(tokens):
    tiles = pair_tiles("blocks", tokens)
    shapes = [sorted_tile("blocks", rows).shape for rows in (1.0, 8.0, 9.0, 100.0)]
    assert all(shape.block_in <= 128 for shape in shapes + ([tiles.up, tiles.down] if tiles else []))
