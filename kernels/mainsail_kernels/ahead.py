"""Kernels compiled before they are launched, on all cores, also where there is no card: while an image is built.

    with noted(card) as launches:         every kernel[grid](…) within is noted, and none is launched
        model.forward(tensors on "meta" …)
    compile_all(launches, jobs)           into Triton's cache, which the engine then finds filled

Triton finds a compiled kernel by a hash of its source, its arguments' types and what it assumes of them (integers and
addresses divisible by 16), its constants, the options of the launch, the architecture and its own version. All of that
follows from shapes, so tensors without memory do: those of torch's "meta" device, whose addresses count from 0.

Compiling takes 0.1 to 1 s a kernel, and most of it holds Python's lock: so it is processes that share the work. They
are forked off one that has not touched a card, and return nothing but what they failed at.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mainsail_kernels._triton import Card, pretending, triton

log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1
"""Of Linux: a signal for when the parent ends."""
_work: list[Launch] = []
"""What the forked processes compile: they get no more than a number in this list."""
_DRIVER = re.compile(r"\bcu[A-Z]\w+")
"""Functions of the driver."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel in one of its variants, as `triton.compile` takes it."""

    function: Any
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    target: Any

    @property
    def name(self) -> str:
        return str(self.function.__name__)


@dataclass(slots=True)
class Compiled:
    """What came of it."""

    num_kernels: int
    seconds: float
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Kernels that could not be compiled, and why: they will be tried again when they are launched."""


class _AbsentDriver:
    """Triton's driver for a card that is not there: enough of one to find out what a launch would compile."""

    def __init__(self, card: Card) -> None:
        from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingTypeStubs]

        major, minor = card.capability
        self._target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


@contextmanager
def noted(card: Card) -> Iterator[list[Launch]]:
    """Launches within the block, each variant once, for that card. In a process that never launches anything."""
    from triton.runtime.driver import driver  # pyright: ignore[reportMissingTypeStubs]
    from triton.runtime.jit import JITFunction  # pyright: ignore[reportMissingTypeStubs]

    jit: Any = JITFunction
    launches: list[Launch] = []
    seen: set[tuple[int, Any]] = set()
    target = _AbsentDriver(card).get_current_target()

    def note(
        function: Any,
        key: Any,
        signature: Any,
        device: Any,
        constants: Any,
        options: Any,
        attributes: Any,
        warmup: bool,
    ) -> None:
        del device, warmup
        if (id(function), key) not in seen:
            seen.add((id(function), key))
            launches.append(Launch(function, signature, constants, attributes, dict(options.__dict__), target))

    original = jit._do_compile
    active: Any = driver
    active.set_active(_AbsentDriver(card))
    jit._do_compile = note
    try:
        with pretending(card):
            yield launches
    finally:
        jit._do_compile = original


def compile_all(launches: Sequence[Launch], jobs: int | None = None) -> Compiled:
    """Compile what is not in Triton's cache yet, with so many processes (None: one for each core)."""
    global _work
    began_s = time.monotonic()
    _work = sorted(launches, key=lambda launch: not _is_gluon(launch))  # they take longest
    with tempfile.TemporaryDirectory() as folder:
        _link_without_driver(Path(folder))
        failed = _shared(max(1, min(jobs or os.cpu_count() or 1, len(launches))))
    return Compiled(len(launches), time.monotonic() - began_s, failed)


def _shared(jobs: int) -> dict[str, str]:
    """What of the work could not be compiled, and why."""
    failed: dict[str, str] = {}
    num_done = -1  # the first is what Triton asks the driver through
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, fork, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        try:
            for outcome in pool.map(_compile, range(-1, len(_work))):
                num_done += 1
                failed |= {outcome[0]: outcome[1]} if outcome else {}
        except BrokenProcessPool:
            why = f"one of {jobs} processes was killed, perhaps for the memory that they took: try fewer (--jobs)"
            failed |= {launch.name: why for launch in _work[max(num_done, 0) :]}
    return failed


def _end_with(parent: int) -> None:
    """A process that compiles is of no use when the one that gave it work is gone, however that was ended."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(OSError, AttributeError):  # another system
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _is_gluon(launch: Launch) -> bool:
    return bool(getattr(launch.function, "is_gluon", lambda: False)())


def _compile(number: int) -> tuple[str, str] | None:
    if number < 0:
        _build_utilities()
        return None
    launch = _work[number]
    try:
        source = launch.function.ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
        kernel = triton.compile(source, target=launch.target, options=launch.options)
        _build_launcher(source, kernel.metadata)
    except Exception as error:
        return launch.name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _build_utilities() -> None:
    """What Triton asks the driver through, in C."""
    from triton.backends.nvidia import driver as nvidia  # pyright: ignore[reportMissingTypeStubs]

    with suppress(ImportError):  # built, and cannot be loaded without a driver
        nvidia.CudaUtils()


def _build_launcher(source: Any, metadata: Any) -> None:
    """The piece of C that passes a kernel's arguments on; some versions of Triton have one for each signature."""
    from triton.backends.nvidia import driver as nvidia  # pyright: ignore[reportMissingTypeStubs]

    launcher: Any = nvidia.CudaLauncher
    with suppress(ImportError, AttributeError):  # built, and cannot be loaded without a driver; or needs none
        launcher(source, metadata)


def _link_without_driver(folder: Path) -> None:
    """Where no driver is installed, launchers are linked against a library with its name and its functions' names.

    Of a library that has nothing they use, linkers leave no trace (--as-needed), and then a launcher does not find the
    driver's functions where there is a driver.
    """
    from triton.backends.nvidia import driver as nvidia  # pyright: ignore[reportMissingTypeStubs]

    try:
        nvidia.library_dirs()
    except (AssertionError, OSError, subprocess.CalledProcessError):
        sources = Path(str(nvidia.__file__)).parent
        used = {name for file in ("driver.c", "driver.py") for name in _DRIVER.findall((sources / file).read_text())}
        code = "".join(f"void {name}(void) {{}}\n" for name in sorted(used))
        library = folder / "libcuda.so.1"
        command = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library]
        subprocess.run([*command, "-x", "c", "-"], input=code.encode(), check=True)
        triton.knobs.nvidia.libcuda_path = str(folder)
