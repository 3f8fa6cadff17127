"""LoRA adapters on one base model: read from PEFT's files, kept on the device in slots, added row by row.

Every matrix that an adapter may change is a `Site`: all slots' two factors in one tensor each, so that one kernel
serves a batch of many adapters (`mainsail_kernels.lora`). The scale, alpha / rank, is multiplied into the second factor
when a slot is filled; what an adapter leaves alone is zero there, and so are the ranks that it does not have.

With several ranks an adapter is split as its matrix is: by outputs (the second factor's rows), or by inputs (the first
factor's columns), where the sum over the ranks joins the parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from mainsail_engine.errors import InvalidAdapterError
from mainsail_engine.model.architecture import Architecture
from mainsail_engine.model.parallel import Parallel
from mainsail_engine.model.sources import ALL
from mainsail_kernels.lora import add_lora

SITES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The parts of each site, as they lie in the model's own matrices."""
_FUSED = {"self_attn.qkv_proj": SITES["qkv"], "mlp.gate_up_proj": SITES["gate_up"]}
"""Matrices that some checkpoints, and so their adapters, have in one piece."""
_NAME = re.compile(
    r"^base_model\.model\.(?:.*\.)?layers\.(\d+)\.([a-z_]+\.[a-z_]+)\.lora_([AB])(?:\.default)?\.weight$"
)


class Factors(NamedTuple):
    """What an adapter adds to a matrix: up @ down, the scale in it."""

    down: torch.Tensor
    """[rank, inputs]."""
    up: torch.Tensor
    """[outputs, rank]."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on the CPU, whole."""

    rank: int
    factors: dict[tuple[int, str], Factors]
    """By layer and module, such as (0, "self_attn.q_proj")."""


@dataclass(slots=True)
class AdapterRows:
    """Which rows of a step go through which adapter: the tiles of `mainsail_kernels.lora.add_lora`."""

    rows: torch.Tensor
    slots: torch.Tensor

    def add(self, y: torch.Tensor, x: torch.Tensor, site: Site) -> None:
        """To y, what x [num_tokens, inputs] becomes through each row's adapter."""
        add_lora(y, x, site.down, site.up, site.parts, self.rows, self.slots)


@dataclass(slots=True)
class Site:
    down: torch.Tensor
    """[num_slots, len(parts) * rank, inputs]."""
    up: torch.Tensor
    """[num_slots, outputs, rank]."""
    parts: tuple[int, ...]
    """Outputs of each part on this rank."""


class Shape(NamedTuple):
    """A module's matrix, and which part of it this rank has."""

    outputs: int
    inputs: int
    rows: slice = ALL
    columns: slice = ALL

    @property
    def ours(self) -> tuple[int, int]:
        return len(range(*self.rows.indices(self.outputs))), len(range(*self.columns.indices(self.inputs)))


class AdapterSlots:
    """Room for `num_slots` adapters of at most `rank` on this device, in every layer."""

    def __init__(
        self,
        a: Architecture,
        parallel: Parallel,
        *,
        num_slots: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._rank, self._residual_scale, self._num_layers = rank, a.residual_scale, a.num_layers
        self._ours = parallel.layers(a)
        self.shapes = module_shapes(a, parallel)
        wanted = {name: parts for name, parts in SITES.items() if parts[0] in self.shapes}

        def site(parts: Sequence[str]) -> Site:
            ours = [self.shapes[part].ours for part in parts]
            outputs = tuple(size for size, _ in ours)
            down = torch.zeros((num_slots, len(parts) * rank, ours[0][1]), dtype=dtype, device=device)
            return Site(down, torch.zeros((num_slots, sum(outputs), rank), dtype=dtype, device=device), outputs)

        self.layers = [{name: site(parts) for name, parts in wanted.items()} for _ in self._ours]

    def check(self, adapter: Adapter, name: str) -> None:
        """Raises InvalidAdapterError when it does not fit this model or these slots."""
        if adapter.rank > self._rank:
            raise InvalidAdapterError(f"adapter {name!r} has rank {adapter.rank}; --max-lora-rank is {self._rank}")
        for (layer, module), factors in adapter.factors.items():
            shape = self.shapes.get(module)
            if shape is None or layer >= self._num_layers:
                known = ", ".join(self.shapes)
                raise InvalidAdapterError(
                    f"adapter {name!r} changes layers.{layer}.{module}; {self._num_layers} layers may change: {known}"
                )
            given = (factors.up.shape[0], factors.down.shape[1])
            if given != (shape.outputs, shape.inputs):
                raise InvalidAdapterError(
                    f"adapter {name!r}: layers.{layer}.{module} is for a matrix {list(given)}, "
                    f"the model's is {[shape.outputs, shape.inputs]}"
                )

    def fill(self, slot: int, adapter: Adapter) -> None:
        """Put a checked adapter into a slot that no request uses."""
        for index, sites in zip(self._ours, self.layers, strict=True):
            for name, site in sites.items():
                site.down[slot].zero_()
                site.up[slot].zero_()
                first = 0
                for part, module in enumerate(SITES[name]):
                    factors, size = adapter.factors.get((index, module)), site.parts[part]
                    if factors is not None:
                        self._copy(site, slot, part, first, self.shapes[module], factors)
                    first += size

    def _copy(self, site: Site, slot: int, part: int, first: int, shape: Shape, factors: Factors) -> None:
        rank, below = factors.down.shape[0], part * self._rank
        scale = self._residual_scale if len(site.parts) == 1 else 1.0  # in the model's own output matrices too
        site.down[slot, below : below + rank].copy_(factors.down[:, shape.columns])
        site.up[slot, first : first + site.parts[part], :rank].copy_(factors.up[shape.rows] * scale)


def module_shapes(a: Architecture, parallel: Parallel) -> dict[str, Shape]:
    """What may be adapted in every layer; the experts of a mixture may not."""
    hidden, wide, narrow = a.hidden_size, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    heads, kv = parallel.part(wide), parallel.kv_heads(a.num_kv_heads)
    kv_rows = slice(kv.start * a.head_dim, kv.stop * a.head_dim)
    shapes = {
        "self_attn.q_proj": Shape(wide, hidden, rows=heads),
        "self_attn.k_proj": Shape(narrow, hidden, rows=kv_rows),
        "self_attn.v_proj": Shape(narrow, hidden, rows=kv_rows),
        "self_attn.o_proj": Shape(hidden, wide, columns=heads),
    }
    if a.experts is None:
        channels = parallel.part(a.intermediate_size)
        shapes |= {
            "mlp.gate_proj": Shape(a.intermediate_size, hidden, rows=channels),
            "mlp.up_proj": Shape(a.intermediate_size, hidden, rows=channels),
            "mlp.down_proj": Shape(hidden, a.intermediate_size, columns=channels),
        }
    return shapes


def read_adapter(path: Path, name: str, a: Architecture) -> Adapter:
    """A folder with adapter_config.json and adapter_model.safetensors. Raises InvalidAdapterError."""
    from safetensors import torch as safetensors

    config, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    missing = [file.name for file in (config, weights) if not file.is_file()]
    if missing:
        raise InvalidAdapterError(f"adapter {name!r}: {path} has no {' and no '.join(missing)}")
    try:
        settings = json.loads(config.read_text())
        tensors: dict[str, torch.Tensor] = cast(Any, safetensors).load_file(weights)
    except Exception as error:
        raise InvalidAdapterError(f"adapter {name!r}: {path} is damaged or cut off ({error})") from error
    _check_settings(settings, name)
    factors: dict[tuple[int, str], Factors] = {}
    for (layer, module), (down, up) in _pairs(tensors, name).items():
        up = up.float() * _scale(settings, down.shape[0])
        for part, rows in _split(module, a):
            factors[layer, part] = Factors(down, up[rows])
    return Adapter(max(pair.down.shape[0] for pair in factors.values()), factors)


def _check_settings(settings: dict[str, Any], name: str) -> None:
    for key, plain in (
        ("peft_type", "LORA"), ("use_dora", False), ("bias", "none"), ("fan_in_fan_out", False),
        ("modules_to_save", None), ("alpha_pattern", None), ("trainable_token_indices", None),
    ):  # fmt: skip
        value = settings.get(key)
        if value and value != plain:
            raise InvalidAdapterError(f"adapter {name!r}: {key} {value!r} in adapter_config.json is not supported")


def _scale(settings: dict[str, Any], rank: int) -> float:
    """alpha / rank; rank-stabilized adapters (Kalajdzievski, 2023) divide by its root."""
    alpha = float(settings.get("lora_alpha") or rank)
    return alpha / rank**0.5 if settings.get("use_rslora") else alpha / rank


def _pairs(tensors: dict[str, torch.Tensor], name: str) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
    """(layer, module) → both factors of every matrix that the file changes."""
    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _NAME.match(key)
        if match is None or tensor.dim() != 2:
            raise InvalidAdapterError(f"adapter {name!r} has the tensor {key}, which is no factor of a layer's matrix")
        found.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
    for (layer, module), pair in found.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise InvalidAdapterError(
                f"adapter {name!r}: the factors of layers.{layer}.{module} do not belong together"
            )
    if not found:
        raise InvalidAdapterError(f"adapter {name!r} has no tensors")
    return {key: (pair["A"], pair["B"]) for key, pair in found.items()}


def _split(module: str, a: Architecture) -> list[tuple[str, slice]]:
    """The modules that this one is in our files, each with its rows."""
    if module not in _FUSED:
        return [(module, ALL)]
    wide, narrow = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    sizes = (wide, narrow, narrow) if module == "self_attn.qkv_proj" else (a.intermediate_size,) * 2
    parts: list[tuple[str, slice]] = []
    first = 0
    for part, size in zip(_FUSED[module], sizes, strict=True):
        parts.append((part, slice(first, first + size)))
        first += size
    return parts
