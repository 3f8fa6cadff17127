"""Triton where there is one, and the two questions every public function asks before a launch.

Triton has no wheels for some platforms (Arm, macOS) that still run the CPU path, so this module stands in for the
few names that are evaluated when a kernel is *defined*; no kernel can be launched through the stand-in. With
TRITON_INTERPRET=1 in the environment before the first import, kernels run on CPU tensors through Triton's
interpreter: this is how tests without a GPU check the kernels themselves and not their references.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    tl: Any = SimpleNamespace(constexpr=lambda value=None: value)

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

__all__ = [
    "INTERPRETED",
    "Card",
    "Launcher",
    "card_name",
    "card_of",
    "dependent_launch",
    "is_card",
    "multiprocessors",
    "next_power_of_2",
    "on_card",
    "prefetch_lines",
    "prefetch_rows",
    "pretending",
    "require",
    "runs_kernels",
    "tl",
    "triton",
    "wait_for_inputs",
]


def is_card(device: torch.device) -> bool:
    """Whether it is a GPU; "meta", where tensors have no memory, stands for one that is not there (ahead.py)."""
    return device.type in ("cuda", "meta")


def on_card(tensor: torch.Tensor) -> bool:
    """See is_card."""
    return tensor.is_cuda or tensor.is_meta


def runs_kernels(tensor: torch.Tensor) -> bool:
    """Whether this tensor's operation goes to a Triton kernel (else to the PyTorch reference)."""
    return on_card(tensor) or (INTERPRETED and tensor.device.type == "cpu")


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds: the check of a public function's arguments."""
    if not condition:
        raise ValueError(message)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n < 1)."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True, slots=True)
class Card:
    """What kernels and their tiles are chosen by."""

    name: str
    """Tuned tables are filed under it."""
    multiprocessors: int
    capability: tuple[int, int]


_pretended: list[Card] = []


@contextmanager
def pretending(card: Card) -> Iterator[None]:
    """Within the block every device is taken for this card (ahead.py)."""
    _pretended.append(card)
    try:
        yield
    finally:
        _pretended.pop()


@cache
def _asked(device: torch.device) -> Card:
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.name, properties.multi_processor_count, (properties.major, properties.minor))


def card_of(device: torch.device) -> Card:
    """Of a GPU."""
    return _pretended[-1] if _pretended else _asked(device)


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; a small number under the interpreter, so that splits still happen."""
    return card_of(device).multiprocessors if is_card(device) else 4


def card_name(device: torch.device) -> str:
    """The name that tuned tables are filed under, "cpu" under the interpreter."""
    return card_of(device).name if is_card(device) else "cpu"


class Launcher:
    """A kernel of few programs that the host launches in every step, while the device waits for it.

    Triton finds a launch's variant anew each time, by its arguments' types and options, which takes several times what
    the launch does. Here a variant is the device and which of the tensors begin at a multiple of 16 bytes: the kernel's
    integers must be `do_not_specialize` and of 32 bits, and its tensors always of the same types. All but one may
    lie in pinned memory, which says nothing of the device.
    """

    def __init__(self, kernel: Any, constants: tuple[int, ...], **options: Any) -> None:
        """constants: the last arguments, all constexpr."""
        self._kernel, self._constants, self._options = kernel, constants, options
        self._compiled: dict[tuple[int, ...], Any] = {}

    def __call__(self, num_programs: int, tensors: tuple[torch.Tensor, ...], *numbers: int) -> None:
        """Launch it with the tensors, then the numbers."""
        device = max([tensor.get_device() for tensor in tensors])  # -1: of the host
        variant = (device, *[tensor.data_ptr() % 16 for tensor in tensors])
        compiled = self._compiled.get(variant)
        if compiled is not None:
            compiled[num_programs, 1, 1](*tensors, *numbers, *self._constants)
            return
        compiled = self._kernel[(num_programs,)](*tensors, *numbers, *self._constants, **self._options)
        if device >= 0 and compiled is not None:
            self._compiled[variant] = compiled


# Programmatic dependent launch (Hopper on): a kernel's programs start while the one before still runs, and do what
# needs none of its results: find their work, fetch weights into the cache. Every program waits before it writes and
# before it ends. So a kernel has ended only when all before it have, and whoever has waited may read what any of them
# wrote. (Decodes beside prompts write before they wait: nothing that prompts' attention reads, which is never early.)
#
# Most kernels wait *before* they let the next one start. Norms, activations, rotations, decodes' attention and what
# quantizes or reorders rows may do the opposite (early): the product after them then fetches its weights from the end
# of the product before them on. So several kernels may be under way at once. Before
# it waits a program may read
#
# - what no kernel of this step writes: weights, tables, and the step's own inputs (positions, lengths, slots). These
#   are complete before the step's first kernel starts: what brings them (unpack, a copy) ends before the next begins;
# - after a kernel that is not early, what those before *that* one wrote: it has waited for them (lora.py, after a
#   product).


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr):  # pyright: ignore[reportInvalidTypeForm]
    """From here on results of kernels before may be read, and the next one's programs may start (2: may already)."""
    if DEPENDENT == 2:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    elif DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_lines(pointers):
    """Fetch the cache lines of these addresses into L2. Only for kernels that were launched as dependent."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_rows(rows, first, end, EACH: tl.constexpr, LINES: tl.constexpr):  # pyright: ignore[reportInvalidTypeForm]
    """As prefetch_lines, of rows [n, 1] the LINES lines from place `first` on, of EACH numbers; none behind `end`."""
    line = tl.minimum(first + tl.arange(0, LINES) * EACH, end - 1)
    prefetch_lines(rows + line[None, :])


def dependent_launch(device: torch.device, *, rows: int = 0) -> dict[str, bool | int]:
    """A launch's options: whether the kernel may start before the one before it has ended.

    rows: how many a kernel between products makes, which is early where that pays. Of 2 to 63 rows it does not: their
    products are kernels of ours that hold much shared memory, so it seems that attention finds no room beside them (on
    an H200 a step takes 1 to 24 % more; of one row and from 64 on 1 % less).
    """
    if not is_card(device) or torch.version.hip or card_of(device).capability < (9, 0):
        return {"DEPENDENT": False}
    return {"DEPENDENT": 2 if rows == 1 or rows >= 64 else 1, "launch_pdl": True}
