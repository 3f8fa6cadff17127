"""Where a start's seconds go: phases one after another, for a line of the log and for a metric.

    API process   │ api ───────────────▶ starts the core                                  │ http ▶ ready
    core          │                      core ▶ imports ▶ device ▶ weights ▶ … ▶ token ──▶│

Both processes read the same clock (the machine's monotonic one), so the leader hands the moment at which it started the
core over with the orders, and the core's phases come back with `Ready`. Imports no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

PHASES = {
    "api": "the API process's interpreter and imports",
    "core": "the core's interpreter, until it has its orders",
    "imports": "torch, and the engine's own modules",
    "device": "the CUDA context",
    "weights": "reading the checkpoint",
    "kernels": "waiting for kernels to be compiled",
    "kv_pool": "a step of the largest size, to see what it takes, and the KV pool",
    "graphs": "the first step, and the capture of CUDA graphs",
    "host_memory": "pinning host memory for KV",
    "token": "the scheduler, and a token through the whole path",
    "http": "listening",
}
"""In their order; a phase that there was not (a device on the CPU) takes no time."""

Mark = Callable[[str], None]
"""The phase of that name ends now."""


def unmarked(phase: str) -> None:
    """A Mark of nobody's: of runners that are not part of a start."""


class Timeline:
    """The clock comes from outside."""

    def __init__(self, began_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._last_s, self._clock = began_s, clock
        self.phases: dict[str, float] = {}
        """Seconds of each that has ended."""

    def mark(self, phase: str) -> None:
        """The time since the last mark belongs to this phase, which ends now."""
        now = self._clock()
        self.phases[phase] = self.phases.get(phase, 0.0) + max(0.0, now - self._last_s)
        self._last_s = now


def of_server(core: Mapping[str, float], *, began_s: float, core_started_s: float, now: float) -> dict[str, float]:
    """All phases of an API process's start, those of its core between its own: seconds, none below 0.

    began_s, core_started_s, now: on the monotonic clock. began_s may be too late, where the system does not say it
    (`process_began_s`): then the start begins with the core's.
    """
    began_s = min(began_s, core_started_s)
    phases = {"api": core_started_s - began_s, **core}
    return phases | {"http": max(0.0, now - began_s - sum(phases.values()))}


def in_words(phases: Mapping[str, float]) -> str:
    """For the log."""
    parts = ", ".join(f"{phase} {phases[phase]:.1f}" for phase in PHASES if phase in phases)
    return f"started in {sum(phases.values()):.1f} s: {parts}"


def process_began_s() -> float:
    """When this process was started, on the monotonic clock; where the system does not say, now."""
    now = time.monotonic()
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return now
    return now - age_s if 0 <= age_s < 3600 else now
