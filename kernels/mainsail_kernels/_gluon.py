"""Gluon where there is one: the language below Triton, for kernels that name layouts, barriers and roles of warps.

It comes with Triton, and some of its names have changed from version to version: this module has one for each. It has
no interpreter, so what is written in it is tested on the card alone, and every such kernel stands beside a Triton one
that serves where `runs_gluon` says no.
"""

# A kernel's constants are annotated with a name that Gluon may lack: no type form to a checker.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from mainsail_kernels._triton import card_of, is_card

__all__ = [
    "gl",
    "gluon",
    "group_barrier",
    "hopper",
    "load_tile",
    "mbarrier",
    "reshaped",
    "runs_gluon",
    "tiled",
    "wait_for_inputs",
    "wait_for_kernel_before",
]


def _define_only(fn: Any = None, **_: Any) -> Any:
    return _define_only if fn is None else fn


# Any: no checker can follow a launch, or names that differ between versions.
gluon: Any = SimpleNamespace(jit=_define_only)
gl: Any = SimpleNamespace(constexpr=lambda value=None: value)
hopper: Any = None
mbarrier: Any = None
TensorDescriptor: Any = None
group_barrier: Any = None
"""The threads of one partition wait for one another."""
load_tile: Any = None
"""(descriptor, coordinates, barrier, target): queue a copy of the copy engine."""
AVAILABLE = False
try:
    gluon = import_module("triton.experimental.gluon")
    gl = import_module("triton.experimental.gluon.language")
    hopper = import_module("triton.experimental.gluon.language.nvidia.hopper")
    TensorDescriptor = import_module("triton.experimental.gluon.nvidia.hopper").TensorDescriptor
    mbarrier = hopper.mbarrier
    group_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
    load_tile = hopper.tma.async_load if hasattr(hopper.tma, "async_load") else hopper.tma.async_copy_global_to_shared
    AVAILABLE = hasattr(gl, "warp_specialize")
except (ImportError, AttributeError):  # no Triton here, or one without Gluon: definitions only
    gluon, gl = SimpleNamespace(jit=_define_only), SimpleNamespace(constexpr=lambda value=None: value)
RENAMED = gl.constexpr(AVAILABLE and hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def reshaped(tiles, SHAPE: gl.constexpr, SHARED: gl.constexpr):
    """The same shared memory in another shape and layout."""
    return tiles.reinterpret(tiles.dtype, SHAPE, SHARED) if RENAMED else tiles._reinterpret(tiles.dtype, SHAPE, SHARED)


@gluon.jit
def wait_for_kernel_before(DEPENDENT: gl.constexpr):
    """From here on its results may be read."""
    if DEPENDENT:
        gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_inputs(DEPENDENT: gl.constexpr):
    """As _triton's: the same, and the next kernel's programs may start."""
    if DEPENDENT:
        wait_for_kernel_before(DEPENDENT)
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )


def runs_gluon(device: torch.device) -> bool:
    """Whether kernels in Gluon run there: they are for Hopper."""
    return AVAILABLE and is_card(device) and torch.version.hip is None and card_of(device).capability == (9, 0)


def tiled(matrix: torch.Tensor, rows: int) -> object:
    """A matrix of numbers of one or two bytes for the copy engine, which brings tiles of so many rows, and of as many
    columns as have 128 bytes (or all there are)."""
    size = matrix.element_size()
    columns = min(matrix.shape[1], 128 // size)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=columns * size, element_bitwidth=8 * size, rank=2)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)
