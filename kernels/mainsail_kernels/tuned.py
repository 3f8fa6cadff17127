"""Tuned launch configurations, as data: what `benchmarks/kernels.py --tune` found, by card, with the versions.

The entries for Hopper (cards named "NVIDIA H…") were found with torch 2.11.0 and Triton 3.6.0, CUDA 13.0: attention,
experts, codes of 4 bits and single rows of FP8 on an H200, other linears (dependent launches, the inputs' split) on
an H100.
A card without a table gets the defaults, which are safe everywhere (shared memory of 100 KiB is enough for them).
`override` replaces a choice for a block of code: the tuning script's way to try a configuration.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from mainsail_kernels._triton import INTERPRETED, card_name, multiprocessors


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Tile of the prefill kernel: query rows, KV positions, warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    specialized: bool = False
    """attention_hopper's kernel, which has a tile of its own, wherever it applies."""


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Tile of the decode kernel, how many programs a multiprocessor is given work for, the least tiles of one."""

    block_n: int
    warps: int
    stages: int
    programs_per_sm: int
    least_tiles: int = 4
    specialized: bool = False
    """attention_decode_hopper's kernel, which has a tile of its own, wherever it applies."""


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """Tile of a skinny linear: outputs, inputs, warps, stages; inputs fetched ahead; programs that share the inputs."""

    block_out: int
    block_in: int
    warps: int
    stages: int
    ahead: int = 1024
    """Inputs of every output that are fetched into the cache while the kernel before runs; a power of two times 64."""
    split: int = 1


@dataclass(frozen=True, slots=True)
class QuantizedConfig:
    """Tile of a linear with quantized weights; numbers of inputs are powers of two."""

    block_out: int
    block_in: int
    """Inputs a step; of packed codes the 32-bit words that hold them."""
    warps: int
    stages: int
    split: int = 1
    """Programs that share the inputs."""
    block_rows: int = 128
    """Rows of a tile at most."""
    ahead: int = 512
    """Bytes of every output's weights that are fetched into the cache while the kernel before runs."""


@dataclass(frozen=True, slots=True)
class ExpertTile:
    """Tile of a product of experts: outputs, inputs (FP4: words of eight), warps, stages."""

    block_out: int
    block_in: int
    warps: int
    stages: int
    split: int = 1
    """Programs that share the inputs of a pair or the experts of a token, where pairs have tiles to themselves."""


@dataclass(frozen=True, slots=True)
class PairTiles:
    """How few tokens go through experts (experts.py)."""

    up: ExpertTile
    down: ExpertTile


@dataclass(frozen=True, slots=True)
class SortedTile:
    """Rows of a tile, all of one expert, and the tile's shape."""

    rows: int
    shape: ExpertTile


@dataclass(frozen=True, slots=True)
class HalvesTile:
    """Tile of a product of experts_halves: matrix rows (of gate and up half each), inputs (of e4m3), warps, stages."""

    block_out: int
    block_in: int
    warps: int
    stages: int
    ahead: int = 0
    """Bytes of every output's weights that are fetched into the cache while the kernel before runs."""
    long_sums: bool = False
    """MXFP4: tensor cores, which keep about 14 bits of a sum, add up all inputs and not a step's 256."""


@dataclass(frozen=True, slots=True)
class HalvesTiles:
    """How experts_halves takes a step's rows."""

    rows: int
    """Of a tile."""
    up: HalvesTile
    down: HalvesTile


HALVES_ROWS = {"channels": 64, "blocks": 64, "tables": 256}
"""Experts with more rows than this on average have their pairs sorted."""

Config = TypeVar(
    "Config", PrefillConfig, DecodeConfig, LinearConfig, QuantizedConfig, PairTiles, SortedTile, HalvesTiles
)
_override: dict[type, object] = {}


@contextmanager
def override(config: Config) -> Iterator[None]:
    """Use this configuration, wherever one of its kind is asked for, within the block."""
    _override[type(config)] = config
    try:
        yield
    finally:
        del _override[type(config)]


def _overriding(kind: type[Config]) -> Config | None:
    chosen = _override.get(kind)
    return chosen if isinstance(chosen, kind) else None


def prefill_config(device: torch.device, head_dim: int, rows: int) -> PrefillConfig:
    """For at most `rows` rows (query tokens times heads of a group) in the longest chunk."""
    if (chosen := _overriding(PrefillConfig)) is not None:
        return chosen
    if INTERPRETED:
        return PrefillConfig(16, 32, 4, 1)
    if rows <= 16:
        return PrefillConfig(16, 64, 4, 2)
    if rows <= 32 and head_dim <= 128 and card_name(device).startswith("NVIDIA H"):
        return PrefillConfig(32, 128, 4, 2)
    if rows <= 64 or head_dim > 128:
        return PrefillConfig(64, 64, 4, 2)
    if not card_name(device).startswith("NVIDIA H"):
        return PrefillConfig(128, 32, 8, 2)
    specialized = rows >= 512
    return PrefillConfig(128, 128, 8, 3, specialized) if rows > 4096 else PrefillConfig(64, 64, 4, 2, specialized)


def decode_config(
    device: torch.device, head_dim: int, num_seqs: int, *, fp8: bool = False, padded: bool = False
) -> DecodeConfig:
    """For one query for each of num_seqs sequences; fp8: the cache's numbers; padded: many of them may be none."""
    if (chosen := _overriding(DecodeConfig)) is not None:
        return chosen
    if INTERPRETED:
        return DecodeConfig(32, 4, 1, 2)
    hopper = card_name(device).startswith("NVIDIA H")
    if head_dim > 128:
        return DecodeConfig(32, 4, 3 if hopper else 2, 4)
    if not hopper:
        return DecodeConfig(32, 4, 2, 4)
    if num_seqs <= 2:
        return DecodeConfig(64, 4, 3, 4, 1, specialized=True)
    if fp8 and num_seqs > 96:
        return DecodeConfig(128, 4, 2, 3, 1, specialized=True)
    return DecodeConfig(64, 4, 3, 4, 2, specialized=fp8 or padded or num_seqs <= 64)


def linear_config(device: torch.device, rows: int, num_out: int, *, gated: bool = False) -> LinearConfig | None:
    """For x [rows, …] and weight [num_out, …] (gated: two of them); None where cuBLAS is to run."""
    if (chosen := _overriding(LinearConfig)) is not None:
        return chosen
    if INTERPRETED:
        return LinearConfig(16, 64, 4, 1, split=1 if gated else 3) if 1 <= rows <= 32 else None
    if not card_name(device).startswith("NVIDIA H"):
        return None  # not measured
    if rows == 1:
        return LinearConfig(2, 1024, 4, 2, ahead=512) if gated else LinearConfig(2, 2048, 4, 1, ahead=512)
    if rows > 64:
        return None  # cuBLAS, whose programs share the rows' tile, is ahead from here on
    if gated:
        return LinearConfig(64, 128, 4, 3 if rows <= 32 else 2, ahead=512)
    if num_out >= 65536 and rows > 16:
        return LinearConfig(128, 128, 8, 3, ahead=512)
    split = _split(-(-num_out // 64), multiprocessors(device))
    return LinearConfig(64, 256, 4, 3, 512, split) if rows <= 16 else LinearConfig(64, 128, 4, 4, 512, split)


def specialized_gate(device: torch.device, rows: int, num_out: int) -> bool:
    """Whether linear_hopper multiplies so many rows with a gated MLP's [2 * num_out, …] faster than cuBLAS does.

    Its programs take tiles of 128 rows and 128 outputs in turns, all for about as long: it is ahead where the last turn
    is nearly full (on an H200 by 2 to 4 % for 28,672 and 57,344 x 8,192 and 8 % for 6,144; else up to 8 % behind). Up
    to 128 rows all read the weights once, and it saves writing the halves: 3 to 4 % at 112 and 128.
    """
    if not card_name(device).startswith("NVIDIA H"):
        return False
    tiles, at_once = -(-rows // 128) * -(-num_out // 128), multiprocessors(device)
    full = tiles / (-(-tiles // at_once) * at_once)
    return full > 0.8 if 96 < rows <= 128 else rows >= 896 and full * rows / (-(-rows // 128) * 128) >= 0.95


def _split(tiles: int, multiprocessors: int) -> int:
    """Programs that share a tile's inputs: the most, by doubling, with which all run at once; at most 8."""
    split = 1
    while split < 8 and 2 * split * tiles <= multiprocessors:
        split *= 2
    return split


def fp8_config(
    device: torch.device, rows: int, num_out: int, num_in: int, *, gated: bool = False, blocks: bool = False
) -> QuantizedConfig | None:
    """For x [rows, num_in] and e4m3 weights [num_out, num_in] (gated: two of them); None where cuBLASLt is to run."""
    if (chosen := _overriding(QuantizedConfig)) is not None:
        return chosen
    if INTERPRETED:
        return QuantizedConfig(16, 64, 4, 1, split=1 if gated else 3, block_rows=16)
    if rows == 1:
        return QuantizedConfig(4, 1024, 4, 4) if gated else QuantizedConfig(4, 2048, 4, 2)
    split = 1 if gated else _split(-(-num_out // 64), multiprocessors(device))
    if gated and rows > 32:
        return None
    even = num_out % 16 == 0 and num_in % 16 == 0  # which torch._scaled_mm insists on
    many = num_out >= 16384 and not gated  # outputs that fill the card whatever their tiles
    if rows <= 128 and card_name(device).startswith("NVIDIA H") and not (rows > 64 and many and even and not blocks):
        return QuantizedConfig(64, 256, 4, 3 if gated or many else 4, split=split)
    if rows <= 64:
        return QuantizedConfig(64, 128, 4, 3, split=split)
    return None if even and not blocks else QuantizedConfig(128, 128, 8, 3)


def grouped_config(device: torch.device, rows: int, num_out: int) -> QuantizedConfig | None:
    """For x [rows, …] and packed codes [num_out, …]; None where all are to be dequantized for cuBLAS."""
    if (chosen := _overriding(QuantizedConfig)) is not None:
        return chosen
    if INTERPRETED:
        return QuantizedConfig(16, 16, 4, 1, split=3) if rows <= 20 else None
    if rows == 1:
        return QuantizedConfig(4, 256, 2, 1)  # 128 words a warp: its threads hold the inputs that they multiply
    if rows > 64:
        return None
    split = _split(-(-num_out // 128), multiprocessors(device))
    return QuantizedConfig(128, 32, 4, 4, split) if rows <= 16 else QuantizedConfig(128, 16, 4, 4, split)


def nibbles_config(device: torch.device, num_out: int) -> QuantizedConfig:
    """For a few rows of bfloat16 and codes of 4 bits [num_out, …]."""
    if (chosen := _overriding(QuantizedConfig)) is not None:
        return chosen
    if INTERPRETED:
        return QuantizedConfig(16, 16, 4, 1, split=3, block_rows=16)
    split = _split(-(-num_out // 64), 2 * multiprocessors(device))
    return QuantizedConfig(64, 32, 4, 3, split, block_rows=32)


def row_groups_config() -> QuantizedConfig:
    """For one row and codes of 4 bits whose groups have a scale and an integer; block_in: words."""
    if (chosen := _overriding(QuantizedConfig)) is not None:
        return chosen
    return QuantizedConfig(16, 16, 4, 1) if INTERPRETED else QuantizedConfig(8, 512, 4, 1)


def pair_tiles(kind: str, tokens: int) -> PairTiles | None:
    """For so many tokens' experts; kind: as experts.kind_of has it. None where pairs are to be sorted by expert."""
    if (chosen := _overriding(PairTiles)) is not None:
        return chosen
    if kind == "tables":
        return None
    fp4 = kind == "fp4"
    if INTERPRETED:
        tile = ExpertTile(32, 32 if fp4 else 128 if kind == "blocks" else 32, 4, 1, split=2)
        return PairTiles(tile, tile) if tokens < 3 else None
    if tokens > 1:
        return None
    if fp4:
        return PairTiles(ExpertTile(32, 32, 4, 3), ExpertTile(32, 32, 4, 3, 2))
    step = 128 if kind == "blocks" else 256
    return PairTiles(ExpertTile(32, step, 4, 3), ExpertTile(32, step, 4, 3, 4))


def sorted_tile(kind: str, rows: float) -> SortedTile:
    """For experts that have so many rows on average; kind: as experts.kind_of has it."""
    if (chosen := _overriding(SortedTile)) is not None:
        return chosen
    if kind == "fp4":
        return SortedTile(16 if rows <= 8 else 32, ExpertTile(64, 16, 4, 4))
    return SortedTile(16, ExpertTile(64, 128, 4, 4)) if rows <= 8 else SortedTile(64, ExpertTile(128, 64, 4, 3))


def halves_tiles(kind: str, rows: float) -> HalvesTiles | None:
    """For quantized experts that have so many rows on average; None where they are to be sorted by expert."""
    if (chosen := _overriding(HalvesTiles)) is not None:
        return chosen
    if INTERPRETED:
        return HalvesTiles(8, HalvesTile(128, 128, 4, 1), HalvesTile(64, 64, 4, 1))
    if rows > HALVES_ROWS[kind]:
        return None
    count = 8 if rows <= 4 else 16 if rows <= 9 else 32
    if kind == "tables":
        tile = HalvesTile(128, 32, 4, 3, ahead=256 if rows >= 2 else 0, long_sums=count > 8)
        return HalvesTiles(count, tile, tile)
    return HalvesTiles(count, HalvesTile(128, 128, 4, 3), HalvesTile(64, 128, 4, 4))
