"""gpt-oss: attention with sinks, in windows and over all; biases everywhere; experts in MXFP4, a clamped activation.

A head's sink is a score of no position: attention that finds nothing gives its weight there (`attend`'s sinks). All
experts are in one tensor for each matrix, and in one of two forms:

    plain   gate_up_proj [experts, hidden, 2 * channels], down_proj [experts, channels, hidden]      (inputs first)
    MXFP4   …_blocks [experts, outputs, inputs / 32, 16] uint8, …_scales [experts, outputs, inputs / 32] uint8

Gate and up take turns along the outputs; here the gates come first. A byte of a block has two inputs that are
neighbours; here eight codes are one word, in an order that a kernel need not shuffle, and scales are side by side for
neighbouring outputs. On Hopper that is fp4_tables.py's order, for bfloat16, where a layer's scales and shapes
allow it, and else `pack_fp4`'s. No number changes: MXFP4 stays MXFP4 in memory. Every rank has some channels of all
experts, in whole groups of 32 where they are MXFP4; of `down_proj`, whose inputs are split, it reads all, one layer at
a time, and keeps its part.
"""

from __future__ import annotations

import torch

from mainsail_engine.errors import UnsupportedModelError
from mainsail_engine.model.architecture import Experts
from mainsail_engine.model.linear import Fp4Experts
from mainsail_engine.model.llama import LlamaForCausalLM
from mainsail_engine.model.loader import Weights
from mainsail_engine.model.mlp import ExpertMatrices, ExpertMlp, Mlp
from mainsail_engine.model.parallel import Parallel
from mainsail_engine.model.quantization import Mxfp4
from mainsail_engine.model.quantized import quantize_fp8
from mainsail_kernels.experts_halves import has_fp8_cores
from mainsail_kernels.fp4_tables import Fp4Tables, fp4_tables
from mainsail_kernels.reference_quantized import FP4_GROUP, pack_fp4, pack_fp4_scales


class GptOssForCausalLM(LlamaForCausalLM):
    @property
    def reads_transposed_values(self) -> bool:
        return False  # every layer has sinks

    def _sinks(self, weights: Weights, at: str) -> torch.Tensor | None:
        heads = self.architecture.num_heads
        return weights.get(f"{at}.self_attn.sinks", (heads,), self.parallel.part(heads), dtype=torch.float32)

    def _mlp(self, index: int, weights: Weights) -> Mlp:
        a = self.architecture
        if a.experts is None:
            return super()._mlp(index, weights)
        return _experts(a.experts, a.hidden_size, weights, f"model.layers.{index}.mlp", self.parallel)


def _experts(e: Experts, hidden: int, weights: Weights, at: str, parallel: Parallel) -> ExpertMlp:
    n, size = e.num_experts, e.intermediate_size
    packed = isinstance(weights.quantization.form(f"{at}.experts.gate_up_proj"), Mxfp4)
    ours = _channels(size, FP4_GROUP if packed else 1, parallel)
    both = slice(2 * ours.start, 2 * ours.stop)
    gate_up_bias = weights.get(f"{at}.experts.gate_up_proj_bias", (n, 2 * size), columns=both)
    down_bias = weights.get(f"{at}.experts.down_proj_bias", (n, hidden))
    names = [f"{at}.experts.{name}_proj" for name in ("gate_up", "down")]
    shapes = [(n, 2 * size, hidden), (n, hidden, size)]
    if packed:
        gate_up, down = _fp4(
            _codes(weights, names[0], shapes[0], both, interleaved=True),
            _codes(weights, names[1], shapes[1], ours, interleaved=False),
            tables=weights.dtype == torch.bfloat16 and has_fp8_cores(weights.device),
        )
    else:
        gate_up = _plain(weights, names[0], shapes[0], both, interleaved=True)
        down = _plain(weights, names[1], shapes[1], ours, interleaved=False)
    return ExpertMlp(
        router=weights.get(f"{at}.router.weight", (n, hidden)),
        router_bias=weights.get(f"{at}.router.bias", (n,)),
        gate_up=gate_up,
        gate_up_bias=_gates_first(gate_up_bias, 1).contiguous(),
        down=down,
        down_bias=down_bias if parallel.rank == 0 else None,
        experts=e,
    )


def _channels(total: int, unit: int, parallel: Parallel) -> slice:
    """This rank's, in whole units; shares may be of unlike sizes."""
    units = parallel.part(total // unit)
    return slice(units.start * unit, units.stop * unit)


def _gates_first(x: torch.Tensor, dim: int) -> torch.Tensor:
    pairs = x.view(*x.shape[:dim], -1, 2, *x.shape[dim + 1 :])
    return torch.cat((pairs.select(dim + 1, 0), pairs.select(dim + 1, 1)), dim=dim)


def _plain(
    weights: Weights, name: str, shape: tuple[int, int, int], ours: slice, *, interleaved: bool
) -> ExpertMatrices:
    """shape [experts, outputs, inputs]; ours: of the outputs, if gates and ups are interleaved, else of the inputs."""
    if weights.quantization.online == "int4":
        raise UnsupportedModelError(f"{name}: experts in int4 are not supported; experts in FP8 are")
    n, outputs, inputs = shape
    if interleaved:
        whole = weights.get(name, (n, inputs, outputs))[:, :, ours].contiguous()
        matrix = _gates_first(whole, 2).transpose(1, 2).contiguous()
    else:
        matrix = weights.get(name, (n, inputs, outputs), columns=ours).transpose(1, 2).contiguous()
    return quantize_fp8(matrix) if weights.quantization.online == "fp8" else matrix


def _codes(
    weights: Weights, name: str, shape: tuple[int, int, int], ours: slice, *, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(blocks, scales) as the checkpoint has them; the rest as _plain."""
    n, outputs, inputs = shape
    if inputs % FP4_GROUP:
        raise UnsupportedModelError(
            f"{name}: {inputs} inputs are no multiple of {FP4_GROUP}, the size of MXFP4's groups"
        )
    groups = inputs // FP4_GROUP
    rows = ours if interleaved else slice(None)
    blocks = weights.get(f"{name}_blocks", (n, outputs, groups, FP4_GROUP // 2), columns=rows, dtype=torch.uint8)
    scale = weights.get(f"{name}_scales", (n, outputs, groups), columns=rows, dtype=torch.uint8)
    if interleaved:
        blocks, scale = _gates_first(blocks, 1), _gates_first(scale, 1)
    else:
        kept = slice(ours.start // FP4_GROUP, ours.stop // FP4_GROUP)
        blocks, scale = blocks[:, :, kept], scale[:, :, kept]
    return blocks, scale


def _fp4(
    gate_up: tuple[torch.Tensor, torch.Tensor], down: tuple[torch.Tensor, torch.Tensor], *, tables: bool
) -> tuple[Fp4Experts, Fp4Experts]:
    """Both matrices of a layer in one order. tables: in that of tables, if both can be."""
    if tables and (first := _tables(*gate_up)) is not None and (second := _tables(*down)) is not None:
        return first, second
    return _packed(*gate_up), _packed(*down)


def _packed(blocks: torch.Tensor, scale: torch.Tensor) -> Fp4Experts:
    return Fp4Experts(torch.stack([pack_fp4(_unpacked(of_one)) for of_one in blocks]), pack_fp4_scales(scale))


def _tables(blocks: torch.Tensor, scale: torch.Tensor) -> Fp4Experts | None:
    """One expert after the other: what is made on the way is larger than they are."""
    made: list[Fp4Tables] = []
    for of_one, its in zip(blocks, scale, strict=True):
        one = fp4_tables(_unpacked(of_one)[None], its[None])
        if one is None:
            return None
        made.append(one)
    return Fp4Experts(
        torch.cat([one.words for one in made]), torch.cat([one.scales for one in made]),
        torch.cat([one.factor for one in made]),
    )  # fmt: skip


def _unpacked(blocks: torch.Tensor) -> torch.Tensor:
    """Codes [outputs, inputs] of an expert's blocks."""
    return torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(1)
