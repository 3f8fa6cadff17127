"""Writers of quantized checkpoints, in the forms that the field's tools write, from a plain one in a folder.

Each returns the model that it stands for too: the plain tensors with every quantized matrix replaced by what its codes
mean, computed here and not by the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
FP8 = torch.float8_e4m3fn


def rewrite(source: Path, target: Path, config: dict[str, Any], write: Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]) -> Tensors:  # noqa: E501  # fmt: skip
    """Every projection of source through write(module, matrix) -> (its tensors, what they mean); the meaning of all."""
    target.mkdir(parents=True, exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    written: Tensors = {}
    meant: Tensors = {}
    for name, tensor in tensors.items():
        if "_proj.weight" not in name:
            written[name] = meant[name] = tensor
            continue
        module = name.removesuffix(".weight")
        parts, meant[name] = write(module, tensor)
        written |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(written, target / "model.safetensors")
    for file in source.glob("*.json"):
        (target / file.name).write_text(file.read_text())
    settings = json.loads((source / "config.json").read_text()) | {"quantization_config": config}
    (target / "config.json").write_text(json.dumps(settings))
    return meant


def to_codes(
    weight: torch.Tensor, bits: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes [out, in] int64, scales, zeros [out, groups], what they mean)."""
    out, num_in = weight.shape
    grouped = weight.view(out, -1, group)
    top = (1 << bits) - 1
    scale = ((grouped.amax(-1) - grouped.amin(-1)) / top).half()
    zero = (-grouped.amin(-1) / scale.float()).round().clamp(1, top)
    codes = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
    meant = (codes - zero[..., None]) * scale.float()[..., None]
    return codes.view(out, num_in).long(), scale, zero.long(), meant.view(out, num_in)


def packed(codes: torch.Tensor, bits: int, order: list[int] | None = None) -> torch.Tensor:
    """Neighbours in the last dimension into 32-bit words; order[k]: whose turn it is at bits `bits * k`."""
    per_word = 32 // bits
    parts = codes.view(*codes.shape[:-1], -1, per_word)[..., order or list(range(per_word))]
    words = (parts << (bits * torch.arange(per_word))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def awq(source: Path, target: Path, group: int = 32) -> Tensors:
    def write(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, scale, zero, meant = to_codes(weight, 4, group)
        return {
            "qweight": packed(codes.t().contiguous(), 4, AWQ_ORDER),
            "qzeros": packed(zero.t().contiguous(), 4, AWQ_ORDER),
            "scales": scale.t(),
        }, meant

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return rewrite(source, target, config, write)


def gptq(source: Path, target: Path, group: int = 32, bits: int = 4, order: str = "plain") -> Tensors:
    def write(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, scale, zero, meant = to_codes(weight, bits, group)
        index = torch.arange(weight.shape[1]) // group
        return {
            "qweight": packed(codes, bits).t(),
            "qzeros": packed((zero - 1).t().contiguous(), bits),
            "scales": scale.t(),
            "g_idx": (index if order == "plain" else index.flip(0)).to(torch.int32),
        }, meant

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "desc_act": order != "plain"}
    return rewrite(source, target, config, write)


def compressed_int(source: Path, target: Path, group: int = 32, bits: int = 4, *, symmetric: bool = True) -> Tensors:
    def write(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        if module.endswith("o_proj"):
            return {"weight": weight}, weight
        codes, scale, zero, meant = to_codes(weight, bits, group)
        parts = {
            "weight_packed": packed(codes, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        if symmetric:
            middle = 1 << (bits - 1)
            meant = (codes - middle).view(*scale.shape, -1) * scale.float()[..., None]
            return parts, meant.view_as(weight)
        return {**parts, "weight_zero_point": packed(zero.t().contiguous(), bits).t()}, meant

    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric}
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head", "re:.*o_proj$"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }  # fmt: skip
    return rewrite(source, target, config, write)


def compressed_fp8(
    source: Path, target: Path, strategy: str = "channel", cache: dict[str, Any] | None = None
) -> Tensors:
    def write(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        largest = weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().max()[None]
        scale = largest / 448
        codes = (weight / scale).to(FP8)
        extra = {} if strategy == "channel" else {"input_scale": torch.ones(1)}
        return {"weight": codes, "weight_scale": scale, **extra}, codes.float() * scale

    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    config = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "kv_cache_scheme": cache,
    }  # fmt: skip
    return rewrite(source, target, config, write)


def fp8_blocks(source: Path, target: Path) -> Tensors:
    def write(module: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        tall, wide = (-(-n // 128) for n in weight.shape)
        scale = torch.rand(tall, wide) + 0.5
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: weight.shape[0], : weight.shape[1]]
        codes = (weight / spread).to(FP8)
        return {"weight": codes, "weight_scale_inv": scale}, codes.float() * spread

    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return rewrite(source, target, config, write)


FORMS: dict[str, Callable[[Path, Path], Tensors]] = {
    "awq": awq,
    "gptq": gptq,
    "gptq 8 bits": lambda source, target: gptq(source, target, bits=8),
    "compressed int4": compressed_int,
    "compressed int4 zeros": lambda source, target: compressed_int(source, target, symmetric=False),
    "compressed int8": lambda source, target: compressed_int(source, target, bits=8),
    "compressed fp8": compressed_fp8,
    "compressed fp8 tensor": lambda source, target: compressed_fp8(source, target, "tensor"),
    "fp8 blocks": fp8_blocks,
}
