"""From a checkpoint's quantized tensors to matrices, and from plain matrices to quantized ones.

Every form has its own tensors beside (or in place of) a module's `weight`; here they become `Fp8Weight` or `Codes`,
with only the rows and columns that a rank has. Integer codes are packed anew, in the kernels' order (grouped.py draws
it); no number changes on the way. What a share would cut in the middle (a group, a block, a packed word) is refused by
name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch

from mainsail_engine.errors import InvalidConfigurationError, MissingTensorError, UnsupportedModelError
from mainsail_engine.model.linear import Fp8Weight, RowsOf, Weight
from mainsail_engine.model.quantization import BLOCK, ONLINE_GROUP, Fp8, Int
from mainsail_engine.model.sources import ALL
from mainsail_kernels.grouped import Codes
from mainsail_kernels.reference_quantized import FP8, FP8_MAX, pack

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output 8 * i + AWQ_ORDER[k] is in bits 4k of the word."""


class Share(NamedTuple):
    """Which part of a module's matrix [outputs, inputs] is wanted."""

    module: str
    shape: tuple[int, ...]
    rows: slice = ALL
    columns: slice = ALL

    def range(self, dim: int) -> range:
        return range(*(self.rows, self.columns)[dim].indices(self.shape[dim]))

    def units(self, dim: int, size: int, what: str) -> slice:
        """Its rows (dim 0) or columns (1) in units of `size`. InvalidConfigurationError if it cuts one in two."""
        wanted, total = self.range(dim), self.shape[dim]
        if wanted.start % size or (wanted.stop % size and wanted.stop != total):
            raise InvalidConfigurationError(
                f"{self.module}: {what} of {size} {('outputs', 'inputs')[dim]} cannot be cut, and a rank's share of "
                f"the {total} would be {wanted.start} to {wanted.stop}: set --tensor-parallel-size to another size"
            )
        return slice(wanted.start // size, -(-wanted.stop // size))


class Reader(Protocol):
    """What is read from a checkpoint."""

    device: torch.device

    def has(self, name: str) -> bool: ...

    def raw(self, name: str, rows: slice = ALL, columns: slice = ALL) -> torch.Tensor:
        """That part of a tensor on the device, in the checkpoint's dtype. Raises MissingTensorError."""
        ...

    def ignore(self, name: str) -> None:
        """It may be there, and is not used."""
        ...


def quantize_fp8(weight: torch.Tensor, *, blocks: bool = False) -> Fp8Weight:
    """[…, outputs, inputs] to e4m3, the largest number of each output or block to 448."""
    if blocks:
        return _quantize_blocks(weight)
    scale = (weight.abs().amax(dim=-1).float() / FP8_MAX).clamp(min=1e-12)
    codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    flat, out, scales = weight.view(-1, weight.shape[-1]), codes.view(-1, weight.shape[-1]), scale.view(-1, 1)
    step = max((64 << 20) // weight.shape[-1], 1)  # so that what is in between stays small
    for first in range(0, flat.shape[0], step):
        some = slice(first, first + step)
        out[some] = (flat[some].float() / scales[some]).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
    return Fp8Weight(codes, scale)


def _quantize_blocks(weight: torch.Tensor) -> Fp8Weight:
    if weight.dim() == 3:
        each = [_quantize_blocks(member) for member in weight]
        return Fp8Weight(torch.stack([w.codes for w in each]), torch.stack([w.scale for w in each]))
    out, num_in = weight.shape
    tall, wide = -(-out // BLOCK), -(-num_in // BLOCK)
    padded = torch.nn.functional.pad(weight.float(), (0, wide * BLOCK - num_in, 0, tall * BLOCK - out))
    tiles = padded.view(tall, BLOCK, wide, BLOCK)
    scale = (tiles.abs().amax(dim=(1, 3)) / FP8_MAX).clamp(min=1e-12)
    codes = (tiles / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).view_as(padded)[:out, :num_in]
    return Fp8Weight(codes.to(FP8).contiguous(), scale)


def quantize_int(weight: torch.Tensor, module: str, *, bits: int = 4, group: int = ONLINE_GROUP) -> Codes:
    """[outputs, inputs] to the nearest of 2**bits steps between the least and the largest number of each group.

    Raises UnsupportedModelError where the group does not divide the inputs.
    """
    out, num_in = weight.shape
    if num_in % group:
        raise UnsupportedModelError(f"{module}: {num_in} inputs cannot be quantized in groups of {group}")
    grouped = weight.float().view(out, -1, group)
    least, most = grouped.amin(-1).clamp(max=0.0), grouped.amax(-1).clamp(min=0.0)
    top = (1 << bits) - 1
    scale = ((most - least) / top).clamp(min=1e-8).to(torch.float16).clamp(min=6e-8)
    zero = (-least / scale.float()).round().clamp(0, top)
    codes = (grouped / scale.float()[..., None]).round().add(zero[..., None]).clamp(0, top)
    words = pack(codes.view(out, num_in).to(torch.int32), bits, group)
    return Codes(words, bits, group, scale, zero.to(torch.uint8), zeros=True)


def stack_rows(parts: Sequence[Weight]) -> Weight:
    """One matrix of parts one below the other; RowsOf where they are not of one kind."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if isinstance(first, Fp8Weight) and all(_joins(first, part) for part in parts):
        some = [part for part in parts if isinstance(part, Fp8Weight)]
        if first.scale.dim() == 1 or all(part.shape[0] % BLOCK == 0 for part in some[:-1]):
            return Fp8Weight(torch.cat([p.codes for p in some]), torch.cat([p.scale for p in some]))
    if isinstance(first, Codes) and all(isinstance(p, Codes) and _alike(first, p) for p in parts):
        some = [part for part in parts if isinstance(part, Codes)]
        return replace(
            first,
            words=torch.cat([p.words for p in some]),
            scale=torch.cat([p.scale for p in some]),
            offset=_cat([p.offset for p in some]),
            super_scale=_cat([p.super_scale for p in some]),
            super_offset=_cat([p.super_offset for p in some]),
        )
    if all(isinstance(part, torch.Tensor) for part in parts):
        return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
    return RowsOf(list(parts))


def _joins(first: Fp8Weight, part: Weight) -> bool:
    return isinstance(part, Fp8Weight) and part.scale.dim() == first.scale.dim()


def _alike(a: Codes, b: Codes) -> bool:
    kinds = [(c.bits, c.group, c.zero, c.zeros, c.offset is None, c.super_scale is None, c.scale.dtype) for c in (a, b)]
    return kinds[0] == kinds[1]


def _cat(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


# -- FP8 -------------------------------------------------------------------------------------------------------------


def read_fp8(reader: Reader, form: Fp8, share: Share) -> Fp8Weight:
    name = f"{share.module}.weight"
    codes = reader.raw(name, share.rows, share.columns)
    if codes.dtype != FP8:
        raise UnsupportedModelError(f"{name} is {codes.dtype}, where quantization_config says float8_e4m3fn")
    _check_shape(name, codes.shape, (len(share.range(0)), len(share.range(1))))
    for unused in ("input_scale", "weight_zero_point"):  # activations are scaled row by row, whatever was measured
        reader.ignore(f"{share.module}.{unused}")
    name = f"{share.module}.{form.scale_name}"
    if form.blocks:
        rows, columns = (share.units(dim, BLOCK, "a block") for dim in (0, 1))
        scale = reader.raw(name, rows, columns).float().contiguous()
        _check_shape(name, scale.shape, tuple(-(-len(share.range(dim)) // BLOCK) for dim in (0, 1)))
        return Fp8Weight(codes, scale)
    scale = reader.raw(name).float().reshape(-1)
    if scale.numel() == 1:
        scale = scale.expand(share.shape[0])
    _check_shape(name, scale.shape, (share.shape[0],))
    return Fp8Weight(codes, scale[share.rows].contiguous())


def _check_shape(name: str, found: Sequence[int], asked: Sequence[int]) -> None:
    if tuple(found) != tuple(asked):
        raise MissingTensorError(f"{name} has shape {list(found)}, its quantization asks for {list(asked)}")


# -- integers --------------------------------------------------------------------------------------------------------


def read_int(reader: Reader, form: Int, share: Share) -> Codes:
    group = form.group or share.shape[1]
    if share.shape[1] % group or group % 32:
        raise UnsupportedModelError(f"{share.module}: groups of {group} do not divide {share.shape[1]} inputs, or are "
                                    "no multiple of 32")  # fmt: skip
    if not form.group and len(share.range(1)) < share.shape[1]:
        group = len(share.range(1))  # one scale for a row: every share of the row has it
    read = {"awq": _read_awq, "compressed": _read_compressed}.get(form.layout, _read_gptq)
    codes, scale, zeros = read(reader, form, share, group)
    zero = 1 << (form.bits - 1)
    if zeros is not None and bool((zeros == zero).all()):
        zeros = None
    words = pack(codes, form.bits, group)
    return Codes(words, form.bits, group, scale.contiguous(), zeros, zero=zero if zeros is None else 0,
                 zeros=zeros is not None)  # fmt: skip


Read = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""(codes [outputs, inputs] int32, scales [outputs, groups], zeros [outputs, groups] uint8 or None)"""


def _groups(form: Int, share: Share) -> slice:
    """The share's groups of inputs."""
    return share.units(1, form.group, "a group") if form.group else slice(0, 1)


def _fields(words: torch.Tensor, bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """The fields of 32-bit words, lowest bits first (or in that order), in a new last dimension."""
    places = torch.tensor(order or range(32 // bits), dtype=torch.int32, device=words.device)
    return (words[..., None] >> (bits * places)) & ((1 << bits) - 1)


def _read_awq(reader: Reader, form: Int, share: Share, group: int) -> Read:
    """qweight [inputs, outputs / 8], qzeros and scales by [groups, …]."""
    at, rows, groups = share.module, share.units(0, 8, "a packed word"), _groups(form, share)
    order = [AWQ_ORDER.index(k) for k in range(8)]
    codes = _fields(reader.raw(f"{at}.qweight", share.columns, rows), 4, order).flatten(1).t()
    zeros = _fields(reader.raw(f"{at}.qzeros", groups, rows), 4, order).flatten(1).t().to(torch.uint8).contiguous()
    _check_shape(f"{at}.qweight", codes.shape, (len(share.range(0)), len(share.range(1))))
    return codes.contiguous(), reader.raw(f"{at}.scales", groups, share.rows).t(), zeros


def _read_gptq(reader: Reader, form: Int, share: Share, group: int) -> Read:
    """qweight [inputs / 8, outputs] (4 bits), qzeros [groups, outputs / 8] of z - 1, scales [groups, outputs]."""
    per_word = 32 // form.bits
    at, rows, groups = share.module, share.units(0, per_word, "a packed word"), _groups(form, share)
    _check_order(reader, form, share)
    words = reader.raw(f"{at}.qweight", share.units(1, per_word, "a packed word"), share.rows)
    codes = _fields(words, form.bits).transpose(1, 2).flatten(0, 1).t()
    _check_shape(f"{at}.qweight", codes.shape, (len(share.range(0)), len(share.range(1))))
    zeros = _fields(reader.raw(f"{at}.qzeros", groups, rows), form.bits).flatten(1).t()
    if form.layout == "gptq":
        zeros = (zeros + 1) & ((1 << form.bits) - 1)
    return codes.contiguous(), reader.raw(f"{at}.scales", groups, share.rows).t(), zeros.to(torch.uint8).contiguous()


def _check_order(reader: Reader, form: Int, share: Share) -> None:
    name = f"{share.module}.g_idx"
    if not reader.has(name):
        return
    group = form.group or share.shape[1]
    order = reader.raw(name).long()
    if not torch.equal(order, torch.arange(share.shape[1], device=order.device) // group):
        raise UnsupportedModelError(
            f"{name}: the inputs are in activation order (desc_act), which is not supported; take a checkpoint that "
            "was made with desc_act false"
        )


def _read_compressed(reader: Reader, form: Int, share: Share, group: int) -> Read:
    """weight_packed [outputs, inputs / 8] (4 bits), weight_scale [outputs, groups], zeros packed along the outputs."""
    per_word = 32 // form.bits
    at, groups = share.module, _groups(form, share)
    if reader.has(f"{at}.weight_g_idx"):
        raise UnsupportedModelError(f"{at}.weight_g_idx: activation order is not supported")
    reader.ignore(f"{at}.weight_shape")
    words = reader.raw(f"{at}.weight_packed", share.rows, share.units(1, per_word, "a packed word"))
    codes = _fields(words, form.bits).flatten(1)
    _check_shape(f"{at}.weight_packed", codes.shape, (len(share.range(0)), len(share.range(1))))
    scale = reader.raw(f"{at}.weight_scale", share.rows, groups)
    if form.symmetric:
        return codes, scale, None
    rows = share.units(0, per_word, "a packed word")
    zeros = _fields(reader.raw(f"{at}.weight_zero_point", rows, groups), form.bits).transpose(1, 2).flatten(0, 1)
    return codes, scale, zeros[: len(share.range(0))].to(torch.uint8).contiguous()
