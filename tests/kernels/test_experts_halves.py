"""Quantized experts on FP8 tensor cores: halves of activations are exact, tables of MXFP4 too, sums are float64's."""

from dataclasses import replace

import pytest
import torch
from tests.kernels.test_moe import truth_of

from mainsail_kernels import reference
from mainsail_kernels import reference_quantized as quantized
from mainsail_kernels._triton import runs_kernels
from mainsail_kernels.experts import Mixture
from mainsail_kernels.experts_halves import by_halves, padded_width, split_rows
from mainsail_kernels.fp4_tables import STEP, fp4_tables
from mainsail_kernels.moe import grouped_mlp, route, routed_mlp

pytestmark = pytest.mark.skipif(not runs_kernels(torch.empty(0)) and not torch.cuda.is_available(), reason="no kernels")


def values_of(tables, num_in):
    """[experts, outputs, inputs] float64 by the drawing in experts_halves, from the words on."""
    words, whole = tables.words.long(), num_in // STEP * STEP
    scales = tables.scales.view(torch.uint8).transpose(1, 2).flatten(2).long()  # [experts, outputs, steps * 8]
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
    out = torch.empty(*words.shape[:2], num_in, dtype=torch.float64)
    for step in range(-(-num_in // STEP)):
        width = min(num_in - step * STEP, STEP) // 8  # of a dot
        for dot in range(8):
            for place in range(width):
                word = words[:, :, step * 32 + place // 4 * 4 + dot // 2]
                code = word >> (16 * (dot % 2) + 4 * (place % 4)) & 7
                sign = word >> (8 * (place % 4) + (3 if dot % 2 else 7)) & 1
                power = scales[:, :, step * 8 + dot] // 8 - 5
                channel = step * STEP + width * dot + place
                out[:, :, channel] = magnitudes[code] * (1.0 - 2.0 * sign) * 2.0**power
    assert whole <= num_in
    return out * tables.factor.double()[:, :, None]


@pytest.mark.parametrize("num_in", [256, 288, 320, 640])
def test_tables_are_the_numbers_themselves(num_in):
    codes = torch.randint(0, 16, (2, 6, num_in), dtype=torch.uint8)
    scale = torch.randint(110, 122, (2, 6, num_in // 32), dtype=torch.uint8)
    tables = fp4_tables(codes, scale)
    assert tables is not None
    values = torch.tensor(quantized.FP4_VALUES, dtype=torch.float64)[codes.long()]
    assert torch.equal(values_of(tables, num_in), values * 2.0 ** (scale.double() - 127).repeat_interleave(32, dim=2))


def test_no_tables_where_they_would_not_be_exact():
    codes = torch.full((1, 2, 288), 3, dtype=torch.uint8)
    scale = torch.full((1, 2, 9), 120, dtype=torch.uint8)
    assert fp4_tables(codes, scale) is not None
    scale[0, 1, 4] = 108
    assert fp4_tables(codes, scale) is None
    codes[0, 1, 128:160] = 8  # zeros, whose scale means nothing
    assert fp4_tables(codes, scale) is not None
    assert fp4_tables(codes[:, :, :96], scale[:, :, :3]) is None, "three groups are no whole words of eight dots"


@pytest.mark.parametrize(("size", "width"), [(1e-20, 96), (1.0, 384), (3e4, 1100), (1.0, 2048)])
def test_halves_of_a_bfloat16_are_exact(size, width, device):
    """Threads have one number of a row each, or several, which are packed together."""
    x = (torch.randn(5, width) * size).bfloat16()
    x[1] = 0.0
    x[2, 7] = 200 * size
    codes, scale = split_rows(x.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32), "channels")
    found = (codes[:, 0].double() + codes[:, 1].double() / 32) * scale.double()[:, None]
    near = x.double().abs() >= x.double().abs().amax(dim=1, keepdim=True) * 2.0**-14
    assert torch.equal(found.cpu()[near], x.double()[near])
    assert ((found.cpu() - x.double()).abs() <= x.double().abs().amax(dim=1, keepdim=True) * 2.0**-22).all()


def test_what_is_broken_is_seen(device, dtype):
    x = torch.ones(3, 32).to(device, dtype)
    x[0, 3], x[2, 31] = float("nan"), float("inf")
    assert split_rows(x, "channels")[1].isnan().tolist() == [True, False, True]


def mixture(kind, experts, hidden, wide, device, dtype, *, per_token=2, normalized=True):
    """(a Mixture, the same in the form that test_moe's truth is made of): scales of MXFP4 are near each other."""
    shapes = ((2 * wide, hidden), (hidden, wide))
    if kind == "tables":
        codes = [torch.randint(0, 16, (experts, *shape), dtype=torch.uint8) for shape in shapes]
        powers = [torch.randint(118, 125, (experts, out, num_in // 32), dtype=torch.uint8) for out, num_in in shapes]
        up, down = (fp4_tables(*each) for each in zip(codes, powers, strict=True))
        assert up is not None
        assert down is not None
        words = [quantized.pack_fp4(each).to(device) for each in codes]
        scales = [quantized.pack_fp4_scales(each).to(device) for each in powers]
        biases = [torch.randn(experts, out).to(device, dtype) for out, _ in shapes]
        m = Mixture(
            words[0], words[1], scales[0], scales[1], biases[0], biases[1], per_token, normalized, (1.702, 7.0)
        )  # fmt: skip
        return replace(
            m, gate_up=up.words.to(device), gate_up_scale=up.scales.to(device), gate_up_factor=up.factor.to(device),
            down=down.words.to(device), down_scale=down.scales.to(device), down_factor=down.factor.to(device),
        ), m  # fmt: skip
    matrices = [(torch.randn(experts, *shape) * 8).to(torch.float8_e4m3fn).to(device) for shape in shapes]
    sizes = [(out,) if kind == "channels" else (-(-out // 128), -(-num_in // 128)) for out, num_in in shapes]
    scales = [((0.5 + torch.rand(experts, *size)) / 80).to(device) for size in sizes]
    m = Mixture(matrices[0], matrices[1], scales[0], scales[1], None, None, per_token, normalized, None)
    return m, m


def error_of(x, scores, mixtures, call=by_halves):
    m, same = mixtures
    weights, chosen = reference.route(scores.double(), m.per_token, normalized=m.normalized)
    truth = truth_of(x, weights, chosen, same)
    found = call(x, scores, m).double()
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("tokens", "kind", "normalized"),
    [
        (1, "tables", True),
        (20, "tables", False),
        (20, "channels", True),
        (7, "blocks", True),
    ],
)
def test_mixture(tokens, kind, normalized, device, dtype):
    """Twice, on fresh numbers: what one call leaves behind must not disturb the next. Tiles are not whole."""
    hidden, wide = (320, 288) if kind == "tables" else (256, 384)
    both = mixture(kind, 3, hidden, wide, device, dtype, normalized=normalized)
    for _ in range(2):
        x = torch.randn(tokens, hidden).bfloat16().to(device, dtype)
        error = error_of(x, torch.randn(tokens, 3).to(device, dtype), both)
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-3), f"relative error {error:.2e}"


@pytest.mark.parametrize(("hidden", "wide"), [(320, 288), (512, 256)])
def test_prompts_widen_tables(hidden, wide, device, dtype):
    """Steps at the ends of rows are not whole."""
    both = mixture("tables", 2, hidden, wide, device, dtype)
    scores = torch.randn(40, 2).to(device, dtype)
    error = error_of(torch.randn(40, hidden).to(device, dtype), scores, both, by_sorting)
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-4), f"relative error {error:.2e}"


@pytest.mark.parametrize("tokens", [1, 5])
def test_tables_are_served(tokens, device, dtype):
    both = mixture("tables", 2, 320, 288, device, dtype)
    x, scores = torch.randn(tokens, 320).bfloat16().to(device, dtype), torch.randn(tokens, 2).to(device, dtype)
    error = error_of(x, scores, both, routed_mlp)
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-3), f"relative error {error:.2e}"


def by_sorting(x, scores, m):
    return grouped_mlp(x, *route(scores, m.per_token, normalized=m.normalized), m)


def test_all_tokens_may_choose_the_same_expert(device, dtype):
    both = mixture("channels", 4, 128, 128, device, dtype, per_token=1)
    scores = torch.zeros(19, 4).to(device, dtype)
    scores[:, 2] = 3.0
    assert error_of(torch.randn(19, 128).bfloat16().to(device, dtype), scores, both) < 1e-2


def test_scores_that_are_no_numbers_make_rows_that_are_none(device, dtype):
    both = mixture("channels", 4, 128, 128, device, dtype)
    scores = torch.randn(3, 4).to(device, dtype)
    scores[1] = float("nan")
    found = by_halves(torch.randn(3, 128).to(device, dtype), scores, both[0])
    assert found.isnan().all(dim=1).tolist() == [False, True, False]
    again = by_halves(torch.randn(3, 128).to(device, dtype), torch.randn(3, 4).to(device, dtype), both[0])
    assert not again.isnan().any()


def test_matrices_that_it_does_not_take_are_refused(device, dtype):
    m, _ = mixture("channels", 4, 128, 128, device, dtype)
    plain = replace(m, gate_up=m.gate_up.to(dtype), down=m.down.to(dtype), gate_up_scale=None, down_scale=None)
    with pytest.raises(ValueError, match="no halves"):
        by_halves(torch.randn(3, 128).to(device, dtype), torch.randn(3, 4).to(device, dtype), plain)


def test_rows_of_halves_are_whole_steps():
    assert [padded_width(width, kind) for width, kind in ((2880, "tables"), (256, "tables"), (768, "channels"))] == [
        3072,
        256,
        768,
    ]
