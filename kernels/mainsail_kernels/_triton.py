"""Triton where there is one, and the two questions every public function asks before a launch.

Triton has no wheels for some platforms (Arm, macOS) that still run the CPU path, so this module stands in for the
few names that are evaluated when a kernel is *defined*; no kernel can be launched through the stand-in. With
TRITON_INTERPRET=1 in the environment before the first import, kernels run on CPU tensors through Triton's
interpreter: this is how tests without a GPU check the kernels themselves and not their references.
"""

import os
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

# Any: no checker can follow a launch, kernel[grid](…), which takes the kernel's arguments and the launch's options.
triton: Any
try:
    triton = import_module("triton")
    import triton.language as tl
except ImportError:  # no wheel here: definitions only

    def _define_only(fn: Any = None, **_: Any) -> Any:
        return _define_only if fn is None else fn

    triton = SimpleNamespace(jit=_define_only, __version__="none")
    tl: Any = SimpleNamespace(constexpr=object)

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

__all__ = ["INTERPRETED", "card_name", "multiprocessors", "next_power_of_2", "require", "runs_kernels", "tl", "triton"]


def runs_kernels(tensor: torch.Tensor) -> bool:
    """Whether this tensor's operation goes to a Triton kernel (else to the PyTorch reference)."""
    return tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds: the check of a public function's arguments."""
    if not condition:
        raise ValueError(message)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n < 1)."""
    return 1 << max(n - 1, 0).bit_length()


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; a small number under the interpreter, so that splits still happen."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def card_name(device: torch.device) -> str:
    """The name that tuned tables are filed under, "cpu" under the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
