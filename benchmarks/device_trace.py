"""What the kernels of a profiled step add up to: torch.profiler's trace (kineto) read into shares of the device's time.

Kernels overlap: with programmatic dependent launch the next starts while the last still runs, and waits. So a kernel's
duration says little. Here the time line is cut at the ends of kernels:

    kernel A  ├───────────────┤
    kernel B            ├─────────────┤                  to A: until its end; to B: from there to its own end;
    kernel C                               ├─────┤       the hole between B and C is a gap, named by what follows it
              ··· A ··········|··· B ··|gap|· C ·|       shares and gaps add up to the whole time exactly

A captured graph tells no shapes, so which matrix a product is of follows from what ran before it: after attention the
output projection, after a norm query, key and value or gate and up, in turn. Pure: nothing here needs a device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GROUPS: tuple[tuple[str, str], ...] = (
    ("decode attention", r"^_(hopper_)?decode_kernel"),
    ("prefill attention", r"^_prefill_kernel|^_hopper_(fp8_)?kernel|^_transpose_values_kernel"),
    ("norm", r"rms_norm"),
    ("rotation, KV write", r"^_rope_write"),
    ("activation", r"^_gated_kernel|^_silu"),
    ("experts", r"^_(route|group|grouped|pair_up|down_sum|sum|split|product|widen(_tables)?)_kernel"),
    ("adapters", r"^_(down|up)_kernel"),
    ("sampling", r"^_chunk_kernel|^_argmax|^_draw|^_penalize|^_best_of|^_note_kernel|^_send_kernel"),
    ("inputs", r"^_resolve|^_unpack|[Mm]em(cpy|set)|gather|index|embedding"),
    ("quantizing rows", r"^_quantize"),
    ("linear", r"nvjet|gemm|gemv|cutlass|splitK|linear|^_rows?_|^_few|^_nibbles|^_spread|^_dequantize"),
)
"""The first pattern found in a kernel's name says its group; none: other."""
ROLES = {"attention": "output", "activation": "down"}
"""Which matrix the product after such a kernel is of."""


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    start_us: float
    end_us: float
    stream: int = 0
    grid: tuple[int, ...] = ()


@dataclass(slots=True)
class Share:
    """Of one group of kernels, over all steps of a trace."""

    launches: int = 0
    own_us: float = 0.0
    """Of the time line, cut at the ends of kernels."""
    duration_us: float = 0.0
    """From start to end, overlaps counted twice."""
    gap_us: float = 0.0
    """Holes right before these kernels."""
    by_name: dict[str, float] = field(default_factory=dict[str, float])
    """Kernel (with its grid): share of own_us."""

    @property
    def main_kernel(self) -> str:
        return max(self.by_name, key=lambda name: self.by_name[name], default="")


def read(path: Path) -> list[Kernel]:
    """The kernels, copies and fills of a trace in Chrome's format, by their start."""
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    found = [
        Kernel(
            event["name"],
            event["ts"],
            event["ts"] + event["dur"],
            event["args"].get("stream", 0),
            tuple(event["args"].get("grid", ())),
        )
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(found, key=lambda kernel: kernel.start_us)


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), "other")


def labels(kernels: Iterable[Kernel]) -> list[str]:
    """Of each kernel its group, a linear's with the matrix: 'linear qkv', 'linear gate_up' …, 'linear head'."""
    named: list[str] = []
    role, after_norm = "qkv", list[int]()
    for kernel in kernels:
        group = group_of(kernel.name)
        if group == "linear":
            if named and named[-1] == "linear gate_up" and "splitKreduce" not in kernel.name:
                role = "down"  # no activation between: it was part of the product
            after_norm.append(len(named))
            group = f"linear {role}"
        elif group == "norm":
            role, after_norm = "gate_up" if role == "output" else "qkv", []
        elif group == "rotation, KV write":
            after_norm = []
        elif group == "sampling":
            for index in after_norm:  # a norm and a product, and no layer after that: the head
                named[index] = "linear head"
            role, after_norm = "qkv", []
        else:
            role = ROLES.get(group.rpartition(" ")[2], role)
        named.append(group)
    return named


def exclusive(kernels: Iterable[Kernel]) -> Iterator[tuple[float, float]]:
    """(own time, gap before it) of each kernel, in microseconds; see the head of this file."""
    reached: float | None = None
    for kernel in kernels:
        begin = kernel.start_us if reached is None else max(reached, kernel.start_us)
        gap = 0.0 if reached is None else max(0.0, kernel.start_us - reached)
        yield max(0.0, kernel.end_us - begin), gap
        reached = kernel.end_us if reached is None else max(reached, kernel.end_us)


def shares(kernels: list[Kernel]) -> dict[str, Share]:
    """By label (`labels`)."""
    table: dict[str, Share] = {}
    for kernel, label, (own, gap) in zip(kernels, labels(kernels), exclusive(kernels), strict=True):
        share = table.setdefault(label, Share())
        share.launches += 1
        share.own_us += own
        share.gap_us += gap
        share.duration_us += kernel.end_us - kernel.start_us
        shown = f"{kernel.name[:80]} {list(kernel.grid)}"
        share.by_name[shown] = share.by_name.get(shown, 0.0) + own
    return table
